"""The scheduler: what must happen without anybody's call.

Four times a second it verifies a Redis that is new (INV-8), records openings and closings that
nobody's call has crossed (INV-7), and lets the campaigns follow the roster (INV-9); once in a
while it audits the books. Each step is a compare-and-set in a script, so a second scheduler does
no harm. A purchase does not wait for it: the scripts cross openings and closings by themselves.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Gauge
from redis.exceptions import ResponseError

from sale.bootstrap import Stores
from sale.domain import CampaignState
from sale.stock.catalogue import CampaignNow, campaign_ids, read_campaign, read_campaigns
from sale.stock.scripts import CallReply
from sale.usecases.audit import INVARIANTS, AuditReport, CouldNotCheck, audit
from sale.usecases.isolation import Isolation
from sale.usecases.revocation import sync_all
from sale.usecases.verification import verify_all

HEALTH_TIMEOUT_S: Final = 2.0
AUDIT_SHARE: Final = 0.05
"""An audit reads every order; between two of them passes at least twenty times its duration."""

log = structlog.get_logger()


class SchedulerMetrics:
    """What the scheduler sees on its rounds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.remaining = Gauge(
            "sale_stock_remaining",
            "Tickets left.",
            ["campaign", "showing"],
            registry=registry,
        )
        self.findings = Gauge(
            "sale_audit_findings",
            "Breaches found by the last audit.",
            ["campaign", "invariant"],
            registry=registry,
        )
        self.audited_at = Gauge(
            "sale_audit_timestamp_seconds", "When the last audit ended.", registry=registry
        )
        self.redis_up = Gauge("sale_redis_up", "1 where Redis answers.", registry=registry)
        self.postgres_up = Gauge(
            "sale_postgres_up", "1 where PostgreSQL answers.", registry=registry
        )
        self.recovering = Gauge(
            "sale_campaigns_recovering", "Campaigns that do not fit.", registry=registry
        )


class Scheduler:
    """Makes its rounds until told to stop."""

    def __init__(self, stores: Stores, registry: CollectorRegistry) -> None:
        self._stores = stores
        self._metrics = SchedulerMetrics(registry)
        self._ailing: set[str] = set()
        self._isolation = Isolation()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set."""
        auditing = asyncio.create_task(self._audit_for_ever(stop))
        interval_s = self._stores.settings.tick_interval_ms / 1000
        try:
            while not stop.is_set():
                await self._round()
                await _pause(stop, interval_s)
        finally:
            auditing.cancel()
            await asyncio.gather(auditing, return_exceptions=True)

    async def _round(self) -> None:
        await asyncio.gather(
            self._try("redis", self._ask_redis), self._try("postgres", self._ask_postgres)
        )
        await self._try("verify", self._verify)
        await self._try("clock", self._clock)
        await self._try("roster", self._roster)

    async def _try(self, step: str, work: Callable[[], Awaitable[object]]) -> None:
        """Do one step; what fails is told once and tried again next round, for ever."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - whatever it was, the other steps go on
            if step not in self._ailing:
                log.warning("scheduler.step_failed", step=step, error=type(error).__name__)
            self._ailing.add(step)
        else:
            if step in self._ailing:
                log.info("scheduler.step_back", step=step)
            self._ailing.discard(step)

    async def _ask_redis(self) -> None:
        async with _telling(self._metrics.redis_up):
            await self._stores.redis.ping()

    async def _ask_postgres(self) -> None:
        async with _telling(self._metrics.postgres_up):
            await self._stores.pool.fetchval("SELECT 1")

    async def _verify(self) -> None:
        stores = self._stores
        unfit = await verify_all(stores.redis, stores.scripts, stores.pool, self._isolation)
        self._metrics.recovering.set(len(unfit))

    async def _roster(self) -> None:
        stores = self._stores
        await sync_all(stores.redis, stores.scripts, stores.pool, self._isolation)

    async def _clock(self) -> None:
        for now in await self._read_campaigns():
            with self._isolation.of(now.campaign.id, "clock"):
                await self._cross(now)

    async def _cross(self, now: CampaignNow) -> None:
        if now.state is CampaignState.DELETED:
            return
        campaign_id = now.campaign.id
        for showing, remaining in zip(now.campaign.showings, now.remaining, strict=True):
            self._metrics.remaining.labels(campaign_id, showing.id).set(remaining)
        if not now.recovering and now.state is not now.recorded:
            reply = await self._stores.scripts.tick(campaign_id)
            if reply.reply is CallReply.OK and reply.tickets:
                log.info("campaign.crossed", campaign=campaign_id, state=reply.state)

    async def _read_campaigns(self) -> list[CampaignNow]:
        """Read all in one round trip, or one by one where a damaged key spoils that."""
        redis, found = self._stores.redis, []
        try:
            return await read_campaigns(redis)
        except ResponseError:
            for campaign_id in await campaign_ids(redis):
                with self._isolation.of(campaign_id, "read"):
                    now = await read_campaign(redis, campaign_id)
                    found += [now] if now is not None else []
        return found

    async def _audit_for_ever(self, stop: asyncio.Event) -> None:
        wait_s: float = self._stores.settings.audit_interval_s
        while not stop.is_set():
            await _pause(stop, wait_s)
            if stop.is_set():
                return
            started = time.monotonic()
            try:
                report = await audit(self._stores.redis, self._stores.pool)
            except CouldNotCheck as error:
                log.warning("audit.could_not_check", error=str(error)[:200])
            except Exception:
                log.exception("audit.failed")
            else:
                self._publish(report)
            took_s = time.monotonic() - started
            wait_s = max(self._stores.settings.audit_interval_s, took_s / AUDIT_SHARE)

    def _publish(self, report: AuditReport) -> None:
        self._metrics.findings.clear()
        for each in report.campaigns:
            for invariant in INVARIANTS:
                found = [finding for finding in each.findings if finding.invariant == invariant]
                self._metrics.findings.labels(each.id, invariant).set(len(found))
            for finding in each.findings[:10]:
                log.error(
                    "audit.finding",
                    campaign=each.id,
                    invariant=finding.invariant,
                    what=finding.what,
                )
        self._metrics.audited_at.set_to_current_time()
        log.info("audit.done", clean=report.clean, campaigns=len(report.campaigns))


@asynccontextmanager
async def _telling(up: Gauge) -> AsyncIterator[None]:
    """Ask a store; the gauge tells 0 only once it has not answered."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            yield
    except Exception:
        up.set(0)
        raise
    up.set(1)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
