"""Orders: how one is worded, and how a card reads its own.

An order is readable from the moment of its 201: what the writer has not applied yet is read from
the card's record in Redis, everything else from PostgreSQL.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.domain import (
    Campaign,
    Order,
    Problem,
    Refused,
    Ticket,
    order_number,
    parse_order_number,
    rfc3339,
)
from sale.events import SaleRecord
from sale.stock.catalogue import Catalogue, read_card

CODE_BYTES: Final = 16
CONFIRMED: Final = "confirmed"


class TicketCodes:
    """Ticket codes: 128 bits of a keyed hash of the order and the ticket's number.

    Nobody can guess one without the deployment's secret, none is stored, and a replay gives the
    same again (``HOLES.md`` row 18: codes made from the clock).
    """

    def __init__(self, secret: bytes) -> None:
        self._keyed = hashlib.blake2b(key=secret, digest_size=CODE_BYTES)

    def of(self, order_no: str, quantity: int) -> list[Ticket]:
        """Give the tickets of an order. Copying a keyed state costs a third of an HMAC."""
        tickets = []
        for no in range(1, quantity + 1):
            code = self._keyed.copy()
            code.update(f"{order_no}/{no}".encode())
            tickets.append(Ticket(no, code.hexdigest()))
        return tickets


def key_hash(idempotency_key: str) -> str:
    """Hash under which a key is kept: 16 hex digits, and 64 bits are ample for one card's keys."""
    return hashlib.blake2b(idempotency_key.encode(), digest_size=8).hexdigest()


def live_tickets(records: Sequence[SaleRecord]) -> int:
    """Tickets that count towards the card's limit."""
    return sum(record.quantity for record in records)


class Cursor(msgspec.Struct, array_like=True, frozen=True):
    """Where a page of orders ended: moment (UTC ms), campaign, event number."""

    at_ms: int
    campaign: str
    seq: int


class OwnOrders:
    """A card's own orders; other people's do not exist for it."""

    def __init__(
        self, catalogue: Catalogue, redis: Redis, pool: asyncpg.Pool, codes: TicketCodes
    ) -> None:
        self._catalogue = catalogue
        self._redis = redis
        self._pool = pool
        self._codes = codes

    async def one(self, card_no: str, order_no: str) -> Order:
        """Give one order. Raises Refused (not-found) for anybody else's, like for none."""
        place = parse_order_number(order_no)
        now = None if place is None else await self._catalogue.now(place[0])
        if place is None or now is None:
            raise Refused(Problem.NOT_FOUND, "no such order")
        campaign_id, seq, low_bits = place
        records, _ = await read_card(self._redis, campaign_id, card_no)
        for record in records:
            if record.seq == seq and record.at_ms & 0xFFFFFF == low_bits:
                left = now.campaign.card_limit - live_tickets(records)
                return self._worded(now.campaign, record, left)
        raise Refused(Problem.NOT_FOUND, "no such order")

    async def page(
        self, card_no: str, before: Cursor | None, limit: int
    ) -> tuple[list[Order], Cursor | None]:
        """Give up to ``limit`` orders, newest first, and where to go on."""
        found: dict[tuple[str, int], tuple[Campaign, SaleRecord, int]] = {}
        for now in await self._catalogue.all():
            records, _ = await read_card(self._redis, now.campaign.id, card_no)
            left = now.campaign.card_limit - live_tickets(records)
            for record in records:
                found[now.campaign.id, record.seq] = (now.campaign, record, left)
        rows = sorted(
            found.values(), key=lambda row: (row[1].at_ms, row[0].id, row[1].seq), reverse=True
        )
        if before is not None:
            mark = (before.at_ms, before.campaign, before.seq)
            rows = [row for row in rows if (row[1].at_ms, row[0].id, row[1].seq) < mark]
        page = rows[:limit]
        more = (
            Cursor(page[-1][1].at_ms, page[-1][0].id, page[-1][1].seq)
            if len(rows) > limit
            else None
        )
        return [self._worded(*row) for row in page], more

    def _worded(self, campaign: Campaign, record: SaleRecord, left: int) -> Order:
        return placed_order(
            self._codes,
            campaign,
            record.showing,
            record.quantity,
            record.seq,
            record.at_ms,
            campaign.price_fen,
            left,
        )


def placed_order(
    codes: TicketCodes,
    campaign: Campaign,
    showing: int,
    quantity: int,
    seq: int,
    at_ms: int,
    price_fen: int,
    card_remaining: int,
) -> Order:
    """Word an order as the contract has it."""
    order_no = order_number(campaign.id, seq, at_ms)
    return Order(
        order_no=order_no,
        campaign=campaign.id,
        showing=campaign.showings[showing].id,
        quantity=quantity,
        state=CONFIRMED,
        amount_fen=quantity * price_fen,
        pay_before=None,
        created_at=rfc3339(at_ms),
        tickets=codes.of(order_no, quantity),
        card_remaining=card_remaining,
    )
