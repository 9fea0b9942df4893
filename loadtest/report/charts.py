"""The charts of a run's report: which there are, and what each shows.

They are plotly's, as plain data: its Python objects check each property, at many times the cost of
all else here, so a test lets them check instead. Colours are chosen to be told apart by people who
see red and green alike (after Okabe and Ito), light and dark: what was served is green, a refusal
that the rules ask for is blue to violet, trouble is yellow to red. The same outcome has the same
colour in every report.
"""

import html
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from loadtest.record import ProcessSample, Record
from loadtest.report.runs import Run, runs_of

OUTCOME_COLOURS: Final = {
    "sold": "#009e73",
    "replayed": "#7fd6b6",
    "sold-out": "#0072b2",
    "limit-exceeded": "#56b4e9",
    "not-open": "#b9a6e8",
    "paused": "#8d6cc9",
    "closed": "#5f4aa3",
    "not-eligible": "#cc79a7",
    "card-revoked": "#a8507f",
    "forbidden": "#e3b1cd",
    "rate-limited": "#f0c808",
    "overloaded": "#e69f00",
    "unavailable": "#d55e00",
    "no-answer": "#8c1c13",
}
"""In the order in which they are stacked and listed."""

_OTHER_COLOURS: Final = ("#a6761d", "#8a8a8a", "#b5b09a", "#6d7f8b")
_LINE_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
_DASHES: Final = ("solid", "dash", "dot", "dashdot")
QUIET_SHOWN_S: Final = 2.0
_SHARES_TOLD: Final = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)

Line = tuple[str, str, Sequence[float | None], str]
"""Name, colour, values, dash."""

Lines = Callable[[Run], list[Line]]
Figure = dict[str, Any]


class Chart(NamedTuple):
    """One chart: an id, a title, a line that says how to read it, and a figure for each run."""

    id: str
    title: str
    about: str
    figures: list[Figure]
    shares_time: bool = True
    wide: bool = False


def charts(records: Sequence[Record]) -> list[Chart]:
    """All charts of one run, or of two side by side with the same axes."""
    runs = runs_of(records)
    seconds = [_over_time(runs, *each, by_second=True) for each in _BY_SECOND]
    sampled = [_over_time(runs, *each, by_second=False) for each in _SAMPLED]
    return [*seconds, _outcomes(runs), _percentiles(runs), *sampled]


def colour_of(outcome: str) -> str:
    """Colour of an outcome, the same in every report, also of one that is not known here."""
    by_name = _OTHER_COLOURS[zlib.crc32(outcome.encode()) % len(_OTHER_COLOURS)]
    return OUTCOME_COLOURS.get(outcome, by_name)


def in_order(outcomes: Iterable[str]) -> list[str]:
    """Outcomes as they are stacked and listed: known ones first, each once."""
    known = list(OUTCOME_COLOURS)
    return sorted(
        set(outcomes), key=lambda name: (known.index(name) if name in known else len(known), name)
    )


def all_outcomes(record: Record) -> list[str]:
    """Every outcome that a record has, in the total or in any second."""
    names = set(record.outcomes)
    return in_order(names.union(*(second.outcomes for second in record.seconds)))


# Lines --------------------------------------------------------------------------------------------


def _throughput(run: Run) -> list[Line]:
    styles = {
        "offered": ("#8a8a8a", "dash"),
        "sent": ("#e69f00", "dot"),
        "answered": ("#0072b2", "solid"),
    }
    lines: list[Line] = []
    for name, (colour, dash) in styles.items():
        counts = [getattr(second, name) for second in run.seconds]
        rates = [None if count is None else count / run.width_s for count in counts]
        lines.append((name, colour, rates, dash))
    return lines


def _latency(run: Run) -> list[Line]:
    styles = {
        "p50": ("#0072b2", "solid"), "p95": ("#009e73", "dash"), "p99": ("#d55e00", "solid"),
        "max": ("#8a8a8a", "dot"),
    }  # fmt: skip
    return [
        (name, colour, [getattr(second, f"{name}_ms") or None for second in run.seconds], dash)
        for name, (colour, dash) in styles.items()
    ]


def _sampled(field: str, name: str, number: int) -> Lines:
    """One line of a figure of the samples, in the colour of that number."""
    return lambda run: [_line(name, number, [getattr(sample, field) for sample in run.samples])]


def _stock(run: Run) -> list[Line]:
    return [
        _line(showing, n, [sample.stock.get(showing) for sample in run.samples])
        for n, showing in enumerate(run.showings)
    ]


def _by_process(figure: Callable[[ProcessSample], float]) -> Lines:
    def lines(run: Run) -> list[Line]:
        told = []
        for n, name in enumerate(run.processes):
            found = [sample.processes.get(name) for sample in run.samples]
            told.append(_line(name, n, [None if each is None else figure(each) for each in found]))
        return told

    return lines


def _line(name: str, number: int, values: Sequence[float | None]) -> Line:
    """One line of the samples; what was not read is below 0 and left out."""
    shown = [None if value is None or value < 0 else value for value in values]
    row, column = divmod(number, len(_LINE_COLOURS))
    return name, _LINE_COLOURS[column], shown, _DASHES[row % len(_DASHES)]


_BY_SECOND: Final[tuple[tuple[str, str, str, Lines], ...]] = (
    (
        "throughput",
        "Throughput",
        (
            "Requests a second: offered by the plan, written, and answered. Answered below offered "
            "is a queue that grows. Where the generator was the limit, answers are not told."
        ),
        _throughput,
    ),
    (
        "latency",
        "Latency over time",
        "Milliseconds from the intended send time, by the second of that time; log scale.",
        _latency,
    ),
)
_SAMPLED: Final[tuple[tuple[str, str, str, Lines], ...]] = (
    ("stock", "Stock left", "Tickets left, by showing.", _stock),
    (
        "lag",
        "Ledger lag",
        "Events that PostgreSQL did not have yet.",
        _sampled("lag_events", "events", 4),
    ),
    (
        "lag-age",
        "Age of the ledger lag",
        "Seconds since the oldest of these events.",
        _sampled("lag_s", "seconds", 3),
    ),
    ("queue", "Queue depth", "Purchases that waited for a batch.", _sampled("queue", "waiting", 1)),
    (
        "connections",
        "Connections",
        "Open connections to the API.",
        _sampled("connections", "connections", 0),
    ),
    (
        "cpu",
        "CPU of each process",
        "Per cent of one core, children counted. A process at 100 is a limit.",
        _by_process(lambda process: process.cpu * 100),
    ),
    (
        "memory",
        "Memory of each process",
        "MiB in memory, children counted, shared pages once.",
        _by_process(lambda process: process.rss_bytes / 2**20),
    ),
)
"""Id, title, how to read it, the lines of a run."""


# Figures ------------------------------------------------------------------------------------------


def _over_time(
    runs: Sequence[Run], identifier: str, title: str, about: str, lines: Lines, *, by_second: bool
) -> Chart:
    drawn = [lines(run) for run in runs]
    values = [v for each in drawn for line in each for v in line[2] if v and _rounded(v)]
    upright, figures = _vertical(values, log=lines is _latency), []
    for run, of_run in zip(runs, drawn, strict=True):
        times = [point.t for point in (run.seconds if by_second else run.samples)]
        traces = [
            {
                "type": "scatter",
                "x": times,
                "y": [_rounded(value) for value in shown],
                "name": html.escape(name, quote=False),
                "mode": "lines" if len(times) > 1 else "markers",
                "line": {"color": colour, "dash": dash, "width": 2},
                "marker": {"color": colour},
                "hovertemplate": "%{y:,.4~g}",
            }
            for name, colour, shown, dash in of_run
        ]
        figures.append(_figure(traces, _times(runs), upright))
    return Chart(identifier, title, about + _merging(runs) * by_second, figures)


def _outcomes(runs: Sequence[Run]) -> Chart:
    tops = [sum(second.outcomes.values()) / run.width_s for run in runs for second in run.seconds]
    figures = []
    for run in runs:
        traces = [
            {
                "type": "bar",
                "x": [second.t + run.width_s / 2 for second in run.seconds],
                "y": [
                    None
                    if second.answered is None
                    else round(second.outcomes.get(name, 0) / run.width_s, 3)
                    for second in run.seconds
                ],
                "width": run.width_s * 0.96,
                "name": html.escape(name, quote=False),
                "marker": {"color": colour_of(name), "line": {"width": 0}},
                "hovertemplate": "%{y:,.4~g}",
            }
            for name in all_outcomes(run.record)
        ]
        figures.append(_figure(traces, _times(runs), _vertical(tops, log=False)))
    about = "Final outcomes a second, by the second of the intended send time." + _merging(runs)
    return Chart("outcomes", "Outcomes by second", about, figures, wide=True)


def _percentiles(runs: Sequence[Run]) -> Chart:
    """One figure for all runs: lines that lie on each other compare best."""
    traces, every = [], []
    for number, run in enumerate(runs):
        for name, colour, points in (
            ("all answers", "#0072b2", run.record.latency),
            ("sold", "#009e73", run.record.latency_sold),
        ):
            known = [point for point in points if 0 <= point.share < 1 and 0 < point.ms < math.inf]
            every += known
            traces.append(
                {
                    "type": "scatter",
                    "x": [1 / (1 - point.share) for point in known],
                    "y": [point.ms for point in known],
                    "name": name if len(runs) == 1 else f"{name}, {'AB'[number]}",
                    "customdata": [_share(point.share) for point in known],
                    "mode": "lines+markers",
                    "line": {"color": colour, "dash": _DASHES[number], "width": 2},
                    "marker": {"size": 5, "symbol": ("circle", "diamond-open")[number]},
                    "hovertemplate": "%{customdata}: %{y:,.4~g} ms",
                }
            )
    most = 1 / (1 - max((point.share for point in every), default=0.99))
    ticks = [share for share in _SHARES_TOLD if 1 / (1 - share) <= most * 1.05]
    across = {
        "type": "log",
        "range": [0, math.log10(most) * 1.02 or 1],
        "tickvals": [1 / (1 - share) for share in ticks],
        "ticktext": [_share(share) for share in ticks],
    }
    about = (
        "Share of the answers that came within so many milliseconds of their intended send time. "
        "Each nine of the share has the same width; both scales are logarithmic."
    )
    figure = _figure(traces, across, _vertical([point.ms for point in every], log=True))
    return Chart("percentiles", "Latency percentiles", about, [figure], shares_time=False)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)


def _share(share: float) -> str:
    return f"{share * 100:.10g} %"


def _merging(runs: Sequence[Run]) -> str:
    width_s = max(run.width_s for run in runs)
    if width_s == 1:
        return ""
    return f" A point stands for {width_s} s: of rates it is the mean, of latencies the highest."


def _times(runs: Sequence[Run]) -> Figure:
    """Options of the time axis: first to last second of all runs, so that they have the same.

    Of what was sampled before anybody asked, only the last moment is shown.
    """
    asked_from = min((second.t for run in runs for second in run.seconds), default=0)
    sampled = [float(sample.t) for run in runs for sample in run.samples]
    times = [moment for moment in sampled if moment >= asked_from - QUIET_SHOWN_S]
    for run in runs:
        times += [float(second.t) for second in run.seconds]
        times += [float(second.t + run.width_s) for second in run.seconds[-1:]]
    span = [min(times), max(times)] if times else [0.0, 1.0]
    return {"range": span, "ticksuffix": " s", "hoverformat": ".1f"}


def _vertical(values: Sequence[float], *, log: bool) -> Figure:
    """Options of the upright axis, the same for both runs; a log scale shows whole decades."""
    top = max(values, default=1.0) or 1.0
    if not log:
        return {"range": [0, top * 1.06]}
    low = math.floor(math.log10(min(values, default=1.0)))
    high = max(math.ceil(math.log10(top) + 0.02), low + 1)
    ticks = [10.0**power for power in range(low, high + 1)]
    text = [f"{tick:,.10g} ms" for tick in ticks]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": text}


def _figure(traces: list[Figure], across: Figure, upright: Figure) -> Figure:
    """Traces with what all figures have in common; colours of ground and text are the page's."""
    empty = all(value is None for trace in traces for value in trace["y"])
    bottom = {"yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
    layout: Figure = {
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "legend": {"orientation": "h", "traceorder": "normal", **bottom},
        "barmode": "stack",
        "hovermode": "x unified" if "ticksuffix" in across else "closest",
        "dragmode": "zoom",
        "showlegend": not empty,
        "xaxis": {"automargin": True, "zeroline": False, **across},
        "yaxis": {"automargin": True, "zeroline": False, "fixedrange": True, **upright},
    }
    if empty:
        middle = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
        layout["annotations"] = [{"text": "no data", "showarrow": False, **middle}]
    return {"data": traces, "layout": layout}
