"""Finds ledgers that PostgreSQL has not followed for some seconds.

A trusted Redis and PostgreSQL can diverge: a writer that was suspended in mid-batch and continues
after a recovery applies events that Redis has lost since. The writer then makes no progress, and
nothing else would notice. So the scheduler compares a campaign without progress once more.
"""

import time
from typing import Final

STALLED_S: Final = 3.0
AGAIN_S: Final = 30.0
"""Every ledger is stalled while PostgreSQL is away; more frequent comparisons would not help."""


class StalledLedgers:
    """Remembers since when PostgreSQL has not followed each campaign's ledger."""

    def __init__(self, stalled_s: float = STALLED_S) -> None:
        self._stalled_s = stalled_s
        self._seen: dict[str, tuple[int, float]] = {}

    def due(self, campaign_id: str, seq: int, applied: int) -> bool:
        """Whether PostgreSQL has been at ``applied`` for so long that a comparison is due."""
        now_s = time.monotonic()
        before, due_s = self._seen.get(campaign_id, (-1, 0.0))
        if applied >= seq:
            self._seen.pop(campaign_id, None)
            return False
        if applied != before:
            self._seen[campaign_id] = (applied, now_s + self._stalled_s)
            return False
        if now_s < due_s:
            return False
        self._seen[campaign_id] = (applied, now_s + AGAIN_S)
        return True
