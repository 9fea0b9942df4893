"""Applies the entries of a stream to PostgreSQL; what the ledger writer does there.

A batch is one transaction. Its first statement is a compare-and-set on the campaign's applied
number and chain hash, so however many writers there are, each event is applied once and in order
(INV-5). The events go in by COPY. Their effects are made by the statements that each kind names, a
run of events of one kind at a time, in the order of the ledger: a constraint that holds after
``stock_added`` need not hold before it.

Where the constraints refuse an event, the batch is done again with savepoints: runs are halved
until the offender is alone. It stays in ``event``, which is the truth about what was answered, and
goes to ``conflict``; the rest goes on. ``ON CONFLICT DO NOTHING`` would be shorter and would hide
forks.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, Final

import asyncpg
import msgspec

from sale.db import queries, read
from sale.db.pool import Connection
from sale.domain.clock import from_ms
from sale.domain.problem import DAMAGED
from sale.ledger.chain import GENESIS, CorruptLedger, Entry, Event, Position, check_chain
from sale.ledger.kinds import CANCELLED, CLOCK, EXPIRED, KINDS, MEMBER, Cancelled


class PositionMoved(Exception):  # noqa: N818 - says what happened
    """The compare-and-set found another position: read it again and go on from there."""


class Conflict(msgspec.Struct, frozen=True):
    """An event that PostgreSQL refused to act on; ``why`` names no member."""

    seq: int
    why: str


class Applied(msgspec.Struct, frozen=True):
    """The effect of one batch: ``expired`` orders, and tickets that were given back."""

    position: Position
    events: int
    conflicts: list[Conflict]
    expired: int = 0
    cancelled_tickets: int = 0


async def apply_entries(
    conn: Connection,
    campaign_id: str,
    entries: Sequence[Entry],
    *,
    after: Position | None = None,
) -> Applied:
    """Apply whole entries in one durable transaction, going on from ``after`` (None: read it).

    Raises:
        PositionMoved: another writer has applied meanwhile; nothing was done.
        CorruptLedger: a gap, a broken chain, or what cannot stand in a ledger; nothing was done.
        asyncpg.PostgresError, OSError: PostgreSQL is away; perhaps it was done, so read the
            position again.

    """
    if after is None:
        after = await read.position(conn, campaign_id)
    if not entries:
        return Applied(after, 0, [])
    if entries[0].first <= after.seq:
        raise PositionMoved(f"{campaign_id} is at {after.seq}, not {entries[0].first - 1}")
    batch = _Batch(campaign_id, after, entries)
    try:
        return await _transact(conn, batch, careful=False)
    except _Refusal:
        return await _transact(conn, batch, careful=True)


async def conflicts_to_pause(conn: Connection) -> dict[str, str]:
    """Campaigns that are not paused yet for a conflict: ID to reason."""
    rows = await conn.fetch(_SQL["conflicts_to_pause"])
    return {row["campaign_id"]: row["why"] for row in rows}


async def conflict_rows(conn: Connection) -> dict[str, int]:
    """Rows of table ``conflict`` by campaign, whatever their source; those with none lack."""
    rows = await conn.fetch(_SQL["conflict_rows"])
    return {row["campaign_id"]: row["refused"] for row in rows}


async def mark_paused(conn: Connection, campaign_id: str) -> None:
    """Note that a campaign has been paused for its conflicts."""
    await conn.execute(_SQL["mark_paused"], campaign_id)


_SQL: Final = queries.load("apply")
_COLUMNS: Final = (
    "seq", "at", "epoch", "showing_no", "quantity", "price_fen",
    "campaign_id", "kind", "member_no", "key_hash", "pay_before", "order_seq", "actor", "reason",
    "data",
)  # fmt: skip
_APPLY: Final = {name: [_SQL[each] for each in kind.apply] for name, kind in KINDS.items()}
"""Statements of each kind; one with none does nothing, and may stand between any two others."""
_AUDITED: Final = [name for name, kind in KINDS.items() if kind.audited]
_REFUSED: Final = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.ProgramLimitExceededError,  # a text that is too long for an index
)
"""Errors of PostgreSQL (or asyncpg, for a value of the wrong type) for an impossible event."""
_IMPOSSIBLE: Final = (*_REFUSED, *DAMAGED)
"""The same, and errors of Python for a payload that lacks a field."""


class _Refusal(Exception):  # noqa: N818 - says what it is
    """The constraints refused something in a batch that was tried in one go."""


class _Batch:
    """Checked and decoded entries. Raises CorruptLedger."""

    def __init__(self, campaign_id: str, after: Position, entries: Sequence[Entry]) -> None:
        self.campaign_id = campaign_id
        self.after = after
        self.to = check_chain(entries, after)
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
            campaign_id, event.kind, event.member_no, event.key_hash,
            None if event.pay_before is None else from_ms(event.pay_before), event.order,
            *((event.actor, event.reason, _json(event.data)) if event.data else _NO_DATA),
        )
        for event in batch
    ]  # fmt: skip


_NO_DATA: Final = (None, None, None)


async def _transact(conn: Connection, batch: _Batch, *, careful: bool) -> Applied:
    async with conn.transaction():
        await _record(conn, batch)
        conflicts = await _act(conn, batch, careful=careful)
        if any(KINDS[event.kind].audited for event in batch.events):
            first, last = batch.after.seq + 1, batch.to.seq
            await conn.execute(
                _SQL["add_audit_rows"], batch.campaign_id, first, last, _AUDITED, [CLOCK, MEMBER]
            )
    refused = {each.seq for each in conflicts}
    ended = [
        event
        for event in batch.events
        if event.kind in {EXPIRED, CANCELLED} and event.seq not in refused
    ]
    cancelled = [event.read(Cancelled) for event in ended if event.kind == CANCELLED]
    return Applied(
        batch.to,
        len(batch.events),
        conflicts,
        len(ended) - len(cancelled),
        sum(len(each.tickets) for each in cancelled),
    )


async def _record(conn: Connection, batch: _Batch) -> None:
    """Move the position and add the events."""
    try:
        if batch.after.seq == 0:
            await conn.execute(_SQL["begin_campaign"], batch.campaign_id, GENESIS)
        moved = await conn.fetchrow(
            _SQL["move_position"],
            batch.campaign_id, *batch.after, *batch.to, batch.epoch, batch.at,
        )  # fmt: skip
        if moved is None:
            raise PositionMoved(f"{batch.campaign_id} is no longer at {batch.after.seq}")
        await conn.copy_records_to_table("event", records=batch.rows, columns=_COLUMNS)
    except (*_REFUSED, *DAMAGED) as error:
        # COPY's encoders say the latter to a value of the wrong type.
        raise CorruptLedger(f"{batch.campaign_id}: {_said(error)}") from error


async def _act(conn: Connection, batch: _Batch, *, careful: bool) -> list[Conflict]:
    """Do what the events say, a run of one kind at a time. Raises _Refusal unless careful."""
    conflicts: list[Conflict] = []
    for run in _runs(batch.events):
        if careful:
            conflicts += await _halve(conn, batch.campaign_id, run)
            continue
        try:
            await _do(conn, batch.campaign_id, run)
        except _IMPOSSIBLE as error:
            raise _Refusal from error
    return conflicts


def _runs(events: Sequence[Event]) -> Iterator[list[Event]]:
    acting = (event for event in events if _APPLY[event.kind])
    for _, run in groupby(acting, lambda event: event.kind):
        yield list(run)


async def _halve(conn: Connection, campaign_id: str, run: list[Event]) -> list[Conflict]:
    """Do a run of events, halving what is refused."""
    conflicts: list[Conflict] = []
    pending = [run]
    while pending:
        run = pending.pop()
        try:
            async with conn.transaction():
                await _do(conn, campaign_id, run)
        except _IMPOSSIBLE as error:
            if len(run) > 1:
                middle = len(run) // 2
                pending += [run[middle:], run[:middle]]
                continue
            conflicts.append(await _conflict(conn, campaign_id, run[0], error))
    return conflicts


async def _do(conn: Connection, campaign_id: str, run: list[Event]) -> None:
    """Apply a run of events of one kind."""
    name = run[0].kind
    kind = KINDS[name]
    if not kind.positional:
        for event in run:
            event.read(kind.payload)
    for statement in _APPLY[name]:
        await conn.execute(statement, campaign_id, run[0].seq, run[-1].seq, name, *kind.arguments)


async def _conflict(conn: Connection, campaign_id: str, event: Event, error: Exception) -> Conflict:
    why = f"{type(error).__name__}: {_said(error)}"
    text = _json(msgspec.to_builtins(event))
    await conn.execute(
        _SQL["record_conflict"], campaign_id, event.seq, from_ms(event.at_ms), why, text
    )
    return Conflict(event.seq, why)


def _said(error: Exception) -> object:
    """Give an error's message without PostgreSQL's detail, which holds the member's number."""
    return error.args[0] if error.args else ""


def _json(value: object) -> str:
    """Word a value as JSON. Not by msgspec, which refuses integers of more than 64 bits."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
