"""How far PostgreSQL is behind: measured ten times a second, and told to Redis.

API processes keep what they acknowledged until PostgreSQL has it, and sell nothing where it is too
far behind; both go by what stands in the campaign's head. It is told when it is not what the head
says, whoever changed it: a Redis that came back with less is told anew.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

import structlog
from redis import exceptions as redis_errors

from sale.background import keep_running
from sale.domain.problem import DAMAGED
from sale.jobs.writer_campaign import LedgerCampaign
from sale.jobs.writer_metrics import LedgerMetrics
from sale.jobs.writer_source import LedgerSource, bounded, number
from sale.ledger.chain import CorruptLedger
from sale.stock.scripts import Scripts

LAG_INTERVAL_S: Final = 0.1
TELL_AGAIN_S: Final = 1.0
"""Where a head does not take what it was told."""

log = structlog.get_logger()


class LedgerLag:
    """Watches the campaigns that the writer works on, and tells of them."""

    def __init__(
        self,
        source: LedgerSource,
        scripts: Scripts,
        metrics: LedgerMetrics,
        *,
        campaigns: Callable[[], Iterable[LedgerCampaign]],
        may_tell: Callable[[], bool],
    ) -> None:
        self._source, self._scripts, self._metrics = source, scripts, metrics
        self._campaigns, self._may_tell = campaigns, may_tell
        self._watching = False

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Keep the lag right, also while PostgreSQL is away and the writer waits for it."""
        self._watching = True
        watch = asyncio.create_task(keep_running(self._watch), name="ledger-lag")
        try:
            yield
        finally:
            # The loop sees for itself that it is over, should a library swallow the cancellation.
            self._watching = False
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self) -> None:
        while self._watching:
            with contextlib.suppress(redis_errors.RedisError, OSError):
                await self._round()
            await asyncio.sleep(LAG_INTERVAL_S)

    async def _round(self) -> None:
        watched = list(self._campaigns())
        if not watched:
            return
        heads = [campaign.head for campaign in watched]
        seen = await self._source.look(heads, "seq", "applied", "behind_since")
        for campaign, head in zip(watched, seen.heads, strict=True):
            with contextlib.suppress(redis_errors.ResponseError, CorruptLedger, *DAMAGED):
                seq = number(head)
                if seq is not None:
                    await self._measure(campaign, seq, _told(head), seen.now_ms)

    async def _measure(
        self, campaign: LedgerCampaign, seq: int, stands: tuple[int, int | None], now_ms: int
    ) -> None:
        applied = campaign.position.applied
        behind, since_ms = max(seq - applied, 0), None
        if behind:
            try:
                oldest = await self._source.read(campaign.stream, f"({applied}-0", "+", 1)
            except CorruptLedger:
                since_ms = stands[1]  # it cannot be read, and is behind all the same
            else:
                since_ms = oldest[0].at_ms if oldest else None
        if not any(campaign is each for each in self._campaigns()):
            return
        age_ms = 0 if since_ms is None else max(now_ms - since_ms, 0)
        self._metrics.lag_events.labels(campaign.id).set(behind)
        self._metrics.lag_seconds.labels(campaign.id).set(age_ms / 1_000)
        if stands != (applied, since_ms) and self._may_tell():
            await self._tell_applied(campaign, applied, since_ms)

    async def _tell_applied(
        self, campaign: LedgerCampaign, applied: int, behind_since_ms: int | None
    ) -> None:
        """Tell Redis; whatever comes of it stops nothing and is tried again."""
        telling = (applied, behind_since_ms)
        if campaign.told == telling and time.monotonic() < campaign.tell_not_before:
            return
        try:
            await bounded(self._scripts.tell_applied(campaign.id, *telling))
        except (redis_errors.RedisError, OSError) as error:
            if not campaign.tell_failed:
                log.warning("ledger.tell_failed", campaign=campaign.id, why=str(error)[:200])
            campaign.tell_failed = True
        else:
            campaign.tell_failed = False
        campaign.told = telling
        campaign.tell_not_before = time.monotonic() + TELL_AGAIN_S


def _told(head: list[bytes | None]) -> tuple[int, int | None]:
    """What stands in a head: how far PostgreSQL is, and since when it lacks something."""
    _, applied, since = (int(value) if value and value.isdigit() else None for value in head)
    return (-1 if applied is None else applied), since
