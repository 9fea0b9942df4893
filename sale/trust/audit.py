"""The audit: checks every invariant across Redis, the ledger and PostgreSQL, also during sales.

1. It reads Redis in chunks, each in one atomic step with the current event number.
2. It waits until the writer has applied the highest of those numbers.
3. It reads PostgreSQL in one snapshot and folds the ledger by ``CampaignState``, which shares no
   code with the scripts. It checks window, limit and stock before each event, and compares the
   orders and counters with the ledger.
4. It compares each chunk of Redis with the fold at the chunk's event number.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.config import Durability
from sale.db import queries, read
from sale.db.errors import POSTGRES_ERRORS
from sale.domain.campaign import State
from sale.domain.clock import from_ms, nearest, rfc3339
from sale.domain.problem import DAMAGED, Problem, Refused
from sale.ledger.chain import CorruptLedger, Event, Position
from sale.ledger.fold import CampaignState
from sale.ledger.kinds import KINDS, RECOVERED
from sale.stock.catalogue import campaign_ids, read_campaign, redis_now_ms
from sale.stock.durability import durability_faults
from sale.stock.errors import REDIS_ERRORS
from sale.stock.head import POSITION
from sale.stock.keys import campaign_keys
from sale.stock.troubles import read_troubles
from sale.trust.audit_postgres import (
    compare_campaign,
    compare_changes,
    compare_orders,
    compare_showings,
)
from sale.trust.comparison import (
    INVARIANTS,
    Finding,
    Findings,
    FoldComparison,
    Gone,
    RedisView,
    compare_operations,
    compare_revoked,
    read_redis,
    revoked_at,
)
from sale.trust.history import (
    QUERY_TIMEOUT_S,
    History,
    applied_number,
    ledger_events,
    wait_applied,
)
from sale.trust.isolation import TROUBLES, in_words

__all__ = ["INVARIANTS", "AuditReport", "CampaignAudit", "CouldNotCheck", "Finding", "audit"]

APPLIED_WAIT_S: Final = 20.0
"""Longest time without progress of the writer; the whole may take longer."""
APPLIED_WAIT_STUCK_S: Final = 1.0
"""The same if the writer has reported that it cannot apply this ledger."""
ROSTER_PATIENCE_MS: Final = 2_000
"""A second that INV-9 allows, and one for the commit that follows the moment of a change."""


class CouldNotCheck(Exception):  # noqa: N818 - the name states the outcome
    """The audit was not possible, so its result is unknown."""


class CampaignAudit(msgspec.Struct, frozen=True, omit_defaults=True):
    """Findings in one campaign, at most ten findings of each invariant.

    ``checked`` is false if the check was not possible; then the one finding says why.
    """

    id: str
    clean: bool
    findings: list[Finding]
    checked: bool = True


class AuditReport(msgspec.Struct, frozen=True):
    """The whole audit, as ``sale audit --json`` prints it."""

    clean: bool
    checked_at: str
    campaigns: list[CampaignAudit]


async def audit(
    redis: Redis,
    pool: asyncpg.Pool,
    campaign_id: str | None = None,
    *,
    applied_wait_s: float | None = None,
    durability: Durability = "fsync",
    replicas_min: int = 1,
    progress: Callable[[int, int, str], None] = lambda _done, _of, _campaign: None,
) -> AuditReport:
    """Check one campaign or all. Raises CouldNotCheck, and Refused for an unknown ID.

    ``applied_wait_s`` is how long the writer may make no progress (None: 20). A Redis that is
    weaker than ``durability`` is a finding, also if other parts only warn of it. If some campaigns
    can be checked and others cannot, the report says so.
    """
    wait_s = APPLIED_WAIT_S if applied_wait_s is None else applied_wait_s
    try:
        stored = [row[0] for row in await pool.fetch(_SQL["campaigns"])]
        registered = await campaign_ids(redis)
        ids = sorted({*registered, *stored})
        if campaign_id is not None:
            if campaign_id not in ids:
                raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
            ids = [campaign_id]
        faults = await durability_faults(redis, durability, replicas_min)
        stuck = (await read_troubles(redis))["writer"]
        audits: list[CampaignAudit] = []
        for number, each in enumerate(ids):
            progress(number, len(ids), each)
            findings = Findings()
            for fault in faults:
                findings.add("INV-3", fault)
            check = _Check(redis, pool, each, findings, wait_s, stuck.get(each, ""))
            done = await _audited(check, findings, each, registered=each in registered)
            if done is None:
                continue
            if not done.clean and await pool.fetchval(_SQL["purged"], each):
                continue  # a rehearsal that was purged during the audit
            audits.append(done)
        checked_at = rfc3339(await redis_now_ms(redis))
    except (*REDIS_ERRORS, *POSTGRES_ERRORS) as error:
        raise CouldNotCheck(f"{type(error).__name__}: {error}") from None
    if audits and not any(each.checked for each in audits):
        raise CouldNotCheck("; ".join(each.findings[0].what for each in audits))
    return AuditReport(all(each.clean for each in audits), checked_at, audits)


async def _audited(
    check: "_Check", findings: Findings, campaign_id: str, *, registered: bool
) -> CampaignAudit | None:
    """Check one campaign and catch errors of its own; None if there is nothing to check.

    Raises the stores' errors if they are away.
    """
    try:
        if not await check.run(registered=registered):
            return None
    except Gone:
        findings.add("INV-8", "Redis has lost it while it was read")
    except CorruptLedger as error:
        findings.add("INV-5", f"the stream: {error}")
    except (CouldNotCheck, *TROUBLES) as error:
        why = str(error) if isinstance(error, CouldNotCheck) else in_words(error)
        unchecked = Finding("INV-5", f"could not check: {why}")
        return CampaignAudit(campaign_id, clean=False, findings=[unchecked], checked=False)
    found = findings.all()
    return CampaignAudit(campaign_id, clean=not found, findings=found)


class _Check:
    """The audit of one campaign."""

    def __init__(
        self,
        redis: Redis,
        pool: asyncpg.Pool,
        campaign_id: str,
        findings: Findings,
        applied_wait_s: float,
        stuck: str,
    ) -> None:
        self._redis = redis
        self._pool = pool
        self._id = campaign_id
        self._keys = campaign_keys(campaign_id)
        self._findings = findings
        self._stuck = stuck
        self._applied_wait_s = (
            min(applied_wait_s, APPLIED_WAIT_STUCK_S) if stuck else applied_wait_s
        )

    async def run(self, *, registered: bool) -> bool:
        """Check the campaign; False if there is nothing to check. Raises CouldNotCheck."""
        try:
            view = await read_redis(self._redis, self._id)
        except DAMAGED as error:
            self._findings.add("INV-8", in_words(error))
            return True
        if view is None:
            return await self._lost()
        if not registered:
            self._findings.add("INV-5", "it is not registered: the writer does not see it")
        if view.now.recovering:
            self._findings.add("INV-8", f"it is recovering: {view.now.recovering}")
        await self._check_stream_end(view)
        if not await self._wait_applied(view.highest):
            return True
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            await connection.execute(
                # In a rush the tables outgrow their statistics: a nested loop that was planned for
                # a hundred rows took 14 s for 20,000.
                f"SET LOCAL statement_timeout = '{QUERY_TIMEOUT_S:.0f}s';"
                "SET LOCAL enable_nestloop = off"
            )
            position = await connection.fetchrow(_SQL["applied"], self._id)
            if position is None:
                return True
            await self._check_chain(Position(position["applied"], position["chain"]), view.highest)
            books = await self._fold(connection, position, view)
            await compare_orders(connection, view.now.campaign, self._findings)
            await compare_changes(connection, self._id, books, self._findings)
            await self._check_roster(connection, view)
        compare_operations(view, books, self._findings)
        return True

    async def _lost(self) -> bool:
        applied = await self._pool.fetchval(
            "SELECT applied FROM campaign WHERE campaign_id = $1 AND state <> 'deleted'", self._id
        )
        if applied is None:
            return False
        # It may have been created just now: it is in Redis first, and the next audit checks it.
        if await read_campaign(self._redis, self._id) is not None:
            return False
        what = (
            "has no whole head" if await self._redis.exists(self._keys.head) else "does not hold it"
        )
        self._findings.add("INV-8", f"Redis {what}, PostgreSQL has {applied} events")
        return True

    async def _check_stream_end(self, view: RedisView) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(self._keys.head, POSITION.fields)
            pipe.xrevrange(self._keys.stream, count=1)
            values, last = await pipe.execute()
        head = POSITION.parse(values)
        if head.seq is None:
            raise Gone(self._id)
        seq = head.seq
        ends = int(last[0][0].split(b"-")[0]) if last else 0
        if ends != seq:
            self._findings.add("INV-5", f"head says event {seq}, the stream ends at {ends}")
        elif last[0][1].get(b"h") != head.chain.encode():
            self._findings.add("INV-5", f"head and stream have another chain hash at event {seq}")
        if seq < view.now.seq:
            self._findings.add("INV-8", f"Redis went back from event {view.now.seq} to {seq}")

    async def _wait_applied(self, seq: int) -> bool:
        """Wait for the writer; False if a fault of the ledger itself keeps it from applying."""
        applied = await wait_applied(self._applied, seq, patience_s=self._applied_wait_s)
        if applied >= seq:
            return True
        found = len(self._findings.all())
        async with self._pool.acquire() as connection:
            await self._check_chain(await read.position(connection, self._id), seq)
        if self._stuck:
            self._findings.add("INV-5", f"the writer cannot apply it: {self._stuck}")
        if len(self._findings.all()) > found:
            return False
        raise CouldNotCheck(
            f"{self._id}: PostgreSQL has applied {applied} of {seq} events: is the writer running?"
        )

    async def _applied(self) -> int:
        return await applied_number(self._pool, self._id)

    async def _check_chain(self, position: Position, to: int) -> None:
        """Check that the stream up to ``to`` is one chain that passes through PostgreSQL's."""
        if ((await POSITION.read(self._redis, self._id)).seq or 0) < position.seq:
            self._findings.add(
                "INV-8", f"Redis is behind PostgreSQL, which has applied event {position.seq}"
            )
        history = History(self._redis, self._id, position, applied_now=self._applied)
        await history.read(to=max(position.seq, to))
        if history.wrong:
            self._findings.add("INV-5", f"the stream: {history.wrong}")
        elif not await history.passes():
            self._findings.add("INV-5", "the chain in Redis does not pass through PostgreSQL's")

    async def _fold(
        self,
        connection: Any,  # noqa: ANN401 - asyncpg's connection proxy
        position: Mapping[str, Any],
        view: RedisView,
    ) -> CampaignState:
        """Fold PostgreSQL's ledger to the end of the snapshot; check each event on the way."""
        books, rules = CampaignState(), _Rules(self._findings)
        comparison = FoldComparison(view, self._findings)
        async for events in ledger_events(connection, self._id):
            for event in events:
                try:
                    rules.check(books, event)
                    books.apply(event)
                except (CorruptLedger, *DAMAGED) as error:
                    self._findings.add("INV-5", f"PostgreSQL's ledger: {error}")
                    return books
                comparison.at(books)
        comparison.finish(books)
        if not comparison.compared:
            self._findings.add("INV-5", f"PostgreSQL's ledger does not reach {view.now.seq}")
        if books.seq != position["applied"]:
            self._findings.add(
                "INV-5",
                f"PostgreSQL has applied {position['applied']}, its ledger ends at {books.seq}",
            )
        compare_campaign(position, books, self._findings)
        await compare_showings(connection, self._id, books, self._findings)
        return books

    async def _check_roster(
        self,
        connection: Any,  # noqa: ANN401 - asyncpg's connection proxy
        view: RedisView,
    ) -> None:
        """Check that Redis follows the roster, and that its set equals the roster's."""
        rev = view.now.roster_rev
        if rev < 0 or view.now.state is State.DELETED:
            return
        due = from_ms(nearest(view.now.as_of_ms - ROSTER_PATIENCE_MS))
        behind = await connection.fetchval(_SQL["roster_ahead"], rev, due)
        if behind:
            self._findings.add("INV-9", f"Redis has not followed {behind} changes of the roster")
        compare_revoked(view, await revoked_at(connection, rev), self._findings)


class _Rules:
    """Rules that must hold before each event; ``ledger/kinds.py`` has those of each kind."""

    def __init__(self, findings: Findings) -> None:
        self._find = findings.add
        self._clock_ms = 0

    def check(self, books: CampaignState, event: Event) -> None:
        """Check an event against the state before it."""
        if event.at_ms < self._clock_ms:
            self._find("INV-7", f"event {event.seq}: the clock went back")
        self._clock_ms = max(self._clock_ms, event.at_ms)
        if event.epoch < books.epoch or (event.epoch > books.epoch and event.kind != RECOVERED):
            self._find("INV-8", f"event {event.seq}: epoch {event.epoch} after {books.epoch}")
        if event.kind in KINDS:
            for invariant, what in KINDS[event.kind].breaches(books, event):
                self._find(invariant, f"event {event.seq}: {what}")


_SQL: Final = queries.load("audit")
