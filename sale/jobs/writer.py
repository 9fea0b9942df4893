"""The ledger writer copies every campaign's stream from Redis to PostgreSQL, in order.

One loop reads the heads of all campaigns in one pipeline, then reads and applies the new events of
each campaign that has some. Under load it pauses briefly between rounds, so that a transaction
holds a thousand events and not fifty; after a full batch it continues at once.

Any number of writers may run; ``leadership.py`` selects the active one. Two writers do no harm
because of the compare-and-set in ``db/apply.py``, not because of the lock.

The writer retries every failure without limit, with a bounded wait. If PostgreSQL or Redis is away,
all campaigns wait; if a campaign's ledger is broken, only that campaign waits. PostgreSQL counts as
away also when it answers and cannot write: read-only, disk full, out of connections. The writer
keeps the lock meanwhile, because a standby could do no better. No event is lost, because an entry
is trimmed from the stream only after it was applied and its retention has passed.

Rejected: a consumer group. Its pending list says what was delivered, not what was committed. The
applied number is committed in the same transaction as the rows and cannot disagree with them.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog
from prometheus_client import CollectorRegistry
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from sale.config import Settings
from sale.db import apply, locks, read
from sale.db.apply import Applied, PositionMoved, apply_entries
from sale.db.errors import POSTGRES_AWAY, POSTGRES_ERRORS, in_words
from sale.jobs.backoff import Backoff, pause
from sale.jobs.leadership import Leadership
from sale.jobs.outages import Outages
from sale.jobs.pooling import connected
from sale.jobs.writer_campaign import LedgerCampaign
from sale.jobs.writer_lag import LedgerLag
from sale.jobs.writer_metrics import LedgerMetrics
from sale.jobs.writer_source import LedgerSource, bounded, readable
from sale.ledger.chain import GENESIS, CorruptLedger, Entry, Position
from sale.stock.errors import REDIS_AWAY
from sale.stock.errors import in_words as redis_in_words
from sale.stock.head import WRITER
from sale.stock.scripts import Scripts
from sale.stock.troubles import Troubles

if TYPE_CHECKING:
    import asyncpg

PauseCampaign: TypeAlias = Callable[[str, str], Awaitable[object]]
"""``pause_campaign(campaign_id, reason)``; the writer retries it after any exception."""

IDLE_TRANSACTION_TIMEOUT: Final = "2s"
ROW_LOCK_TIMEOUT: Final = "2s"
"""A foreign lock on a campaign's row delays only that campaign."""
APPLY_TIMEOUT_S: Final = 60.0
PAUSE_TIMEOUT_S: Final = 5.0
PAUSE_AGAIN_S: Final = 0.5
COUNT_CONFLICTS_S: Final = 10.0

POLL_S: Final = 0.025
POLL_IDLE_S: Final = 0.05
IDLE_AFTER_ROUNDS: Final = 20

ENTRY_EVENTS_MAX: Final = 512
"""Most events of an entry: a batch of purchases (256) and the clock's events before it."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class LedgerWriter:
    """Copies streams to PostgreSQL until it is stopped. See the module's docstring."""

    def __init__(
        self,
        redis: Redis,
        scripts: Scripts,
        database_url: str,
        settings: Settings,
        *,
        pause_campaign: PauseCampaign,
        metrics: LedgerMetrics | None = None,
    ) -> None:
        self._source = LedgerSource(redis)
        self._database_url = database_url
        self._batch_events = max(settings.writer_batch_events, ENTRY_EVENTS_MAX)
        self._retention_ms = settings.ledger_retention_s * 1_000
        self._retention_events = settings.ledger_retention_events
        self._pause_campaign = pause_campaign
        self.metrics = metrics or LedgerMetrics(CollectorRegistry())
        self._counted_s = 0.0
        self._campaigns: dict[str, LedgerCampaign] = {}
        self._known_ids: list[str] = []
        self._stop = asyncio.Event()
        self._leadership = Leadership(database_url, locks.WRITER)
        self._applying: asyncpg.Connection[Any] | None = None
        self._lag = LedgerLag(
            self._source,
            scripts,
            self.metrics,
            campaigns=lambda: self._campaigns,
            may_write=lambda: self._leadership.sure,
        )
        self._troubles = Troubles(redis, "writer")
        self._outages = Outages()
        self._backoff = Backoff()
        # Whether the last round applied events, and whether it skipped a failing campaign.
        self._applied_some = self._skipped = False
        self._standing_by = False
        self.active = False
        """Whether this writer holds the lock."""

    @property
    def stuck(self) -> dict[str, str]:
        """Campaigns whose ledger cannot be applied, with the reason."""
        return {c.id: c.stuck for c in self._campaigns.values() if c.stuck}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set; finish the current batch first.

        Raises UnfitProxy if the lock cannot be held.
        """
        self._stop = stop
        try:
            async with self._lag.watching():
                while not stop.is_set():
                    try:
                        await self._leadership.lead(
                            stop, self._lead, stand_by=self._stand_by, sever=self._sever
                        )
                    except POSTGRES_ERRORS as error:
                        await self._wait_for_postgres(error)
        finally:
            self._set_active(active=False)

    # The lock ---------------------------------------------------------------------------------

    def _stand_by(self) -> None:
        self._outages.back("postgres")
        if not self._standing_by:
            self._standing_by = True
            self._campaigns.clear()
            self.metrics.forget_lag()
            log.info("ledger.writer_standby")

    async def _lead(self) -> None:
        """Write while the lock is held."""
        self._standing_by, began = False, False
        try:
            while not self._stop.is_set():
                try:
                    async with self._connection() as conn:
                        if not began:
                            await locks.expel(conn, locks.WRITER_APPLIES)
                        await self._begin(conn)
                        if not began:
                            began = True
                            log.info("ledger.writer_active", campaigns=len(self._campaigns))
                        await self._write(conn)
                except POSTGRES_ERRORS as error:
                    await self._wait_for_postgres(error)
        finally:
            self._set_active(active=False)

    def _sever(self) -> None:
        if self._applying is not None:
            self._applying.terminate()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        async with connected(
            self._database_url, locks.WRITER_APPLIES, command_timeout_s=APPLY_TIMEOUT_S
        ) as conn:
            self._applying = conn
            try:
                await conn.execute(
                    f"SET idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_TIMEOUT}';"
                    f"SET lock_timeout = '{ROW_LOCK_TIMEOUT}'"
                )
                yield conn
            finally:
                self._applying = None

    def _set_active(self, *, active: bool) -> None:
        self.active = active
        self.metrics.active.set(active)

    # The loop ---------------------------------------------------------------------------------

    async def _write(self, conn: "asyncpg.Connection[Any]") -> None:
        backoff, idle_rounds = Backoff(), 0
        while not self._stop.is_set():
            try:
                more = await self._round(conn)
            except redis_errors.RedisError as error:
                self._outages.lost("redis", redis_in_words(error))
                await pause(self._stop, backoff.next())
                continue
            self._outages.back("redis")
            backoff.reset()
            if self._applied_some or not self._skipped:
                # Only a write proves it: a read-only or full PostgreSQL still answers reads.
                self._outages.back("postgres")
                self._backoff.reset()
            idle_rounds = 0 if self._applied_some else idle_rounds + 1
            if not more:
                idle = idle_rounds > IDLE_AFTER_ROUNDS
                await pause(self._stop, POLL_IDLE_S if idle else POLL_S)

    async def _begin(self, conn: "asyncpg.Connection[Any]") -> None:
        positions = await read.positions(conn)
        for campaign_id in {*self._campaigns, *positions}:
            position = positions.get(campaign_id, Position(0, GENESIS))
            # Keep the known objects, so that each problem is logged once and a failing campaign
            # keeps its back-off.
            campaign = self._campaigns.setdefault(
                campaign_id, LedgerCampaign(campaign_id, position, _now_ms())
            )
            campaign.position, campaign.pause_for = position, None
        await self._count_conflicts(conn)
        for campaign_id, why in (await apply.conflicts_to_pause(conn)).items():
            if campaign_id in self._campaigns:
                self._campaigns[campaign_id].pause_for = why
        self._set_active(active=True)

    async def _count_conflicts(self, conn: "asyncpg.Connection[Any]") -> None:
        """Refresh the gauge, because recoveries and reports of API processes add rows too."""
        rows = await apply.conflict_rows(conn)
        for campaign_id in self._campaigns:
            self.metrics.conflict_rows.labels(campaign_id).set(rows.get(campaign_id, 0))
        self._counted_s = time.monotonic()

    async def _round(self, conn: "asyncpg.Connection[Any]") -> bool:
        """Process every campaign once; return whether more events are ready at once."""
        if time.monotonic() - self._counted_s > COUNT_CONFLICTS_S:
            await self._count_conflicts(conn)
        now_ms, heads = await self._read_heads()
        more = self._applied_some = self._skipped = False
        for campaign, head in heads:
            if campaign.not_before > time.monotonic():
                self._skipped = True
                continue
            before = campaign.position.seq
            try:
                seq = readable(head).seq
                if seq is not None:
                    more |= await self._process(conn, campaign, seq, now_ms)
                campaign.backoff.reset()
            except PositionMoved:
                campaign.position = await read.position(conn, campaign.id)
            except CorruptLedger as error:
                self._set_stuck(campaign, str(error))
            except _STORE_ERRORS:
                # It may be this campaign's fault alone, so the next round begins with the others.
                campaign.not_before = time.monotonic() + campaign.backoff.next()
                raise
            except Exception as error:  # noqa: BLE001 - one campaign must not stop the others
                self._set_stuck(campaign, f"{type(error).__name__}: {error.args[:1]}")
            self._applied_some |= campaign.position.seq != before
        if self._leadership.sure:
            await bounded(self._troubles.report(self.stuck))
        return more

    async def _process(
        self, conn: "asyncpg.Connection[Any]", campaign: LedgerCampaign, head: int, now_ms: int
    ) -> bool:
        """Process one campaign; return whether more of its events are ready at once."""
        applied, more = campaign.position.seq, False
        if head > applied:
            more = await self._copy_batch(conn, campaign, now_ms)
        elif head < applied:
            raise CorruptLedger(f"Redis is at event {head}, PostgreSQL at {applied}")
        else:
            self._clear_stuck(campaign)
        due = campaign.pause_not_before <= time.monotonic()
        if campaign.pause_for and due and self._leadership.sure:
            await self._pause_for_conflict(conn, campaign)
        await self._trim(campaign, head, now_ms)
        return more

    async def _read_heads(self) -> tuple[int, list[tuple[LedgerCampaign, Any]]]:
        """Read Redis' clock (ms), and each campaign's head, or the error of reading it."""
        known = self._known_ids
        seen = await self._source.read_heads(known, WRITER)
        self._known_ids = seen.campaign_ids
        for campaign_id in {*known, *seen.campaign_ids}:
            if campaign_id not in self._campaigns:
                begin = Position(0, GENESIS)
                self._campaigns[campaign_id] = LedgerCampaign(campaign_id, begin, seen.now_ms)
                self.metrics.conflict_rows.labels(campaign_id).set(0)
        found = zip(known, seen.heads, strict=True)
        return seen.now_ms, [(self._campaigns[campaign_id], head) for campaign_id, head in found]

    async def _copy_batch(
        self, conn: "asyncpg.Connection[Any]", campaign: LedgerCampaign, now_ms: int
    ) -> bool:
        """Apply one batch of a campaign's new events; return whether it was a full one."""
        applied = campaign.position.seq
        # Entry IDs are event numbers, so the range's end bounds the events, not only the entries.
        entries = await self._source.read(
            campaign.stream,
            f"({applied}-0",
            f"{applied + self._batch_events}-0",
            self._batch_events,
        )
        if not entries:
            following = await self._source.read(campaign.stream, f"({applied}-0", "+", 1)
            first = following[0].first if following else "nothing"
            raise CorruptLedger(f"event {applied + 1} is missing from the stream: next is {first}")
        done, entries = await self._apply_valid(conn, campaign, entries)
        campaign.applied(done.position, entries[-1].at_ms, now_ms, self._retention_ms)
        self.metrics.written.inc(done.events)
        self.metrics.expired.inc(done.expired)
        self.metrics.cancelled_tickets.inc(done.cancelled_tickets)
        self._clear_stuck(campaign)
        for conflict in done.conflicts:
            self.metrics.conflicts.labels(campaign.id).inc()
            self.metrics.conflict_rows.labels(campaign.id).inc()
            log.error("ledger.conflict", campaign=campaign.id, seq=conflict.seq, why=conflict.why)
            campaign.pause_for = f"event {conflict.seq}: {conflict.why}"
        return done.events > self._batch_events - ENTRY_EVENTS_MAX

    async def _apply_valid(
        self, conn: "asyncpg.Connection[Any]", campaign: LedgerCampaign, entries: list[Entry]
    ) -> tuple[Applied, list[Entry]]:
        """Apply entries. If one is corrupt, halve their number until a batch before it applies.

        Raises CorruptLedger if the first entry is corrupt.
        """
        while True:
            try:
                done = await apply_entries(conn, campaign.id, entries, after=campaign.position)
            except CorruptLedger:
                if len(entries) == 1:
                    raise
                entries = entries[: len(entries) // 2]
            else:
                return done, entries

    async def _trim(self, campaign: LedgerCampaign, head: int, now_ms: int) -> None:
        passed = campaign.trim_to(now_ms, self._retention_ms, self._retention_events)
        if passed is not None and passed > 0:
            # Never trim the last entry: the scripts check it against the head.
            try:
                await self._source.trim(campaign.stream, f"{min(passed, head)}-0")
            except redis_errors.ResponseError as error:
                self._outages.lost("trim", f"{type(error).__name__}: {error}")
            else:
                self._outages.back("trim")

    async def _pause_for_conflict(
        self, conn: "asyncpg.Connection[Any]", campaign: LedgerCampaign
    ) -> None:
        try:
            async with asyncio.timeout(PAUSE_TIMEOUT_S):
                await self._pause_campaign(campaign.id, f"ledger conflict, {campaign.pause_for}")
        except Exception as error:  # noqa: BLE001 - retried after any error
            if campaign.pause_failed != repr(error):
                campaign.pause_failed = repr(error)
                log.warning("ledger.pause_failed", campaign=campaign.id, why=repr(error))
            # Writing goes on meanwhile, because the ledger holds orders that members were given.
            campaign.pause_not_before = time.monotonic() + PAUSE_AGAIN_S
            return
        campaign.pause_failed = None
        await apply.mark_paused(conn, campaign.id)
        campaign.pause_for = None

    def _set_stuck(self, campaign: LedgerCampaign, why: str) -> None:
        campaign.not_before = time.monotonic() + campaign.backoff.next()
        if campaign.stuck != why:
            campaign.stuck = why
            self.metrics.stuck.labels(campaign.id).set(1)
            log.error("ledger.stuck", campaign=campaign.id, why=why)

    def _clear_stuck(self, campaign: LedgerCampaign) -> None:
        if campaign.stuck:
            campaign.stuck = None
            self.metrics.stuck.labels(campaign.id).set(0)
            log.info("ledger.unstuck", campaign=campaign.id)

    # Stores that are away ---------------------------------------------------------------------

    async def _wait_for_postgres(self, error: Exception) -> None:
        self._outages.lost("postgres", in_words(error))
        await pause(self._stop, self._backoff.next())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


_STORE_ERRORS: Final = (*POSTGRES_AWAY, *REDIS_AWAY)
"""Errors that are no single campaign's fault."""
