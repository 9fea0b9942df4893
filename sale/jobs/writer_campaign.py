"""The ledger writer's state of one campaign: its position, and what may be trimmed."""

from collections import deque
from typing import Final

from sale.jobs.backoff import Backoff
from sale.ledger.chain import Position
from sale.stock.keys import campaign_keys

MARKS_PER_RETENTION: Final = 100


class LedgerCampaign:
    """One campaign's position in PostgreSQL, and its present problems."""

    def __init__(self, campaign_id: str, position: Position, now_ms: int) -> None:
        self.id = campaign_id
        self.stream = campaign_keys(campaign_id).stream
        self.position = position
        self.stuck: str | None = None
        self.pause_for: str | None = None
        self.pause_failed: str | None = None
        self.pause_not_before = 0.0
        self.not_before = 0.0
        self.backoff = Backoff()
        self.sent: tuple[int, int | None] | None = None
        self.send_not_before = 0.0
        self.send_failed = False
        # Events applied before this writer started count as new at its start.
        self._marks: deque[tuple[int, int]] = deque([(position.seq, now_ms)])
        self._mark_begun_ms = now_ms

    def applied(self, position: Position, at_ms: int, now_ms: int, retention_ms: int) -> None:
        """Record a new position, and the moment of its last event for trimming."""
        self.position = position
        if now_ms - self._mark_begun_ms < retention_ms // MARKS_PER_RETENTION and self._marks:
            self._marks[-1] = (position.seq, at_ms)
        else:
            self._marks.append((position.seq, at_ms))
            self._mark_begun_ms = now_ms

    def trim_to(self, now_ms: int, retention_ms: int, retention_events: int) -> int | None:
        """Give the number up to which events may be trimmed, or None if nothing new may be.

        All earlier events have passed both bounds of retention. Each number is given once.
        """
        passed = None
        while self._marks:
            seq, at_ms = self._marks[0]
            if at_ms + retention_ms > now_ms or seq > self.position.seq - retention_events:
                break
            passed = seq
            self._marks.popleft()
        return passed
