"""Metrics of the purchase path and of a process, cheap to count.

A labelled counter and a histogram observation per purchase would be too slow on the hot path. So
the batcher adds up plain integers once per batch, and a collector turns them into metrics when
they are scraped.
"""

import platform
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from sale import __version__

LATENCY_BOUNDS_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
BATCH_BOUNDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
SUMMED_GAUGES: Final = frozenset(
    {
        "process_open_fds",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "sale_connections",
        "sale_purchases_standing",
        "sale_purchases_waiting",
    }
)
"""Gauges that are summed over processes; of all others the maximum is shown."""


def new_registry(role: str) -> CollectorRegistry:
    """Make the registry of one process, with its build and the kernel's figures about it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Gauge(
        "sale_build_info",
        "1 for each running part, with the versions of the engine and of Python.",
        ["version", "python", "role"],
        registry=registry,
    ).labels(__version__, platform.python_version(), role).set(1)
    return registry


class StoreMetrics:
    """Gauges that say whether the stores answer this process; registered in ``registry``.

    A process makes them after it has opened both stores, so they begin at 1: a 0 means that a store
    did not answer, and never that nobody has asked yet.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.redis_up = Gauge("sale_redis_up", "1 if Redis answers.", registry=registry)
        self.postgres_up = Gauge("sale_postgres_up", "1 if PostgreSQL answers.", registry=registry)
        self.redis_up.set(1)
        self.postgres_up.set(1)


class Distribution:
    """The counts of a histogram; ``observe`` costs a bisection and two additions."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the unit of the bounds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: list[float]) -> None:
        """Count many values at once, and sort the list: one search per bound, not per value.

        Waiting times of a queue are almost sorted already, so the sort is one pass.
        """
        values.sort()
        seen = 0
        for place in range(bisect_left(self.bounds, values[0]) if values else 0, len(self.bounds)):
            if seen == len(values):
                break
            upto = bisect_right(values, self.bounds[place], seen)
            self.counts[place] += upto - seen
            seen = upto
        self.counts[-1] += len(values) - seen
        self.total += sum(values)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative buckets in Prometheus' form."""
        running, rows = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(running)))
        return rows


class PurchaseMetrics(Collector):
    """Purchases of one process by campaign and outcome, their latency (s), and batch sizes."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.seconds = Distribution(LATENCY_BOUNDS_S)
        self.batch_size = Distribution(BATCH_BOUNDS)
        self.halted = False

    def collect(self) -> Iterator[Metric]:
        """Give the counts so far."""
        purchases = CounterMetricFamily(
            "sale_purchases",
            "Purchase requests answered, by outcome.",
            labels=("campaign", "outcome"),
        )
        for labels, count in list(self.outcomes.items()):
            purchases.add_metric(labels, count)
        yield purchases
        yield HistogramMetricFamily(
            "sale_purchase_seconds",
            "Seconds from the decoded request to its answer.",
            buckets=self.seconds.buckets(),
            sum_value=self.seconds.total,
        )
        yield GaugeMetricFamily(
            "sale_halted",
            "1 if this process sells nothing: Redis is too weak, its disk is full, or it stops.",
            value=float(self.halted),
        )
        yield HistogramMetricFamily(
            "sale_batch_size",
            "Purchases in one call of purchase.lua.",
            buckets=self.batch_size.buckets(),
            sum_value=self.batch_size.total,
        )


class LoadMetrics(Collector):
    """The load of a process and its refusals; other modules count, this one collects."""

    def __init__(
        self,
        connections: Callable[[], int] = lambda: 0,
        waiting: Callable[[], Mapping[str, int]] = dict,
        shed: Mapping[str, int] | None = None,
        limited: Mapping[str, int] | None = None,
        waiters: Callable[[], int] = lambda: 0,
    ) -> None:
        self._waiters = waiters
        self._connections = connections
        self._waiting = waiting
        self._shed = shed or {}
        self._limited = limited or {}

    def collect(self) -> Iterator[Metric]:
        """Give the present load and the counts so far."""
        yield GaugeMetricFamily(
            "sale_connections", "Open connections of clients.", value=float(self._connections())
        )
        yield GaugeMetricFamily(
            "sale_purchases_standing",
            "Purchases in the waiting line: received and not yet examined.",
            value=float(self._waiters()),
        )
        waiting = GaugeMetricFamily(
            "sale_purchases_waiting", "Purchases that wait for their batch.", labels=("campaign",)
        )
        for campaign, count in self._waiting().items():
            waiting.add_metric((campaign,), count)
        yield waiting
        shed = CounterMetricFamily(
            "sale_shed", "Connections and requests refused for overload.", labels=("reason",)
        )
        for reason, count in self._shed.items():
            shed.add_metric((reason,), count)
        yield shed
        limited = CounterMetricFamily(
            "sale_rate_limited", "Requests refused for their rate.", labels=("scope",)
        )
        for scope, count in self._limited.items():
            limited.add_metric((scope,), count)
        yield limited
