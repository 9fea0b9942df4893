"""The benchmark: what the engine does, as a share of what its HTTP stack can do at all.

Goal: figures of one run, with everything switched on, that stand beside each other: the constant
peer, purchases, replays and refusals are offered in turn by the same client to the same core, and
of several rounds the one with the median ratio is told. Not a goal: figures of a network, or of a
bigger machine.

API and Redis share one core; PostgreSQL, writer, scheduler and client have the other. Closed loop.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
import structlog
import uvloop
from rich.console import Console

from loadtest.bench_report import CLEAN, Case, Growth, Result, print_result, wide_console
from loadtest.client import Client, Unreachable
from loadtest.engine import EngineError, cancelled_by_signals
from loadtest.offer import Feed, Offer, OfferError, offer, read_feed, write_feed, wrk
from loadtest.rig import SHOWING, Rig, cpu_s, rig_up, tree_cpu_s
from loadtest.wire import ProtocolError

CONNECTIONS: Final = 256
SOLD_OUT_TICKETS: Final = 100
FEED_MARGIN: Final = 1.6
CHUNK: Final = 50_000
PROBE_MAX: Final = 5_000
FIRST_GUESS_RATE: Final = 12_000
STOCK: Final = 10_000_000
WRITER_S: Final = 90.0
WRITER_POLL_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. ``cards`` replay, or are refused, in turn; ``growth`` are the numbers
    sold at which the cost is looked at.
    """

    seconds: int
    rounds: int
    backlog: int
    cards: int
    growth: tuple[int, ...]


FULL: Final = Plan(
    seconds=2, rounds=5, backlog=50_000, cards=20_000, growth=(1_000, 10_000, 100_000)
)
TINY: Final = Plan(seconds=1, rounds=1, backlog=2_000, cards=2_000, growth=(500, 2_000))
MILLION: Final = 1_000_000


class Bench:
    """One run against one rig."""

    def __init__(
        self, rig: Rig, plan: Plan, program: str | None, note: Callable[[str], None]
    ) -> None:
        self.rig = rig
        self.plan = plan
        self.program = program
        self.note = note
        self.mint = rig.mint
        self.next_card = 1
        self.rate = float(FIRST_GUESS_RATE)

    async def run(self) -> Result:
        """Measure everything."""
        self.note("campaigns and requests")
        await self._prepare()
        cases = await self._cases()
        self.note("growth")
        await self.rig.written("bench")
        await self.rig.trimmed("bench")
        memory_before = await self.rig.used_memory()
        growth = await self._growth()
        bytes_an_order, entries_left = await self._bytes_an_order(memory_before)
        self.note("the writer's backlog")
        rows_a_second = await self._writer()
        self.note("audit of all that was sold")
        audit = await self._audit()
        return Result(
            client=f"wrk ({self.program})" if self.program else "our own client",
            connections=CONNECTIONS,
            cases=cases,
            growth=growth,
            redis_bytes_an_order=bytes_an_order,
            stream_entries_left=entries_left,
            writer_rows_a_second=rows_a_second,
            audit=audit,
        )

    async def _prepare(self) -> None:
        rig = self.rig
        await rig.campaign("bench", STOCK)
        await rig.campaign("bench-growth", STOCK)
        await rig.campaign("bench-writer", STOCK)
        await rig.campaign("bench-sold-out", SOLD_OUT_TICKETS)
        await rig.campaign("bench-not-open", STOCK, datetime.now(UTC) + timedelta(days=365))
        await rig.start_constant(await self._answer_bytes())
        await self._sell("bench-sold-out", SOLD_OUT_TICKETS)
        self.refused = {
            name: self._feed(name, range(10**9, 10**9 + self.plan.cards), cycle=True)
            for name in ("bench-sold-out", "bench-not-open")
        }
        replayed = self._feed("bench", range(5 * 10**9, 5 * 10**9 + self.plan.cards), cycle=True)
        await self._play(read_feed(replayed), replayed.count)
        self.replays = replayed

    async def _answer_bytes(self) -> int:
        """Size of the body that a purchase is answered with."""
        (raw,) = self._requests("bench", self._cards(1))
        async with Client(self.rig.address) as client:
            answer = await client.request(raw)
        if answer.status != 201:
            raise OfferError(f"the first purchase: {answer.status} {answer.body[:300]!r}")
        return len(answer.body)

    async def _cases(self) -> list[Case]:
        rounds: dict[str, list[Case]] = {}
        await self._measure("purchases", warm=True)
        for number in range(self.plan.rounds):
            for name in ("constant", "purchases", "replays", "sold_out", "not_open"):
                self.note(f"round {number + 1} of {self.plan.rounds}: {name}")
                rounds.setdefault(name, []).append(await self._measure(name))
        constants = rounds["constant"]
        median = statistics.median_low([case.rate for case in constants])
        middle = next(case for case in constants if case.rate == median)
        others = [_median(cases, constants) for name, cases in rounds.items() if name != "constant"]
        return [middle, *others]

    async def _measure(self, name: str, *, warm: bool = False) -> Case:
        rig = self.rig
        feed, refuses = self._feed_of(name)
        address = rig.constant_address if name == "constant" else rig.address
        server = "constant" if name == "constant" else "serve"
        seconds = 1 if warm else self.plan.seconds
        before = self._cpu(server)
        got = await offer(feed, address, seconds, CONNECTIONS, program=self.program)
        used = [after - first for after, first in zip(self._cpu(server), before, strict=True)]
        self._check(name, got, refuses=refuses)
        if name == "purchases":
            self.rate = got.rate
            await rig.written("bench")
        if not feed.cycle:
            feed.file.unlink()
        api_s, redis_s, books_s = used
        return Case(
            name=name,
            rate=got.rate,
            latency_ms=got.latency_ms,
            api_us=api_s / got.requests * 1e6,
            redis_us=redis_s / got.requests * 1e6,
            server_busy=(api_s + redis_s) / got.duration_s,
            client_busy=got.client_s / got.duration_s,
            books_busy=books_s / got.duration_s,
        )

    def _feed_of(self, name: str) -> tuple[Feed, bool]:
        """What is offered, and whether all of it is refused."""
        match name:
            case "constant" | "replays":
                return self.replays, False
            case "purchases":
                count = int(self.rate * self.plan.seconds * FEED_MARGIN) + 2 * CONNECTIONS
                return self._feed("bench", self._cards(max(count, 2 * FIRST_GUESS_RATE))), False
            case _:
                return self.refused["bench-" + name.replace("_", "-")], True

    def _check(self, name: str, got: Offer, *, refuses: bool) -> None:
        expected = got.requests if refuses else 0
        if got.refused != expected:
            raise OfferError(f"{name}: {got.refused} refused of {got.requests}, not {expected}")

    def _cpu(self, server: str) -> tuple[float, float, float]:
        rig = self.rig
        books = cpu_s(rig.pid("writer")) + tree_cpu_s(rig.pid("postgresql"))
        return cpu_s(rig.pid(server)), cpu_s(rig.pid("redis")), books

    async def _growth(self) -> list[Growth]:
        """Sell in one campaign, and look at the cost at some numbers sold."""
        sold, rows = 0, []
        for goal in self.plan.growth:
            while sold < goal:
                count = min(CHUNK, goal - sold)
                await self._sell("bench-growth", count)
                sold += count
                self.note(f"growth: {sold:,} sold")
            await self.rig.written("bench-growth")
            probe = min(goal, PROBE_MAX)
            raws = list(self._requests("bench-growth", self._cards(probe)))
            before, start = self._cpu("serve"), time.perf_counter()
            await self._play(iter(raws), probe)
            took_s = time.perf_counter() - start
            api_s, redis_s, _ = (a - b for a, b in zip(self._cpu("serve"), before, strict=True))
            rows.append(Growth(sold, probe / took_s, api_s / probe * 1e6, redis_s / probe * 1e6))
            sold += probe
        self.grown = sold
        return rows

    async def _bytes_an_order(self, before: int) -> tuple[float, int]:
        """Redis memory of what growth has sold, after the stream was trimmed."""
        await self.rig.written("bench-growth")
        left = await self.rig.trimmed("bench-growth")
        return (await self.rig.used_memory() - before) / self.grown, left

    async def _writer(self) -> float:
        """Stop the writer, sell, let it go on: events a second that it writes.

        Counted from its first batch on where there are several: its session ran out while it was
        stopped, and the wait for a new one is not its work.
        """
        rig, pid = self.rig, self.rig.pid("writer")
        os.kill(pid, signal.SIGSTOP)
        try:
            await self._sell("bench-writer", self.plan.backlog)
            seen = await rig.applied("bench-writer")
        finally:
            os.kill(pid, signal.SIGCONT)
        head = await rig.head("bench-writer")
        steps = [(time.perf_counter(), seen)]
        while seen < head:
            if time.perf_counter() - steps[0][0] > WRITER_S:
                raise EngineError(f"the writer does not go on: at {seen:,} of {head:,}")
            await asyncio.sleep(WRITER_POLL_S)
            if (now := await rig.applied("bench-writer")) > seen:
                seen = now
                steps.append((time.perf_counter(), seen))
        (began, first), (ended, last) = steps[1 if len(steps) > 2 else 0], steps[-1]
        return (last - first) / (ended - began)

    async def _audit(self) -> str:
        """What the engine's audit says of everything that was measured; a fast lie is no figure."""
        try:
            await self.rig.sale("audit")
        except EngineError as error:
            return str(error)
        return CLEAN

    async def _sell(self, campaign: str, count: int) -> None:
        await self._play(self._requests(campaign, self._cards(count)), count)

    async def _play(self, raws: Iterator[bytes], count: int) -> None:
        async with Client(self.rig.address, min(CONNECTIONS, count)) as client:
            plan = list(zip(raws, range(count), strict=True))
            result = await client.run(plan, lambda *_: None)
        if result.statuses[201] != count:
            raise OfferError(f"sold {result.statuses[201]} of {count}: {dict(result.statuses)}")

    def _cards(self, count: int) -> range:
        first, self.next_card = self.next_card, self.next_card + count
        return range(first, first + count)

    def _requests(self, campaign: str, cards: range) -> Iterator[bytes]:
        return self.mint.requests(self.rig.address, campaign, SHOWING, cards)

    def _feed(self, campaign: str, cards: range, *, cycle: bool = False) -> Feed:
        file = self.rig.folder / f"{campaign}-{cards.start}.requests"
        return write_feed(file, self._requests(campaign, cards), cycle=cycle)


def _median(cases: list[Case], constants: list[Case]) -> Case:
    """The round whose share of its own round's constant is the median, whole.

    Rounds are compared within themselves because a shared machine is quick in one and slow in the
    next.
    """
    shares = [case.rate / base.rate for case, base in zip(cases, constants, strict=True)]
    middle = statistics.median_low(shares)
    return msgspec.structs.replace(cases[shares.index(middle)], ratio=middle)


async def bench(plan: Plan, *, program: str | None, console: Console | None) -> Result:
    """Run the benchmark in a directory of its own. Raises EngineError, OfferError …"""
    cancelled_by_signals()
    server, client, everywhere = _cores()
    os.sched_setaffinity(0, client)
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, everywhere)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sale-bench-")))
        status = stack.enter_context(console.status("starting")) if console else None
        async with rig_up(folder, server_cores=server, client_cores=client) as rig:
            return await Bench(rig, plan, program, status.update if status else _quiet).run()


def _cores() -> tuple[set[int], set[int], set[int]]:
    """The server's core, the other, and all that we may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return {allowed[0]}, {allowed[min(1, len(allowed) - 1)]}, set(allowed)


def _quiet(_: str) -> None: ...


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--seconds", type=int, help="of each measurement")
    parser.add_argument("--rounds", type=int, help="of which the median is told")
    parser.add_argument("--million", action="store_true", help="growth up to 1,000,000 sold")
    parser.add_argument("--client", choices=("wrk", "ours"), help="default: wrk if installed")
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    options = parser.parse_args()
    base = TINY if options.tiny else FULL
    plan = Plan(
        seconds=options.seconds or base.seconds,
        rounds=options.rounds or base.rounds,
        backlog=base.backlog,
        cards=base.cards,
        growth=(*base.growth, MILLION) if options.million else base.growth,
    )
    program = None if options.client == "ours" else wrk()
    if options.client == "wrk" and program is None:
        parser.error("wrk is not installed")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    try:
        console = None if options.json else wide_console()
        result = uvloop.run(bench(plan, program=program, console=console))
    except (EngineError, OfferError, ProtocolError, Unreachable, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench: stopped", file=sys.stderr)
        sys.exit(130)
    if console is None:
        print(msgspec.json.encode(result).decode())
    else:
        print_result(result, console)
    sys.exit(0 if result.audit == CLEAN else 1)


if __name__ == "__main__":
    main()
