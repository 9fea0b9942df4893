"""The timeline of a seed: faults and steps, and the answers meanwhile."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator

BUCKETS = 20
LINES_MAX = 400


class Timeline:
    """Notes and counts of one seed; moments in seconds from ``start``."""

    def __init__(self, seconds: float) -> None:
        self.bucket_s = max(0.25, seconds / BUCKETS)
        self.started_at = time.perf_counter()
        self._notes: list[tuple[float, str]] = []
        self._counts: dict[int, Counter[str]] = defaultdict(Counter)

    def start(self) -> None:
        """Set the start: members come from now on."""
        self.started_at = time.perf_counter()

    @property
    def now_s(self) -> float:
        """Seconds from the start; below 0 before it."""
        return time.perf_counter() - self.started_at

    def note(self, what: str) -> None:
        """Record an action or an observation."""
        if len(self._notes) < LINES_MAX:
            self._notes.append((self.now_s, what))

    def answered(self, campaign: int, outcome: str) -> None:
        """Count an answer."""
        self._counts[int(self.now_s // self.bucket_s)][f"{campaign}:{outcome}"] += 1

    def lines(self) -> Iterator[str]:
        """All notes and counts in order."""
        rows = list(self._notes)
        for bucket, counts in self._counts.items():
            told = ", ".join(f"{outcome} × {n}" for outcome, n in sorted(counts.items()))
            rows.append(((bucket + 1) * self.bucket_s, f"    answers: {told}"))
        for at_s, what in sorted(rows, key=lambda row: row[0]):
            yield f"{at_s:7.2f} s  {what}"
