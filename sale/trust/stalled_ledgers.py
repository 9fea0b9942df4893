"""Ledgers that PostgreSQL does not follow for some seconds: are they still one chain?

A trusted Redis and PostgreSQL can part: a writer that was stopped with a batch in its hands, and
wakes up after a recovery, applies what Redis has since lost. The writer then stands still, and
nobody else would look. So a campaign whose ledger stands still is compared once more.
"""

import time
from typing import Final

STALLED_S: Final = 3.0
AGAIN_S: Final = 30.0
"""A PostgreSQL that is away makes every ledger stand still: then looking often helps nobody."""


class StalledLedgers:
    """Remembers since when each campaign's ledger has stood still."""

    def __init__(self, stalled_s: float = STALLED_S) -> None:
        self._stalled_s = stalled_s
        self._seen: dict[str, tuple[int, float]] = {}

    def due(self, campaign_id: str, seq: int, applied: int) -> bool:
        """Whether PostgreSQL has stood still at ``applied`` for so long that it is looked into."""
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
