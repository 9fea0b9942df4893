"""The benchmark's figures, and the table they are read in."""

import os
import platform
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

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
CLEAN: Final = "clean"
BUSY: Final = 0.9


class Case(msgspec.Struct, frozen=True):
    """One kind of request. ``*_us``: CPU microseconds a request; ``*_busy``: share of a core;
    ``ratio``: rate as a share of the constant peer's in the same round.
    """

    name: str
    rate: float
    latency_ms: tuple[float, float, float]
    api_us: float
    redis_us: float
    server_busy: float
    client_busy: float
    books_busy: float
    ratio: float = 1.0
    requests: int = 0


class Growth(msgspec.Struct, frozen=True):
    """What a purchase costs when so many were sold in the campaign before it."""

    sold: int
    rate: float
    api_us: float
    redis_us: float


class Result(msgspec.Struct, frozen=True):
    """Everything that one run measured."""

    client: str
    connections: int
    cases: list[Case]
    growth: list[Growth]
    redis_bytes_an_order: float
    stream_entries_left: int
    writer_rows_a_second: float
    audit: str

    @property
    def disturbed(self) -> bool:
        """Whether something else used the server's core, so that the rates mean little."""
        return min(case.server_busy for case in self.cases) < BUSY

    def cpu_ratio(self, case: Case) -> float:
        """CPU of the constant peer as a share of the case's; what others run hardly touches it."""
        constant = self.cases[0]
        return (constant.api_us + constant.redis_us) / (case.api_us + case.redis_us)


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
            f"{result.cpu_ratio(case):.2f}",
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
