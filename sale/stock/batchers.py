"""The batchers of a process, which share one sequence of call numbers."""

import asyncio
from collections.abc import Awaitable, Callable

from sale.domain.campaign import Campaign
from sale.metrics import PurchaseMetrics
from sale.stock.batcher import Batcher, unknown
from sale.stock.mark import NOT_CHECKED
from sale.stock.script_connection import ScriptConnection
from sale.stock.scripts import Scripts


class Batchers:
    """The batchers of this process, one per campaign, created at the first use."""

    def __init__(
        self,
        scripts: Scripts,
        process: str,
        metrics: PurchaseMetrics,
        *,
        batch_max: int,
        queue_max: int,
        deadline_s: float,
        behind_max: tuple[int, int],
        check_redis: Callable[[], Awaitable[str]] | None = None,
        configured: Callable[[str, int], Campaign | None] = unknown,
    ) -> None:
        """Create no batcher yet.

        ``check_redis`` runs before ``Batcher.check_acknowledged``; it returns why this Redis is
        not durable enough, or ''. ``configured`` gives the configuration of a number
        (``Catalogue.configured``).
        """
        self._configured = configured
        self._scripts = scripts
        self.process = process
        self.halted = ""
        """Why this process sells nothing, or ''."""
        self._halts: dict[str, str] = {}
        self.check_redis = check_redis
        self._behind_max = behind_max
        self._metrics = metrics
        self._batch_max = batch_max
        self._queue_max = queue_max
        self.deadline_s = deadline_s
        self._by_campaign: dict[str, Batcher] = {}
        self._calls = 0
        self._connection = ScriptConnection.to(scripts.redis)

    def of(self, campaign: Campaign) -> Batcher:
        """Give the batcher of a campaign that exists."""
        batcher = self._by_campaign.get(campaign.id)
        if batcher is None:
            batcher = self._by_campaign[campaign.id] = Batcher(
                campaign,
                self._scripts,
                self.process,
                self._metrics,
                batch_max=self._batch_max,
                queue_max=self._queue_max,
                deadline_s=self.deadline_s,
                behind_max=self._behind_max,
                next_call=self._next_call,
                connection=self._connection,
                check_redis=self.check_redis,
                configured=self._configured,
            )
        return batcher

    def halt(self, by: str, why: str) -> None:
        """Set or (``why`` = '') clear the reason of ``by``; any reason stops all sales."""
        self._halts[by] = why
        self.halted = next(filter(None, self._halts.values()), "")
        self._metrics.halted = bool(self.halted)

    def on_step(self, campaign_id: str, seq: int, chain: str) -> None:
        """Record the event of an operator's step that this process has answered."""
        batcher = self._by_campaign.get(campaign_id)
        if batcher is not None and batcher.mark is not NOT_CHECKED:
            batcher.advance(seq, chain)

    def forget(self, campaign_id: str) -> None:
        """Drop the batcher of a deleted campaign, unless a purchase waits in it."""
        batcher = self._by_campaign.get(campaign_id)
        if batcher is not None and not batcher.waiting:
            del self._by_campaign[campaign_id]

    def all(self) -> list[Batcher]:
        """All batchers that exist now."""
        return list(self._by_campaign.values())

    def waiting(self) -> tuple[int, float, int, int]:
        """Sum of all batchers, in the form of ``http.overload.Waiting``.

        These are: the purchases that wait, since when the first waits (0.0: none, or only because
        Redis fails), how many have left the queues so far, and how many wait because Redis fails.
        """
        count, since, taken, stalled = 0, 0.0, 0, 0
        for batcher in self._by_campaign.values():
            count += batcher.waiting
            taken += batcher.taken
            first = batcher.waiting_since
            stalled += 0 if first else batcher.waiting
            if first and (first < since or not since):
                since = first
        return count, since, taken, stalled

    async def close(self) -> None:
        """Answer the waiting purchases, then stop."""
        await asyncio.gather(*(batcher.close() for batcher in self._by_campaign.values()))
        if self._connection is not None:
            await self._connection.close()

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls
