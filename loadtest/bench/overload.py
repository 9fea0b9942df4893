"""``python -m loadtest overload``: what is sold while more is asked than can be done.

An engine of its own, one API process and Redis on one core, and an open loop on another. Two
scenes, because one core cannot offer ten times what another can sell. In *far* Redis answers late
and a call holds few purchases, so that capacity is small while a refusal costs what it always does:
ten times as much is offered from the other core. In *near* nothing is slowed, so the CPU is the
limit, and only the queue is shorter than by default: so many connections as the generator can have
would all find a place in the usual one. The table says how much of the plan it sent.

Capacity is what a closed loop reaches in the scene. A scene's members each come once, on a
connection that is open already, and do not ask again. After each step every answer of it is
compared with PostgreSQL; of the closed loops, whose client keeps no answers, the audit alone tells.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from loadtest.bench.__main__ import bench_up, measured_by
from loadtest.bench.cases import STOCK, TINY, Bench
from loadtest.bench.half import Half, half
from loadtest.bench.idle import OPENED_PER_S, SETTLE_S, Idle, idle
from loadtest.bench.offer import Feed, Offer, offer, wrk
from loadtest.bench.open_loop import Checked, OpenLoops
from loadtest.bench.rig import cpu_s, spawn, tree_cpu_s
from loadtest.engine import EngineError, stop
from loadtest.record import SOLD
from loadtest.summary import at_share, judged
from loadtest.tables import CLEAN, coloured, figures, grid, verdict
from loadtest.tally import Bounds, Tally
from sale.http.overload import files_allow

CAMPAIGN: Final = "overload"
OVERLOADED: Final = "overloaded"
SECONDS_MIN: Final = 1.0
PROBE_S: Final = 2
PROBE_CONNECTIONS: Final = 256
FIRST_RATE: Final = 60_000
REFUSED_LEAST: Final = 0.95
REFUSED_CARDS: Final = 20_000
TIMEOUT_S: Final = 10.0
PATIENCE_S: Final = 2.0
"""So long a member waits for one of the generator's connections before it counts as not sent."""

QUEUE: Final = 1_000_000
WAIT_S: Final = 10.0
PARTS: Final = ("serve", "redis", "writer", "postgresql")
SHARE_GOAL: Final = 0.9
COST_GOAL: Final = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """The load offered: multiples of the capacity, each for ``seconds``."""

    seconds: float = 3.0
    far: tuple[float, ...] = (1, 2, 5, 10)
    near: tuple[float, ...] = (1, 2, 3)
    connections: int = 12_000
    far_batch: int = 32
    far_ms: float = 20.0
    near_wait_ms: int = 250


class Step(msgspec.Struct, frozen=True):
    """One multiple. Rates are a second, from ``SETTLE_S`` to the end of the offer.

    Latencies (ms) are of the sold: from sending, and from the intended time, which counts the
    wait for one of the generator's connections as well. ``sold_per_cpu_s``: of API and Redis.
    ``told_to_wait``: how many were told which Retry-After (s). ``bottleneck``: why the generator
    was the limit, or ''. ``share``: what it sold of the most that any step of its scene sold.
    """

    times: float
    offered: float
    sent: float
    sold: float
    refused: float
    other: dict[str, int]
    p50_ms: float
    p99_ms: float
    intended_p99_ms: float
    refused_p99_ms: float
    sold_per_cpu_s: float
    told_to_wait: dict[int, int]
    bottleneck: str
    share: float = 0.0

    @property
    def of_peak(self) -> str:
        """Markup of its share."""
        return coloured(f"{self.share:.2f}", good=self.share >= SHARE_GOAL)

    @property
    def retry_after(self) -> str:
        """The least and the most told, and the share of the one told most."""
        if not (told := self.told_to_wait):
            return ""
        return f"{min(told)}-{max(told)} s, {max(told.values()) / sum(told.values()):.0%}"


class Scene(msgspec.Struct, frozen=True):
    """One way to be slow, or not. ``how``: in words."""

    name: str
    how: str
    capacity: float
    steps: list[Step]

    def show(self, console: Console) -> None:
        """Print the table."""
        columns = {
            "×": "{.times:g}",
            "offered": "{.offered:,.0f}",
            "sent": "{.sent:,.0f}",
            "sold": "{.sold:,.0f}",
            "of peak": "{.of_peak}",
            "per CPU s": "{.sold_per_cpu_s:,.0f}",
            "refused": "{.refused:,.0f}",
            "p50 ms": "{.p50_ms:.0f}",
            "p99": "{.p99_ms:.0f}",
            "intended": "{.intended_p99_ms:.0f}",
            "of refused": "{.refused_p99_ms:.0f}",
            "Retry-After": "{.retry_after}",
        }
        caption = (
            "All a second, in answers; per CPU s: sold a CPU second of API and Redis. Then ms: p50 "
            "and p99 of the sold, from sending; their p99 from the intended time; p99 of the "
            "refused. Retry-After: the least and the most told, and the share of the one told most."
        )
        title = f"{self.name}: {self.how}; capacity {self.capacity:,.0f}/s"
        console.print(figures(title, columns, self.steps, caption))
        for step in self.steps:
            if step.other:
                other = ", ".join(f"{count:,} {code}" for code, count in step.other.items())
                console.print(f"{step.times:g} ×: else {other}")
            if step.bottleneck:
                console.print(f"[yellow]{step.times:g} ×: the generator's limit: {step.bottleneck}")


class Overload(Checked, frozen=True, kw_only=True):
    """All of it. ``purchase_us`` is CPU time by process; ``refusal_us`` that of the API alone."""

    client: str
    connections: int
    purchase_us: dict[str, float]
    refusal_us: float
    scenes: list[Scene]

    def show(self, console: Console) -> None:
        """Print the tables."""
        console.print(
            "One API process and Redis on one core; the open loop, PostgreSQL and writer on "
            f"another. Capacity by {self.client}, closed loop. {self.connections:,} connections "
            "at most."
        )
        for scene in self.scenes:
            scene.show(console)
        used = self.purchase_us
        ratio = self.refusal_us / sum(used.values())
        purchase = [f"{us:.1f}" for us in (*used.values(), sum(used.values()))]
        refusal, others = f"{self.refusal_us:.1f}", [""] * (len(used) - 1)
        cost = coloured(f"{ratio:.2f}", good=ratio < COST_GOAL)
        rows = [["a purchase", *purchase, ""], ["a refusal", refusal, *others, refusal, cost]]
        headings = "|".join(("", *used, "all", f"{OVERLOADED} / purchase"))
        console.print(grid("CPU µs", headings, rows))


class Overloading:
    """One run on one bench."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.bench = bench
        self.rig = bench.rig
        self.plan = plan
        self.loops = OpenLoops(bench)

    async def run(self) -> Overload:
        """Measure everything. Raises EngineError, OfferError …"""
        await self.rig.campaign(CAMPAIGN, STOCK)
        purchase_us, near = await self._capacity(FIRST_RATE)
        scenes, wait_ms = [], self.plan.near_wait_ms
        if self.plan.far:
            scenes.append(await self._far())
        if self.plan.near:
            await self.rig.serve_anew(SALE_WAIT_MAX_MS=str(wait_ms))
            how = f"nothing is slowed, wait_max_ms {wait_ms}"
            scenes.append(Scene("near", how, near, await self._steps(near, self.plan.near)))
        return Overload(
            client=self.bench.client,
            connections=self.plan.connections,
            purchase_us=purchase_us,
            refusal_us=await self._refusal_us(),
            scenes=scenes,
            audit=await self.loops.verdict(),
            compared=self.loops.answers,
        )

    async def _far(self) -> Scene:
        """Redis behind a delay, and few purchases a call."""
        rig, plan = self.rig, self.plan
        listen = Path(rig.servers.sockets) / "far"
        target = urlsplit(rig.settings["SALE_REDIS_URL"]).path
        module = (sys.executable, "-m", "loadtest.bench.delay")
        command = [*module, str(listen), target, str(plan.far_ms)]
        relay = await spawn(command, rig.log("far"), rig.client_cores)
        try:
            await _until(listen.exists, "the delaying relay")
            await rig.serve_anew(
                SALE_REDIS_URL=f"unix://{listen}", SALE_BATCH_MAX=str(plan.far_batch)
            )
            _, capacity = await self._capacity(FIRST_RATE // 5)
            how = f"Redis answers {plan.far_ms:g} ms late, {plan.far_batch} purchases a call"
            return Scene("far", how, capacity, await self._steps(capacity, plan.far))
        finally:
            if "serve" in rig.processes:
                await stop(rig.processes.pop("serve"))
            await stop(relay)

    async def _capacity(self, rate_most: int) -> tuple[dict[str, float], float]:
        """Sell in a closed loop: CPU µs a purchase by process, and purchases a second."""
        self.bench.note("capacity, closed loop")
        feed = self.bench.feed(CAMPAIGN, self.bench.cards(rate_most * PROBE_S))
        before = self._cpu()
        got = await self._offer(feed)
        feed.file.unlink()
        await self.rig.written(CAMPAIGN)
        after = self._cpu()
        if got.refused:
            raise EngineError(f"capacity: {got.refused} refused of {got.requests}")
        return {name: (after[name] - before[name]) / got.requests * 1e6 for name in PARTS}, got.rate

    async def _refusal_us(self) -> float:
        """CPU µs of the API a refusal, where nearly all are refused. Raises EngineError."""
        self.bench.note("the cost of a refusal")
        await self.rig.serve_anew(SALE_WAITING_MAX="1", SALE_BATCH_MAX="1")
        feed = self.bench.feed(CAMPAIGN, self.bench.cards(REFUSED_CARDS), cycle=True)
        before = self._cpu()["serve"]
        got = await self._offer(feed)
        used_s = self._cpu()["serve"] - before
        if got.refused < REFUSED_LEAST * got.requests:
            raise EngineError(f"the cost of a refusal: {got.refused} refused of {got.requests}")
        return used_s / got.requests * 1e6

    async def _offer(self, feed: Feed) -> Offer:
        program = self.bench.program
        return await offer(feed, self.rig.address, PROBE_S, PROBE_CONNECTIONS, program=program)

    async def _steps(self, capacity: float, multiples: tuple[float, ...]) -> list[Step]:
        steps = []
        for times in multiples:
            self.bench.note(f"{times:g} × {capacity:,.0f} a second")
            steps.append(await self._step(capacity, times))
        peak = max(step.sold for step in steps) or 1.0
        return [msgspec.structs.replace(step, share=step.sold / peak) for step in steps]

    async def _step(self, capacity: float, times: float) -> Step:
        plan, rate = self.plan, capacity * times
        warm = min(int(rate * 2) + PROBE_CONNECTIONS, plan.connections)
        bounds = Bounds(
            connections=plan.connections, warm=warm, warm_s=warm / OPENED_PER_S + SETTLE_S,
            queue=QUEUE, timeout_s=TIMEOUT_S, retries=0, give_up_s=PATIENCE_S,
        )  # fmt: skip
        generator, spool = self.loops.generator(CAMPAIGN, rate, plan.seconds, bounds)
        start = time.monotonic() + bounds.warm_s
        tally, server_s = await asyncio.gather(
            generator.run(start), self._server_s(start + SETTLE_S, start + plan.seconds)
        )
        await self.loops.compare(CAMPAIGN, spool)
        return _step_of(times, tally, plan.seconds, server_s)

    async def _server_s(self, since: float, until: float) -> float:
        """CPU seconds of API and Redis between two times of the monotonic clock."""
        await asyncio.sleep(max(since - time.monotonic(), 0))
        before = self._cpu()
        await asyncio.sleep(max(until - time.monotonic(), 0))
        after = self._cpu()
        return sum(after[name] - before[name] for name in ("serve", "redis"))

    def _cpu(self) -> dict[str, float]:
        return {
            name: (tree_cpu_s if name == "postgresql" else cpu_s)(self.rig.pid(name))
            for name in PARTS
        }


async def _until(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not there():
        if time.monotonic() > deadline:
            raise EngineError(f"{what} is not there after {WAIT_S:.0f} s")
        await asyncio.sleep(0.05)


def _step_of(times: float, tally: Tally, seconds: float, server_s: float) -> Step:
    window_s, record, within = seconds - SETTLE_S, judged(tally), Counter[str]()
    for done_at, outcome in zip(tally.done_at, tally.outcome, strict=True):
        if SETTLE_S <= done_at < seconds:
            within[tally.codes[outcome]] += 1
    sold_ms = tally.took_ms(SOLD, sent=True)
    known = {SOLD, OVERLOADED}
    return Step(
        times=times,
        offered=len(tally.offsets) / seconds,
        sent=sum(count for second, count in tally.sent.items() if second < seconds) / seconds,
        sold=within[SOLD] / window_s,
        refused=within[OVERLOADED] / window_s,
        other={code: n for code, n in record.outcomes.items() if n and code not in known},
        p50_ms=at_share(sold_ms, 0.5),
        p99_ms=at_share(sold_ms, 0.99),
        intended_p99_ms=at_share(tally.took_ms(SOLD), 0.99),
        refused_p99_ms=at_share(tally.took_ms(OVERLOADED, sent=True), 0.99),
        sold_per_cpu_s=within[SOLD] / max(server_s, 1e-9),
        told_to_wait={int(wait_s): n for wait_s, n in sorted(tally.told_to_wait.items())},
        bottleneck=record.bottleneck,
    )


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(prog="overload", description=__doc__.splitlines()[0])
    default = Plan()
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of each multiple")
    for scene, what in (("far", "Redis answers late"), ("near", "nothing is slowed")):
        words = f"multiples of the capacity where {what}; none: not at all"
        how: dict[str, Any] = {"type": float, "nargs": "*", "metavar": "TIMES", "help": words}
        parser.add_argument(f"--{scene}", default=getattr(default, scene), **how)
    instead = parser.add_mutually_exclusive_group()
    for name, metavar, what in (
        ("half", "ROUNDS", "latency at half of the capacity, beside the constant's"),
        ("idle", "CONNECTIONS", "what connections cost that are kept open and idle"),
    ):
        instead.add_argument(f"--{name}", type=int, metavar=metavar, help=f"no overload: {what}")
    parser.add_argument("--connections", type=int, default=default.connections)
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    options = parser.parse_args(arguments)
    if options.seconds < SECONDS_MIN:
        parser.error(f"--seconds: at least {SECONDS_MIN:g}")
    if min(1 if given is None else given for given in (options.half, options.idle)) < 1:
        parser.error("--half and --idle: at least 1")
    if not (options.far or options.near or options.half or options.idle):
        parser.error("--far and --near: no multiple of either, so there is nothing to measure")
    if min((*options.far, *options.near), default=1.0) <= 0 or options.connections < 1:
        parser.error("multiples and connections are above 0")
    connections = files_allow(options.connections)
    return options, Plan(options.seconds, tuple(options.far), tuple(options.near), connections)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options, plan = _options(arguments)

    async def measured(console: Console | None) -> Overload | Half | Idle:
        async with bench_up(TINY, program=wrk(), console=console) as bench:
            if options.half:
                return await half(bench, plan.seconds, options.half)
            if options.idle:
                return await idle(bench, options.idle, plan.seconds)
            return await Overloading(bench, plan).run()

    def show(result: Overload | Half | Idle, console: Console) -> None:
        result.show(console)
        console.print(
            f"{result.compared:,} answers compared with PostgreSQL, all that was sold audited: "
            + verdict(result.audit)
        )

    result = measured_by("overload", measured, show, as_json=options.json)
    sys.exit(0 if result.measured and result.audit == CLEAN else 1)


if __name__ == "__main__":
    main()
