"""Half of the capacity: what members feel while the engine has time to spare.

Capacity is what a closed loop reaches. Half of it arrives in an open loop (Poisson), at the
constant peer and at the engine in turn, and latency counts from the intended moment. The figure is
the p99 of the engine's purchases as a multiple of the constant's median at the same rate; a round
in which the generator was the limit, on either side, has none. After each round every answer to a
purchase is compared with PostgreSQL.
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
from loadtest.latency import at_share
from loadtest.overload.spool import Compared, Spool
from loadtest.overload.tables import print_books
from loadtest.record import SOLD, Record
from loadtest.rush import arrivals
from loadtest.rush.loop import OpenLoop
from loadtest.rush.summary import fill
from loadtest.rush.tally import Bounds, Tally
from loadtest.rush.worker import summed_up

SHARE: Final = 0.5
GOAL: Final = 10.0
CONNECTIONS: Final = 512
SETTLE_S: Final = 0.5
BEGINS_IN_S: Final = 1.0
CAMPAIGN: Final = "bench"


class Side(msgspec.Struct, frozen=True):
    """One side of a round. ms from the intended moment; ``bottleneck``: the generator's, or ''."""

    p50_ms: float
    p99_ms: float
    unsold: int
    bottleneck: str
    notes: list[str] = []


class Round(msgspec.Struct, frozen=True):
    """The constant and the engine, one after the other, at the same rate."""

    constant: Side
    purchases: Side


class Half(msgspec.Struct, frozen=True):
    """All of it; rates a second. ``compared`` and ``audit`` as in `loadtest.overload.measure`."""

    capacity: float
    rate: float
    rounds: list[Round]
    compared: int
    audit: str

    @property
    def constant_p50_ms(self) -> float | None:
        """The constant's least median: a disturbed one would flatter the engine."""
        sound = [each.constant for each in self.rounds if not each.constant.bottleneck]
        return min((side.p50_ms for side in sound if side.p50_ms), default=None)

    def ratio(self, each: Round) -> float | None:
        """p99 as a multiple of the constant's median; None where it is not the servers' figure."""
        base_ms = self.constant_p50_ms
        limited = each.constant.bottleneck or each.purchases.bottleneck
        if base_ms is None or limited or not each.purchases.p99_ms:
            return None
        return each.purchases.p99_ms / base_ms

    @property
    def goal(self) -> Goal:
        """The target, and the median of the rounds that have a figure."""
        ratios = [ratio for each in self.rounds if (ratio := self.ratio(each)) is not None]
        median = statistics.median(ratios) if ratios else None
        return Goal("p99 at half of capacity, × (a)'s median", GOAL, median, at_most=True)


async def half(bench: Bench, seconds: float, rounds: int) -> Half:
    """Measure. Raises EngineError, OfferError …"""
    await bench.prepare_constant()
    bench.rig.books_stand_back()
    await bench.warm_up()
    bench.note("capacity, closed loop")
    capacity = (await bench.case("purchases")).rate
    done, compared = [], Compared(bench)
    for number in range(1, rounds + 1):
        bench.note(f"round {number} of {rounds}: half of {capacity:,.0f} a second")
        constant, _ = await _offered(bench, bench.rig.constant_address, capacity * SHARE, seconds)
        purchases, spool = await _offered(bench, bench.rig.address, capacity * SHARE, seconds)
        await compared.add(CAMPAIGN, spool)
        done.append(Round(constant, purchases))
    audit = await compared.verdict()
    return Half(capacity, capacity * SHARE, done, compared.answers, audit)


async def _offered(bench: Bench, address: str, rate: float, seconds: float) -> tuple[Side, Spool]:
    offsets = arrivals.make("poisson", rate, seconds, seed=1)
    cards = bench.cards(len(offsets))
    raws, spool = list(bench.requests(CAMPAIGN, cards)), Spool(cards)
    bounds = Bounds(connections=CONNECTIONS, warm=CONNECTIONS, warm_s=BEGINS_IN_S, retries=0)
    loop = OpenLoop(address, offsets, raws.__getitem__, spool, bounds)
    tally = await loop.run(time.monotonic() + BEGINS_IN_S)
    record = Record(name="half", campaign=CAMPAIGN, started_at="", duration_s=0.0)
    fill(record, [summed_up(offsets, tally)])
    took_ms = _took_ms(offsets, tally)
    side = Side(
        p50_ms=at_share(took_ms, 0.5),
        p99_ms=at_share(took_ms, 0.99),
        unsold=record.offered - record.outcomes.get(SOLD, 0),
        bottleneck=record.bottleneck,
        notes=record.notes,
    )
    return side, spool


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
    for heading in ("round", "(a) p50 ms", "(a) p99 ms", "p50 ms", "p99 ms", "p99 / least (a) p50"):
        table.add_column(heading, justify="right")
    for number, each in enumerate(result.rounds, start=1):
        figures = (
            each.constant.p50_ms, each.constant.p99_ms, each.purchases.p50_ms,
            each.purchases.p99_ms,
        )  # fmt: skip
        ratio = result.ratio(each)
        told = "–" if ratio is None else f"{ratio:.1f}"
        table.add_row(str(number), *(f"{ms:.2f}" for ms in figures), told)
    table.caption = (
        "ms from the intended moment; (a): aiohttp's constant answer at the same rate. "
        "–: the generator was the limit, and the round does not count."
    )
    console.print(table)
    for number, each in enumerate(result.rounds, start=1):
        for name, side in (("(a)", each.constant), ("purchases", each.purchases)):
            if side.bottleneck:
                console.print(f"[yellow]{number}, {name}: the generator's limit: {side.bottleneck}")
            for note in side.notes:
                console.print(f"[yellow]{number}, {name}: {note}")
            if side.unsold:
                console.print(f"[yellow]{number}, {name}: {side.unsold:,} were not sold")
    print_books(result.compared, result.audit, console)
    goal = result.goal
    got = "[yellow]not measured[/]"
    if goal.got is not None:
        got = f"[green]{goal.got:.1f}, met[/]" if goal.met else f"[red]{goal.got:.1f}, not met[/]"
    console.print(f"{goal.what}: {got} (≤ {goal.goal:g})")
