"""Half of the capacity: what members feel while the engine has time to spare.

Capacity is what a closed loop reaches. Half of it arrives in an open loop (Poisson), at the
constant peer and at the engine in turn, and latency counts from the intended moment. The figure is
the p99 of the engine's purchases as a multiple of the constant's median at the same rate.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.bench.compare import Goal
from loadtest.bench.measure import Bench
from loadtest.overload.measure import value_at
from loadtest.record import Record
from loadtest.rush import arrivals
from loadtest.rush.loop import OpenLoop
from loadtest.rush.summary import fill
from loadtest.rush.tally import SOLD, Bounds, Tally
from loadtest.rush.worker import summed_up

SHARE: Final = 0.5
GOAL: Final = 10.0
CONNECTIONS: Final = 512
SETTLE_S: Final = 0.5
BEGINS_IN_S: Final = 1.0


class Side(msgspec.Struct, frozen=True):
    """One side of a round. ms from the intended moment; ``bottleneck``: the generator's, or ''."""

    p50_ms: float
    p99_ms: float
    unsold: int
    bottleneck: str


class Round(msgspec.Struct, frozen=True):
    """The constant and the engine, one after the other, at the same rate."""

    constant: Side
    purchases: Side

    @property
    def ratio(self) -> float:
        """p99 of purchases as a multiple of the constant's median."""
        return self.purchases.p99_ms / self.constant.p50_ms


class Half(msgspec.Struct, frozen=True):
    """All of it; rates a second."""

    capacity: float
    rate: float
    rounds: list[Round]
    audit: str

    @property
    def goal(self) -> Goal:
        """The target, and the median of this run's rounds."""
        median = statistics.median(each.ratio for each in self.rounds)
        return Goal("p99 at half of capacity, × (a)'s median", GOAL, median, at_most=True)


async def half(bench: Bench, seconds: float, rounds: int) -> Half:
    """Measure. Raises EngineError, OfferError …"""
    await bench.prepare()
    bench.rig.books_stand_back()
    await bench.warm_up()
    bench.note("capacity, closed loop")
    capacity = (await bench.case("purchases")).rate
    done = []
    for number in range(1, rounds + 1):
        bench.note(f"round {number} of {rounds}: half of {capacity:,.0f} a second")
        constant = await _offered(bench, bench.rig.constant_address, capacity * SHARE, seconds)
        purchases = await _offered(bench, bench.rig.address, capacity * SHARE, seconds)
        await bench.rig.written("bench")
        done.append(Round(constant, purchases))
    return Half(capacity, capacity * SHARE, done, await bench.audit())


async def _offered(bench: Bench, address: str, rate: float, seconds: float) -> Side:
    offsets = arrivals.make("poisson", rate, seconds, seed=1)
    raws = list(bench.requests("bench", bench.cards(len(offsets))))
    bounds = Bounds(connections=CONNECTIONS, warm=CONNECTIONS, warm_s=BEGINS_IN_S, retries=0)
    loop = OpenLoop(address, offsets, raws.__getitem__, lambda *_: None, bounds)
    tally = await loop.run(time.monotonic() + BEGINS_IN_S)
    record = Record(name="half", campaign="bench", started_at="", duration_s=0.0)
    fill(record, [summed_up(offsets, tally)])
    took_ms = _took_ms(offsets, tally)
    return Side(
        p50_ms=value_at(took_ms, 0.5),
        p99_ms=value_at(took_ms, 0.99),
        unsold=record.offered - record.outcomes.get(SOLD, 0),
        bottleneck=record.bottleneck,
    )


def _took_ms(offsets: Sequence[float], tally: Tally) -> list[float]:
    return [
        (done_at - offset) * 1e3
        for offset, done_at, outcome in zip(offsets, tally.done_at, tally.outcome, strict=True)
        if offset >= SETTLE_S and tally.codes[outcome] == SOLD
    ]


def print_half(result: Half, console: Console) -> None:
    """Print the table."""
    table = Table(
        title=f"Half of {result.capacity:,.0f} purchases a second, open loop: {result.rate:,.0f}/s"
    )
    for heading in ("round", "(a) p50 ms", "(a) p99 ms", "p50 ms", "p99 ms", "p99 / (a) p50"):
        table.add_column(heading, justify="right")
    for number, each in enumerate(result.rounds, start=1):
        figures = (
            each.constant.p50_ms, each.constant.p99_ms, each.purchases.p50_ms,
            each.purchases.p99_ms,
        )  # fmt: skip
        table.add_row(str(number), *(f"{ms:.2f}" for ms in figures), f"{each.ratio:.1f}")
    table.caption = (
        "ms from the intended moment; (a): aiohttp's constant answer at the same rate. "
        f"Audit of all that was sold: {result.audit}"
    )
    console.print(table)
    for number, each in enumerate(result.rounds, start=1):
        for name, side in (("(a)", each.constant), ("purchases", each.purchases)):
            if side.bottleneck:
                console.print(f"[yellow]{number}, {name}: the generator's limit: {side.bottleneck}")
            if side.unsold:
                console.print(f"[yellow]{number}, {name}: {side.unsold:,} were not sold")
    goal = result.goal
    colour = "green" if goal.met else "red"
    console.print(f"{goal.what}: [{colour}]{goal.got:.1f}[/] (≤ {goal.goal:g})")
