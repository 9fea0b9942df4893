"""Records made ready to be drawn: sorted, and merged where a page should not hold them in full."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from loadtest.record import ProcessSample, Record, Sample, Second

BINS_MAX: Final = 600


class Run(NamedTuple):
    """A record, and its seconds and samples merged to at most ``BINS_MAX`` of each.

    ``showings`` and ``processes`` are those of all runs: one name has one colour.
    """

    record: Record
    seconds: list[Second]
    width_s: int
    samples: list[Sample]
    showings: list[str]
    processes: list[str]


def runs_of(records: Sequence[Record]) -> list[Run]:
    """The records, ready to be drawn beside each other."""
    samples = [sample for record in records for sample in record.samples]
    showings = sorted({name for sample in samples for name in sample.stock})
    processes = sorted({name for sample in samples for name in sample.processes})
    return [_run(record, showings, processes) for record in records]


def _run(record: Record, showings: list[str], processes: list[str]) -> Run:
    width_s = max(1, math.ceil(_length_s(record.seconds) / BINS_MAX))
    merged: dict[int, list[Second]] = {}
    for second in sorted(record.seconds, key=lambda each: each.t):
        merged.setdefault(second.t // width_s, []).append(second)
    seconds = [_merged(number * width_s, width_s, group) for number, group in merged.items()]
    samples = sorted(record.samples, key=lambda sample: sample.t)
    step = max(1, math.ceil(len(samples) / BINS_MAX))
    groups = [samples[start : start + step] for start in range(0, len(samples), step)]
    return Run(record, seconds, width_s, [_peak(group) for group in groups], showings, processes)


def _length_s(seconds: Sequence[Second]) -> int:
    times = [second.t for second in seconds]
    return max(times) - min(times) + 1 if times else 1


def _merged(start: int, width_s: int, group: list[Second]) -> Second:
    """Sums of counts, and of latencies the highest: percentiles do not add up."""
    if width_s == 1 and len(group) == 1:
        return group[0]
    answered = [second.answered for second in group if second.answered is not None]
    outcomes = Counter[str]()
    for second in group:
        outcomes.update(second.outcomes)
    return Second(
        t=start,
        offered=sum(second.offered for second in group),
        sent=sum(second.sent for second in group),
        answered=sum(answered) if answered else None,
        outcomes=dict(outcomes),
        **_highest(group, "p50_ms", "p95_ms", "p99_ms", "max_ms"),
    )


def _peak(group: list[Sample]) -> Sample:
    """The highest of each figure; of stock the last."""
    if len(group) == 1:
        return group[0]
    processes: dict[str, ProcessSample] = {}
    for name in {name for sample in group for name in sample.processes}:
        seen = [sample.processes[name] for sample in group if name in sample.processes]
        processes[name] = ProcessSample(
            cpu=max(each.cpu for each in seen), rss_bytes=max(each.rss_bytes for each in seen)
        )
    return Sample(
        t=group[0].t,
        stock=next((sample.stock for sample in reversed(group) if sample.stock), {}),
        processes=processes,
        **_highest(group, "lag_events", "lag_s", "queue", "connections"),
    )


def _highest(group: Sequence[object], *names: str) -> dict[str, Any]:
    return {name: max(getattr(each, name) for each in group) for name in names}
