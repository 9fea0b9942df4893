"""Counting what the purchase path does, at a cost that the path does not feel.

A labelled counter and a histogram's observation for each purchase would stand on the hot path. So
the batcher adds up plain integers, a batch at a time, and this collector turns them into metrics
when somebody asks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

LATENCY_BOUNDS_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
BATCH_BOUNDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class Distribution:
    """A histogram's counts: ``observe`` costs a bisection and two additions."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the unit of the bounds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: list[float]) -> None:
        """Count many values, for the price of one call."""
        bounds, counts = self.bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative buckets as Prometheus wants them."""
        running, rows = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(running)))
        return rows


class PurchaseMetrics(Collector):
    """Purchases by campaign and outcome, their latency (s), and batch sizes of one process."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.seconds = Distribution(LATENCY_BOUNDS_S)
        self.batch_size = Distribution(BATCH_BOUNDS)
        self.halted = False

    def collect(self) -> Iterator[Metric]:
        """Give what was counted so far."""
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
            "From the decoded request to its answer.",
            buckets=self.seconds.buckets(),
            sum_value=self.seconds.total,
        )
        yield GaugeMetricFamily(
            "sale_halted",
            "1 where this process sells nothing: its Redis' disk is short, or it is stopping.",
            value=float(self.halted),
        )
        yield HistogramMetricFamily(
            "sale_batch_size",
            "Purchases in one call of purchase.lua.",
            buckets=self.batch_size.buckets(),
            sum_value=self.batch_size.total,
        )
