"""The report of a run, or of two side by side, as one HTML file that opens without a network.

Charts are plotly's: its Python package carries the script that draws them, so one ``pip install``
has all that is needed, and the page can hold it. They are SVG, so they print sharply, and can be
zoomed and read off. It costs 4.8 MB a report (``plotly.min.js`` of plotly 7.1). Bokeh's script has
1.3 MB, but its package wants NumPy, Tornado and Pillow, and it draws on a canvas, which prints as
pixels; pyecharts fetches its script from a network. Plotly's script names addresses for maps, which
are not used here; the page's Content-Security-Policy forbids the browser to ask any.
"""

import functools
import importlib.resources
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
from plotly.offline import get_plotlyjs

from loadtest import record as records
from loadtest.record import Record, latency_ms
from loadtest.report.charts import Chart, charts
from loadtest.report.tables import NONE, count, figure_groups, measure, told_tables

FINDINGS_SHOWN: Final = 20
_LETTERS: Final = "AB"


class Verdict(NamedTuple):
    """Whether the books balance, in one line."""

    tone: str
    sign: str
    says: str


def keep(folder: Path, record: Record) -> None:
    """Write a run's record and its report. Raises OSError."""
    records.write_whole(folder / records.RECORD_NAME, records.encode(record))
    write_report(folder / records.REPORT_NAME, record)


def write_report(file: Path, record: Record, other: Record | None = None) -> None:
    """Write the report of a run, or of two, whole or not at all. Raises OSError."""
    records.write_whole(file, render(record, other).encode())


def render(record: Record, other: Record | None = None) -> str:
    """The report as text."""
    runs = [record] if other is None else [record, other]
    drawn = charts(runs)
    return _page().render(
        title=" and ".join(dict.fromkeys(run.name for run in runs)),
        pair=other is not None,
        runs=list(zip(_LETTERS, runs, strict=False)),
        charts=[(chart, _panels(chart, runs)) for chart in drawn],
        groups=figure_groups(runs),
        tables=told_tables(runs),
        figures={
            f"{chart.id}-{number}": figure | {"shares_time": chart.shares_time}
            for chart in drawn
            for number, figure in enumerate(chart.figures)
        },
        findings_shown=FINDINGS_SHOWN,
        style=_asset("report.css"),
        script=_asset("report.js"),
        library=_library(),
    )


@functools.cache
def _page() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": count, "facts": _facts, "measure": measure, "moment": _moment, "verdict": _verdict,
    }  # fmt: skip
    return environment.from_string(_asset("report.html"))


@functools.cache
def _library() -> str:
    """Plotly's script, which must not end the element that it stands in."""
    library: str = get_plotlyjs()
    return library.replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return importlib.resources.files("loadtest.report").joinpath("web", name).read_text("utf-8")


def _moment(iso: str) -> str:
    """A moment as people write it, to the second; what is none is shown as it stands."""
    try:
        return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return iso


def _verdict(run: Record) -> Verdict:
    proof = run.proof
    if proof is None:
        return Verdict("warn", "!", "Not proved.")
    if not proof.clean or proof.audit_clean is False:
        return Verdict("bad", "✗", "The books do NOT balance.")
    if proof.audit_clean is None:
        return Verdict("warn", "✓", "The books balance; not audited.")
    return Verdict("good", "✓", "The books balance.")


def _facts(run: Record) -> list[tuple[str, str, str]]:
    """The figures of the head: name, value, note. Achieved is a share of those offered in the same
    time, which are all, where the last answer came before the planned time was over.
    """
    sold, due = run.outcomes.get("sold", 0), max(run.offered, run.offered_rate * run.duration_s)
    achieved = f"{measure(run.achieved_rate)}/s"
    of_due = f"{run.achieved_rate * run.duration_s / due:.0%} of offered" if due else ""
    if run.bottleneck:
        achieved, of_due = NONE, "the generator was the limit"
    told = {name: latency_ms(run.latency, s) for name, s in (("p50", 0.5), ("p99", 0.99))}
    told["p99.9"] = latency_ms(run.latency, 0.999)
    return [
        ("Offered", count(run.offered), f"{measure(run.offered_rate)} a second"),
        ("Sent", count(run.sent), "with repeats"),
        ("Answered", count(run.answered), "with repeats"),
        ("Achieved", achieved, of_due),
        ("Sold", count(sold), f"{sold / run.offered:.1%} of offered" if run.offered else ""),
        *(
            (name, NONE if ms is None else f"{measure(ms)} ms", "all answers")
            for name, ms in told.items()
        ),
    ]


def _panels(chart: Chart, runs: Sequence[Record]) -> list[dict[str, Any]]:
    """A chart's figures as the page wants them; one of a run that its generator limited says so."""
    panels = []
    own = len(chart.figures) == len(runs)
    for number in range(len(chart.figures)):
        shown = [runs[number]] if own else runs
        bound = [_LETTERS[runs.index(run)] for run in shown if run.bottleneck]
        which = "" if own or len(runs) == 1 else ": " + ", ".join(bound)
        panels.append(
            {
                "id": f"{chart.id}-{number}",
                "letter": _LETTERS[number] if own and len(runs) > 1 else "",
                "name": shown[0].name,
                "limited": f"limited by the generator{which}" if bound else "",
            }
        )
    return panels
