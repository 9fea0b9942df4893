"""The batchers of a process, and the calls that they number together."""

import asyncio
from collections.abc import Awaitable, Callable

from sale.domain.campaign import Campaign
from sale.metrics import PurchaseMetrics
from sale.stock.batcher import NOT_ATTENDED, Batcher, Mark
from sale.stock.script_connection import ScriptConnection
from sale.stock.scripts import Scripts


class Batchers:
    """The batchers of this process, one a campaign, made when first asked for."""

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
        meet: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """Make none yet. ``meet`` is asked before this process signs for a Redis (``attend``)."""
        self._scripts = scripts
        self.process = process
        self.halted = ""
        """Why this process sells nothing at all, or ''."""
        self._halts: dict[str, str] = {}
        self.meet = meet
        self._behind_max = behind_max
        self._metrics = metrics
        self._batch_max = batch_max
        self._queue_max = queue_max
        self.deadline_s = deadline_s
        self._by_campaign: dict[str, Batcher] = {}
        self._calls = 0
        self._line = ScriptConnection.to(scripts.redis)

    def of(self, campaign: Campaign) -> Batcher:
        """Give the batcher of a campaign that is known to exist."""
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
                line=self._line,
                meet=self.meet,
            )
        return batcher

    def halt(self, by: str, why: str) -> None:
        """Sell nothing at all while anyone has a reason; ``why`` is '' where ``by`` has none."""
        self._halts[by] = why
        self.halted = next(filter(None, self._halts.values()), "")
        self._metrics.halted = bool(self.halted)

    def saw(self, campaign_id: str, seq: int) -> None:
        """Note an event that this process has told an operator of."""
        batcher = self._by_campaign.get(campaign_id)
        if batcher is not None and batcher.mark is not NOT_ATTENDED:
            batcher.mark = Mark(batcher.mark.incarnation, max(batcher.mark.seq, seq))

    def forget(self, campaign_id: str) -> None:
        """Drop the batcher of a campaign that has gone away, unless somebody waits in it."""
        batcher = self._by_campaign.get(campaign_id)
        if batcher is not None and not batcher.waiting:
            del self._by_campaign[campaign_id]

    def all(self) -> list[Batcher]:
        """Those that there are."""
        return list(self._by_campaign.values())

    def waiting(self) -> tuple[int, float, int, int]:
        """Purchases that wait in all of them, since when the first does, how many left so far.

        Since 0.0: nobody waits, or Redis is what ails; the last number is how many wait for that.
        """
        count, since, taken, ailing = 0, 0.0, 0, 0
        for batcher in self._by_campaign.values():
            count += batcher.waiting
            taken += batcher.taken
            first = batcher.waiting_since
            ailing += 0 if first else batcher.waiting
            if first and (first < since or not since):
                since = first
        return count, since, taken, ailing

    async def close(self) -> None:
        """Answer everything that waits, then stop."""
        await asyncio.gather(*(batcher.close() for batcher in self._by_campaign.values()))
        if self._line is not None:
            await self._line.close()

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls
