"""Examines a campaign for a recovery: its ledger, its stream, the API processes' reports.

It changes nothing. ``recover.py`` describes the order of a recovery.
"""

import contextlib
from collections.abc import Callable
from itertools import chain
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sale.db import claims, read
from sale.db.pool import Connection
from sale.domain.clock import nearest
from sale.domain.problem import DAMAGED, Problem, Refused
from sale.ledger.chain import (
    GENESIS,
    CorruptLedger,
    Entry,
    Event,
    Position,
    parse_entry,
)
from sale.ledger.fold import CampaignState
from sale.ledger.kinds import CLOCK, VOIDED
from sale.stock.head import EXAMINED, SEQ
from sale.stock.keys import CAMPAIGNS, campaign_keys
from sale.stock.process_reports import Reports
from sale.stock.rebuild import Rebuild
from sale.stock.records import parse_records
from sale.stock.scripts import Scripts
from sale.stock.stream import stream_rows
from sale.trust.comparison import (
    Findings,
    FoldComparison,
    Gone,
    RedisView,
    compare_operations,
    compare_revoked,
    read_redis,
    revoked_at,
)
from sale.trust.history import History, Steps, ledger_events
from sale.trust.record_steps import steps_beyond
from sale.trust.refill import Refilled, refill
from sale.trust.verify import what_lacks

DIFFERENCES_MAX: Final = 20
LOST_MAX: Final = 2_000_000
"""Numbers that a recovery fills in or voids at most, because it holds them in memory."""
REASON_CHARS: Final = 300
NO_HEAD: Final = ("", "")

Progress: TypeAlias = Callable[[str, int, int], None]
"""``progress(step, done, of)`` receives how far a recovery is."""


class Examination(msgspec.Struct):
    """The findings on a campaign; ``books`` is its state at ``seq`` and ``chain``."""

    campaign_id: str
    old: tuple[str, str] = ("", "")
    old_epoch: int = 0
    applied: int = 0
    seq: int = 0
    chain: str = GENESIS
    clock_ms: int = 0
    books: CampaignState = msgspec.field(default_factory=CampaignState)
    entries: list[Entry] = []
    keep_stream: bool = False
    frozen: bool = False
    unsteady: bool = False
    trusted: bool = False
    registered: bool = True
    differences: list[str] = []
    ended_ms: int = 0
    refilled: Refilled = msgspec.field(default_factory=Refilled)
    strays: list[tuple[Event, str]] = []
    reported_epoch: int = 0
    silent: list[str] = []

    @property
    def conflicts(self) -> int:
        """How many events were told to members and have no place in the ledger, as far as known."""
        return len(self.strays) + self.refilled.unused

    @property
    def lossless(self) -> bool:
        """Whether the ledger holds everything that was told to members after the recovery."""
        return not self.conflicts and not self.refilled.voided

    @property
    def redis_seq(self) -> int:
        """The head's number; 0 if there is none, or if it is damaged."""
        return int(self.old[0]) if self.old[0].isdecimal() else 0

    def covers(self, position: Position) -> bool:
        """Whether PostgreSQL's ledger ends within the state that will be built."""
        return position.seq == self.applied or any(
            (entry.last, entry.chain) == position for entry in self.entries
        )

    def plan(self, actor: str) -> Rebuild:
        """Give the parts that the campaign will be built from."""
        return Rebuild(
            campaign_id=self.campaign_id,
            old=self.old,
            books=self.books,
            seq=self.seq,
            chain=self.chain,
            epoch=max(self.books.epoch, self.old_epoch, self.reported_epoch) + 1,
            clock_ms=self.clock_ms,
            keep_stream=self.keep_stream,
            entries=self.entries,
            applied=self.applied,
            voided=self.refilled.voided,
            actor=actor,
            reason="; ".join(self.differences)[:REASON_CHARS],
        )


class _Trail(NamedTuple):
    """The stream: its sound entries beyond PostgreSQL's position, and its first fault."""

    tail: list[Entry]
    ends: int
    overlaps: bool
    wrong: str


async def examine(
    redis: Redis,
    scripts: Scripts,
    connection: Connection,
    campaign_id: str,
    reports: Reports,
    progress: Progress | None,
) -> Examination:
    """Examine a campaign. Raises Refused for an unknown one, or one that cannot be recovered."""
    examination = Examination(campaign_id, differences=[], strays=[], silent=reports.silent)
    findings = Findings()
    view = await _view(redis, campaign_id)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        examination.applied, examination.chain = await read.position(connection, campaign_id)
        revoked = await revoked_at(connection, view.now.roster_rev) if view else set()
        await _read_head(redis, scripts, examination)
        given_out = max(
            examination.redis_seq,
            await _last_generated(redis, campaign_id),
            await claims.highest(connection, campaign_id),
        )
        trail = await _trail(redis, campaign_id, Position(examination.applied, examination.chain))
        # If sales go on, the stream is longer by now than the head said.
        still = (
            await redis.hget(campaign_keys(campaign_id).head, SEQ) == examination.old[0].encode()
        )
        if examination.old == NO_HEAD and not given_out and not examination.applied:
            raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
        comparison = None if view is None else FoldComparison(view, findings)
        await _fold(connection, examination, trail, comparison, progress)
        handed = await claims.unsettled(connection, campaign_id, examination.seq)
        streamed = (
            await _stray(redis, connection, examination) if trail.wrong or trail.overlaps else []
        )
    known = {event.seq for event in (*handed, *streamed)}
    # A record tells less of a change than the event: several cancellations look like one.
    streamed += [
        event
        for event in await _from_members(view, examination)
        if event.order is None or event.seq not in known
    ]
    epochs = [each.epoch for each in reports.reports(campaign_id).values()]
    examination.reported_epoch = max([*epochs, *(claim.epoch for claim in handed)], default=0)
    given_out = max(given_out, reports.highest(campaign_id, examination.books.epoch))
    examination.keep_stream = (
        not trail.wrong and trail.ends == examination.seq and not trail.overlaps
    )
    examination.differences += _misfit(examination, trail, reports, given_out, still=still)
    examination.unsteady = trail.wrong != "" or given_out > examination.seq or not still
    if view is not None and comparison is not None and examination.redis_seq >= examination.applied:
        comparison.finish(examination.books)
        compare_operations(view, examination.books, findings)
        if view.now.roster_rev >= 0:
            compare_revoked(view, revoked, findings)
        examination.differences += [finding.what for finding in findings.all()]
    elif view is None and examination.old != NO_HEAD:
        examination.differences.append("the head in Redis cannot be read")
    if given_out > examination.seq + LOST_MAX:
        raise Refused(
            Problem.UNAVAILABLE,
            f"{campaign_id}: Redis says that {given_out} events were given out, the ledger ends at "
            f"{examination.seq}: that cannot be true, and a recovery would void all between",
        )
    if examination.differences and given_out > examination.seq:
        await _refill(examination, handed, streamed, given_out)
    examination.differences = examination.differences[:DIFFERENCES_MAX]
    return examination


async def _refill(
    examination: Examination, handed: list[Event], streamed: list[Event], given_out: int
) -> None:
    """Fill in or void every number that was given out beyond the ledger.

    A sale that was handed in and does not fit becomes a conflict when the ledger has been applied
    that far (``claims.settle``). An event that only the stream holds would be lost with the stream,
    so the recovery records it as a conflict before.
    """
    examination.refilled = await refill(
        examination.books, examination.ended_ms, [*handed, *streamed], given_out
    )
    examination.books = examination.refilled.books
    ids = {id(event) for event in streamed}
    examination.strays += [stray for stray in examination.refilled.strays if id(stray[0]) in ids]
    examination.refilled.unused = len(examination.refilled.strays) - sum(
        id(stray[0]) in ids for stray in examination.refilled.strays
    )
    added = await examination.refilled.entries(examination.chain)
    examination.entries = [*examination.entries, *added]
    examination.seq, examination.chain = added[-1].last, added[-1].chain
    examination.clock_ms = max(examination.clock_ms, added[-1].at_ms)
    examination.keep_stream = False


def _misfit(
    examination: Examination, trail: _Trail, reports: Reports, given_out: int, *, still: bool
) -> list[str]:
    """Say how head and stream differ from the ledger; ``still``: nothing was sold meanwhile."""
    if examination.old == NO_HEAD:
        return ["Redis does not hold it"]
    redis_seq, applied = examination.redis_seq, examination.applied
    if redis_seq < applied:
        return [f"Redis knows {redis_seq} events, PostgreSQL has applied {applied}"]
    if trail.wrong or trail.ends < redis_seq:
        return [f"the stream: {trail.wrong or 'it lacks its last event'}"]
    if still and redis_seq != examination.seq:
        return [f"the head says event {redis_seq}, the ledger ends at {examination.seq}"]
    if still and examination.old[1] != examination.chain:
        return ["the head has another chain hash than the ledger"]
    if lacking := what_lacks(
        reports, examination.campaign_id, examination.old_epoch, examination.seq
    ):
        return [lacking]
    if still and given_out > examination.seq:
        return [f"events {examination.seq + 1} to {given_out} are lost"]
    return []


async def _view(redis: Redis, campaign_id: str) -> RedisView | None:
    """Read the campaign in Redis; None if it is not there or cannot be read."""
    try:
        return await read_redis(redis, campaign_id)
    except (Gone, ResponseError, *DAMAGED):
        return None


async def _read_head(redis: Redis, scripts: Scripts, examination: Examination) -> None:
    """Read head, identity and registration; the head as texts, because it may be damaged."""
    server, replication = await redis.info("server"), await redis.info("replication")
    seq, chain, epoch, clock, recovering, *identity = await EXAMINED.read_texts(
        redis, examination.campaign_id
    )
    examination.old = (seq, chain)
    examination.old_epoch = int(epoch) if epoch.isdecimal() else 0
    # If the clock were outside the bounds of an event's moment, the next event could not be read.
    examination.clock_ms = (
        int(clock) if clock.isdecimal() and int(clock) == nearest(int(clock)) else 0
    )
    examination.frozen = recovering != ""
    examination.trusted = not recovering and identity == [
        scripts.nonce,
        str(server["run_id"]),
        str(replication["master_replid"]),
    ]
    examination.registered = bool(await redis.sismember(CAMPAIGNS, examination.campaign_id))


async def _last_generated(redis: Redis, campaign_id: str) -> int:
    """Give the last number that the stream has had, deleted entries included."""
    try:
        information: Any = await redis.xinfo_stream(campaign_keys(campaign_id).stream)
    except ResponseError:
        return 0  # there is no stream, or the key holds another type
    return int(information["last-generated-id"].split(b"-")[0])


async def _trail(redis: Redis, campaign_id: str, position: Position) -> _Trail:
    """Follow the stream's chain, and on from PostgreSQL's position."""
    if await _is_no_stream(redis, campaign_id):
        return _Trail([], 0, overlaps=False, wrong="its key holds another type")
    history = History(redis, campaign_id, position)
    tail = [entry async for entry in history.follow()]
    return _Trail(tail, history.ends, not history.met and not tail, history.wrong)


async def _is_no_stream(redis: Redis, campaign_id: str) -> bool:
    kind = await redis.type(campaign_keys(campaign_id).stream)
    return kind not in {b"stream", b"none"}


async def _stray(redis: Redis, connection: Connection, examination: Examination) -> list[Event]:
    """Give a broken stream's events beyond the ledger; record those that contradict the ledger."""
    held: dict[int, Event] = {}
    beyond: list[Event] = []
    if await _is_no_stream(redis, examination.campaign_id):
        return beyond
    async for rows in stream_rows(redis, examination.campaign_id):
        for row in rows:
            try:
                events = parse_entry(*row).events()
            except CorruptLedger:
                continue
            acted = [event for event in events if event.actor != CLOCK]
            held.update((event.seq, event) for event in acted if event.seq <= examination.applied)
            beyond += [
                event for event in acted if event.seq > examination.seq and event.kind != VOIDED
            ]
    if held:
        async for chunk in ledger_events(connection, examination.campaign_id):
            for event in chunk:
                stray = held.get(event.seq)
                if stray is not None and stray != event:
                    why = f"Redis sold it, but the ledger has {event.kind} under this number"
                    examination.strays.append((stray, why))
    return beyond


async def _from_members(view: RedisView | None, examination: Examination) -> list[Event]:
    """Give the steps beyond the ledger in members' records, because the stream may lack them."""
    found: list[Event] = []
    steps = Steps()
    chunks = () if view is None else view.chunks
    for member_no, value in chain.from_iterable(each.members.items() for each in chunks):
        await steps.done()
        with contextlib.suppress(ValueError):
            found += steps_beyond(
                member_no, parse_records(value), {} if view is None else view.holds,
                examination.books,
            )  # fmt: skip
    return found


async def _fold(
    connection: Connection,
    examination: Examination,
    trail: _Trail,
    comparison: FoldComparison | None,
    progress: Progress | None,
) -> None:
    """Fold PostgreSQL's ledger and the sound tail; compare head and stock at the head's number."""

    def add(events: list[Event]) -> None:
        for event in events:
            examination.books.apply(event)
            examination.ended_ms = max(examination.ended_ms, event.at_ms)
            if comparison is not None:
                comparison.at(examination.books)
        if progress is not None:
            progress(
                "reading the ledger",
                examination.books.seq,
                max(examination.applied, examination.books.seq),
            )

    try:
        async for events in ledger_events(connection, examination.campaign_id):
            add(events)
        steps = Steps()
        for entry in trail.tail:
            await steps.done(entry.last - entry.first + 1)
            add(entry.events())
            examination.chain = entry.chain
    except (CorruptLedger, *DAMAGED) as error:
        raise Refused(
            Problem.UNAVAILABLE, f"{examination.campaign_id}: the ledger itself is damaged: {error}"
        ) from None
    examination.clock_ms = max(examination.clock_ms, examination.ended_ms)
    examination.seq = examination.books.seq
    examination.entries = trail.tail
