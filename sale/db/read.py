"""Reads campaigns in PostgreSQL: positions, events, orders, the audit log."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec

from sale.db import queries
from sale.db.pool import Connection
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.clock import from_ms, parse_moment, rfc3339, to_ms
from sale.domain.order import GIVEN_BACK, VALID, OrderCursor, OrderState
from sale.ledger.chain import START, Event, Position
from sale.ledger.fold import CampaignState, OrderRecord


class OrderRow(msgspec.Struct, frozen=True):
    """An order as PostgreSQL has it. ``card_remaining`` is what the card may still buy.

    ``payment`` and ``cancel_until`` are the campaign's; ``pay_before_ms`` is 0 where it never held.
    """

    campaign_id: str
    member_no: int
    showing_id: str
    price_fen: int
    payment: str
    cancel_until: str | None
    pay_before_ms: int
    card_remaining: int
    record: OrderRecord

    @property
    def cursor(self) -> OrderCursor:
        """Cursor of the page that goes on after this order."""
        return OrderCursor(self.record.at_ms, self.campaign_id, self.record.seq)


class AuditRow(msgspec.Struct, frozen=True):
    """One line of the audit log."""

    id: int
    at_ms: int
    actor: str
    action: str
    target: str
    campaign_id: str | None
    reason: str | None
    data: dict[str, Any]


class GoneDraft(NamedTuple):
    """A draft that was deleted, as it was then; ``tickets`` by showing number."""

    config: dict[str, Any]
    tickets: list[int]
    seq: int
    epoch: int
    at_ms: int


class ShowingRow(msgspec.Struct, frozen=True):
    """A showing with its stock and the tickets in live orders."""

    showing_no: int
    showing_id: str
    title: str
    stock: int
    live: int


class CampaignRow(msgspec.Struct, frozen=True):
    """A campaign as far as it is applied; ``config`` is that of its ``created`` event."""

    campaign_id: str
    config: dict[str, Any]
    state: str
    opens_at_ms: int | None
    closes_at_ms: int | None
    price_fen: int
    card_limit: int
    epoch: int
    applied: int
    chain: str
    showings: list[ShowingRow]


async def position(conn: Connection, campaign_id: str) -> Position:
    """How far a campaign is applied; START where nothing is."""
    row = await conn.fetchrow(_SQL["position"], campaign_id)
    return START if row is None else Position(row["applied"], row["chain"])


async def positions(conn: Connection) -> dict[str, Position]:
    """How far every campaign is applied, by campaign ID."""
    rows = await conn.fetch(_SQL["positions"])
    return {row["campaign_id"]: Position(row["applied"], row["chain"]) for row in rows}


async def state(conn: Connection, campaign_id: str) -> str | None:
    """A campaign's state as far as it is applied, or None where there is none."""
    if not CAMPAIGN_ID.fullmatch(campaign_id):
        return None  # a client's text may hold a character that PostgreSQL refuses (NUL)
    found: str | None = await conn.fetchval(_SQL["state"], campaign_id)
    return found


async def living(conn: Connection) -> list[str]:
    """IDs of the campaigns that have events and are not deleted drafts, sorted."""
    return [row["campaign_id"] for row in await conn.fetch(_SQL["living"])]


async def orders_of_member(
    conn: Connection, member_no: int, *, before: OrderCursor | None = None, limit: int = 50
) -> list[OrderRow]:
    """A member's orders, newest first, at most ``limit``; ``before`` is the last one's cursor."""
    at = None if before is None else from_ms(before.created_at_ms)
    campaign_id, seq = (None, None) if before is None else (before.campaign_id, before.seq)
    rows = await conn.fetch(_SQL["orders_of_member"], member_no, at, campaign_id, seq, limit)
    return [_order(row) for row in rows]


async def order(conn: Connection, campaign_id: str, seq: int) -> OrderRow | None:
    """The order that event ``seq`` made, or None. The caller checks its member."""
    row = await conn.fetchrow(_SQL["one_order"], campaign_id, seq)
    return None if row is None else _order(row)


async def audit_log(
    conn: Connection,
    *,
    limit: int = 50,
    before_id: int | None = None,
    campaign: str | None = None,
    union: str | None = None,
) -> list[AuditRow]:
    """A page of the audit log, newest first; ``before_id`` is the last row's ID.

    With a ``union``, only what its accounts may see.
    """
    if union is None:
        query = "audit_log" if campaign is None else "audit_log_of_campaign"
    else:
        query = "audit_log_of_union" if campaign is None else "audit_log_of_union_and_campaign"
    narrowed = [each for each in (union, campaign) if each is not None]
    rows = await conn.fetch(_SQL[query], before_id, limit, *narrowed)
    return [
        AuditRow(
            id=row["id"],
            at_ms=to_ms(row["at"]),
            actor=row["actor"],
            action=row["action"],
            target=row["target"],
            campaign_id=row["campaign_id"],
            reason=row["reason"],
            data=msgspec.json.decode(row["data"]),
        )
        for row in rows
    ]


async def events(
    conn: Connection, campaign_id: str, after: int, limit: int, *, timeout_s: float | None = None
) -> list[Event]:
    """The ledger of a campaign after an event number, in order, at most ``limit`` events."""
    rows = await conn.fetch(_SQL["events"], campaign_id, after, limit, timeout=timeout_s)
    return [_event(row) for row in rows]


async def gone_draft(conn: Connection, campaign_id: str, seq: int) -> GoneDraft | None:
    """The draft that event ``seq`` was of, as it was deleted; None where its end is not there."""
    draft = CampaignState()
    for row in await conn.fetch(_SQL["draft_events"], campaign_id, seq):
        event = _event(row)
        draft.seq = event.seq - 1
        draft.apply(event)
    if draft.state != "deleted":
        return None
    return GoneDraft(
        draft.config, list(draft.tickets.values()), event.seq, event.epoch, event.at_ms
    )


async def campaigns(conn: Connection) -> list[CampaignRow]:
    """Every campaign that has events, deleted drafts too, by ID."""
    rows = await conn.fetch(_SQL["campaigns"])
    return [
        CampaignRow(
            campaign_id=row["campaign_id"],
            config=msgspec.json.decode(row["config"]),
            state=row["state"],
            opens_at_ms=_ms(row["opens_at"]),
            closes_at_ms=_ms(row["closes_at"]),
            price_fen=row["price_fen"],
            card_limit=row["card_limit"],
            epoch=row["epoch"],
            applied=row["applied"],
            chain=row["chain"],
            showings=_SHOWINGS.decode(row["showings"]),
        )
        for row in rows
    ]


_SHOWINGS: Final = msgspec.json.Decoder(list[ShowingRow])
_SQL: Final = queries.load("read")


def _ms(moment: datetime | None) -> int | None:
    return None if moment is None else to_ms(moment)


def _order(row: Mapping[str, Any]) -> OrderRow:
    until = row["cancel_until"]
    return OrderRow(
        campaign_id=row["campaign_id"],
        member_no=row["member_no"],
        showing_id=row["showing_id"],
        price_fen=row["price_fen"],
        payment=row["payment"],
        cancel_until=None if until is None else rfc3339(to_ms(parse_moment(until))),
        pay_before_ms=_ms(row["pay_before"]) or 0,
        card_remaining=row["card_remaining"],
        record=OrderRecord(
            seq=row["seq"],
            at_ms=to_ms(row["created_at"]),
            showing=row["showing_no"],
            quantity=row["quantity"],
            key_hash=row["key_hash"],
            live=row["live"],
            state=OrderState(row["state"]),
            letters="".join(
                GIVEN_BACK if no in row["given_back"] else VALID
                for no in range(1, row["quantity"] + 1)
            ),
            changed=row["changed_by"],
            paid=row["paid"],
            returned=row["returned"],
        ),
    )


def _event(row: Mapping[str, Any]) -> Event:
    data = row["data"]
    return Event(
        seq=row["seq"],
        at_ms=to_ms(row["at"]),
        epoch=row["epoch"],
        kind=row["kind"],
        member_no=row["member_no"],
        showing=row["showing_no"],
        quantity=row["quantity"],
        key_hash=row["key_hash"],
        price_fen=row["price_fen"],
        pay_before=_ms(row["pay_before"]),
        order=row["order_seq"],
        data=msgspec.json.decode(data) if data else {},
    )
