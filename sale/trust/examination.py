"""Examines a campaign for a recovery: its ledger, its stream, the API processes' reports.

Changes nothing. ``recover.py`` says what is looked at, and in which order things are done.
"""

from collections.abc import Callable
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
from sale.ledger.kinds import CLOCK, SOLD, VOIDED
from sale.stock.head import EXAMINED, SEQ
from sale.stock.keys import CAMPAIGNS, campaign_keys
from sale.stock.process_reports import Reports
from sale.stock.rebuild import Rebuild
from sale.stock.records import parse_records
from sale.stock.scripts import Scripts
from sale.stock.stream import stream_rows
from sale.trust.comparison import (
    Findings,
    Gone,
    RedisView,
    compare_members,
    compare_operations,
    compare_revoked,
    compare_rules,
    compare_state,
    read_redis,
    revoked_at,
)
from sale.trust.history import History, Steps, ledger_events
from sale.trust.refill import Refilled, refill
from sale.trust.verify import what_lacks

DIFFERENCES_MAX: Final = 20
LOST_MAX: Final = 2_000_000
"""Numbers that a recovery fills or voids at most: they pass through memory."""
REASON_CHARS: Final = 300
NO_HEAD: Final = ("", "")

Progress: TypeAlias = Callable[[str, int, int], None]
"""``progress(step, done, of)``: how far a recovery is."""


class Examination(msgspec.Struct):
    """The findings on a campaign: ``books`` stand at ``seq`` and ``chain``."""

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
    roll_epoch: int = 0
    silent: list[str] = []

    @property
    def conflicts(self) -> int:
        """How much was told and does not stand, as far as is known."""
        return len(self.strays) + self.refilled.unused

    @property
    def lossless(self) -> bool:
        """Whether everything that was told stands after it."""
        return not self.conflicts and not self.refilled.voided

    @property
    def redis_seq(self) -> int:
        """Number that the head says; 0 where there is none, or none that is a number."""
        return int(self.old[0]) if self.old[0].isdecimal() else 0

    def covers(self, position: Position) -> bool:
        """Whether PostgreSQL's ledger ends within what is to be built."""
        return position.seq == self.applied or any(
            (entry.last, entry.chain) == position for entry in self.entries
        )

    def plan(self, actor: str) -> Rebuild:
        """Give what the campaign is to be built from."""
        return Rebuild(
            campaign_id=self.campaign_id,
            old=self.old,
            books=self.books,
            seq=self.seq,
            chain=self.chain,
            epoch=max(self.books.epoch, self.old_epoch, self.roll_epoch) + 1,
            clock_ms=self.clock_ms,
            keep_stream=self.keep_stream,
            entries=self.entries,
            applied=self.applied,
            voided=self.refilled.voided,
            actor=actor,
            reason="; ".join(self.differences)[:REASON_CHARS],
        )


class _Trail(NamedTuple):
    """The content of the stream: the sound entries beyond PostgreSQL, and what is wrong with it."""

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
    """Look at everything, change nothing."""
    case = Examination(campaign_id, differences=[], strays=[], silent=reports.silent)
    findings = Findings()
    view = await _view(redis, campaign_id)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        case.applied, case.chain = await read.position(connection, campaign_id)
        revoked = await revoked_at(connection, view.now.roster_rev) if view else set()
        await _read_head(redis, scripts, case)
        given_out = max(
            case.redis_seq,
            await _last_generated(redis, campaign_id),
            await claims.highest(connection, campaign_id),
        )
        trail = await _trail(redis, campaign_id, Position(case.applied, case.chain))
        # Where sales go on, the stream is longer by now than the head was.
        still = await redis.hget(campaign_keys(campaign_id).head, SEQ) == case.old[0].encode()
        if case.old == NO_HEAD and not given_out and not case.applied:
            raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
        await _fold(connection, case, trail, (view, findings), progress)
        handed = await _handed(await claims.unsettled(connection, campaign_id, case.seq))
        told = await _stray(redis, connection, case) if trail.wrong or trail.overlaps else []
    told += await _from_members(view, case)
    epochs = [told.epoch for told in reports.reports(campaign_id).values()]
    case.roll_epoch = max([*epochs, *(claim.epoch for claim in handed)], default=0)
    given_out = max(given_out, reports.highest(campaign_id, case.books.epoch))
    case.keep_stream = not trail.wrong and trail.ends == case.seq and not trail.overlaps
    case.differences += _misfit(case, trail, reports, given_out, still=still)
    case.unsteady = trail.wrong != "" or given_out > case.seq or not still
    if view is not None and case.redis_seq >= case.applied:
        await compare_members(view, case.books, findings)
        compare_operations(view, case.books, findings)
        if view.now.roster_rev >= 0:
            compare_revoked(view, revoked, findings)
        case.differences += [finding.what for finding in findings.told()]
    elif view is None and case.old != NO_HEAD:
        case.differences.append("the head in Redis cannot be read")
    if given_out > case.seq + LOST_MAX:
        raise Refused(
            Problem.UNAVAILABLE,
            f"{campaign_id}: Redis says that {given_out} events were given out, the ledger ends at "
            f"{case.seq}: that is not believable, and a recovery would void all between",
        )
    if case.differences and given_out > case.seq:
        await _refill(case, handed, told, given_out)
    case.differences = case.differences[:DIFFERENCES_MAX]
    return case


async def _refill(
    case: Examination, handed: list[Event], told: list[Event], given_out: int
) -> None:
    """Give every number that was given out beyond the ledger its place in it.

    What was handed in and does not stand is set down when the ledger has been applied so far
    (``claims.settle``); what only the stream told would go with it, and is set down before.
    """
    case.refilled = await refill(case.books, case.ended_ms, [*handed, *told], given_out)
    streamed = {id(event) for event in told}
    case.strays += [stray for stray in case.refilled.strays if id(stray[0]) in streamed]
    case.refilled.unused = len(case.refilled.strays) - sum(
        id(stray[0]) in streamed for stray in case.refilled.strays
    )
    added = await case.refilled.entries(case.chain)
    case.entries = [*case.entries, *added]
    case.seq, case.chain = added[-1].last, added[-1].chain
    case.clock_ms = max(case.clock_ms, added[-1].at_ms)
    case.keep_stream = False


def _misfit(
    case: Examination, trail: _Trail, reports: Reports, given_out: int, *, still: bool
) -> list[str]:
    """Say how head and stream differ from the ledger; ``still``: nothing was sold meanwhile."""
    if case.old == NO_HEAD:
        return ["Redis does not hold it"]
    if case.redis_seq < case.applied:
        return [f"Redis knows {case.redis_seq} events, PostgreSQL has applied {case.applied}"]
    if trail.wrong or trail.ends < case.redis_seq:
        return [f"the stream: {trail.wrong or 'it lacks its last event'}"]
    if still and case.redis_seq != case.seq:
        return [f"the head says event {case.redis_seq}, the ledger ends at {case.seq}"]
    if still and case.old[1] != case.chain:
        return ["the head has another chain hash than the ledger"]
    if lacking := what_lacks(reports, case.campaign_id, case.old_epoch, case.seq):
        return [lacking]
    if still and given_out > case.seq:
        return [f"events {case.seq + 1} to {given_out} are lost"]
    return []


async def _view(redis: Redis, campaign_id: str) -> RedisView | None:
    """Give what Redis holds; None where there is nothing, or nothing that can be read."""
    try:
        return await read_redis(redis, campaign_id)
    except (Gone, ResponseError, *DAMAGED):
        return None


async def _read_head(redis: Redis, scripts: Scripts, case: Examination) -> None:
    """Read head, identity and register; the head as bytes, since it may be damaged."""
    server, replication = await redis.info("server"), await redis.info("replication")
    seq, chain, epoch, clock, recovering, *identity = await EXAMINED.read_texts(
        redis, case.campaign_id
    )
    case.old = (seq, chain)
    case.old_epoch = int(epoch) if epoch.isdecimal() else 0
    # A clock that no event can carry would make the campaign's next event one that cannot be read.
    case.clock_ms = int(clock) if clock.isdecimal() and int(clock) == nearest(int(clock)) else 0
    case.frozen = recovering != ""
    case.trusted = not recovering and identity == [
        scripts.nonce,
        str(server["run_id"]),
        str(replication["master_replid"]),
    ]
    case.registered = bool(await redis.sismember(CAMPAIGNS, case.campaign_id))


async def _last_generated(redis: Redis, campaign_id: str) -> int:
    """Last number that the stream has given out; entries that were deleted since count."""
    try:
        information: Any = await redis.xinfo_stream(campaign_keys(campaign_id).stream)
    except ResponseError:
        return 0  # there is none, or something else in its place
    return int(information["last-generated-id"].split(b"-")[0])


async def _trail(redis: Redis, campaign_id: str, position: Position) -> _Trail:
    """Follow the stream: its own chain, then on from PostgreSQL's position."""
    if await _is_no_stream(redis, campaign_id):
        return _Trail([], 0, overlaps=False, wrong="something else stands in its place")
    history = History(redis, campaign_id, position)
    tail = [entry async for entry in history.follow()]
    return _Trail(tail, history.ends, not history.met and not tail, history.wrong)


async def _is_no_stream(redis: Redis, campaign_id: str) -> bool:
    kind = await redis.type(campaign_keys(campaign_id).stream)
    return kind not in {b"stream", b"none"}


async def _stray(redis: Redis, connection: Connection, case: Examination) -> list[Event]:
    """Give what a broken stream tells beyond the ledger, and note where it tells another story."""
    held: dict[int, Event] = {}
    beyond: list[Event] = []
    if await _is_no_stream(redis, case.campaign_id):
        return beyond
    async for rows in stream_rows(redis, case.campaign_id):
        for row in rows:
            try:
                events = parse_entry(*row).events()
            except CorruptLedger:
                continue  # what cannot be read tells no story
            told = [event for event in events if event.actor != CLOCK]
            held.update((event.seq, event) for event in told if event.seq <= case.applied)
            beyond += [event for event in told if event.seq > case.seq and event.kind != VOIDED]
    if held:
        async for chunk in ledger_events(connection, case.campaign_id):
            for event in chunk:
                stray = held.get(event.seq)
                if stray is not None and stray != event:
                    why = f"Redis sold it, but the ledger has {event.kind} under this number"
                    case.strays.append((stray, why))
    return beyond


async def _handed(handed_in: list[claims.Claim]) -> list[Event]:
    """Give what was handed in as the events that it was."""
    found, steps = [], Steps()
    for claim in handed_in:
        await steps.done()
        found.append(claim.event())
    return found


async def _from_members(view: RedisView | None, case: Examination) -> list[Event]:
    """Give the sales beyond the ledger that members' records hold: the stream may lack them."""
    found: list[Event] = []
    price_fen, steps = case.books.config.get("price_fen"), Steps()
    for member_no, (_, value) in ({} if view is None else view.members).items():
        await steps.done()
        try:
            records = parse_records(value)
        except ValueError:
            continue
        found += [
            Event(
                record.seq, record.at_ms, case.books.epoch, SOLD, member_no, record.showing,
                record.quantity, record.key_hash, price_fen,
            )
            for record in records
            if record.seq > case.seq
        ]  # fmt: skip
    return found


async def _fold(
    connection: Connection,
    case: Examination,
    trail: _Trail,
    compared: tuple[RedisView | None, Findings],
    progress: Progress | None,
) -> None:
    """Add up PostgreSQL's ledger and the sound tail; compare head and stock on the way."""
    view, findings = compared

    def add(events: list[Event]) -> None:
        for event in events:
            case.books.apply(event)
            case.ended_ms = max(case.ended_ms, event.at_ms)
            if view is not None and event.seq == view.now.seq:
                compare_state(view.now, case.books, findings)
                compare_rules(view.rules, case.books, findings)
        if progress is not None:
            progress("reading the ledger", case.books.seq, max(case.applied, case.books.seq))

    try:
        async for events in ledger_events(connection, case.campaign_id):
            add(events)
        steps = Steps()
        for entry in trail.tail:
            await steps.done(entry.last - entry.first + 1)
            add(entry.events())
            case.chain = entry.chain
    except (CorruptLedger, *DAMAGED) as error:
        raise Refused(
            Problem.UNAVAILABLE, f"{case.campaign_id}: the ledger itself is damaged: {error}"
        ) from None
    case.clock_ms = max(case.clock_ms, case.ended_ms)
    case.seq = case.books.seq
    case.entries = trail.tail
