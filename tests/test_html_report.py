"""The report of a run: what it says, that it is harmless, offline, and drawn by a browser."""

import asyncio
import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from record_maker import OUTCOMES, made_up, unbalanced

from loadtest import record as records
from loadtest.__main__ import main as loadtest_command
from loadtest.record import Percentile, Proof, Record, Sample, Second, Threshold
from loadtest.report.__main__ import main
from loadtest.report.charts import OUTCOME_COLOURS, charts, colour_of
from loadtest.report.page import render, write_report
from loadtest.report.runs import BINS_MAX
from loadtest.report.tables import figure_groups, told_tables

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER_LIMIT_S = 40
EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


def empty(**fields: Any) -> Record:
    return Record(
        **{"name": "nothing", "campaign": "x", "started_at": "", "duration_s": 0.0} | fields
    )


def own_part(page: str) -> str:
    """The page without plotly's script."""
    library = get_plotlyjs()
    assert page.count(library) == 1
    return page.replace(library, "")


def figures_in(page: str) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL
    )
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    return figures


def text_of(page: str) -> str:
    plain = re.sub(r"<(script|style).*?</\1>", "", own_part(page), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", plain)))


# Offline and harmless -----------------------------------------------------------------------------


def test_page_names_no_address_and_forbids_all() -> None:
    page = render(made_up(), made_up("other"))
    ours = own_part(page)
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", ours), "an address, or a comment that looks so"
    assert not re.search(r"(?i)\b(src|action|poster)\s*=|@import|url\(", ours)
    assert re.findall(r'href="([^"]*)"', ours) == ["data:,"]
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    allowed = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert {word for words in allowed.values() for word in words.split()} <= {
        "'none'", "'unsafe-inline'", "data:", "blob:",
    }  # fmt: skip
    assert page.index("Content-Security-Policy") < page.index("<script")


def test_html_in_names_stays_text() -> None:
    run = made_up(EVIL)
    run.campaign = run.bottleneck = run.started_at = EVIL
    run.outcomes[EVIL] = 3
    run.seconds[6].outcomes[EVIL] = 3
    run.samples[6].stock[EVIL] = 3
    run.samples[6].processes[EVIL] = run.samples[6].processes["redis"]
    run.plan[EVIL] = run.settings[EVIL] = run.versions[EVIL] = run.machine[EVIL] = EVIL
    run.proof = Proof(clean=False, findings=[records.Finding(kind=EVIL, what=EVIL)])
    for page in (render(run), render(made_up(), run)):
        assert EVIL not in page
        assert "<img" not in own_part(page)
        assert len(re.findall(r"(?i)</script", page)) == 3
        names = {trace["name"] for figure in figures_in(page).values() for trace in figure["data"]}
        # Plotly reads a little HTML in names, and entities.
        assert html.escape(EVIL, quote=False) in names
        assert EVIL in text_of(page)


def test_page_survives_numbers_that_are_none() -> None:
    run = made_up(seconds=3)
    run.offered_rate = float("nan")
    run.seconds[1].p99_ms = run.seconds[1].p50_ms = float("inf")
    run.latency.append(Percentile(share=0.5, ms=float("nan")))
    run.samples[0].lag_s = float("nan")
    assert "NaN" not in own_part(render(run))
    assert "Infinity" not in json.dumps(figures_in(render(run)))


# What it says -------------------------------------------------------------------------------------


def test_clean_run_shows_verdict_and_figures() -> None:
    run = made_up()
    said = text_of(render(run))
    assert "✓ The books balance. 60,000 orders in the campaign, 60,000 tickets" in said
    assert "NOT" not in said
    assert "limited by the generator" not in said
    for value in (run.offered, run.sent, run.answered):
        assert f"{value:,}" in said
    for table in (run.plan, run.settings, run.versions, run.machine):
        for name, value in table.items():
            assert f" {name} {value} " in said


def test_bottleneck_and_open_books_are_shown() -> None:
    page = render(unbalanced(made_up()))
    said = text_of(page)
    assert "The generator was the limit: the rates and latencies are not the server’s." in said
    assert "generator-1 used 0.99 of its core" in said
    assert "✗ The books do NOT balance." in said
    assert "The engine’s audit found breaches." in said
    assert "oversold : general: 60,001 of 60,000" in said
    assert "… and 11 more in the record." in said
    assert said.count("limited by the generator") == len(charts([made_up()]))


def test_limited_generator_shows_no_rate_of_the_server() -> None:
    run = unbalanced(made_up())
    records.withhold(run)
    said = text_of(render(run))
    assert "Achieved – the generator was the limit" in said
    assert "achieved a second –" in said
    drawn = {chart.id: chart.figures[0]["data"] for chart in charts([run])}
    offered, sent, answered = drawn["throughput"]
    assert answered["name"] == "answered"
    for line in (answered, *drawn["outcomes"], *drawn["latency"], *drawn["percentiles"]):
        assert not any(line["y"]), line["name"]
    assert all(offered["y"])
    assert all(sent["y"])


def test_merging_brings_no_withheld_figures_back() -> None:
    run = unbalanced(made_up(seconds=1_500))
    records.withhold(run)
    drawn = {chart.id: chart.figures[0]["data"] for chart in charts([run])}
    assert set(drawn["throughput"][2]["y"]) == {None}
    assert {value for bar in drawn["outcomes"] for value in bar["y"]} == {None}


def test_notes_stand_beside_the_verdict() -> None:
    said = text_of(render(empty(notes=[EVIL, "late"])))
    assert f"{EVIL} late" in said


@pytest.mark.parametrize(("duration_s", "share"), [(8.0, 95), (10.0, 95), (20.0, 48)])
def test_achieved_share_is_of_those_offered_meanwhile(duration_s: float, share: int) -> None:
    """Of 1,000 a second for 10 s, 9,500 were settled: early, in time, or after twice the time."""
    run = empty(offered=10_000, offered_rate=1_000.0, duration_s=duration_s)
    run.achieved_rate = 9_500 / duration_s
    assert f"/s {share}% of offered" in text_of(render(run))


def test_missing_proof_is_explained() -> None:
    assert "The books were not looked at." in text_of(render(empty(plan={"proof": 0})))
    assert "PostgreSQL: gone" in text_of(render(empty(not_proved="PostgreSQL: gone")))


@pytest.mark.parametrize(
    ("proof", "says"),
    [
        (None, "! Not proved."),
        (Proof(clean=True), "✓ The books balance; not audited."),
        (Proof(clean=True, audit_clean=True), "✓ The books balance."),
        (Proof(clean=True, audit_clean=False), "✗ The books do NOT balance."),
        (Proof(clean=False, audit_clean=True), "✗ The books do NOT balance."),
    ],
)
def test_verdict_fits_the_proof(proof: Proof | None, says: str) -> None:
    assert says in text_of(render(empty(proof=proof)))


def test_each_outcome_has_bars_of_its_own_colour() -> None:
    run = made_up()
    for number, outcome in enumerate([*OUTCOMES, "brand-new"]):
        run.seconds[number].outcomes[outcome] = 70 + number
        run.outcomes.setdefault(outcome, 70 + number)
    (figure,) = next(chart.figures for chart in charts([run]) if chart.id == "outcomes")
    bars = {bar["name"]: bar for bar in figure["data"]}
    assert list(bars) == [*OUTCOMES, "brand-new"]
    for number, outcome in enumerate([*OUTCOMES, "brand-new"]):
        assert bars[outcome]["y"][number] == 70 + number
        assert bars[outcome]["marker"]["color"] == colour_of(outcome)
    assert len(set(OUTCOME_COLOURS.values())) == len(OUTCOME_COLOURS)
    (table,) = [group for group in figure_groups([run]) if group.title == "Outcomes"]
    assert [row.name for row in table.rows] == [*OUTCOMES, "brand-new"]


def test_unread_samples_leave_gaps() -> None:
    run = made_up(seconds=20)
    run.samples[3] = msgspec.structs.replace(run.samples[3], lag_events=-1, queue=-1, stock={})
    drawn = {chart.id: chart.figures[0]["data"] for chart in charts([run])}
    assert drawn["lag"][0]["y"][3] is None
    assert drawn["queue"][0]["y"][3] is None
    assert all(line["y"][3] is None for line in drawn["stock"])
    (line,) = [line for line in drawn["cpu"] if line["name"] == "serve-2"]
    assert [x for x, y in zip(line["x"], line["y"], strict=True) if y is None] == [
        15,
        15.5,
        16,
        16.5,
    ]


def test_long_run_is_merged_with_sums_and_peaks() -> None:
    run = made_up(seconds=1_500)
    run.seconds[700].p99_ms = 9_999.0
    run.samples[1_501].queue = 77_777
    drawn = {chart.id: chart for chart in charts([run])}
    rates = drawn["throughput"].figures[0]["data"][0]
    assert len(rates["x"]) <= BINS_MAX
    assert sum(rates["y"]) * 3 == pytest.approx(run.offered, rel=1e-4)
    assert max(drawn["latency"].figures[0]["data"][2]["y"]) == 9_999.0
    assert max(drawn["queue"].figures[0]["data"][0]["y"]) == 77_777
    assert "A point stands for 3 s" in drawn["latency"].about


@pytest.mark.parametrize(
    "run",
    [
        empty(),
        empty(seconds=[Second(t=0)], samples=[Sample(t=0)]),
        empty(seconds=[Second(t=-2, offered=4), Second(t=9)], outcomes={"no-answer": 4}),
        empty(latency=[Percentile(share=1.0, ms=5.0)]),
        empty(latency=[Percentile(share=0.0, ms=5.0)], latency_sold=[Percentile(share=0.5, ms=0)]),
    ],
    ids=["nothing", "one of each", "gap", "only the most", "only the least"],
)
def test_page_is_made_of_hardly_any_data(run: Record) -> None:
    assert len(figures_in(render(run))) == 11
    assert len(figures_in(render(run, made_up()))) == len(figures_in(render(made_up(), run))) == 21


def test_plotly_knows_every_property_of_the_charts() -> None:
    for chart in charts([made_up(seconds=3), empty()]):
        for figure in chart.figures:
            go.Figure(figure)


def test_charts_begin_shortly_before_the_rush() -> None:
    run = made_up()
    early = msgspec.structs.replace(run.samples[0], t=-15.0)
    run.samples = [early, *run.samples]
    begins = {
        figure["layout"]["xaxis"]["range"][0]
        for chart in charts([run])
        if chart.id != "percentiles"
        for figure in chart.figures
    }
    assert begins == {0.0}
    run.samples.insert(1, msgspec.structs.replace(early, t=-1.5))
    (throughput, *_) = charts([run])
    assert throughput.figures[0]["layout"]["xaxis"]["range"][0] == -1.5


# Two runs -----------------------------------------------------------------------------------------


def test_two_runs_have_the_same_axes_and_differences() -> None:
    one, two = made_up(), made_up("after", seed=2, seconds=55, capacity=7_500)
    for chart in charts([one, two]):
        if chart.id == "percentiles":
            assert len(chart.figures) == 1
            assert {line["name"] for line in chart.figures[0]["data"]} == {
                "all answers, A", "sold, A", "all answers, B", "sold, B",
            }  # fmt: skip
            continue
        first, second = (figure["layout"] for figure in chart.figures)
        assert first["xaxis"]["range"] == second["xaxis"]["range"] == [0, 55.0]
        assert first["yaxis"]["range"] == second["yaxis"]["range"]
    (totals,) = [group for group in figure_groups([one, two]) if group.title == "Totals"]
    assert totals.columns == ["A", "B", "B − A", "B ÷ A"]
    assert totals.rows[0].cells == [
        f"{one.offered:,}",
        f"{two.offered:,}",
        f"{two.offered - one.offered:+,}",
        f"{two.offered / one.offered:.2f} ×",
    ]
    two.duration_s = one.duration_s + 0.001
    (totals,) = [group for group in figure_groups([one, two]) if group.title == "Totals"]
    assert totals.rows[5].cells == ["40.4", "40.4", "0.00", "1.00 ×"]
    settings = {row.name: row for row in told_tables([one, two])[1].rows}
    assert settings["seed"].differs
    assert not settings["workers"].differs
    assert "≠ seed 1 2" in text_of(render(one, two))


def test_processes_have_the_same_colour_in_both_runs() -> None:
    one, two = made_up(), made_up()
    for sample in two.samples:
        sample.processes.pop("generator-2")
    (chart,) = [chart for chart in charts([one, two]) if chart.id == "cpu"]
    first, second = (
        {line["name"]: line["line"]["color"] for line in figure["data"]} for figure in chart.figures
    )
    assert first == second


# The command --------------------------------------------------------------------------------------


def test_report_command_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        records.write_whole(tmp_path / name / "run.json", records.encode(made_up(name)))
    assert main([str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "run.html")
    assert "<h1>a</h1>" in (tmp_path / "a" / "run.html").read_text("utf-8")

    out = tmp_path / "both.html"
    words = ["report", str(tmp_path / "a" / "run.json"), str(tmp_path / "b"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["loadtest", *words])
    with pytest.raises(SystemExit) as ended:
        loadtest_command()
    assert ended.value.code == 0
    assert "<h1>a and b</h1>" in out.read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "both.html"]


@pytest.mark.parametrize("wrong", ["missing", "rubbish", "folder"])
def test_report_command_tells_a_bad_file_in_one_line(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "run.json", tmp_path / "x.html"
    records.write_whole(file, records.encode(made_up()))
    if wrong == "missing":
        file.unlink()
    elif wrong == "rubbish":
        file.write_text("{}")
    else:
        out = tmp_path / "no" / "x.html"
    assert main([str(file), "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert str(out if wrong == "folder" else file) in told.err
    assert not told.out


# In a browser -------------------------------------------------------------------------------------


@pytest.mark.browser
async def test_browser_draws_two_runs_and_asks_for_nothing(
    tmp_path: Path,
) -> None:
    assert BROWSER is not None, "chromium is missing"
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    page = tmp_path / "report.html"
    run = made_up(EVIL, seconds=9)
    run.seconds[6].outcomes[EVIL] = 3
    write_report(page, run, unbalanced(made_up(seconds=9)))
    probe = "<script>onerror = (event) => document.documentElement.dataset.failed = event</script>"
    text = page.read_text("utf-8").replace("<script type", f"{probe}<script type", 1)
    page.write_text(text, "utf-8")
    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        browser = await asyncio.create_subprocess_exec(
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--proxy-server=127.0.0.1:{port}"),
            *("--window-size=1280,900", "--virtual-time-budget=10000", "--dump-dom"),
            page.as_uri(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(BROWSER_LIMIT_S):
                out, _ = await browser.communicate()
        finally:
            if browser.returncode is None:
                browser.kill()
                await browser.wait()
    drawn = out.decode()
    head = drawn[: drawn.index(">", drawn.index("<html"))]
    assert 'data-drawn="21"' in head
    assert "data-failed" not in head
    body = re.sub(r"<script.*?</script>", "", drawn, flags=re.DOTALL)
    assert "<img" not in body
    # No button that sends a chart away, as plotly's own choice of them has.
    buttons = set(re.findall(r'data-title="([^"]*)"', body))
    assert buttons == {"Download plot as a PNG", "Zoom", "Reset axes"}
    for outcome in made_up(seconds=9).outcomes:
        assert f">{outcome}</text>" in body
    assert not [line for line in asked if b"google" not in line], asked


def test_start_is_told_as_people_write_it() -> None:
    told = text_of(render(empty(started_at="2026-11-28T09:59:58.750+08:00")))
    assert "started 2026-11-28 09:59:58 UTC+08:00," in told


def test_thresholds_and_a_rush_that_was_none_are_shown() -> None:
    run = made_up()
    run.not_played = "5 of 5 members could not buy at all (closed 5)"
    run.thresholds = [
        Threshold(rule="p99>1ms", got="17.4 ms", missed=True),
        Threshold(rule="errors>1%", got="0.000%", missed=False),
    ]
    page = render(run)
    assert "The rush did not happen." in page
    assert run.not_played in page
    assert "p99&gt;1ms</th><td>17.4 ms</td>" in page
    assert (page.count("✗ missed"), page.count("✓ met")) == (1, 1)
