"""The benchmark's figures: kinds of requests with their goals, what one run measured, its tables.

A new kind of request to the engine is a row of `KINDS`, and a way to offer it in `cases`.
"""

import platform
import statistics
from typing import Final

import msgspec
from rich.console import Console

from loadtest.tables import coloured, facts, figures, other_core, verdict

BUSY: Final = 0.9
BYTES_GOAL: Final = 300
CASE_COLUMNS: Final = {
    "": "{.title}",
    "a second": "{.rate:,.0f}",
    "× a": "{.ratio:.2f}",
    "p50 ms": "{.latency_ms[0]:.1f}",
    "p99 ms": "{.latency_ms[2]:.1f}",
    "API µs": "{.api_us:.1f}",
    "Redis µs": "{.redis_us:.1f}",
    "server": "{.server_busy:.0%}",
    "client": "{.client_busy:.0%}",
    "books": "{.books_busy:.0%}",
}


class Kind(msgspec.Struct, frozen=True):
    """A kind of request to the engine, and the goal of its share of (a).

    ``outcome``: how the engine must count all of them, '' for what is no purchase. ``of``: the
    campaign that refuses them, '' for the one that sells. ``fresh``: each has a card that was not
    seen before; otherwise the same cards ask in turn. ``path``: what is read, where it is no
    purchase.
    """

    outcome: str
    goal: float
    of: str = ""
    fresh: bool = False
    path: str = ""


KINDS: Final = {
    "purchases": Kind("sold", 1.3, fresh=True),
    "replays": Kind("replayed", 1.2),
    "sold_out": Kind("sold-out", 3.0, "bench-sold-out"),
    "not_open": Kind("not-open", 3.0, "bench-not-open"),
    "sold_out_fresh": Kind("sold-out", 3.0, "bench-sold-out", fresh=True),
    "not_open_fresh": Kind("not-open", 3.0, "bench-not-open", fresh=True),
    "campaign": Kind("", 3.0, path="/api/v1/campaigns/bench"),
    "availability": Kind("", 3.0, path="/api/v1/campaigns/bench/availability"),
}
OURS: Final = tuple(KINDS)


class Case(msgspec.Struct, frozen=True):
    """One kind of request. ``*_us``: CPU microseconds a request; ``*_busy``: share of a core;
    ``ratio``: rate as a share of the constant peer's just before and after; ``cpu_ratio``: the same
    by CPU time, which other programs hardly touch.
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
    cpu_ratio: float = 1.0
    requests: int = 0

    @property
    def title(self) -> str:
        """Its name; the constant is (a) in all tables and documents."""
        return "(a) " * (self.name == "constant") + self.name.replace("_", " ")

    @property
    def goal(self) -> str:
        """Markup of the goal, where it has one."""
        goal = KINDS[self.name].goal if self.name in KINDS else None
        return "" if goal is None else coloured(f"≥ {goal}", good=self.ratio >= goal)

    def beside(self, *constants: "Case") -> "Case":
        """Give this case with its shares of the constant peer, as measured close to it."""
        rate = statistics.fmean(each.rate for each in constants)
        server_us = statistics.fmean(each.api_us + each.redis_us for each in constants)
        cpu_ratio = server_us / (self.api_us + self.redis_us)
        return msgspec.structs.replace(self, ratio=self.rate / rate, cpu_ratio=cpu_ratio)


class Growth(msgspec.Struct, frozen=True):
    """The cost of a purchase when so many were sold in the campaign before it."""

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

    def show(self, console: Console) -> None:
        """Print the tables."""
        console.print(
            f"Client: {self.client}, {self.connections} connections, closed loop. Python "
            f"{platform.python_version()}. API and Redis on one core, client, PostgreSQL and "
            f"writer on {other_core()}."
        )
        caption = (
            "server: API and Redis on their core; books: PostgreSQL and writer, on the client's "
            "core. While server is near 100 % and client and books together are not, the client is "
            "no bottleneck. CPU × a: the same ratio by CPU time."
        )
        columns = {**CASE_COLUMNS, "goal": "{.goal}", "CPU × a": "{.cpu_ratio:.2f}"}
        console.print(figures("One core: API and Redis", columns, self.cases, caption))
        if min(case.server_busy for case in self.cases) < BUSY:
            console.print(
                "[red]The server's core was not full: another program used it, or the client was "
                "the bottleneck. Go by CPU × a, or run it again on a quiet machine.[/]"
            )
        columns = {
            "sold before": "{.sold:,}",
            "purchases a second": "{.rate:,.0f}",
            "API µs": "{.api_us:.1f}",
            "Redis µs": "{.redis_us:.1f}",
        }
        console.print(figures("Growth: one campaign, our own client", columns, self.growth))
        each = self.redis_bytes_an_order
        left = f"({self.stream_entries_left} stream entries left)"
        figure = f"{coloured(f'{each:.0f}', good=each <= BYTES_GOAL)} (≤ {BYTES_GOAL})"
        rest = [
            (f"Redis bytes an order of one ticket {left}", figure),
            ("writer, rows a second", f"{self.writer_rows_a_second:,.0f}"),
            ("audit of all that was sold", verdict(self.audit)),
        ]
        console.print(facts("", rest))
