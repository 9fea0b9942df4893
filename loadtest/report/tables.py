"""The figures of one run or two as rows of text: totals, outcomes, latency, peaks, processes."""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from loadtest.record import Percentile, Record, Sample
from loadtest.report.charts import all_outcomes, colour_of, in_order

NONE: Final = "–"
_SHARES: Final = (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0)

Format = Callable[[float], str]


class Row(NamedTuple):
    """A name, a cell for each column, and a colour where the charts have one for it."""

    name: str
    cells: list[str]
    colour: str = ""


class Group(NamedTuple):
    """A table of figures: one run has one column, two have A, B, B − A and B ÷ A."""

    title: str
    what: str
    columns: list[str]
    rows: list[Row]


class Told(NamedTuple):
    """A row of what was told about the runs; ``differs`` where they are not the same."""

    name: str
    cells: list[str]
    differs: bool


class Table(NamedTuple):
    """A titled table."""

    title: str
    rows: list[Told]


def figure_groups(records: Sequence[Record]) -> list[Group]:
    """All tables of figures; those without rows are left out."""
    groups = [
        ("Totals", "", _totals(records)),
        ("Outcomes", "final outcome", _outcomes(records)),
        ("Latency of all answers, ms", "share", _latency([run.latency for run in records])),
        ("Latency of what was sold, ms", "share", _latency([run.latency_sold for run in records])),
        ("Peaks", "", _peaks([run.samples for run in records])),
        ("CPU, % of a core: mean", "process", _cpu([run.samples for run in records])),
        ("Memory, MiB: most", "process", _memory([run.samples for run in records])),
    ]
    columns = ["A", "B", "B − A", "B ÷ A"] if len(records) > 1 else [""]
    return [Group(title, what, columns, rows) for title, what, rows in groups if rows]


def told_tables(records: Sequence[Record]) -> list[Table]:
    """Plan, settings, versions and machine."""
    return [
        _told("Plan", [{key: str(value) for key, value in run.plan.items()} for run in records]),
        _told("Settings of the engine", [run.settings for run in records]),
        _told("Versions", [run.versions for run in records]),
        _told("Machine", [run.machine for run in records]),
    ]


def count(value: float) -> str:
    """A whole number with thousands set apart."""
    return f"{value:,.0f}" if math.isfinite(value) else NONE


def measure(value: float) -> str:
    """A measured number in about three digits."""
    if not math.isfinite(value):
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{round(value, digits) or 0.0:,.{digits}f}"


def at_share(points: Sequence[Percentile], share: float) -> float | None:
    """Milliseconds within which at least ``share`` of the answers came."""
    return min((point.ms for point in points if point.share >= share - 1e-9), default=None)


def _totals(records: Sequence[Record]) -> list[Row]:
    rows: list[tuple[str, list[float | None], Format]] = [
        ("offered", [run.offered for run in records], count),
        ("sent, with repeats", [run.sent for run in records], count),
        ("answered, with repeats", [run.answered for run in records], count),
        ("offered a second", [run.offered_rate for run in records], measure),
        (
            "achieved a second",
            [None if run.bottleneck else run.achieved_rate for run in records],
            measure,
        ),
        ("duration, s", [run.duration_s for run in records], measure),
        (
            "orders in the books",
            [run.proof.orders if run.proof else None for run in records],
            count,
        ),
        (
            "tickets in the books",
            [run.proof.tickets if run.proof else None for run in records],
            count,
        ),
    ]
    return [_row(name, values, form) for name, values, form in rows]


def _outcomes(records: Sequence[Record]) -> list[Row]:
    names = in_order(name for run in records for name in all_outcomes(run))
    rows = []
    for name in names:
        row = _row(name, [run.outcomes.get(name, 0) for run in records], count)
        rows.append(row._replace(colour=colour_of(name)))
    return rows


def _latency(runs: Sequence[Sequence[Percentile]]) -> list[Row]:
    if not any(runs):
        return []
    return [
        _row(
            "most" if share == 1 else f"{share * 100:.10g} %",
            [at_share(points, share) for points in runs],
            measure,
        )
        for share in _SHARES
    ]


def _peaks(runs: Sequence[Sequence[Sample]]) -> list[Row]:
    if not any(runs):
        return []
    figures: tuple[tuple[str, Callable[[Sample], float], Format], ...] = (
        ("ledger lag, events", lambda sample: sample.lag_events, count),
        ("ledger lag, s", lambda sample: sample.lag_s, measure),
        ("queue depth", lambda sample: sample.queue, count),
        ("connections", lambda sample: sample.connections, count),
    )
    rows = []
    for name, figure, form in figures:
        read = [[figure(sample) for sample in samples] for samples in runs]
        most = [max((value for value in each if value >= 0), default=None) for each in read]
        rows.append(_row(name, most, form))
    return rows


def _cpu(runs: Sequence[Sequence[Sample]]) -> list[Row]:
    def mean(samples: Sequence[Sample], name: str) -> float | None:
        seen = [each.processes[name].cpu for each in samples if name in each.processes]
        return sum(seen) / len(seen) * 100 if seen else None

    return _by_process(runs, mean)


def _memory(runs: Sequence[Sequence[Sample]]) -> list[Row]:
    def most(samples: Sequence[Sample], name: str) -> float | None:
        seen = (each.processes[name].rss_bytes for each in samples if name in each.processes)
        found = max(seen, default=None)
        return None if found is None else found / 2**20

    return _by_process(runs, most)


def _by_process(
    runs: Sequence[Sequence[Sample]], figure: Callable[[Sequence[Sample], str], float | None]
) -> list[Row]:
    names = sorted({name for samples in runs for each in samples for name in each.processes})
    return [_row(name, [figure(samples, name) for samples in runs], measure) for name in names]


def _row(name: str, values: Sequence[float | None], form: Format) -> Row:
    cells = [NONE if value is None else form(value) for value in values]
    if len(values) == 2:
        first, second = values
        if first is None or second is None:
            cells += [NONE, NONE]
        else:
            change = form(second - first)
            cells.append(f"+{change}" if second > first and change.strip("0.") else change)
            cells.append(f"{second / first:.2f} ×" if first else NONE)
    return Row(name, cells)


def _told(title: str, tables: Sequence[dict[str, str]]) -> Table:
    names = dict.fromkeys(name for table in tables for name in table)
    rows = []
    for name in names:
        cells = [table.get(name, NONE) for table in tables]
        rows.append(Told(name, cells, len(set(cells)) > 1))
    return Table(title, rows)
