"""Recovery: build a campaign's state in Redis again, from the ledger.

What is looked at first: does the head fit PostgreSQL's ledger, is the stream one chain, does what
Redis holds equal the fold of the events. Where all of it does, nothing is done. Otherwise the
campaign is marked as recovering, so that nothing can sell, looked at once more, and built anew
beside from PostgreSQL's ledger and what the stream soundly adds to it. One script puts it in its
place under the next epoch, with a ``recovered`` event.

Refused, in words: a stream that tells another story than PostgreSQL (a fork), and event numbers
that were given out and are nowhere to be found. Choosing between two histories, and voiding what
somebody was told, needs more evidence than these two stores hold.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sale.db import ledger
from sale.domain import Problem, Refused
from sale.events import GENESIS, Books, CorruptLedger, Entry, Event, check_chain, parse_entry
from sale.stock.keys import CAMPAIGNS, campaign_keys
from sale.stock.rebuild import Rebuild, freeze, rebuild
from sale.stock.scripts import CallReply, Scripts
from sale.stock.stream import stream_rows
from sale.usecases.comparison import (
    DAMAGED,
    Findings,
    RedisView,
    compare_cards,
    compare_operations,
    compare_revoked,
    compare_rules,
    compare_state,
    ledger_events,
    read_redis,
    revoked_at,
)
from sale.usecases.revocation import sync_campaign
from sale.usecases.verification import verify

TRIES: Final = 6
RETRY_PAUSE_S: Final = 0.1
LOCK_CLASS: Final = 0x53414C45
DIFFERENCES_MAX: Final = 20
REASON_CHARS: Final = 300

log = structlog.get_logger()


class Recovery(msgspec.Struct, frozen=True):
    """What was done, or would be: event numbers in Redis and PostgreSQL before, and one line."""

    campaign: str
    changed: bool
    redis_seq: int
    applied: int
    differences: list[str]
    says: str


async def recover(
    redis: Redis,
    scripts: Scripts,
    pool: asyncpg.Pool,
    campaign_id: str,
    *,
    actor: str,
    dry_run: bool,
) -> Recovery:
    """Recover one campaign. Raises Refused for an unknown one, a fork, and lost events."""
    async with _alone(pool, campaign_id) as connection:
        for _ in range(TRIES):
            case = await _examine(redis, scripts, connection, campaign_id)
            if case.refused:
                await asyncio.sleep(RETRY_PAUSE_S)
                continue  # a stream that is trimmed or grows meanwhile looks broken for a moment
            if dry_run:
                return case.report(changed=False)
            await redis.sadd(CAMPAIGNS, campaign_id)
            if not case.differences:
                return await _trust(redis, scripts, pool, case)
            if case.old != _NO_HEAD and not case.frozen:
                await freeze(redis, campaign_id, case.differences[0])
                continue
            if await rebuild(scripts, case.plan(actor)) is CallReply.OK:
                await sync_campaign(redis, scripts, pool, campaign_id)
                log.warning("campaign.recovered", campaign=campaign_id, why=case.differences[0])
                return case.report(changed=True)
    raise Refused(
        Problem.UNAVAILABLE, case.refused or f"{campaign_id}: its state keeps changing; try again"
    )


async def _trust(redis: Redis, scripts: Scripts, pool: asyncpg.Pool, case: "_Case") -> Recovery:
    """Mark as verified what is sound."""
    if not case.trusted and not await verify(redis, scripts, pool, case.campaign_id, whole=True):
        raise Refused(Problem.UNAVAILABLE, f"{case.campaign_id}: it could not be verified")
    return case.report(changed=not (case.trusted and case.registered))


class _Case(msgspec.Struct):
    """What was found of a campaign: ``books`` stand at ``seq`` and ``chain``."""

    campaign_id: str
    old: tuple[str, str] = ("", "")
    old_epoch: int = 0
    applied: int = 0
    seq: int = 0
    chain: str = GENESIS
    clock_ms: int = 0
    books: Books = msgspec.field(default_factory=Books)
    entries: list[Entry] = []
    keep_stream: bool = False
    frozen: bool = False
    trusted: bool = False
    registered: bool = True
    differences: list[str] = []
    refused: str = ""

    @property
    def redis_seq(self) -> int:
        """Number that the head says; 0 where there is none, or none that is a number."""
        return int(self.old[0]) if self.old[0].isdecimal() else 0

    def plan(self, actor: str) -> Rebuild:
        """Give what the campaign is to be built from."""
        return Rebuild(
            campaign_id=self.campaign_id,
            old=self.old,
            books=self.books,
            seq=self.seq,
            chain=self.chain,
            epoch=max(self.books.epoch, self.old_epoch) + 1,
            clock_ms=self.clock_ms,
            keep_stream=self.keep_stream,
            entries=self.entries,
            actor=actor,
            reason="; ".join(self.differences)[:REASON_CHARS],
        )

    def report(self, *, changed: bool) -> Recovery:
        """Word it."""
        if self.differences:
            says = f"rebuilt from event {self.seq}" if changed else "would be rebuilt"
        elif not self.trusted:
            says = "it fits; verified" if changed else "it fits, and would be verified"
        elif not self.registered:
            says = "registered again" if changed else "would be registered again"
        else:
            says = "nothing is wrong"
        return Recovery(
            self.campaign_id,
            changed,
            self.redis_seq,
            self.applied,
            self.differences,
            f"{self.campaign_id}: {says}",
        )


class _Trail(NamedTuple):
    """What the stream holds: the sound entries beyond PostgreSQL, and what is wrong with it."""

    tail: list[Entry]
    ends: int
    overlaps: bool
    wrong: str


async def _examine(
    redis: Redis, scripts: Scripts, connection: ledger.Connection, campaign_id: str
) -> _Case:
    """Look at everything, change nothing."""
    case = _Case(campaign_id, differences=[])
    findings = Findings()
    view = await _view(redis, campaign_id)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        case.applied, case.chain = await ledger.position(connection, campaign_id)
        revoked = await revoked_at(connection, view.now.roster_rev) if view else set()
        await _read_head(redis, scripts, case)
        given_out = max(case.redis_seq, await _last_generated(redis, campaign_id))
        trail = await _trail(redis, campaign_id, case.applied, case.chain)
        # Where sales go on, the stream is longer by now than the head was.
        still = await redis.hget(campaign_keys(campaign_id).head, "seq") == case.old[0].encode()
        if case.old == _NO_HEAD and not given_out and not case.applied:
            raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
        fork = await _fork(redis, connection, case) if trail.overlaps else ""
        await _fold(connection, case, trail, view, findings)
    if fork:
        case.refused = fork
    elif given_out > case.seq:
        case.refused = (
            f"{campaign_id}: events {case.seq + 1} to {given_out} were given out by Redis and are "
            f"neither in PostgreSQL nor sound in the stream ({trail.wrong or 'it lacks them'}); "
            "nothing was changed"
        )
    case.keep_stream = not trail.wrong and trail.ends == case.seq and not trail.overlaps
    case.differences += _misfit(case, trail, still=still)
    if view is not None and case.redis_seq >= case.applied:
        await compare_cards(view, case.books, findings)
        compare_operations(view, case.books, findings)
        if view.now.roster_rev >= 0:
            compare_revoked(view, revoked, findings)
        case.differences += [finding.what for finding in findings.told()]
    elif view is None and case.old != _NO_HEAD:
        case.differences.append("the head in Redis cannot be read")
    case.differences = case.differences[:DIFFERENCES_MAX]
    return case


def _misfit(case: _Case, trail: _Trail, *, still: bool) -> list[str]:
    """Say how head and stream differ from the ledger; ``still``: nothing was sold meanwhile."""
    if case.old == _NO_HEAD:
        return ["Redis does not hold it"]
    if case.redis_seq < case.applied:
        return [f"Redis knows {case.redis_seq} events, PostgreSQL has applied {case.applied}"]
    if trail.wrong or trail.ends < case.redis_seq:
        return [f"the stream: {trail.wrong or 'it lacks its last event'}"]
    if still and case.redis_seq != case.seq:
        return [f"the head says event {case.redis_seq}, the ledger ends at {case.seq}"]
    if still and case.old[1] != case.chain:
        return ["the head has another chain hash than the ledger"]
    return []


async def _view(redis: Redis, campaign_id: str) -> RedisView | None:
    """Give what Redis holds; None where there is nothing, or nothing that can be read."""
    try:
        return await read_redis(redis, campaign_id)
    except (ResponseError, *DAMAGED):
        return None


async def _read_head(redis: Redis, scripts: Scripts, case: _Case) -> None:
    """Read head, identity and register; the head as bytes, since it may be damaged."""
    server, replication = await redis.info("server"), await redis.info("replication")
    values: list[Any] = await redis.hmget(
        campaign_keys(case.campaign_id).head,
        ["seq", "chain", "epoch", "clock", "recovering", "nonce", "run_id", "replid"],
    )
    seq, chain, epoch, clock, recovering, *identity = (
        (value or b"").decode(errors="replace") for value in values
    )
    case.old = (seq, chain)
    case.old_epoch = int(epoch) if epoch.isdecimal() else 0
    case.clock_ms = int(clock) if clock.isdecimal() else 0
    case.frozen = recovering != ""
    case.trusted = not recovering and identity == [
        scripts.nonce,
        str(server["run_id"]),
        str(replication["master_replid"]),
    ]
    case.registered = bool(await redis.sismember(CAMPAIGNS, case.campaign_id))


async def _last_generated(redis: Redis, campaign_id: str) -> int:
    """Last number that the stream has given out; entries that were deleted since count."""
    stream = campaign_keys(campaign_id).stream
    if not await redis.exists(stream):
        return 0
    information: Any = await redis.xinfo_stream(stream)
    return int(information["last-generated-id"].split(b"-")[0])


async def _trail(redis: Redis, campaign_id: str, applied: int, chain: str) -> _Trail:
    """Follow the stream: its own chain, then on from PostgreSQL's position."""
    after: tuple[int, str] | None = None
    beyond, tail = (applied, chain), []
    ends, met, wrong = 0, False, ""
    async for rows in stream_rows(redis, campaign_id):
        for row in rows:
            ends = int(row[0].split(b"-")[0])
            try:
                entry = parse_entry(*row)
                entry.events()
                if ends > applied:
                    beyond = check_chain([entry], *beyond)
                    tail.append(entry)
                else:
                    after = check_chain([entry], *after) if after else (entry.last, entry.chain)
                    met = after == (applied, chain)
            except CorruptLedger as error:
                wrong, after = wrong or str(error), None
                if ends > applied:
                    return _Trail(tail, ends, not met and not tail, wrong)
    return _Trail(tail, ends, not met and not tail, wrong)


async def _fork(redis: Redis, connection: ledger.Connection, case: _Case) -> str:
    """Say where stream and PostgreSQL tell different stories of the same number; '' if nowhere."""
    held: dict[int, Event] = {}
    ends = 0
    async for rows in stream_rows(redis, case.campaign_id):
        for row in rows:
            try:
                events = parse_entry(*row).events()
            except CorruptLedger:
                continue  # what cannot be read tells no story
            held.update((event.seq, event) for event in events if event.seq <= case.applied)
            ends = events[-1].seq
    if not held:
        return ""
    async for chunk in ledger_events(connection, case.campaign_id):
        for event in chunk:
            if event.seq in held and held[event.seq] != event:
                return (
                    f"{case.campaign_id}: Redis and PostgreSQL tell different stories from event "
                    f"{event.seq} on: PostgreSQL goes on to {case.applied}, Redis to "
                    f"{max(ends, case.redis_seq)}; both may have been told to members, so nothing "
                    "was changed"
                )
    return ""


async def _fold(
    connection: ledger.Connection,
    case: _Case,
    trail: _Trail,
    view: RedisView | None,
    findings: Findings,
) -> None:
    """Add up PostgreSQL's ledger and the sound tail; compare head and stock on the way."""

    def add(events: list[Event]) -> None:
        for event in events:
            case.books.apply(event)
            case.clock_ms = max(case.clock_ms, event.at_ms)
            if view is not None and event.seq == view.now.seq:
                compare_state(view.now, case.books, findings)
                compare_rules(view.rules, case.books, findings)

    try:
        async for events in ledger_events(connection, case.campaign_id):
            add(events)
        for entry in trail.tail:
            add(entry.events())
            case.chain = entry.chain
    except (CorruptLedger, *DAMAGED) as error:
        raise Refused(
            Problem.UNAVAILABLE, f"{case.campaign_id}: the ledger itself is damaged: {error}"
        ) from None
    case.seq = case.books.seq
    case.entries = trail.tail


@asynccontextmanager
async def _alone(pool: asyncpg.Pool, campaign_id: str) -> AsyncIterator[ledger.Connection]:
    """Hold a connection and the right to recover this campaign. Raises Refused."""
    async with pool.acquire() as connection:
        mine = await connection.fetchval(
            "SELECT pg_try_advisory_lock($1, hashtext($2))", LOCK_CLASS, campaign_id
        )
        if not mine:
            raise Refused(Problem.UNAVAILABLE, f"{campaign_id}: it is being recovered already")
        try:
            yield connection
        finally:
            await connection.execute(
                "SELECT pg_advisory_unlock($1, hashtext($2))", LOCK_CLASS, campaign_id
            )


_NO_HEAD: Final = ("", "")
