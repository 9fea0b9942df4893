"""What one process of an open loop is held to, and what it counts."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from loadtest.record import NO_ANSWER, NOT_SENT, REPLAYED, SOLD


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one process. ``early_again``: ask again after "not open" at the opening.

    ``warm`` connections are opened before the start, from ``warm_s`` seconds before it on.
    """

    connections: int = 1_000
    warm: int = 32
    warm_s: float = 2.0
    queue: int = 100_000
    timeout_s: float = 10.0
    retries: int = 5
    give_up_s: float = 30.0
    early_again: bool = False


@dataclass(slots=True)
class Tally:
    """What came of it. Per arrival: ``done_at`` (seconds from the start; NaN: never), ``outcome``
    (index into ``codes``), ``late`` (how late the loop took it up, seconds), ``sent_at`` (its last
    try, seconds from the start; NaN: never). Per second of the run: ``sent``, ``answered``, ``cpu``
    (share of a core). ``told_to_wait``: 503s by their Retry-After (seconds; 0.0: none was told).
    """

    done_at: "array[float]"
    outcome: "array[int]"
    late: "array[float]"
    codes: list[str] = field(default_factory=lambda: [SOLD, REPLAYED, NO_ANSWER, NOT_SENT])
    sent_at: "array[float]" = field(default_factory=lambda: array("d"))
    lags: "array[float]" = field(default_factory=lambda: array("f"))
    sent: Counter[int] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)
    told_to_wait: Counter[float] = field(default_factory=Counter)
    cpu: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    retries: int = 0
    pool_waits: int = 0
    connections: int = 0
    lost_connections: int = 0
    duration_s: float = 0.0
