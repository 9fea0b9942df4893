"""The figures of one run or two as rows of text: totals, outcomes, latency, peaks, processes."""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from loadtest.record import Percentile, ProcessSample, Record, latency_ms
from loadtest.report.charts import all_outcomes, colour_of, in_order

NONE: Final = "–"
_SHARES: Final = (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0)


class Row(NamedTuple):
    """A name, a cell for each column, and a colour where the charts have one for it.

    ``differs``: the runs were not told the same.
    """

    name: str
    cells: list[str]
    colour: str = ""
    differs: bool = False


class Group(NamedTuple):
    """A table. Of figures one run has one column, two have A, B, B − A and B ÷ A."""

    title: str
    what: str
    columns: list[str]
    rows: list[Row]


def figure_groups(records: Sequence[Record]) -> list[Group]:
    """All tables of figures; those without rows are left out."""
    groups = [
        ("Totals", "", _totals(records)),
        ("Outcomes", "final outcome", _outcomes(records)),
        ("Latency of all answers, ms", "share", _latency([run.latency for run in records])),
        ("Latency of what was sold, ms", "share", _latency([run.latency_sold for run in records])),
        ("Peaks", "", _peaks(records)),
        ("CPU, % of a core: mean", "process", _by_process(records, _mean_cpu)),
        ("Memory, MiB: most", "process", _by_process(records, _most_mib)),
    ]
    columns = ["A", "B", "B − A", "B ÷ A"] if len(records) > 1 else [""]
    return [Group(title, what, columns, rows) for title, what, rows in groups if rows]


def told_tables(records: Sequence[Record]) -> list[Group]:
    """Plan, settings, versions and machine."""
    titles = {
        "plan": "Plan",
        "settings": "Settings of the engine",
        "versions": "Versions",
        "machine": "Machine",
    }
    tables = []
    for field, title in titles.items():
        told = [getattr(run, field) for run in records]
        names = dict.fromkeys(name for table in told for name in table)
        every = [(name, [str(table.get(name, NONE)) for table in told]) for name in names]
        rows = [Row(name, cells, differs=len(set(cells)) > 1) for name, cells in every]
        tables.append(Group(title, "", ["A", "B"][: len(records)], rows))
    return tables


def count(value: float) -> str:
    """A whole number with thousands set apart."""
    return f"{value:,.0f}" if math.isfinite(value) else NONE


def measure(value: float) -> str:
    """A measured number in about three digits."""
    if not math.isfinite(value):
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{round(value, digits) or 0.0:,.{digits}f}"


def _totals(records: Sequence[Record]) -> list[Row]:
    rows: tuple[tuple[str, Callable[[Record], float | None], Callable[[float], str]], ...] = (
        ("offered", lambda run: run.offered, count),
        ("sent, with repeats", lambda run: run.sent, count),
        ("answered, with repeats", lambda run: run.answered, count),
        ("offered a second", lambda run: run.offered_rate, measure),
        ("achieved a second", lambda run: None if run.bottleneck else run.achieved_rate, measure),
        ("duration, s", lambda run: run.duration_s, measure),
        ("orders in the books", lambda run: run.proof.orders if run.proof else None, count),
        ("tickets in the books", lambda run: run.proof.tickets if run.proof else None, count),
    )
    return [_row(name, [figure(run) for run in records], form) for name, figure, form in rows]


def _outcomes(records: Sequence[Record]) -> list[Row]:
    names = in_order(name for run in records for name in all_outcomes(run))
    return [
        _row(name, [run.outcomes.get(name, 0) for run in records], count, colour_of(name))
        for name in names
    ]


def _latency(runs: Sequence[Sequence[Percentile]]) -> list[Row]:
    names = {share: "most" if share == 1 else f"{share * 100:.10g} %" for share in _SHARES}
    return [
        _row(name, [latency_ms(points, share) for points in runs])
        for share, name in names.items()
        if any(runs)
    ]


def _peaks(records: Sequence[Record]) -> list[Row]:
    def most(run: Record, field: str) -> float | None:
        read = (getattr(sample, field) for sample in run.samples)
        return max((value for value in read if value >= 0), default=None)

    figures = (
        ("ledger lag, events", "lag_events", count),
        ("ledger lag, s", "lag_s", measure),
        ("queue depth", "queue", count),
        ("connections", "connections", count),
    )
    sampled = any(run.samples for run in records)
    return [
        _row(name, [most(run, field) for run in records], form)
        for name, field, form in figures
        if sampled
    ]


def _mean_cpu(seen: Sequence[ProcessSample]) -> float:
    return sum(each.cpu for each in seen) / len(seen) * 100


def _most_mib(seen: Sequence[ProcessSample]) -> float:
    return max(each.rss_bytes for each in seen) / 2**20


def _by_process(
    records: Sequence[Record], figure: Callable[[Sequence[ProcessSample]], float]
) -> list[Row]:
    names = sorted({name for run in records for each in run.samples for name in each.processes})
    rows = []
    for name in names:
        seen = [[s.processes[name] for s in run.samples if name in s.processes] for run in records]
        rows.append(_row(name, [figure(each) if each else None for each in seen]))
    return rows


def _row(
    name: str,
    values: Sequence[float | None],
    form: Callable[[float], str] = measure,
    colour: str = "",
) -> Row:
    cells = [NONE if value is None else form(value) for value in values]
    if len(values) == 2:
        first, second = values
        if first is None or second is None:
            cells += [NONE, NONE]
        else:
            change = form(second - first)
            cells.append(f"+{change}" if second > first and change.strip("0.") else change)
            cells.append(f"{second / first:.2f} ×" if first else NONE)
    return Row(name, cells, colour)
