"""Latencies added up: an HDR histogram of microseconds, and the percentiles that are told of it."""

import math
from collections.abc import Sequence
from typing import Final

from hdrh.histogram import HdrHistogram

from loadtest.record import Percentile

HIGHEST_US: Final = 3_600_000_000
DIGITS: Final = 3
TICKS_PER_HALF: Final = 4
TOLD_SHARES: Final = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


def new_histogram() -> HdrHistogram:
    """An empty histogram of microseconds up to an hour, three digits exact."""
    return HdrHistogram(1, HIGHEST_US, DIGITS)


def percentiles(histogram: HdrHistogram) -> list[Percentile]:
    """The histogram's percentiles, ever denser towards 1, as they are drawn on a log scale."""
    count = histogram.get_total_count()
    if not count:
        return []
    shares, rest, step = set(TOLD_SHARES), 1.0, 0
    while rest * count > 1:
        shares.add(1 - rest)
        step += 1
        rest = 0.5 ** (step / TICKS_PER_HALF)
    levels = {share * 100: share for share in sorted(shares)}
    values = histogram.get_percentile_to_value_dict(list(levels))
    return [Percentile(share=levels[level], ms=values[level] / 1e3) for level in levels]


def at_share(values: Sequence[float], share: float) -> float:
    """Value that a share of the values stay within; 0 for none."""
    ranked = sorted(values)
    return ranked[max(math.ceil(share * len(ranked)) - 1, 0)] if ranked else 0.0
