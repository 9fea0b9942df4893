"""The ledger in PostgreSQL: apply what the stream holds, read what came of it.

A batch is one transaction. Its first statement is a compare-and-set on the campaign's applied
number and chain hash, so however many writers there are, each event is applied once and in order
(INV-5). The events go in by COPY, the orders follow from them by one INSERT … SELECT, and what is
not a sale is done one by one, in its place among the sales, because a constraint that holds after
``stock_added`` need not hold before it.

Where the constraints refuse a sale that Redis has made, the batch is done again with savepoints:
ranges of sales are halved until the offender stands alone. It stays in ``event``, which is the
truth about what was answered, and goes to ``conflict`` instead of ``orders``; the rest goes on.
``ON CONFLICT DO NOTHING`` would be shorter and would hide forks.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import asyncpg
import msgspec

from sale.db import queries
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.clock import from_ms, nearest, to_ms
from sale.domain.problem import DAMAGED
from sale.ledger.chain import GENESIS, CorruptLedger, Entry, Event, check_chain
from sale.ledger.kinds import SOLD, STATE_AFTER, VOIDED

Connection: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"
"""One connection with asyncpg's own codecs: jsonb comes and goes as text."""

CURSOR_MOMENT_MAX_MS: Final = 2**43
CURSOR_SEQ_MAX: Final = 2**53
"""Beyond any real one, and within what PostgreSQL can be asked for: cursors come from outside."""


class PositionMoved(Exception):  # noqa: N818 - says what happened
    """The compare-and-set found another position: read it again and go on from there."""


class Position(NamedTuple):
    """How far a campaign is applied: number of the last event and chain hash after it."""

    applied: int
    chain: str


class Conflict(msgspec.Struct, frozen=True):
    """An event that PostgreSQL refused to act on; ``why`` names no card."""

    seq: int
    why: str


class Applied(msgspec.Struct, frozen=True):
    """What one batch did."""

    position: Position
    events: int
    conflicts: list[Conflict]


class OrderCursor(NamedTuple):
    """Where a page of orders ended: sold at (UTC ms), campaign, event number."""

    created_at_ms: Annotated[int, msgspec.Meta(ge=0, le=CURSOR_MOMENT_MAX_MS)]
    campaign_id: Annotated[str, msgspec.Meta(pattern=f"^{CAMPAIGN_ID.pattern}$")]
    seq: Annotated[int, msgspec.Meta(ge=0, le=CURSOR_SEQ_MAX)]


class OrderRow(msgspec.Struct, frozen=True):
    """An order as PostgreSQL has it. ``card_remaining`` is what the card may still buy."""

    campaign_id: str
    seq: int
    card_no: str
    showing_no: int
    showing_id: str
    quantity: int
    price_fen: int
    amount_fen: int
    state: str
    key_hash: str
    created_at_ms: int
    card_remaining: int

    @property
    def cursor(self) -> OrderCursor:
        """Cursor of the page that goes on after this order."""
        return OrderCursor(self.created_at_ms, self.campaign_id, self.seq)


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
    starts_at_ms: int | None
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
    """How far a campaign is applied; ``(0, GENESIS)`` where nothing is."""
    row = await conn.fetchrow(_SQL["position"], campaign_id)
    return Position(0, GENESIS) if row is None else Position(row["applied"], row["chain"])


async def positions(conn: Connection) -> dict[str, Position]:
    """How far every campaign is applied, by campaign ID."""
    rows = await conn.fetch(_SQL["positions"])
    return {row["campaign_id"]: Position(row["applied"], row["chain"]) for row in rows}


async def state(conn: Connection, campaign_id: str) -> str | None:
    """A campaign's state as far as it is applied, or None where there is none."""
    if not CAMPAIGN_ID.fullmatch(campaign_id):
        return None  # not asked: anybody's text may hold what PostgreSQL takes for a fault (NUL)
    found: str | None = await conn.fetchval(_SQL["state"], campaign_id)
    return found


async def living(conn: Connection) -> list[str]:
    """IDs of the campaigns that have events and are not deleted drafts, sorted."""
    return [row["campaign_id"] for row in await conn.fetch(_SQL["living"])]


async def apply(
    conn: Connection,
    campaign_id: str,
    entries: Sequence[Entry],
    *,
    after: Position | None = None,
) -> Applied:
    """Apply whole entries in one durable transaction, going on from ``after`` (None: read it).

    Raises:
        PositionMoved: somebody else has applied meanwhile; nothing was done.
        CorruptLedger: a gap, a broken chain, or what cannot stand in a ledger; nothing was done.
        asyncpg.PostgresError, OSError: PostgreSQL is away; perhaps it was done, so read the
            position again.

    """
    if after is None:
        after = await position(conn, campaign_id)
    if not entries:
        return Applied(after, 0, [])
    if entries[0].first <= after.applied:
        raise PositionMoved(f"{campaign_id} is at {after.applied}, not {entries[0].first - 1}")
    batch = _Batch(campaign_id, after, entries)
    try:
        return await _transact(conn, batch, careful=False)
    except _Refusal:
        return await _transact(conn, batch, careful=True)


async def conflicts_to_pause(conn: Connection) -> dict[str, str]:
    """Campaigns with a conflict that nobody has paused them for yet: ID to reason."""
    rows = await conn.fetch(_SQL["conflicts_to_pause"])
    return {row["campaign_id"]: row["why"] for row in rows}


async def conflict_rows(conn: Connection) -> dict[str, int]:
    """Rows of table ``conflict`` by campaign, whatever their source; those with none lack."""
    rows = await conn.fetch(_SQL["conflict_rows"])
    return {row["campaign_id"]: row["refused"] for row in rows}


async def mark_paused(conn: Connection, campaign_id: str) -> None:
    """Note that a campaign has been paused for its conflicts."""
    await conn.execute(_SQL["mark_paused"], campaign_id)


async def orders_of_card(
    conn: Connection, card_no: str, *, before: OrderCursor | None = None, limit: int = 50
) -> list[OrderRow]:
    """A card's orders, newest first, at most ``limit``; ``before`` is the last one's cursor."""
    at = None if before is None else from_ms(before.created_at_ms)
    campaign_id, seq = (None, None) if before is None else (before.campaign_id, before.seq)
    rows = await conn.fetch(_SQL["orders_of_card"], card_no, at, campaign_id, seq, limit)
    return [_order(row) for row in rows]


async def order(conn: Connection, campaign_id: str, seq: int) -> OrderRow | None:
    """The order that event ``seq`` made, or None. Whose it is, the caller checks."""
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


async def gone_draft(conn: Connection, campaign_id: str, seq: int) -> GoneDraft | None:
    """The draft that event ``seq`` was of, as it was deleted; None where its end is not there."""
    rows = await conn.fetch(_SQL["draft_events"], campaign_id, seq)
    if not rows or rows[-1]["kind"] != "deleted":
        return None
    data = [msgspec.json.decode(row["data"]) for row in rows]
    config = data[0]["config"]
    tickets = [row["tickets"] for row in config["showings"]]
    for row, told in zip(rows, data, strict=True):
        if row["kind"] == "stock_added":
            tickets[told["showing"]] += told["add"]
    end = rows[-1]
    return GoneDraft(config, tickets, end["seq"], end["epoch"], to_ms(end["at"]))


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
_SQL: Final = queries.load("ledger")
_COLUMNS: Final = (
    "seq", "at", "epoch", "showing_no", "quantity", "price_fen",
    "campaign_id", "kind", "card_no", "key_hash", "actor", "reason", "data",
)  # fmt: skip
_SALES: Final = frozenset({SOLD, VOIDED})
"""Done a run at a time: a voided number does nothing, and may stand between any two sales."""
_REFUSED: Final = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.ProgramLimitExceededError,  # a text that is too long for an index
)
"""What PostgreSQL (or asyncpg, for a value of the wrong type) says to an impossible event."""


class _Refusal(Exception):  # noqa: N818 - says what it is
    """The constraints refused something in a batch that was tried in one go."""


class _Batch:
    """Checked and decoded entries. Raises CorruptLedger."""

    def __init__(self, campaign_id: str, after: Position, entries: Sequence[Entry]) -> None:
        self.campaign_id = campaign_id
        self.after = after
        self.to = Position(*check_chain(entries, *after))
        self.epoch = entries[-1].epoch
        self.at = from_ms(entries[-1].at_ms)
        self.events: list[Event] = []
        self.rows: list[tuple[Any, ...]] = []
        for entry in entries:
            decoded = entry.events()
            self.events += decoded
            self.rows += _copy_rows(campaign_id, from_ms(entry.at_ms), decoded)


def _copy_rows(campaign_id: str, at: datetime, batch: list[Event]) -> list[tuple[Any, ...]]:
    return [
        (
            event.seq, at, event.epoch, event.showing, event.quantity, event.price_fen,
            campaign_id, SOLD, event.card_no, event.key_hash, None, None, None,
        )
        if event.kind == SOLD
        else (
            event.seq, at, event.epoch, None, None, None,
            campaign_id, event.kind, None, None, event.actor, event.reason, _json(event.data),
        )
        for event in batch
    ]  # fmt: skip


async def _transact(conn: Connection, batch: _Batch, *, careful: bool) -> Applied:
    async with conn.transaction():
        await _record(conn, batch)
        conflicts = await _act(conn, batch, careful=careful)
        if any(event.kind not in _SALES for event in batch.events):
            await conn.execute(
                _SQL["post_audit"], batch.campaign_id, batch.after.applied + 1, batch.to.applied
            )
    return Applied(batch.to, len(batch.events), conflicts)


async def _record(conn: Connection, batch: _Batch) -> None:
    """Move the position and add the events."""
    try:
        if batch.after.applied == 0:
            await conn.execute(_SQL["begin_campaign"], batch.campaign_id, GENESIS)
        moved = await conn.fetchrow(
            _SQL["move_position"],
            batch.campaign_id, *batch.after, *batch.to, batch.epoch, batch.at,
        )  # fmt: skip
        if moved is None:
            raise PositionMoved(f"{batch.campaign_id} is no longer at {batch.after.applied}")
        await conn.copy_records_to_table("event", records=batch.rows, columns=_COLUMNS)
    except (*_REFUSED, *DAMAGED) as error:
        # COPY's encoders say the latter to a value of the wrong type.
        raise CorruptLedger(f"{batch.campaign_id}: {_said(error)}") from error


async def _act(conn: Connection, batch: _Batch, *, careful: bool) -> list[Conflict]:
    """Do what the events say, in order; runs of sales at once. Raises _Refusal unless careful."""
    conflicts: list[Conflict] = []
    for is_sale, group in groupby(batch.events, lambda event: event.kind in _SALES):
        run = list(group)
        if not careful:
            try:
                await _do(conn, batch.campaign_id, run)
            except (*_REFUSED, *_MALFORMED) as error:
                raise _Refusal from error
            continue
        pending = [run] if is_sale else [[event] for event in reversed(run)]
        conflicts += await _halve(conn, batch.campaign_id, pending)
    return conflicts


async def _halve(conn: Connection, campaign_id: str, pending: list[list[Event]]) -> list[Conflict]:
    """Do runs of events, the last of the list first, halving what is refused."""
    conflicts: list[Conflict] = []
    while pending:
        run = pending.pop()
        try:
            async with conn.transaction():
                await _do(conn, campaign_id, run)
        except (*_REFUSED, *_MALFORMED) as error:
            if len(run) > 1:
                middle = len(run) // 2
                pending += [run[middle:], run[:middle]]
                continue
            conflicts.append(await _conflict(conn, campaign_id, run[0], error))
    return conflicts


async def _conflict(conn: Connection, campaign_id: str, event: Event, error: Exception) -> Conflict:
    why = f"{type(error).__name__}: {_said(error)}"
    text = _json(msgspec.to_builtins(event))
    await conn.execute(
        _SQL["record_conflict"], campaign_id, event.seq, from_ms(event.at_ms), why, text
    )
    return Conflict(event.seq, why)


def _said(error: Exception) -> object:
    """Give an error's message without PostgreSQL's detail, which holds the card's number."""
    return error.args[0] if error.args else ""


_MALFORMED: Final = DAMAGED
"""What Python says to an operator's event that lacks what it needs."""


async def _do(conn: Connection, campaign_id: str, run: list[Event]) -> None:
    """Do a run of events, all of them sales (or voided) or none."""
    if run[0].kind in _SALES:
        await conn.execute(_SQL["post_sales"], campaign_id, run[0].seq, run[-1].seq)
        return
    for event in run:
        if event.kind == "created":
            await _create(conn, campaign_id, event.data)
        elif event.kind == "stock_added":
            await _add_stock(conn, campaign_id, event.data)
        elif event.kind in STATE_AFTER:
            await _change_state(conn, campaign_id, STATE_AFTER[event.kind], event.data)


async def _create(conn: Connection, campaign_id: str, data: Mapping[str, Any]) -> None:
    config = data["config"]
    showings = config["showings"]
    await conn.execute(_SQL["forget_showings"], campaign_id)
    await conn.execute(
        _SQL["configure"],
        campaign_id,
        _json(config),
        _moment(data.get("opens_at")),
        _moment(data.get("closes_at")),
        config["price_fen"],
        config["card_limit"],
    )
    await conn.execute(
        _SQL["add_showings"],
        campaign_id,
        list(range(len(showings))),
        [row["id"] for row in showings],
        [row["title"] for row in showings],
        [_iso(row.get("starts_at")) for row in showings],
        [row["tickets"] for row in showings],
    )


async def _add_stock(conn: Connection, campaign_id: str, data: Mapping[str, Any]) -> None:
    stock = await conn.fetchval(_SQL["add_stock"], campaign_id, data["showing"], data["add"])
    if stock is None:
        raise KeyError(f"no showing {data['showing']}")


async def _change_state(
    conn: Connection, campaign_id: str, state: str, data: Mapping[str, Any]
) -> None:
    await conn.execute(
        _SQL["change_state"],
        campaign_id,
        state,
        "opens_at" in data,
        _moment(data.get("opens_at")),
        "closes_at" in data,
        _moment(data.get("closes_at")),
    )


def _moment(ms: int | None) -> datetime | None:
    # An event stands in the ledger whatever it says; a moment beyond PostgreSQL stops nothing.
    return None if ms is None else from_ms(nearest(ms))


def _iso(text: str | None) -> datetime | None:
    return None if text is None else _moment(to_ms(datetime.fromisoformat(text)))


def _json(value: object) -> str:
    """Word a value as JSON. Not by msgspec, which refuses integers of more than 64 bits."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _ms(moment: datetime | None) -> int | None:
    return None if moment is None else to_ms(moment)


def _order(row: Mapping[str, Any]) -> OrderRow:
    return OrderRow(
        campaign_id=row["campaign_id"],
        seq=row["seq"],
        card_no=row["card_no"],
        showing_no=row["showing_no"],
        showing_id=row["showing_id"],
        quantity=row["quantity"],
        price_fen=row["price_fen"],
        amount_fen=row["amount_fen"],
        state=row["state"],
        key_hash=row["key_hash"],
        created_at_ms=to_ms(row["created_at"]),
        card_remaining=row["card_remaining"],
    )
