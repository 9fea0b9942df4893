"""The ledger writer: carries every campaign's stream from Redis to PostgreSQL, in order.

One loop looks at the heads of all campaigns in one pipeline, reads what is new of those that have
something new, and applies it. Under load it waits a moment between rounds, so that a transaction
carries a thousand events and not fifty; a full batch is followed at once by the next.

Any number of writers may run. An advisory lock, held on a connection of its own, names the active
one. A holder that is stopped must lose it, so that connection has an idle timeout shorter than any
pause we mean to survive, and a heartbeat. The lock only saves work: what keeps two writers from
doing harm is the compare-and-set in ``db/ledger.py``.

Whatever fails is tried again for ever, with a bounded wait: PostgreSQL or Redis away stops
everything, a campaign whose ledger is broken stops alone. Nothing is lost meanwhile, because an
entry is trimmed from the stream only after it was applied and its retention has passed.

Rejected: a consumer group. Its pending list says what was delivered, not what was committed; the
applied number stands in the same transaction as the rows and cannot disagree with them.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from sale.config import Settings
from sale.db import ledger
from sale.db.ledger import Position
from sale.events import GENESIS, CorruptLedger, Entry, parse_entry
from sale.stock.keys import CAMPAIGNS, campaign_keys

PauseCampaign: TypeAlias = Callable[[str, str], Awaitable[object]]
"""``pause_campaign(campaign_id, reason)``; whatever it raises, it is tried again."""

LOCK: Final = 0x53414C45_0004
"""Advisory lock number of the active writer; ("SALE", 1 to 3) are the migrations' and roster's."""

APPLICATION: Final = "sale-writer"
APPLY: Final = "sale-writer-apply"
LOCK_TIMEOUT: Final = "2s"
HEARTBEAT_S: Final = 0.5
LOCK_POLL_S: Final = 0.25
CONNECT_TIMEOUT_S: Final = 5.0
APPLY_TIMEOUT_S: Final = 60.0
HEARTBEAT_TIMEOUT_S: Final = 5.0
REDIS_TIMEOUT_S: Final = 5.0
PAUSE_TIMEOUT_S: Final = 5.0
PAUSE_AGAIN_S: Final = 0.5
CLOSE_TIMEOUT_S: Final = 2.0

POLL_S: Final = 0.025
POLL_IDLE_S: Final = 0.05
IDLE_AFTER_ROUNDS: Final = 20
LAG_INTERVAL_S: Final = 0.1
BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 1.0

_T = TypeVar("_T")

ENTRY_EVENTS_MAX: Final = 512
"""No entry holds more: a batch of purchases (256) and what the clock changed before it."""

MARKS_PER_RETENTION: Final = 100


class LedgerMetrics:
    """The writer's metrics, registered in ``registry``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.lag_events = Gauge(
            "sale_ledger_lag_events",
            "Events that PostgreSQL does not have yet.",
            ["campaign"],
            registry=registry,
        )
        self.lag_seconds = Gauge(
            "sale_ledger_lag_seconds",
            "Age of the oldest event that PostgreSQL does not have yet; 0 where it has all.",
            ["campaign"],
            registry=registry,
        )
        self.written = Counter(
            "sale_ledger_written",
            "Events written to PostgreSQL.",
            registry=registry,
        )
        self.conflicts = Counter(
            "sale_ledger_conflicts",
            "Events that PostgreSQL refused to act on.",
            ["campaign"],
            registry=registry,
        )
        self.conflict_rows = Gauge(
            "sale_ledger_conflict_rows",
            "Events in table conflict: refused by PostgreSQL, ever since the campaign was made.",
            ["campaign"],
            registry=registry,
        )
        self.stuck = Gauge(
            "sale_ledger_stuck",
            "1 where a campaign's ledger cannot be applied: a gap, a broken chain.",
            ["campaign"],
            registry=registry,
        )

    def forget_lag(self) -> None:
        """Drop what only the active writer knows."""
        self.lag_events.clear()
        self.lag_seconds.clear()
        self.stuck.clear()
        self.conflict_rows.clear()


class _Backoff:
    """Doubling wait, bounded."""

    def __init__(self) -> None:
        self.wait_s = BACKOFF_FIRST_S

    def next(self) -> float:
        wait_s, self.wait_s = self.wait_s, min(self.wait_s * 2, BACKOFF_MAX_S)
        return wait_s


class _Campaign:
    """What the writer knows of one campaign."""

    def __init__(self, campaign_id: str, position: Position, now_ms: int) -> None:
        self.id = campaign_id
        self.stream = campaign_keys(campaign_id).stream
        self.head = campaign_keys(campaign_id).head
        self.position = position
        self.stuck: str | None = None
        self.pause_for: str | None = None
        self.pause_failed: str | None = None
        self.pause_not_before = 0.0
        self.not_before = 0.0
        self.backoff = _Backoff()
        # What was applied before this writer began is as old as its begin.
        self._marks: deque[tuple[int, int]] = deque([(position.applied, now_ms)])
        self._mark_begun_ms = now_ms

    def applied(self, position: Position, at_ms: int, now_ms: int, retention_ms: int) -> None:
        """Note a new position, and the moment of its last event for the trimming."""
        self.position = position
        if now_ms - self._mark_begun_ms < retention_ms // MARKS_PER_RETENTION and self._marks:
            self._marks[-1] = (position.applied, at_ms)
        else:
            self._marks.append((position.applied, at_ms))
            self._mark_begun_ms = now_ms

    def trim_to(self, now_ms: int, retention_ms: int, retention_events: int) -> int | None:
        """Number before which everything has passed both bounds of retention, once; or None."""
        passed = None
        while self._marks:
            seq, at_ms = self._marks[0]
            if at_ms + retention_ms > now_ms or seq > self.position.applied - retention_events:
                break
            passed = seq
            self._marks.popleft()
        return passed


class LedgerWriter:
    """Carries streams to PostgreSQL until told to stop. See the module's text."""

    def __init__(
        self,
        redis: Redis,
        database_url: str,
        settings: Settings,
        *,
        pause_campaign: PauseCampaign,
        metrics: LedgerMetrics | None = None,
    ) -> None:
        self._redis = redis
        self._database_url = database_url
        self._batch_events = max(settings.writer_batch_events, ENTRY_EVENTS_MAX)
        self._retention_ms = settings.ledger_retention_s * 1_000
        self._retention_events = settings.ledger_retention_events
        self._pause_campaign = pause_campaign
        self.metrics = metrics or LedgerMetrics(CollectorRegistry())
        self._campaigns: dict[str, _Campaign] = {}
        self._known_ids: list[str] = []
        self._stop = asyncio.Event()
        self._watching = False
        self._away: set[str] = set()
        self._standing_by = False
        self.active = False
        """Whether this writer holds the lock."""

    @property
    def stuck(self) -> dict[str, str]:
        """Campaigns whose ledger cannot be applied, and why."""
        return {c.id: c.stuck for c in self._campaigns.values() if c.stuck}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set; a batch that is under way is finished first."""
        self._stop = stop
        self._watching = True
        lag = asyncio.create_task(self._watch_lag(), name="ledger-lag")
        try:
            await self._serve_postgres()
        finally:
            # The loop sees for itself that it is over, should a library swallow the cancellation.
            self._watching = False
            lag.cancel()
            await asyncio.gather(lag, return_exceptions=True)
            self.active = False

    async def _serve_postgres(self) -> None:
        backoff = _Backoff()
        while not self._stop.is_set():
            try:
                async with self._lock() as beating, self._connection(APPLY) as conn:
                    if not self._stop.is_set():
                        await self._begin(conn)
                        self._back("postgres")
                        backoff = _Backoff()
                        await self._write(conn, beating)
            except (*_POSTGRES_AWAY, asyncpg.PostgresError) as error:
                self._lost("postgres", error)
                await self._pause(backoff.next())

    # The lock ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _lock(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Hold the advisory lock; yields its heartbeat, which ends when the lock is lost."""
        async with self._connection(APPLICATION) as conn:
            while not await conn.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                self._back("postgres")
                self._stand_by()
                await self._pause(LOCK_POLL_S)
                if self._stop.is_set():
                    break
            beating = asyncio.create_task(_heartbeat(conn), name="ledger-heartbeat")
            try:
                yield beating
            finally:
                self.active = False
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)

    def _stand_by(self) -> None:
        if self.active or not self._standing_by:
            log.info("ledger.writer_standby")
        self.active, self._standing_by = False, True
        self._campaigns.clear()
        self.metrics.forget_lag()

    @contextlib.asynccontextmanager
    async def _connection(self, name: str) -> AsyncIterator["asyncpg.Connection[Any]"]:
        conn = await asyncpg.connect(
            self._database_url,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=APPLY_TIMEOUT_S,
            server_settings={
                "application_name": name,
                "idle_in_transaction_session_timeout": LOCK_TIMEOUT,
                **({"idle_session_timeout": LOCK_TIMEOUT} if name == APPLICATION else {}),
            },
        )
        try:
            yield conn
        finally:
            with contextlib.suppress(*_POSTGRES_AWAY):
                await conn.close(timeout=CLOSE_TIMEOUT_S)

    # The loop ---------------------------------------------------------------------------------

    async def _write(self, conn: "asyncpg.Connection[Any]", beating: "asyncio.Task[None]") -> None:
        backoff, idle_rounds = _Backoff(), 0
        while not self._stop.is_set():
            if beating.done():
                raise _LockLost(f"heartbeat: {beating.exception()!r}")
            try:
                more, wrote = await self._round(conn)
            except redis_errors.RedisError as error:
                self._lost("redis", error)
                await self._pause(backoff.next())
                continue
            self._back("redis")
            backoff = _Backoff()
            idle_rounds = 0 if wrote else idle_rounds + 1
            if not more:
                await self._pause(POLL_IDLE_S if idle_rounds > IDLE_AFTER_ROUNDS else POLL_S)

    async def _begin(self, conn: "asyncpg.Connection[Any]") -> None:
        self._known_ids = []
        self.metrics.stuck.clear()
        self._campaigns = {
            campaign_id: _Campaign(campaign_id, position, _now_ms())
            for campaign_id, position in (await ledger.positions(conn)).items()
        }
        rows = await ledger.conflict_rows(conn)
        for campaign_id in self._campaigns:
            self.metrics.conflict_rows.labels(campaign_id).set(rows.get(campaign_id, 0))
        for campaign_id, why in (await ledger.conflicts_to_pause(conn)).items():
            self._campaigns[campaign_id].pause_for = why
        self.active, self._standing_by = True, False
        log.info("ledger.writer_active", campaigns=len(self._campaigns))

    async def _round(self, conn: "asyncpg.Connection[Any]") -> tuple[bool, bool]:
        """Look at every campaign once; whether there is more at once, and whether one was new."""
        now_ms, heads = await self._look()
        more = wrote = False
        for campaign, head in heads:
            if campaign.not_before > time.monotonic():
                continue
            before = campaign.position.applied
            try:
                more |= await self._tend(conn, campaign, _number(head), now_ms)
            except ledger.PositionMoved:
                campaign.position = await ledger.position(conn, campaign.id)
            except CorruptLedger as error:
                self._stick(campaign, str(error))
            except _PASS_ON:
                raise
            except Exception as error:  # noqa: BLE001 - no campaign's fault stops the others
                self._stick(campaign, f"{type(error).__name__}: {error.args[:1]}")
            wrote |= campaign.position.applied != before
        return more, wrote

    async def _tend(
        self, conn: "asyncpg.Connection[Any]", campaign: _Campaign, head: int, now_ms: int
    ) -> bool:
        """Do what one campaign needs; whether there is more at once."""
        applied, more = campaign.position.applied, False
        if head > applied:
            more = await self._carry(conn, campaign, now_ms)
        elif head < applied:
            raise CorruptLedger(f"Redis is at event {head}, PostgreSQL at {applied}")
        else:
            self._unstick(campaign)
        if campaign.pause_for and campaign.pause_not_before <= time.monotonic():
            await self._pause_for_conflict(conn, campaign)
        await self._trim(campaign, head, now_ms)
        return more

    async def _look(self) -> tuple[int, list[tuple[_Campaign, Any]]]:
        """Redis' clock (ms), and each campaign with what Redis says is its head's number."""
        asked = self._known_ids
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        pipe.smembers(CAMPAIGNS)
        for campaign_id in asked:
            pipe.hget(campaign_keys(campaign_id).head, "seq")
        # A key of the wrong type is its own campaign's trouble.
        clock, members, *numbers = await _bounded(pipe.execute(raise_on_error=False))
        _raise_where_lost([clock, members], numbers)
        known = sorted(_text(member) for member in members)
        now_ms = clock[0] * 1_000 + clock[1] // 1_000
        self._known_ids = known
        for campaign_id in {*asked, *known}:
            if campaign_id not in self._campaigns:
                begin = Position(0, GENESIS)
                self._campaigns[campaign_id] = _Campaign(campaign_id, begin, now_ms)
                self.metrics.conflict_rows.labels(campaign_id).set(0)
        return now_ms, [
            (self._campaigns[campaign_id], number)
            for campaign_id, number in zip(asked, numbers, strict=True)
            if number is not None
        ]

    async def _carry(
        self, conn: "asyncpg.Connection[Any]", campaign: _Campaign, now_ms: int
    ) -> bool:
        """Apply one batch of a campaign that has something new; whether it was a full one."""
        applied = campaign.position.applied
        # Numbers are the IDs, so the end of the range bounds the events, not only the entries.
        entries = await self._read(
            campaign.stream, f"({applied}-0", f"{applied + self._batch_events}-0"
        )
        if not entries:
            following = await self._read(campaign.stream, f"({applied}-0", "+", count=1)
            was = following[0].first if following else "nothing"
            raise CorruptLedger(f"event {applied + 1} is missing from the stream: next is {was}")
        done = await ledger.apply(conn, campaign.id, entries, after=campaign.position)
        campaign.applied(done.position, entries[-1].at_ms, now_ms, self._retention_ms)
        self.metrics.written.inc(done.events)
        self._unstick(campaign)
        for conflict in done.conflicts:
            self.metrics.conflicts.labels(campaign.id).inc()
            self.metrics.conflict_rows.labels(campaign.id).inc()
            log.error("ledger.conflict", campaign=campaign.id, seq=conflict.seq, why=conflict.why)
            campaign.pause_for = f"event {conflict.seq}: {conflict.why}"
        return done.events > self._batch_events - ENTRY_EVENTS_MAX

    async def _read(
        self, stream: str, first: str, last: str, *, count: int | None = None
    ) -> list[Entry]:
        rows: Any = await _bounded(
            self._redis.xrange(stream, first, last, count or self._batch_events)
        )
        return [parse_entry(entry_id, fields) for entry_id, fields in rows]

    async def _trim(self, campaign: _Campaign, head: int, now_ms: int) -> None:
        passed = campaign.trim_to(now_ms, self._retention_ms, self._retention_events)
        if passed is not None and passed > 0:
            # The last entry is the anchor that the scripts check: it stays in any case.
            bound = f"{min(passed, head)}-0"
            trimming = self._redis.xtrim(campaign.stream, minid=bound, approximate=False)
            try:
                await _bounded(trimming)
            except redis_errors.ResponseError as error:
                self._lost("trim", error)
            else:
                self._back("trim")

    async def _pause_for_conflict(
        self, conn: "asyncpg.Connection[Any]", campaign: _Campaign
    ) -> None:
        try:
            async with asyncio.timeout(PAUSE_TIMEOUT_S):
                await self._pause_campaign(campaign.id, f"ledger conflict, {campaign.pause_for}")
        except Exception as error:  # noqa: BLE001 - whatever it was, it is tried again
            if campaign.pause_failed != repr(error):
                campaign.pause_failed = repr(error)
                log.warning("ledger.pause_failed", campaign=campaign.id, why=repr(error))
            # The ledger goes on meanwhile: it holds what members were told.
            campaign.pause_not_before = time.monotonic() + PAUSE_AGAIN_S
            return
        campaign.pause_failed = None
        await ledger.mark_paused(conn, campaign.id)
        campaign.pause_for = None

    def _stick(self, campaign: _Campaign, why: str) -> None:
        campaign.not_before = time.monotonic() + campaign.backoff.next()
        if campaign.stuck != why:
            campaign.stuck = why
            self.metrics.stuck.labels(campaign.id).set(1)
            log.error("ledger.stuck", campaign=campaign.id, why=why)

    def _unstick(self, campaign: _Campaign) -> None:
        if campaign.stuck:
            campaign.stuck = None
            campaign.backoff = _Backoff()
            self.metrics.stuck.labels(campaign.id).set(0)
            log.info("ledger.unstuck", campaign=campaign.id)

    # The lag ----------------------------------------------------------------------------------

    async def _watch_lag(self) -> None:
        """Keep the lag right, also while PostgreSQL is away and the loop waits for it."""
        while self._watching:
            with contextlib.suppress(redis_errors.RedisError, CorruptLedger):
                await self._measure_lag()
            await asyncio.sleep(LAG_INTERVAL_S)

    async def _measure_lag(self) -> None:
        watched = list(self._campaigns.values())
        if not watched:
            return
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        for campaign in watched:
            pipe.hget(campaign.head, "seq")
        clock, *numbers = await _bounded(pipe.execute(raise_on_error=False))
        _raise_where_lost([clock], numbers)
        now_ms = clock[0] * 1_000 + clock[1] // 1_000
        for campaign, number in zip(watched, numbers, strict=True):
            head = int(number) if isinstance(number, bytes) and number.isdigit() else 0
            behind = max(head - campaign.position.applied, 0)
            age_ms = 0
            if behind:
                oldest = await self._read(
                    campaign.stream, f"({campaign.position.applied}-0", "+", count=1
                )
                age_ms = max(now_ms - oldest[0].at_ms, 0) if oldest else 0
            if self._campaigns.get(campaign.id) is campaign:
                self.metrics.lag_events.labels(campaign.id).set(behind)
                self.metrics.lag_seconds.labels(campaign.id).set(age_ms / 1_000)

    # What is away -----------------------------------------------------------------------------

    def _lost(self, what: str, error: Exception) -> None:
        if what not in self._away:
            self._away.add(what)
            log.error(_LOST[what], why=f"{type(error).__name__}: {error}")

    def _back(self, what: str) -> None:
        if what in self._away:
            self._away.remove(what)
            log.info(_BACK[what])

    async def _pause(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), wait_s)


class _LockLost(Exception):  # noqa: N818 - says what happened
    """The heartbeat failed: another writer may hold the lock by now."""


async def _heartbeat(conn: "asyncpg.Connection[Any]") -> None:
    """Keep the lock's connection from its idle timeout; ends by the error that says it is lost."""
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        await conn.execute("SELECT 1", timeout=HEARTBEAT_TIMEOUT_S)


async def _bounded(call: Awaitable[_T]) -> _T:
    """Wait for Redis, but not for ever: a stopped one neither answers nor hangs up.

    Not by ``wait_for``: in Python 3.11 it swallows a cancellation that meets the answer.
    """
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            return await call
    except TimeoutError as error:
        raise redis_errors.TimeoutError(f"no answer in {REDIS_TIMEOUT_S:g} s") from error


def _raise_where_lost(shared: list[Any], numbers: list[Any]) -> None:
    """Raise what is no campaign's own fault."""
    for reply in shared:
        if isinstance(reply, Exception):
            raise reply
    for reply in numbers:
        if isinstance(reply, Exception) and not isinstance(reply, redis_errors.ResponseError):
            raise reply


def _number(head: object) -> int:
    """Give a head's number. Raises what Redis said, or CorruptLedger."""
    if isinstance(head, Exception):
        raise head
    if not isinstance(head, bytes) or not head.isdigit():
        raise CorruptLedger(f"the head in Redis says event {head!r}")
    return int(head)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _text(member: bytes | str) -> str:
    return member.decode() if isinstance(member, bytes) else member


log: structlog.stdlib.BoundLogger = structlog.get_logger()

_LOST: Final = {
    "postgres": "ledger.postgres_lost",
    "redis": "ledger.redis_lost",
    "trim": "ledger.trim_failed",
}
_BACK: Final = {
    "postgres": "ledger.postgres_back",
    "redis": "ledger.redis_back",
    "trim": "ledger.trim_back",
}
_POSTGRES_AWAY: Final = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    _LockLost,
)
_PASS_ON: Final = (*_POSTGRES_AWAY, redis_errors.ConnectionError, redis_errors.TimeoutError)
"""What is no campaign's own fault."""
