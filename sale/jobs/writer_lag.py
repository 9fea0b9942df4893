"""Measure ten times a second how far PostgreSQL is behind, and store it in Redis.

API processes keep acknowledged orders until PostgreSQL has them, and sell nothing if PostgreSQL is
too far behind. Both read the applied number from the campaign's head. The writer updates the head
whenever it differs, for any reason: a Redis restored from older files is corrected too.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import structlog
from redis import exceptions as redis_errors

from sale.background import keep_running
from sale.domain.problem import DAMAGED
from sale.jobs.writer_campaign import LedgerCampaign
from sale.jobs.writer_metrics import LedgerMetrics
from sale.jobs.writer_source import LedgerSource, bounded, readable
from sale.ledger.chain import CorruptLedger
from sale.lifetime import cancel_and_wait
from sale.stock.errors import REDIS_ERRORS
from sale.stock.head import LAG
from sale.stock.scripts import Scripts

LAG_INTERVAL_S: Final = 0.1
RETRY_AFTER_S: Final = 1.0
"""Time before the same values are sent again to a head that did not change."""

log = structlog.get_logger()


class LedgerLag:
    """Measures the lag of the writer's campaigns, and stores it in their heads."""

    def __init__(
        self,
        source: LedgerSource,
        scripts: Scripts,
        metrics: LedgerMetrics,
        *,
        campaigns: Callable[[], Mapping[str, LedgerCampaign]],
        may_write: Callable[[], bool],
    ) -> None:
        self._source, self._scripts, self._metrics = source, scripts, metrics
        self._campaigns, self._may_write = campaigns, may_write

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Keep the lag up to date, also while the writer waits for PostgreSQL."""
        watch = asyncio.create_task(keep_running(self._watch), name="ledger-lag")
        try:
            yield
        finally:
            await cancel_and_wait([watch])

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(*REDIS_ERRORS):
                await self._round()
            await asyncio.sleep(LAG_INTERVAL_S)

    async def _round(self) -> None:
        watched = list(self._campaigns().values())
        if not watched:
            return
        ids = [campaign.id for campaign in watched]
        seen = await self._source.read_heads(ids, LAG, lenient=True)
        for campaign, head in zip(watched, seen.heads, strict=True):
            with contextlib.suppress(redis_errors.ResponseError, CorruptLedger, *DAMAGED):
                read = readable(head)
                if read.seq is not None:
                    stored = (read.applied, read.behind_since)
                    await self._measure(campaign, read.seq, stored, seen.now_ms)

    async def _measure(
        self, campaign: LedgerCampaign, seq: int, stored: tuple[int, int | None], now_ms: int
    ) -> None:
        applied = campaign.position.seq
        behind, since_ms = max(seq - applied, 0), None
        if behind:
            try:
                oldest = await self._source.read(campaign.stream, f"({applied}-0", "+", 1)
            except CorruptLedger:
                since_ms = stored[1]  # the entry cannot be read, so keep the known moment
            else:
                since_ms = oldest[0].at_ms if oldest else None
        if self._campaigns().get(campaign.id) is not campaign:
            return  # the writer has become a standby meanwhile
        age_ms = 0 if since_ms is None else max(now_ms - since_ms, 0)
        self._metrics.lag_events.labels(campaign.id).set(behind)
        self._metrics.lag_seconds.labels(campaign.id).set(age_ms / 1_000)
        if stored != (applied, since_ms):
            self._source.forget_head(campaign.id, LAG)
            if self._may_write():
                await self._store_applied(campaign, applied, since_ms)

    async def _store_applied(
        self, campaign: LedgerCampaign, applied: int, behind_since_ms: int | None
    ) -> None:
        """Update the head in Redis; a failure is logged once and retried."""
        sent = (applied, behind_since_ms)
        if campaign.sent == sent and time.monotonic() < campaign.send_not_before:
            return
        try:
            await bounded(self._scripts.set_applied(campaign.id, *sent))
        except REDIS_ERRORS as error:
            if not campaign.send_failed:
                log.warning("ledger.applied_not_stored", campaign=campaign.id, why=str(error)[:200])
            campaign.send_failed = True
        else:
            campaign.send_failed = False
        campaign.sent = sent
        campaign.send_not_before = time.monotonic() + RETRY_AFTER_S
