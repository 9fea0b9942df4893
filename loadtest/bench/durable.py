"""Durable end to end: orders in PostgreSQL a second, everything on the same cores, for long.

Nothing is pinned: API, Redis, writer, PostgreSQL, scheduler and client share the cores as the
kernel has it. What counts is what the writer has brought to PostgreSQL within the window, not what
was answered; the lag beside it tells whether that would last.
"""

import asyncio
import itertools
import os
import time
from typing import Final

import msgspec
from rich.console import Console

from loadtest.bench.cases import CONNECTIONS, FIRST_GUESS_RATE, STOCK, Bench
from loadtest.bench.figures import Case
from loadtest.bench.offer import Offer, OfferError, offer
from loadtest.bench.rig import busy_s, tree_cpu_s
from loadtest.engine import EngineError
from loadtest.tables import CLEAN, Goal, facts, goals_table

CAMPAIGN: Final = "bench-durable"
GOAL: Final = 0.3
PROBE_MORE_S: Final = 1
WARM_S: Final = 2.0
MARGIN: Final = 1.6
SECONDS_MIN: Final = 5
SAMPLE_S: Final = 1.0
FULL_SHARE: Final = 0.85


class Durable(msgspec.Struct, frozen=True):
    """The figures of one long run.

    ``cpu``: share of one core by process over the window, ``others``
    that of all that is not ours (and of the kernel, which counts some of our work as its own).
    """

    client: str
    connections: int
    workers: int
    cores: int
    window_s: float
    rows_a_second: float
    slowest_second: float
    answered_a_second: float
    latency_ms: tuple[float, float, float]
    lag_end: int
    lag_most: int
    cpu: dict[str, float]
    others: float
    limit: str
    constants: tuple[float, float]
    ratio: float
    orders: int
    check: str
    audit: str

    def show(self, console: Console) -> None:
        """Print the tables."""
        console.print(
            f"Durable end to end: {self.workers} API process(es), every process free on "
            f"{self.cores} core(s) with {self.client}, {self.connections} connections, closed "
            f"loop. Counted over {self.window_s:.0f} s."
        )
        rows = [
            ("orders in PostgreSQL a second", f"{self.rows_a_second:,.0f}"),
            ("of which the slowest second", f"{self.slowest_second:,.0f}"),
            ("purchases answered a second", f"{self.answered_a_second:,.0f}"),
            ("ledger lag at the end of the window, events", f"{self.lag_end:,}"),
            ("highest ledger lag, events", f"{self.lag_most:,}"),
            ("(a) before and after, a second", " ".join(f"{rate:,.0f}" for rate in self.constants)),
            ("p50, p99 ms of a purchase", f"{self.latency_ms[0]:.1f}  {self.latency_ms[2]:.1f}"),
            ("orders in PostgreSQL in the end, all counted", f"{self.orders:,}"),
            ("books", self.check),
            ("audit", self.audit),
        ]
        shares = sorted(self.cpu.items(), key=lambda each: -each[1])
        shares.append(("all else, kernel included", self.others))
        cpu = [(name, f"{share:.0%}") for name, share in shares]
        console.print(facts("", rows), facts("CPU, share of one core", cpu), sep="\n")
        console.print(f"The limit: {self.limit}")
        goal = Goal("durable orders end to end × (a)", GOAL, self.ratio)
        console.print(goals_table([goal]))


class _Moment(msgspec.Struct, frozen=True):
    at: float
    applied: int
    head: int
    cpu: dict[str, float]
    busy: float


class Lasting:
    """One durable run on one rig, for ``seconds``, with ``workers`` API processes."""

    def __init__(self, bench: Bench, seconds: int, workers: int) -> None:
        self.bench = bench
        self.rig = bench.rig
        self.seconds = seconds
        self.workers = workers
        self.cores = self.rig.server_cores | self.rig.client_cores

    async def run(self) -> Durable:
        """Measure. Raises EngineError, OfferError …"""
        bench, rig = self.bench, self.rig
        await bench.prepare()
        await rig.campaign(CAMPAIGN, STOCK)
        before = await self._constant()
        rig.repin(apart=False)
        os.sched_setaffinity(0, self.cores)
        for number in range(2, self.workers + 1):
            await rig.serve(f"serve-{number}", self.cores)
        probe, _ = await self._sell(bench.plan.seconds + PROBE_MORE_S, FIRST_GUESS_RATE)
        bench.note(f"durable: {self.seconds} s")
        got, moments = await self._sell(self.seconds, probe.rate)
        bench.note("durable: the rest of the ledger")
        await rig.written(CAMPAIGN)
        orders = await rig.sold(CAMPAIGN)
        answered = probe.requests + got.requests
        rig.repin(apart=True)
        os.sched_setaffinity(0, rig.client_cores)
        after = await self._constant()
        return self._result(
            got, moments, (before.rate, after.rate), orders, answered, await bench.audit()
        )

    async def _constant(self) -> Case:
        self.bench.note("the constant, pinned")
        return await self.bench.case("constant")

    async def _sell(self, seconds: int, rate: float) -> tuple[Offer, list[_Moment]]:
        """Offer purchases, and look each second how far the books are."""
        bench = self.bench
        bench.note(f"durable: requests for {seconds} s")
        cards = bench.cards(int(rate * seconds * MARGIN) + 2 * CONNECTIONS)
        feed = bench.feed(CAMPAIGN, cards)
        bench.note(f"durable: {seconds} s")
        moments = [await self._moment()]
        selling = asyncio.create_task(
            offer(feed, self.rig.address, seconds, CONNECTIONS, program=bench.program)
        )
        try:
            due = time.perf_counter()
            while not selling.done():
                due += SAMPLE_S
                await asyncio.wait([selling], timeout=max(0.0, due - time.perf_counter()))
                if not selling.done():
                    moments.append(await self._moment())
            got = await selling
        finally:
            selling.cancel()
            await asyncio.gather(selling, return_exceptions=True)
            feed.file.unlink()
        if got.refused:
            raise OfferError(f"durable: {got.refused} refused of {got.requests}")
        return got, moments

    async def _moment(self) -> _Moment:
        # The head first: what is applied then can only be more, so the lag is not told too high.
        head = await self.rig.head(CAMPAIGN)
        applied = await self.rig.applied(CAMPAIGN)
        return _Moment(time.perf_counter(), applied, head, self._cpu(), busy_s(self.cores))

    def _cpu(self) -> dict[str, float]:
        rig = self.rig
        names = [name for name in rig.processes if name != "constant"]
        used = {name: tree_cpu_s(rig.pid(name)) for name in (*names, *rig.servers.pids)}
        return used | {"this program": time.process_time()}

    def _result(
        self,
        got: Offer,
        moments: list[_Moment],
        constants: tuple[float, float],
        orders: int,
        answered: int,
        audit: str,
    ) -> Durable:
        window = [each for each in moments if each.at - moments[0].at >= WARM_S]
        if len(window) < 2:
            raise EngineError("durable: the machine was too busy to look at the books each second")
        first, last = window[0], window[-1]
        window_s = last.at - first.at
        rows = (last.applied - first.applied) / window_s
        cpu = {name: (last.cpu[name] - first.cpu[name]) / window_s for name in first.cpu}
        if self.bench.program:
            cpu["wrk"] = got.client_s / got.duration_s
        others = max((last.busy - first.busy) / window_s - sum(cpu.values()), 0.0)
        pairs = itertools.pairwise(window)
        # Requests under way when the client leaves are sold and not counted.
        most = answered + 2 * CONNECTIONS
        untrue = f"{orders} orders, but {answered} to {most} answered"
        return Durable(
            client=self.bench.client,
            connections=CONNECTIONS,
            workers=self.workers,
            cores=len(self.cores),
            window_s=window_s,
            rows_a_second=rows,
            slowest_second=min((b.applied - a.applied) / (b.at - a.at) for a, b in pairs),
            answered_a_second=got.rate,
            latency_ms=got.latency_ms,
            lag_end=max(last.head - last.applied, 0),
            lag_most=max(each.head - each.applied for each in window),
            cpu=cpu,
            others=others,
            limit=_limit(cpu, others, len(self.cores)),
            constants=constants,
            ratio=rows / (sum(constants) / 2),
            orders=orders,
            check=CLEAN if answered <= orders <= most else untrue,
            audit=audit,
        )


def _limit(cpu: dict[str, float], others: float, cores: int) -> str:
    """Say in words what the run was limited by, as far as CPU time tells."""
    used = sum(cpu.values())
    name, most = max(cpu.items(), key=lambda each: each[1])
    words = (
        f"{used:.2f} of {cores} core(s) used, most by {name} ({most:.0%} of one core); "
        f"{others:.2f} by other programs and the kernel"
    )
    if used + others >= FULL_SHARE * cores:
        return f"the CPU as a whole: {words}"
    if most >= FULL_SHARE:
        return f"one process that fills its core: {words}"
    return f"no core was full, so the disk or a wait: {words}"
