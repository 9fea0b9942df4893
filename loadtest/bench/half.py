"""Half of the capacity: what members feel while the engine has time to spare.

Capacity is what a closed loop reaches. Half of it arrives in an open loop (Poisson), at the
constant peer and at the engine in turn, and latency counts from the intended time. The figure is
the p99 of the engine's purchases as a multiple of the constant's median at the same rate; a round
in which the generator was the limit, on either side, has none. After each round every answer to a
purchase is compared with PostgreSQL.
"""

import statistics
from typing import Final

import msgspec
from rich.console import Console

from loadtest.bench.cases import Bench
from loadtest.bench.open_loop import Checked, OpenLoops
from loadtest.record import SOLD
from loadtest.summary import at_share, judged
from loadtest.tables import Goal, coloured, grid
from loadtest.tally import Bounds, Tally

SHARE: Final = 0.5
GOAL: Final = 10.0
CONNECTIONS: Final = 512
SETTLE_S: Final = 0.5
CAMPAIGN: Final = "bench"
BOUNDS: Final = Bounds(connections=CONNECTIONS, warm=CONNECTIONS, warm_s=1.0, retries=0)


class Side(msgspec.Struct, frozen=True):
    """One side of a round. ms from the intended time; ``bottleneck``: the generator's, or ''."""

    p50_ms: float
    p99_ms: float
    unsold: int
    bottleneck: str
    notes: list[str] = []

    @property
    def remarks(self) -> list[str]:
        """Remarks on the result, a line each."""
        limit = [f"the generator's limit: {self.bottleneck}"] * bool(self.bottleneck)
        return [*limit, *self.notes, *[f"{self.unsold:,} were not sold"] * bool(self.unsold)]


class Round(msgspec.Struct, frozen=True):
    """The constant and the engine, one after the other, at the same rate."""

    constant: Side
    purchases: Side


class Half(Checked, frozen=True, kw_only=True):
    """All of it; rates a second."""

    capacity: float
    rate: float
    rounds: list[Round]

    def ratio(self, each: Round) -> float | None:
        """p99 as a multiple of the constant's median; None if it is not the servers' figure.

        Of the constant's medians the least counts: a disturbed one would flatter the engine.
        """
        sound = [r.constant.p50_ms for r in self.rounds if not r.constant.bottleneck]
        base_ms = min(filter(None, sound), default=None)
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

    @property
    def measured(self) -> bool:
        """Whether any round counts."""
        return self.goal.got is not None

    def show(self, console: Console) -> None:
        """Print the table."""
        rows, remarks = [], []
        for number, each in enumerate(self.rounds, start=1):
            ratio, sides = self.ratio(each), (each.constant, each.purchases)
            figures = [f"{ms:.2f}" for side in sides for ms in (side.p50_ms, side.p99_ms)]
            rows.append([str(number), *figures, "–" if ratio is None else f"{ratio:.1f}"])
            for name, side in zip(("(a)", "purchases"), sides, strict=True):
                remarks += [f"[yellow]{number}, {name}: {line}" for line in side.remarks]
        title = f"Half of {self.capacity:,.0f} purchases a second, open loop: {self.rate:,.0f}/s"
        caption = (
            "ms from the intended time; (a): aiohttp's constant answer at the same rate. "
            "–: the generator was the limit, and the round does not count."
        )
        headings = "round|(a) p50 ms|(a) p99 ms|p50 ms|p99 ms|p99 / least (a) p50"
        console.print(grid(title, headings, rows, caption), *remarks, sep="\n")
        goal, got = self.goal, "[yellow]not measured[/]"
        if goal.got is not None:
            met = "met" if goal.met else "not met"
            got = coloured(f"{goal.got:.1f}, {met}", good=bool(goal.met))
        console.print(f"{goal.what}: {got} (≤ {goal.goal:g})")


async def half(bench: Bench, seconds: float, rounds: int) -> Half:
    """Measure. Raises EngineError, OfferError …"""
    await bench.prepare()
    bench.rig.books_stand_back()
    await bench.warm_up()
    bench.note("capacity, closed loop")
    capacity = (await bench.case("purchases")).rate
    rate, done, loops = capacity * SHARE, [], OpenLoops(bench)
    for number in range(1, rounds + 1):
        bench.note(f"round {number} of {rounds}: half of {capacity:,.0f} a second")
        address = bench.rig.constant_address
        constant, _ = await loops.offer(CAMPAIGN, rate, seconds, BOUNDS, address)
        purchases, spool = await loops.offer(CAMPAIGN, rate, seconds, BOUNDS)
        await loops.compare(CAMPAIGN, spool)
        done.append(Round(_side(constant), _side(purchases)))
    audit = await loops.verdict()
    return Half(capacity=capacity, rate=rate, rounds=done, compared=loops.answers, audit=audit)


def _side(tally: Tally) -> Side:
    record, took_ms = judged(tally), tally.took_ms(SOLD, since_s=SETTLE_S)
    return Side(
        p50_ms=at_share(took_ms, 0.5),
        p99_ms=at_share(took_ms, 0.99),
        unsold=record.offered - record.outcomes.get(SOLD, 0),
        bottleneck=record.bottleneck,
        notes=record.notes,
    )
