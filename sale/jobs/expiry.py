"""Ends holds on time, for the scheduler.

A pass over the campaigns that have holds runs ``expire.lua`` for each in turn, 256 holds a call
until nothing is due anywhere: a campaign with many due holds does not delay another's. Then it
sleeps until the next hold ends, at most MAX_WAIT_S; a hold lasts minutes, so new ones are seen long
before they end. A purchase that needs tickets of a due hold does not wait for this: its batcher
runs the script itself.

Rejected: a timer for each hold, which a restart would lose (HOLES 19).
"""

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import Gauge

from sale.stock.scripts import CallReply, Expired, Scripts, Untrusted
from sale.trust.isolation import Isolation

EXPIRED_MAX: Final = 256
"""Holds that one call ends at most; ``expire.lua`` has the same number."""
MAX_WAIT_S: Final = 1.0


class Expiry:
    """Ends the holds of all campaigns. ``active`` says whether this process is to do so."""

    def __init__(
        self, scripts: Scripts, isolation: Isolation, holds: Gauge, active: Callable[[], bool]
    ) -> None:
        self._scripts = scripts
        self._isolation = isolation
        self._holds = holds
        self._active = active
        self.holding: frozenset[str] = frozenset()
        """Campaigns that have holds."""
        self.wait_s = MAX_WAIT_S
        """Time until the next pass."""

    def watch(self, holding: Iterable[str]) -> None:
        """Take over which campaigns have holds."""
        self.holding = frozenset(holding)
        self._isolation.forget_others("expiry", self.holding)

    async def end_due(self) -> None:
        """End every hold that is due. Raises Redis' errors that concern all campaigns."""
        self.wait_s = MAX_WAIT_S
        due = sorted(self.holding)
        while due and self._active():
            due = [each for each in due if await self._end_some(each)]

    async def _end_some(self, campaign_id: str) -> bool:
        """End up to EXPIRED_MAX holds of a campaign; whether more may be due."""
        done: Expired | None = None
        try:
            with self._isolation.of(campaign_id, "expiry"):
                done = await self._scripts.expire(campaign_id)
        except Untrusted as error:
            # Until a campaign is verified nothing ends there, and that step tells of its trouble.
            if error.reply is CallReply.BROKEN:
                self._isolation.note(campaign_id, "expiry", "its holds do not match its orders")
        if done is None:
            return False
        if self._active():
            self._holds.labels(campaign_id).set(done.held)
        # A hold may be overdue: while its campaign is recovering, or shortly after.
        ends_ms = max(done.next_ends_ms, done.grace_until_ms)
        if done.next_ends_ms and ends_ms > done.now_ms:
            self.wait_s = min(self.wait_s, (ends_ms - done.now_ms) / 1_000)
        return done.count == EXPIRED_MAX
