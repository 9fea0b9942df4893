"""The limits of a load generator, and what it counts."""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Protocol

from loadtest.record import NO_ANSWER, NOT_SENT, REPLAYED, SOLD

NEVER_S: Final = 1e9


class Spool(Protocol):
    """Records every answer: arrival number, status, whether replayed, body."""

    def __call__(self, number: int, status: int, replayed: bool, body: bytes, /) -> object:  # noqa: FBT001
        """Record one answer."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one process. ``early_again``: ask again after "not open" at the opening.

    ``warm`` connections are opened before the start, from ``warm_s`` seconds before it on.
    ``window``: a closed loop; ``away_s``: the run fails after so long without a connection.
    """

    connections: int = 1_000
    warm: int = 32
    warm_s: float = 2.0
    queue: int = 100_000
    timeout_s: float = 10.0
    retries: int = 5
    give_up_s: float = 30.0
    early_again: bool = False
    window: bool = False
    away_s: float = NEVER_S


@dataclass(slots=True)
class Tally:
    """The counts of a run.

    Per arrival: ``offsets`` (intended time, seconds from the start), ``done_at`` (NaN: never),
    ``outcome`` (index into ``codes``), ``late`` (how late the generator took it up, seconds),
    ``sent_at`` (its last try; NaN: never). Per second of the run: ``sent``, ``answered``, ``cpu``
    (share of a core). ``told_to_wait``: 503s by their Retry-After (seconds; 0.0: none was told).
    ``window``: of a closed loop, whose ``offsets`` are those at which it sent.
    """

    offsets: "array[float]"
    done_at: "array[float]"
    outcome: "array[int]"
    late: "array[float]"
    codes: list[str] = field(default_factory=lambda: [SOLD, REPLAYED, NO_ANSWER, NOT_SENT])
    sent_at: "array[float]" = field(default_factory=lambda: array("d"))
    lags: "array[float]" = field(default_factory=lambda: array("f"))
    sent: Counter[int] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)
    told_to_wait: Counter[float] = field(default_factory=Counter)
    window: bool = False
    cpu: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    retries: int = 0
    pool_waits: int = 0
    connections: int = 0
    lost_connections: int = 0
    duration_s: float = 0.0
    rss_bytes: int = 0

    def outcomes(self) -> Counter[str]:
        """Members by their final outcome."""
        return Counter({self.codes[n]: count for n, count in Counter(self.outcome).items()})

    def took_ms(self, *codes: str, sent: bool = False, since_s: float = 0.0) -> list[float]:
        """Latencies of members with these outcomes: from the intended time, or from ``sent``.

        Without ``codes``: of all that got an answer. Members intended before ``since_s`` are left
        out.
        """
        wanted = {n for n, code in enumerate(self.codes) if not codes or code in codes}
        wanted -= set() if codes else {2, 3}  # no answer, not sent
        first = self.sent_at if sent else self.offsets
        rows = zip(self.offsets, first, self.done_at, self.outcome, strict=True)
        return [
            (done - began) * 1e3
            for offset, began, done, n in rows
            if n in wanted and offset >= since_s
        ]
