"""The scheduler does the periodic work that no request triggers.

Four times a second it verifies a new Redis (INV-8), records openings and closings that no script
has recorded yet (INV-7), and applies changes of the roster to the campaigns (INV-9). It ends holds
at their moment (``expiry.py``, INV-6). At a longer interval it audits the campaigns. Each step is a
compare-and-set in a script, so a second scheduler does no harm. A purchase does not wait for the
scheduler: the scripts apply openings and closings themselves.

One scheduler is active and the others stand by (see ``leadership.py``); a standby only watches
whether the stores answer. If PostgreSQL cannot say which one is active, all of them work, because
openings and closings must be recorded. The clock has a loop of its own, because a PostgreSQL that
does not answer delays the steps that need it. The roster has its own too, because a recovery takes
time, and the holds have one, because thousands may end at once.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Gauge

from sale.background import keep_running
from sale.bootstrap import Stores
from sale.db.errors import POSTGRES_ERRORS, in_words
from sale.db.locks import SCHEDULER
from sale.domain.campaign import Campaign, State
from sale.domain.campaign_view import CampaignNow
from sale.jobs.backoff import Backoff, pause
from sale.jobs.expiry import Expiry
from sale.jobs.leadership import Leadership
from sale.lifetime import cancel_and_wait
from sale.metrics import StoreMetrics
from sale.stock.catalogue import Unreadable, campaign_ids, read_campaigns
from sale.stock.dormant import DORMANT, Dormant
from sale.stock.durability import durability_faults, make_whole, rewrite_trouble
from sale.stock.scripts import CallReply
from sale.stock.troubles import Troubles
from sale.trust.audit import INVARIANTS, AuditReport, CouldNotCheck, audit
from sale.trust.auto_recovery import AutoRecovery
from sale.trust.isolation import Isolation
from sale.trust.revocation import sync_all
from sale.trust.stalled_ledgers import StalledLedgers
from sale.trust.store_watch import StoreWatch
from sale.trust.verify import verify_all

STOP_PATIENCE_S: Final = 5.0
"""Longest time for a step to end by itself after the stop; then it is cancelled."""

FILE_EVERY_S: Final = 1.0
"""Time between two checks of an append-only file that is whole, or whose rewrite just failed."""

AUDIT_SHARE: Final = 0.05
"""An audit reads every order, so the next one starts after twenty times its duration at least."""

log = structlog.get_logger()


class SchedulerMetrics:
    """The scheduler's metrics, registered in ``registry``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.active = Gauge(
            "sale_scheduler_active",
            "1 if this scheduler is active, 0 if it is a standby.",
            registry=registry,
        )
        self.remaining = Gauge(
            "sale_stock_remaining",
            "Tickets left.",
            ["campaign", "showing"],
            registry=registry,
        )
        self.holds = Gauge(
            "sale_holds",
            "Orders that are held and not paid yet.",
            ["campaign"],
            registry=registry,
        )
        self.findings = Gauge(
            "sale_audit_findings",
            "Breaches of an invariant that the last audit found.",
            ["campaign", "invariant"],
            registry=registry,
        )
        self.audited_at = Gauge(
            "sale_audit_timestamp_seconds",
            "Unix time at which the last audit ended.",
            registry=registry,
        )
        self.stores = StoreMetrics(registry)
        self.recovering = Gauge(
            "sale_campaigns_recovering",
            "Campaigns whose state in Redis does not match PostgreSQL; they sell nothing.",
            registry=registry,
        )
        self.rewrite_failed = Gauge(
            "sale_redis_rewrite_failed",
            "1 if the last rewrite of Redis' append-only file failed.",
            registry=registry,
        )
        self.troubled = Gauge(
            "sale_campaign_troubled",
            "1 if a campaign cannot be read, or a step of the scheduler fails for it alone.",
            ["campaign"],
            registry=registry,
        )

    def forget(self) -> None:
        """Clear the values that only the active scheduler knows."""
        self.remaining.clear()
        self.holds.clear()
        self.findings.clear()
        self.recovering.set(0)
        self.rewrite_failed.set(0)
        self.troubled.clear()


class Scheduler:
    """Repeats its steps until it is stopped."""

    def __init__(self, stores: Stores, database_url: str, registry: CollectorRegistry) -> None:
        self._stores = stores
        self._metrics = SchedulerMetrics(registry)
        self._failed_steps: set[str] = set()
        self._met_run_id = ""
        self._faults: list[str] = []
        self._file_trouble = ""
        self._file_due_s = 0.0
        self._dormant = Dormant[CampaignNow](stores.redis)
        self._rehearsals: dict[str, Campaign] = {}
        self._isolation = Isolation()
        self._expiry = Expiry(
            stores.scripts, self._isolation, self._metrics.holds, lambda: bool(self.active)
        )
        self._troubles = Troubles(stores.redis, "scheduler")
        self._stalls = StalledLedgers()
        self._auto_recovery = AutoRecovery(
            stores.redis, stores.scripts, stores.pool, allowed=stores.settings.auto_recover
        )
        self._leadership = Leadership(database_url, SCHEDULER)
        self._decided = asyncio.Event()
        self.active: bool | None = None
        """Whether this scheduler is active; None until that is decided."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set. Raises UnfitProxy if the lock cannot be held."""
        working = [
            asyncio.create_task(work)
            for work in (
                self._lead_or_stand_by(stop),
                self._repeat(
                    stop, file=self._file, verify=self._verify, settle=self._auto_recovery.settle
                ),
                self._repeat(stop, roster=self._roster),
                self._repeat(stop, clock=self._clock),
                self._end_holds(stop),
            )
        ]
        stores = self._stores
        auditing = asyncio.create_task(keep_running(lambda: self._audit_repeatedly(stop)))
        watching = asyncio.create_task(
            keep_running(StoreWatch(stores.redis, stores.pool, self._metrics.stores).run)
        )
        patience = asyncio.create_task(_patience(stop))
        rounds = asyncio.gather(*working)
        try:
            await asyncio.wait((rounds, patience), return_when=asyncio.FIRST_COMPLETED)
            if rounds.done():
                rounds.result()
        finally:
            await cancel_and_wait([*working, rounds, auditing, watching, patience])
            self._metrics.active.set(0)

    async def _repeat(self, stop: asyncio.Event, **steps: Callable[[], Awaitable[object]]) -> None:
        """Do the steps in this order at each tick while this scheduler is active."""
        tick_s = self._stores.settings.tick_interval_ms / 1000
        # Sales wait for the verification after a start, so the first round begins as soon as it is
        # decided who is active.
        await pause(self._decided, tick_s)
        while not stop.is_set():
            for step, work in steps.items() if self.active else ():
                await self._try(step, work)
            await pause(stop, tick_s)

    async def _end_holds(self, stop: asyncio.Event) -> None:
        tick_s = self._stores.settings.tick_interval_ms / 1000
        await pause(self._decided, tick_s)
        while not stop.is_set():
            if self.active:
                await self._try("expiry", self._expiry.end_due)
            # The clock's round finds the campaigns that have holds.
            await pause(stop, self._expiry.wait_s if self._expiry.holding else tick_s)

    async def _lead_or_stand_by(self, stop: asyncio.Event) -> None:
        backoff = Backoff()

        async def lead() -> None:
            self._set_active("it holds the lock")
            await stop.wait()

        def stand_by() -> None:
            backoff.reset()
            self._set_active("")

        while not stop.is_set():
            try:
                await self._leadership.lead(stop, lead, stand_by=stand_by)
            except POSTGRES_ERRORS as error:
                self._set_active(f"PostgreSQL is away: {in_words(error)}")
                await pause(stop, backoff.next())

    def _set_active(self, why: str) -> None:
        """Become active for the reason ``why``, or a standby if it is ''."""
        if self.active is not bool(why):
            self.active = bool(why)
            self._decided.set()
            self._metrics.active.set(self.active)
            if why:
                log.info("scheduler.active", why=why)
            else:
                self._metrics.forget()
                log.info("scheduler.standby")

    async def _try(self, step: str, work: Callable[[], Awaitable[object]]) -> None:
        """Do one step. Log its first failure; the next round tries it again, without limit."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - one failing step must not stop the others
            if step not in self._failed_steps:
                log.warning("scheduler.step_failed", step=step, error=type(error).__name__)
            self._failed_steps.add(step)
        else:
            if step in self._failed_steps:
                log.info("scheduler.step_back", step=step)
            self._failed_steps.discard(step)

    async def _verify(self) -> None:
        stores = self._stores
        unfit = await verify_all(
            stores.redis,
            stores.scripts,
            stores.pool,
            self._isolation,
            meet=self._check_durability,
            stalled_ledgers=self._stalls,
        )
        if self.active:  # another scheduler may have taken the lock meanwhile
            self._metrics.recovering.set(len(unfit))
        await self._auto_recovery.recover_unfit(unfit)

    async def _file(self) -> None:
        """Check Redis' append-only file, several times a second until it is whole."""
        if time.monotonic() < self._file_due_s:
            return
        redis = self._stores.redis
        why, trouble = await make_whole(redis), await rewrite_trouble(redis)
        # After a failed rewrite, the next one is requested only after FILE_EVERY_S.
        self._file_due_s = time.monotonic() + (FILE_EVERY_S if trouble or not why else 0.0)
        if self.active:
            self._metrics.rewrite_failed.set(bool(trouble))
        if trouble and trouble != self._file_trouble:
            log.error("redis.rewrite_failed", why=trouble)
        self._file_trouble = trouble

    async def _check_durability(self, run_id: str) -> list[str]:
        """List what makes a new Redis weaker than the durability level, if that is checked."""
        settings = self._stores.settings
        if run_id != self._met_run_id:
            self._met_run_id, self._file_due_s = run_id, 0.0
            await self._file()
        if settings.durability_check != "refuse":
            return []
        faults = await durability_faults(
            self._stores.redis, settings.durability, settings.replicas_min
        )
        if faults and faults != self._faults:
            log.warning("redis.refused", faults=faults)
        elif self._faults and not faults:
            log.info("redis.accepted")
        self._faults = faults
        return faults

    async def _roster(self) -> None:
        stores = self._stores
        await sync_all(stores.redis, stores.scripts, stores.pool, self._isolation)

    async def _clock(self) -> None:
        unreadable: list[Unreadable] = []
        ids = await campaign_ids(self._stores.redis)
        due = await self._dormant.due(ids)
        campaigns = await read_campaigns(self._stores.redis, due, unreadable=unreadable)
        for now in campaigns:
            if now.recorded in DORMANT and not now.recovering:
                self._dormant.keep(now.campaign.id, now.seq, now)
        campaigns += [self._dormant.kept(each) for each in set(ids) - set(due)]
        for now in campaigns:
            self._isolation.note(now.campaign.id, "window", now.window_fault)
            with self._isolation.of(now.campaign.id, "clock"):
                await self._apply_clock(now)
        for each in unreadable:
            with self._isolation.of(each.campaign_id, "clock"):
                raise each
        self._expiry.watch(
            [now.campaign.id for now in campaigns if any(now.held)]
            + [each.campaign_id for each in unreadable]
        )
        there = {now.campaign.id for now in campaigns}
        self._forget_gone(there)
        self._isolation.forget_others("clock", there | {each.campaign_id for each in unreadable})
        self._isolation.forget_others("window", there)
        await self._report_troubles()

    async def _report_troubles(self) -> None:
        if not self.active:
            return
        failing = self._isolation.failing
        self._metrics.troubled.clear()
        for campaign_id in failing:
            self._metrics.troubled.labels(campaign_id).set(1)
        await self._troubles.report(failing)

    def _forget_gone(self, there: set[str]) -> None:
        """Stop showing the stock of purged rehearsals; any other missing campaign will return."""
        for campaign_id in self._rehearsals.keys() - there:
            for showing in self._rehearsals.pop(campaign_id).showings:
                with contextlib.suppress(KeyError):
                    self._metrics.remaining.remove(campaign_id, showing.id)

    async def _apply_clock(self, now: CampaignNow) -> None:
        if now.state is State.DELETED or not self.active:
            return
        campaign_id = now.campaign.id
        if now.campaign.rehearsal_of:
            self._rehearsals[campaign_id] = now.campaign
        for showing, remaining in zip(now.campaign.showings, now.remaining, strict=True):
            self._metrics.remaining.labels(campaign_id, showing.id).set(remaining)
        if now.campaign.payment == "online" and not any(now.held):
            self._metrics.holds.labels(campaign_id).set(0)
        if not now.recovering and now.state is not now.recorded:
            reply = await self._stores.scripts.tick(campaign_id)
            if reply.reply is CallReply.OK and reply.tickets:
                log.info("campaign.crossed", campaign=campaign_id, state=reply.state)

    async def _audit_repeatedly(self, stop: asyncio.Event) -> None:
        wait_s: float = self._stores.settings.audit_interval_s
        while not stop.is_set():
            await pause(stop, wait_s)
            if stop.is_set():
                return
            if not self.active:
                continue
            started = time.monotonic()
            try:
                report = await audit(
                    self._stores.redis,
                    self._stores.pool,
                    durability=self._stores.settings.durability,
                    replicas_min=self._stores.settings.replicas_min,
                )
            except CouldNotCheck as error:
                log.warning("audit.could_not_check", error=str(error)[:200])
            except Exception:
                log.exception("audit.failed")
            else:
                if self.active:  # otherwise another scheduler publishes its own findings
                    self._publish(report)
            took_s = time.monotonic() - started
            wait_s = max(self._stores.settings.audit_interval_s, took_s / AUDIT_SHARE)

    def _publish(self, report: AuditReport) -> None:
        self._metrics.findings.clear()
        for each in report.campaigns:
            if not each.checked:
                why = each.findings[0].what
                log.warning("audit.could_not_check", campaign=each.id, error=why[:200])
                continue
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


async def _patience(stop: asyncio.Event) -> None:
    await stop.wait()
    await asyncio.sleep(STOP_PATIENCE_S)
