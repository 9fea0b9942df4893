"""Overload, measured: multiples of the capacity in an open loop, and what is sold meanwhile.

Two scenes, because one core cannot offer ten times what another can sell. In *far* Redis answers
late and a call holds few purchases, so that capacity is small while a refusal costs what it always
does: ten times as much is offered from the other core. In *near* nothing is slowed, so the CPU is
the limit, and only the queue is shorter than by default: so many connections as the generator can
have would all find a place in the usual one. How much it reached is told beside what it was asked.

Capacity is what a closed loop reaches in the scene. A scene's members each come once, on a
connection that is open already, and do not ask again. After each step every answer of it is
compared with PostgreSQL; of the closed loops, whose client keeps no answers, the audit alone tells.
"""

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from loadtest.bench.measure import STOCK, Bench
from loadtest.bench.offer import offer
from loadtest.bench.rig import Rig, cpu_s, ready, spawn, tree_cpu_s
from loadtest.engine import EngineError, stop
from loadtest.latency import at_share
from loadtest.overload.spool import Compared, Spool
from loadtest.record import SOLD, Record
from loadtest.rush import arrivals
from loadtest.rush.loop import OpenLoop
from loadtest.rush.summary import fill
from loadtest.rush.tally import Bounds, Tally
from loadtest.rush.worker import summed_up

CAMPAIGN: Final = "overload"
OVERLOADED: Final = "overloaded"
PROBE_S: Final = 2
PROBE_CONNECTIONS: Final = 256
FIRST_RATE: Final = 30_000
REFUSED_S: Final = 2
REFUSED_LEAST: Final = 0.95
REFUSED_CARDS: Final = 20_000
SETTLE_S: Final = 0.5
OPENED_PER_S: Final = 4_000
TIMEOUT_S: Final = 10.0
PATIENCE_S: Final = 2.0
"""So long a member waits for one of the generator's connections before it counts as not sent."""

QUEUE: Final = 1_000_000
WAIT_S: Final = 10.0
PARTS: Final = ("serve", "redis", "writer", "postgresql")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is offered: multiples of the capacity, each for ``seconds``."""

    seconds: float = 3.0
    far: tuple[float, ...] = (1, 2, 5, 10)
    near: tuple[float, ...] = (1, 2, 3)
    connections: int = 12_000
    far_batch: int = 32
    far_ms: float = 20.0
    near_wait_ms: int = 250


class Step(msgspec.Struct, frozen=True):
    """One multiple. Rates are a second, from ``SETTLE_S`` to the end of the offer.

    Latencies (ms) are of the sold: from sending, and from the intended moment, which counts the
    wait for one of the generator's connections as well. ``sold_per_cpu_s``: of API and Redis.
    ``told_to_wait``: how many were told which Retry-After (s). ``bottleneck``: why the generator
    was the limit, or ''.
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


class Scene(msgspec.Struct, frozen=True):
    """One way to be slow, or not."""

    name: str
    capacity: float
    steps: list[Step]

    def share(self, step: Step) -> float:
        """What a step sold of the most that any sold."""
        return step.sold / (max(each.sold for each in self.steps) or 1.0)


class Overload(msgspec.Struct, frozen=True):
    """All of it. ``purchase_us`` is CPU time by process; ``refusal_us`` that of the API alone.

    ``compared`` answers were compared with PostgreSQL; ``audit`` is ``clean``, or what that or the
    audit of all that was sold has found.
    """

    client: str
    purchase_us: dict[str, float]
    refusal_us: float
    scenes: list[Scene]
    compared: int
    audit: str


class Overloading:
    """One run on one bench."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.bench = bench
        self.rig = bench.rig
        self.plan = plan
        self.compared = Compared(bench)

    async def run(self) -> Overload:
        """Measure everything. Raises EngineError, OfferError …"""
        await self.rig.campaign(CAMPAIGN, STOCK)
        purchase_us, near = await self._capacity(FIRST_RATE)
        scenes = []
        if self.plan.far:
            scenes.append(await self._far())
        if self.plan.near:
            await serve_anew(self.rig, SALE_WAIT_MAX_MS=str(self.plan.near_wait_ms))
            scenes.append(Scene("near", near, await self._steps(near, self.plan.near)))
        refusal_us = await self._refusal_us()
        return Overload(
            client=self.bench.client,
            purchase_us=purchase_us,
            refusal_us=refusal_us,
            scenes=scenes,
            compared=self.compared.answers,
            audit=await self.compared.verdict(),
        )

    async def _far(self) -> Scene:
        """Redis behind a delay, and few purchases a call."""
        rig, plan = self.rig, self.plan
        listen = Path(rig.servers.sockets) / "far"
        target = urlsplit(rig.settings["SALE_REDIS_URL"]).path
        module = (sys.executable, "-m", "loadtest.overload.delay")
        command = [*module, str(listen), target, str(plan.far_ms)]
        relay = await spawn(command, rig.log("far"), rig.client_cores)
        try:
            await _until(listen.exists, "the delaying relay")
            await serve_anew(
                self.rig, SALE_REDIS_URL=f"unix://{listen}", SALE_BATCH_MAX=str(plan.far_batch)
            )
            _, capacity = await self._capacity(FIRST_RATE // 5)
            return Scene("far", capacity, await self._steps(capacity, plan.far))
        finally:
            if "serve" in rig.processes:
                await stop(rig.processes.pop("serve"))
            await stop(relay)

    async def _capacity(self, rate_most: int) -> tuple[dict[str, float], float]:
        """Sell in a closed loop: CPU µs a purchase by process, and purchases a second."""
        self.bench.note("capacity, closed loop")
        feed = self.bench.feed(CAMPAIGN, self.bench.cards(rate_most * PROBE_S))
        before = self._cpu()
        got = await offer(
            feed, self.rig.address, PROBE_S, PROBE_CONNECTIONS, program=self.bench.program
        )
        feed.file.unlink()
        await self.rig.written(CAMPAIGN)
        after = self._cpu()
        if got.refused:
            raise EngineError(f"capacity: {got.refused} refused of {got.requests}")
        return {name: (after[name] - before[name]) / got.requests * 1e6 for name in PARTS}, got.rate

    async def _refusal_us(self) -> float:
        """CPU µs of the API a refusal, where nearly all are refused. Raises EngineError."""
        self.bench.note("the cost of a refusal")
        await serve_anew(self.rig, SALE_WAITING_MAX="1", SALE_BATCH_MAX="1")
        feed = self.bench.feed(CAMPAIGN, self.bench.cards(REFUSED_CARDS), cycle=True)
        before = cpu_s(self.rig.pid("serve"))
        got = await offer(
            feed, self.rig.address, REFUSED_S, PROBE_CONNECTIONS, program=self.bench.program
        )
        used_s = cpu_s(self.rig.pid("serve")) - before
        if got.refused < REFUSED_LEAST * got.requests:
            raise EngineError(f"the cost of a refusal: {got.refused} refused of {got.requests}")
        return used_s / got.requests * 1e6

    async def _steps(self, capacity: float, multiples: tuple[float, ...]) -> list[Step]:
        steps = []
        for times in multiples:
            self.bench.note(f"{times:g} × {capacity:,.0f} a second")
            steps.append(await self._step(capacity, times))
        return steps

    async def _step(self, capacity: float, times: float) -> Step:
        plan, rate = self.plan, capacity * times
        offsets = arrivals.make("poisson", rate, plan.seconds, seed=1)
        cards = self.bench.cards(len(offsets))
        raws, spool = list(self.bench.requests(CAMPAIGN, cards)), Spool(cards)
        warm = min(int(rate * 2) + PROBE_CONNECTIONS, plan.connections)
        bounds = Bounds(
            connections=plan.connections,
            warm=warm,
            warm_s=warm / OPENED_PER_S + SETTLE_S,
            queue=QUEUE,
            timeout_s=TIMEOUT_S,
            retries=0,
            give_up_s=PATIENCE_S,
        )
        loop = OpenLoop(self.rig.address, offsets, raws.__getitem__, spool, bounds)
        start = time.monotonic() + bounds.warm_s
        playing = asyncio.create_task(loop.run(start))
        used = asyncio.create_task(self._server_s(start + SETTLE_S, start + plan.seconds))
        try:
            tally = await playing
            server_s = await used
        finally:
            playing.cancel()
            used.cancel()
            await asyncio.gather(playing, used, return_exceptions=True)
        record = Record(name=CAMPAIGN, campaign=CAMPAIGN, started_at="", duration_s=0.0)
        fill(record, [summed_up(offsets, tally)])
        await self.compared.add(CAMPAIGN, spool)
        return _step_of(times, offsets, tally, record, plan.seconds, server_s)

    async def _server_s(self, since: float, until: float) -> float:
        """CPU seconds of API and Redis between two moments of the monotonic clock."""
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


def _step_of(
    times: float,
    offsets: Sequence[float],
    tally: Tally,
    record: Record,
    seconds: float,
    server_s: float,
) -> Step:
    window_s = seconds - SETTLE_S
    codes, within = tally.codes, Counter[str]()
    sold_ms, intended_ms, refused_ms = [], [], []
    for offset, sent_at, done_at, outcome in zip(
        offsets, tally.sent_at, tally.done_at, tally.outcome, strict=True
    ):
        code = codes[outcome]
        if SETTLE_S <= done_at < seconds:
            within[code] += 1
        if code == SOLD:
            sold_ms.append((done_at - sent_at) * 1e3)
            intended_ms.append((done_at - offset) * 1e3)
        elif code == OVERLOADED:
            refused_ms.append((done_at - sent_at) * 1e3)
    known = {SOLD, OVERLOADED}
    return Step(
        times=times,
        offered=len(offsets) / seconds,
        sent=sum(count for second, count in tally.sent.items() if second < seconds) / seconds,
        sold=within[SOLD] / window_s,
        refused=within[OVERLOADED] / window_s,
        other={code: n for code, n in record.outcomes.items() if n and code not in known},
        p50_ms=at_share(sold_ms, 0.5),
        p99_ms=at_share(sold_ms, 0.99),
        intended_p99_ms=at_share(intended_ms, 0.99),
        refused_p99_ms=at_share(refused_ms, 0.99),
        sold_per_cpu_s=within[SOLD] / max(server_s, 1e-9),
        told_to_wait={int(wait_s): n for wait_s, n in sorted(tally.told_to_wait.items())},
        bottleneck=record.bottleneck,
    )


async def serve_anew(rig: Rig, **settings: str) -> None:
    """Start the API anew with settings of its own. Raises EngineError."""
    if "serve" in rig.processes:
        await stop(rig.processes.pop("serve"))
    socket = f"unix:{rig.servers.sockets}/bench-serve"
    with _replaced(rig.settings, settings):
        program = ("sale", "serve", "--metrics-listen", socket)
        await rig.spawn("serve", *program, cores=rig.server_cores)
    await ready(rig.processes["serve"], rig.log("serve"), rig.address, "/readyz", 200)


@contextlib.contextmanager
def _replaced(settings: dict[str, str], others: Mapping[str, str]) -> Iterator[None]:
    kept = dict(settings)
    settings.update(others)
    try:
        yield
    finally:
        settings.clear()
        settings.update(kept)


async def _until(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not there():
        if time.monotonic() > deadline:
            raise EngineError(f"{what} is not there after {WAIT_S:.0f} s")
        await asyncio.sleep(0.05)
