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
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
from plotly.offline import get_plotlyjs

from loadtest import record as records
from loadtest.record import Finding, Record
from loadtest.report.charts import Chart, charts
from loadtest.report.tables import NONE, at_share, count, figure_groups, measure, told_tables

FINDINGS_SHOWN: Final = 20
_LETTERS: Final = "AB"


class Verdict(NamedTuple):
    """Whether the books balance: in one line, and why."""

    tone: str
    sign: str
    says: str
    why: str
    findings: list[Finding]
    unlisted: int


class Fact(NamedTuple):
    """A figure of the head."""

    name: str
    value: str
    note: str


def keep(folder: Path, record: Record) -> None:
    """Write a run's record and its report. Raises OSError."""
    records.write(folder / records.RECORD_NAME, record)
    write_report(folder / records.REPORT_NAME, record)


def write_report(file: Path, record: Record, other: Record | None = None) -> None:
    """Write the report of a run, or of two, whole or not at all. Raises OSError."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_text(render(record, other), "utf-8")
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def render(record: Record, other: Record | None = None) -> str:
    """The report as text."""
    runs = [record] if other is None else [record, other]
    drawn = charts(runs)
    return _page().render(
        title=" and ".join(dict.fromkeys(run.name for run in runs)),
        pair=other is not None,
        heads=[_head(run, letter) for run, letter in zip(runs, _LETTERS, strict=False)],
        charts=[_section(chart, runs) for chart in drawn],
        groups=figure_groups(runs),
        tables=told_tables(runs),
        figures={
            f"{chart.id}-{number}": figure | {"shares_time": chart.shares_time}
            for chart in drawn
            for number, figure in enumerate(chart.figures)
        },
        footer="Latencies count from the intended send time, so waiting in the generator counts.",
        style=_asset("report.css"),
        script=_asset("report.js"),
        library=_library(),
    )


@functools.cache
def _page() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("report.html"))


@functools.cache
def _library() -> str:
    """Plotly's script, which must not end the element that it stands in."""
    library: str = get_plotlyjs()
    return library.replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return importlib.resources.files("loadtest.report").joinpath("web", name).read_text("utf-8")


def _head(run: Record, letter: str) -> dict[str, Any]:
    return {
        "letter": letter,
        "name": run.name,
        "campaign": run.campaign,
        "started_at": _moment(run.started_at),
        "duration": f"{measure(run.duration_s)} s",
        "bottleneck": run.bottleneck,
        "not_played": run.not_played,
        "thresholds": run.thresholds,
        "notes": run.notes,
        "verdict": _verdict(run),
        "facts": _facts(run),
    }


def _moment(iso: str) -> str:
    """A moment as people write it, to the second; what is none is shown as it stands."""
    if "T" not in iso:
        return iso
    try:
        return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return iso


def _verdict(run: Record) -> Verdict:
    proof = run.proof
    if proof is None:
        why = "not looked at" if run.plan.get("proof") == 0 else "not checked"
        why = run.not_proved or f"The books were {why}."
        return Verdict("warn", "!", "Not proved.", why, [], 0)
    why = f"{count(proof.orders)} orders in the campaign, {count(proof.tickets)} tickets. "
    why += {
        None: "The engine’s audit was not run.",
        True: "The engine’s audit is clean.",
        False: "The engine’s audit found breaches.",
    }[proof.audit_clean]
    told, unlisted = proof.findings[:FINDINGS_SHOWN], len(proof.findings[FINDINGS_SHOWN:])
    if not proof.clean or proof.audit_clean is False:
        return Verdict("bad", "✗", "The books do NOT balance.", why, told, unlisted)
    if proof.audit_clean is None:
        return Verdict("warn", "✓", "The books balance; not audited.", why, told, unlisted)
    return Verdict("good", "✓", "The books balance.", why, told, unlisted)


def _facts(run: Record) -> list[Fact]:
    def latency(name: str, share: float) -> Fact:
        ms = at_share(run.latency, share)
        return Fact(name, NONE if ms is None else f"{measure(ms)} ms", "all answers")

    sold = run.outcomes.get("sold", 0)
    share = f"{sold / run.offered:.1%} of offered" if run.offered else ""
    return [
        Fact("Offered", count(run.offered), f"{measure(run.offered_rate)} a second"),
        Fact("Sent", count(run.sent), "with repeats"),
        Fact("Answered", count(run.answered), "with repeats"),
        _achieved(run),
        Fact("Sold", count(sold), share),
        latency("p50", 0.5),
        latency("p99", 0.99),
        latency("p99.9", 0.999),
    ]


def _achieved(run: Record) -> Fact:
    """Members settled a second, and as a share of those offered in the same time.

    Offered are all, where the last answer came before the planned time was over.
    """
    if run.bottleneck:
        return Fact("Achieved", NONE, "the generator was the limit")
    due = max(run.offered, run.offered_rate * run.duration_s)
    share = f"{run.achieved_rate * run.duration_s / due:.0%} of offered" if due else ""
    return Fact("Achieved", f"{measure(run.achieved_rate)}/s", share)


def _section(chart: Chart, runs: Sequence[Record]) -> dict[str, Any]:
    """A chart as the page wants it; a figure of a run that its generator limited says so."""
    panels = []
    for number in range(len(chart.figures)):
        own = len(chart.figures) == len(runs)
        shown = [runs[number]] if own else list(runs)
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
    return {
        "title": chart.title,
        "about": chart.about,
        "panels": panels,
        "place": "drawn wide" if chart.wide else "drawn",
    }
