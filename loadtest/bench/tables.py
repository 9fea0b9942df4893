"""The benchmark, the comparison with the peers and the durable run, as tables to read."""

import os
import platform
from typing import Final

from rich.console import Console
from rich.table import Table

from loadtest.bench.compare import SELLS_NOTHING, Comparison, Goal
from loadtest.bench.durable import Durable
from loadtest.bench.figures import BUSY, CLEAN, Case, Result

TITLES: Final = {
    "constant": "a constant",
    "purchases": "b purchases",
    "replays": "c replays",
    "sold_out": "d sold out",
    "not_open": "e not open",
}
GOALS: Final = {"purchases": 1.2, "replays": 1.2, "sold_out": 3.0, "not_open": 3.0}
BYTES_GOAL: Final = 300
WIDTH: Final = 116
LETTERS: Final = {"bare": "b", "naive": "c", "afternoon": "d", "node": "e"}
CONSTANT: Final = "a aiohttp, constant"


def wide_console() -> Console:
    """A console on which the tables fit, also where the output is a file."""
    console = Console()
    return console if console.width >= WIDTH else Console(width=WIDTH)


def print_result(result: Result, console: Console) -> None:
    """Print the tables."""
    cores = len(os.sched_getaffinity(0))
    console.print(
        f"Client: {result.client}, {result.connections} connections, closed loop. Python "
        f"{platform.python_version()}. API and Redis on one core, client, PostgreSQL and writer on "
        + ("another." if cores > 1 else "the same: there is only one, so nothing here is a figure.")
    )
    console.print(_cases(result))
    if result.disturbed:
        console.print(
            "[red]The server's core was not full: another program used it, or the client was the "
            "bottleneck. Go by CPU × a, or run it again on a quiet machine.[/]"
        )
    console.print(_growth(result))
    console.print(_rest(result))


def _cases(result: Result) -> Table:
    table = Table(title="One core: API and Redis")
    for heading in (
        "",
        "a second",
        "× a",
        "goal",
        "CPU × a",
        "p50 ms",
        "p99 ms",
        "API µs",
        "Redis µs",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for heading in ("server", "client", "books"):
        table.add_column(heading, justify="right")
    for case in result.cases:
        ratio, goal = case.ratio, GOALS.get(case.name)
        met = "" if goal is None else f"[{'green' if ratio >= goal else 'red'}]≥ {goal}[/]"
        table.add_row(
            TITLES[case.name],
            f"{case.rate:,.0f}",
            f"{ratio:.2f}",
            met,
            f"{case.cpu_ratio:.2f}",
            f"{case.latency_ms[0]:.1f}",
            f"{case.latency_ms[2]:.1f}",
            f"{case.api_us:.1f}",
            f"{case.redis_us:.1f}",
            f"{case.server_busy:.0%}",
            f"{case.client_busy:.0%}",
            f"{case.books_busy:.0%}",
        )
    table.caption = (
        "server: API and Redis on their core; books: PostgreSQL and writer, on the client's core. "
        "While server is near 100 % and client and books together are not, the client is no "
        "bottleneck. CPU × a: the same ratio by CPU time."
    )
    return table


def _growth(result: Result) -> Table:
    table = Table(title="Growth: one campaign, our own client")
    for heading in ("sold before", "purchases a second", "API µs", "Redis µs"):
        table.add_column(heading, justify="right")
    for row in result.growth:
        table.add_row(
            f"{row.sold:,}", f"{row.rate:,.0f}", f"{row.api_us:.1f}", f"{row.redis_us:.1f}"
        )
    return table


def _rest(result: Result) -> Table:
    table = Table(show_header=False)
    table.add_column(max_width=50)
    table.add_column(justify="right", max_width=50)
    colour = "green" if result.redis_bytes_an_order <= BYTES_GOAL else "red"
    table.add_row(
        f"Redis bytes an order of one ticket ({result.stream_entries_left} stream entries left)",
        f"[{colour}]{result.redis_bytes_an_order:.0f}[/] (≤ {BYTES_GOAL})",
    )
    table.add_row("writer, rows a second", f"{result.writer_rows_a_second:,.0f}")
    table.add_row("audit of all that was sold", result.audit)
    return table


def print_comparison(result: Comparison, console: Console) -> None:
    """Print the tables of a comparison."""
    console.print(
        f"Client: {result.client}, {result.connections} connections, closed loop; {result.rounds} "
        f"rounds of {result.seconds} s each in turn. Python {platform.python_version()}. API and "
        f"its Redis on one core, client (and the engine's PostgreSQL and writer) on {_other()}."
    )
    console.print(_table(result))
    console.print(_left_out(result))
    if min(case.server_busy for case in _everybody(result)) < BUSY:
        console.print(
            "[red]In some row the server's core was not full: another program used it, or the "
            "client was the bottleneck. Run it again on a quiet machine.[/]"
        )
    console.print(_engine(result))
    console.print(_goals(result.goals))
    full = result.full
    console.print(
        f"Full batches ({full.connections} connections, {full.mean:.0f} purchases a call): API "
        f"{full.case.api_us:.1f} µs and Redis {full.case.redis_us:.1f} µs a purchase, so one core "
        f"of Redis feeds {full.api_cores:.1f} API cores."
    )
    colour = "green" if result.audit == CLEAN else "red"
    console.print(f"Audit of all that the engine sold: [{colour}]{result.audit}[/]")


def _everybody(result: Comparison) -> list[Case]:
    theirs = [case for peer in result.peers for case in (peer.purchases, peer.sold_out) if case]
    return [result.constant, *result.ours, *theirs]


def _table(result: Comparison) -> Table:
    table = Table(title="The engine beside its peers: one core for API and Redis")
    table.add_column("")
    for heading in ("purchases/s", "× a", "ours ×", "API µs", "Redis µs", "sold-out/s", "× a"):
        table.add_column(heading, justify="right")
    table.add_column("books", max_width=13)
    purchases, sold_out = (_named(result.ours, name) for name in ("purchases", "sold_out"))
    table.add_row("ours", *_figures(purchases, None), *_refused(sold_out), result.audit)
    table.add_row(CONSTANT, *_figures(result.constant, purchases.ratio), "", "", SELLS_NOTHING)
    for peer in result.peers:
        title = f"{LETTERS[peer.name]} {peer.title}"
        if peer.why_not:
            table.add_row(title, *[""] * 7, "[yellow]not here[/]")
            continue
        books = peer.check if peer.check in {CLEAN, SELLS_NOTHING} else "[red]WRONG[/]"
        table.add_row(title, *_figures(peer.purchases, peer.ours), *_refused(peer.sold_out), books)
    table.caption = (
        "purchases/s of constants: answers. ours ×: the engine's purchases as a multiple. µs: CPU "
        "time a purchase. books: whether what it answered is what its Redis holds, never above "
        "the stock. All that sell fsync before each answer."
    )
    return table


def _left_out(result: Comparison) -> Table:
    table = Table(title="What each leaves out")
    table.add_column("", no_wrap=True)
    table.add_column("")
    table.add_row(CONSTANT, "everything")
    for peer in result.peers:
        words = [peer.leaves_out]
        if peer.why_not:
            words.append(f"[yellow]not measured: {peer.why_not}[/]")
        elif peer.check not in {CLEAN, SELLS_NOTHING}:
            words.append(f"[red]{peer.check}[/]")
        table.add_row(f"{LETTERS[peer.name]} {peer.title}", "\n".join(words))
    return table


def _figures(case: Case | None, ours: float | None) -> list[str]:
    if case is None:
        return [""] * 5
    multiple = "" if ours is None else f"{ours:.2f}"
    us = [f"{case.api_us:.1f}", f"{case.redis_us:.1f}"]
    return [f"{case.rate:,.0f}", f"{case.ratio:.2f}", multiple, *us]


def _refused(case: Case | None) -> list[str]:
    return ["", ""] if case is None else [f"{case.rate:,.0f}", f"{case.ratio:.2f}"]


def _engine(result: Comparison) -> Table:
    table = Table(title="The engine's cases and the constant")
    table.add_column("")
    for heading in ("a second", "× a", "p50 ms", "p99 ms", "API µs", "Redis µs"):
        table.add_column(heading, justify="right")
    for heading in ("server", "client", "books"):
        table.add_column(heading, justify="right")
    for case in (result.constant, *result.ours):
        table.add_row(
            case.name.replace("_", " "),
            f"{case.rate:,.0f}",
            f"{case.ratio:.2f}",
            f"{case.latency_ms[0]:.1f}",
            f"{case.latency_ms[2]:.1f}",
            f"{case.api_us:.1f}",
            f"{case.redis_us:.1f}",
            *(f"{busy:.0%}" for busy in (case.server_busy, case.client_busy, case.books_busy)),
        )
    return table


def _goals(goals: list[Goal]) -> Table:
    table = Table(title="goals")
    table.add_column("")
    for heading in ("goal", "this run", ""):
        table.add_column(heading, justify="right")
    for goal in goals:
        verdict = {True: "[green]met[/]", False: "[red]not met[/]", None: "not measured"}[goal.met]
        table.add_row(
            goal.what,
            f"{'≤' if goal.at_most else '≥'} {goal.goal:g}",
            "" if goal.got is None else f"{goal.got:.2f}",
            verdict,
        )
    return table


def print_durable(result: Durable, console: Console) -> None:
    """Print the durable run."""
    console.print(
        f"Durable end to end: {result.workers} API process(es), every process free on "
        f"{result.cores} core(s) with {result.client}, {result.connections} connections, closed "
        f"loop. Counted over {result.window_s:.0f} s."
    )
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for what, figure in (
        ("orders in PostgreSQL a second", f"{result.rows_a_second:,.0f}"),
        ("of which the slowest second", f"{result.slowest_second:,.0f}"),
        ("purchases answered a second", f"{result.answered_a_second:,.0f}"),
        ("ledger lag at the end of the window, events", f"{result.lag_end:,}"),
        ("highest ledger lag, events", f"{result.lag_most:,}"),
        ("(a) before and after, a second", " ".join(f"{rate:,.0f}" for rate in result.constants)),
        ("p50, p99 ms of a purchase", f"{result.latency_ms[0]:.1f}  {result.latency_ms[2]:.1f}"),
        ("orders in PostgreSQL in the end, all counted", f"{result.orders:,}"),
        ("books", result.check),
        ("audit", result.audit),
    ):
        table.add_row(what, figure)
    console.print(table)
    shares = Table(title="CPU, share of one core")
    shares.add_column("")
    shares.add_column(justify="right")
    for name, share in sorted(result.cpu.items(), key=lambda each: -each[1]):
        shares.add_row(name, f"{share:.0%}")
    shares.add_row("all else, kernel included", f"{result.others:.0%}")
    console.print(shares)
    console.print(f"The limit: {result.limit}")
    console.print(_goals([result.goal]))


def _named(cases: list[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


def _other() -> str:
    if len(os.sched_getaffinity(0)) > 1:
        return "another"
    return "the same: there is only one, so nothing here is a figure"
