"""The benchmark's measurements against one rig: what is offered to whom, and what it costs.

Every measurement is a feed that is offered to a target for some seconds, closed loop. Rounds are
compared within themselves, because a shared machine is quick in one and slow in the next.
"""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final

from loadtest.bench.figures import KINDS, OURS, Case, Growth, Result
from loadtest.bench.offer import Feed, OfferError, offer, read_feed, write_feed
from loadtest.bench.rig import SHOWING, Rig, cpu_s, tree_cpu_s
from loadtest.client import Client
from loadtest.engine import EngineError, sale
from loadtest.generator import closed
from loadtest.record import SOLD
from loadtest.tables import CLEAN
from loadtest.wire import get_request

CONNECTIONS: Final = 256
SOLD_OUT_TICKETS: Final = 100
FEED_MARGIN: Final = 3.0
CHUNK: Final = 50_000
PROBE_MAX: Final = 5_000
FIRST_GUESS_RATE: Final = 30_000
REPLAYED_FROM: Final = 50_000_000
REFUSED_FROM: Final = 60_000_000
"""Numbers of minted members who replay, and who are refused."""
STOCK: Final = 10_000_000
WRITER_S: Final = 90.0
WRITER_POLL_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. ``cards`` replay, or are refused, in turn (so many that the engine's
    limit of requests a card is not met); ``growth`` are the numbers sold at which the cost is
    looked at.
    """

    seconds: int
    rounds: int
    backlog: int
    cards: int
    growth: tuple[int, ...]
    connections: int = CONNECTIONS


FULL: Final = Plan(
    seconds=2, rounds=5, backlog=50_000, cards=20_000, growth=(1_000, 10_000, 100_000)
)
TINY: Final = Plan(seconds=1, rounds=1, backlog=2_000, cards=5_000, growth=(500, 2_000))
MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Target:
    """Whom something is offered to. ``redis_pid`` None: it has no Redis."""

    name: str
    address: str
    pid: int
    redis_pid: int | None


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
        self.rates: dict[str, float] = {}

    async def run(self) -> Result:
        """Measure everything."""
        await self.prepare()
        await self.rig.campaign("bench-growth", STOCK)
        await self.rig.campaign("bench-writer", STOCK)
        self.rig.books_stand_back()
        cases = await self._cases()
        self.note("growth")
        await self.rig.written("bench")
        await self.rig.trimmed("bench")
        memory_before = await self.rig.used_memory()
        growth = await self._growth()
        await self.rig.written("bench-growth")
        entries_left = await self.rig.trimmed("bench-growth")
        memory = await self.rig.used_memory() - memory_before
        self.note("the writer's backlog")
        return Result(
            client=self.client,
            connections=self.plan.connections,
            cases=cases,
            growth=growth,
            redis_bytes_an_order=memory / (growth[-1].sold + _probe(growth[-1].sold)),
            stream_entries_left=entries_left,
            writer_rows_a_second=await self._writer(),
            audit=await self.audit(),
        )

    @property
    def client(self) -> str:
        """The program that offers, in words."""
        return f"wrk ({self.program})" if self.program else "our own client"

    async def prepare(self) -> None:
        """Make the campaigns and what is offered again and again; start the constant peer.

        The constant peer answers with as many bytes as the engine, and is asked what the engine
        has sold already.
        """
        self.note("campaigns and requests")
        rig, again = self.rig, self.plan.cards
        await rig.campaign("bench", STOCK)
        self.answer_bytes = await self._answer_bytes()
        await rig.start_constant(self.answer_bytes)
        replayed = range(REPLAYED_FROM, REPLAYED_FROM + again)
        self.replays = self.feed("bench", replayed, cycle=True)
        await self._play(list(read_feed(self.replays)))
        await rig.campaign("bench-sold-out", SOLD_OUT_TICKETS)
        await rig.campaign("bench-not-open", STOCK, datetime.now(UTC) + timedelta(days=365))
        await self._sell("bench-sold-out", SOLD_OUT_TICKETS)
        refused = range(REFUSED_FROM, REFUSED_FROM + again)
        self.refused: dict[str, Feed] = {}
        self.reads: dict[str, Feed] = {}
        for name, kind in KINDS.items():
            if kind.of and kind.of not in self.refused:
                self.refused[kind.of] = self.feed(kind.of, refused, cycle=True)
            if kind.path:
                file, raw = rig.folder / f"{name}.requests", get_request(rig.address, kind.path)
                self.reads[kind.path] = write_feed(file, [raw], cycle=True)

    async def _answer_bytes(self) -> int:
        """Size of the body that a purchase is answered with."""
        (raw,) = self.requests("bench", self.cards(1))
        async with Client(self.rig.address) as client:
            answer = await client.request(raw)
        if answer.status != 201:
            raise OfferError(f"the first purchase: {answer.status} {answer.body[:300]!r}")
        return len(answer.body)

    async def _cases(self) -> list[Case]:
        await self.warm_up()
        rounds = [
            await self.round(f"round {number} of {self.plan.rounds}")
            for number in range(1, self.plan.rounds + 1)
        ]
        constants = [cases["constant"] for cases in rounds]
        return [middle(constants), *(median([cases[name] for cases in rounds]) for name in OURS)]

    async def round(self, title: str) -> dict[str, Case]:
        """Measure each kind of request between two measurements of the constant peer.

        A shared machine changes its speed within seconds: a share of the mean of both neighbours
        says more than one of a constant that was measured a while ago.
        """
        cases: dict[str, Case] = {}
        constants = []
        for name in (None, *OURS):
            if name is not None:
                self.note(f"{title}: {name}")
                cases[name] = await self.case(name)
            self.note(f"{title}: constant")
            constants.append(await self.case("constant"))
        for name, (before, after) in zip(OURS, pairwise(constants), strict=True):
            cases[name] = cases[name].beside(before, after)
        return {"constant": middle(constants), **cases}

    async def warm_up(self) -> None:
        """Offer purchases for a second, which also tells how many a measurement needs."""
        feed = self.purchases("purchases", seconds=1)
        await self.measure("purchases", feed, self.ours, seconds=1)
        feed.file.unlink()

    @property
    def ours(self) -> Target:
        """The engine."""
        return Target("serve", self.rig.address, self.rig.pid("serve"), self.rig.pid("redis"))

    @property
    def constant(self) -> Target:
        """The constant peer; it uses no Redis, but the engine's beside it runs on the same core."""
        pid = self.rig.pid("constant")
        return Target("constant", self.rig.constant_address, pid, self.rig.pid("redis"))

    async def case(self, name: str) -> Case:
        """Measure one kind of request of the engine, or the constant peer."""
        if name == "constant":
            return await self.measure(name, self.replays, self.constant)
        kind, before = KINDS[name], await self.rig.metrics()
        if kind.fresh:
            feed = self.purchases(name, campaign=kind.of or "bench")
        elif kind.path:
            feed = self.reads[kind.path]
        else:
            feed = self.refused[kind.of] if kind.of else self.replays
        got = await self.measure(name, feed, self.ours, refuses=bool(kind.of))
        if kind.fresh:
            feed.file.unlink()
            await self.rig.written("bench")
        if kind.outcome:
            await self._outcomes_were(name, before, got.requests)
        return got

    async def _outcomes_were(self, name: str, before: dict[str, float], requests: int) -> None:
        """See that the engine decided so: a refusal for another reason may be cheaper."""
        now = await self.rig.metrics()
        told = {
            label: int(value - before.get(label, 0.0))
            for label, value in now.items()
            if label.startswith("sale_purchases_total") and value > before.get(label, 0.0)
        }
        wanted = f'outcome="{KINDS[name].outcome}"'
        if sum(count for label, count in told.items() if wanted in label) < requests:
            raise OfferError(f"{name}: {requests} answered, but the engine counted {told}")

    def purchases(self, name: str, seconds: int | None = None, campaign: str = "bench") -> Feed:
        """Purchases of new cards, more than can be answered in the time by what ``name`` says."""
        rate = self.rates.get(name, FIRST_GUESS_RATE)
        count = int(rate * (seconds or self.plan.seconds) * FEED_MARGIN) + 2 * CONNECTIONS
        return self.feed(campaign, self.cards(max(count, FIRST_GUESS_RATE)))

    async def measure(
        self,
        name: str,
        feed: Feed,
        target: Target,
        *,
        refuses: bool = False,
        seconds: int | None = None,
        connections: int | None = None,
    ) -> Case:
        """Offer a feed. Raises OfferError where not all (or with ``refuses`` none) is accepted."""
        before = self._cpu(target)
        got = await offer(
            feed,
            target.address,
            seconds or self.plan.seconds,
            connections or self.plan.connections,
            program=self.program,
        )
        api_s, redis_s, books_s = self._used(target, before)
        expected = got.requests if refuses else 0
        if got.refused != expected:
            raise OfferError(
                f"{target.name}, {name}: {got.refused} refused of {got.requests}, not {expected}"
            )
        if target.name == self.ours.name:
            self.rates[name] = got.rate
        elif name == "purchases":
            self.rates[target.name] = got.rate
        return Case(
            name=name,
            rate=got.rate,
            latency_ms=got.latency_ms,
            api_us=api_s / got.requests * 1e6,
            redis_us=redis_s / got.requests * 1e6,
            server_busy=(api_s + redis_s) / got.duration_s,
            client_busy=got.client_s / got.duration_s,
            books_busy=books_s / got.duration_s,
            requests=got.requests,
        )

    def _cpu(self, target: Target) -> tuple[float, float, float]:
        rig = self.rig
        books = cpu_s(rig.pid("writer")) + tree_cpu_s(rig.pid("postgresql"))
        stock = 0.0 if target.redis_pid is None else cpu_s(target.redis_pid)
        return cpu_s(target.pid), stock, books

    def _used(self, target: Target, before: tuple[float, float, float]) -> list[float]:
        return [after - first for after, first in zip(self._cpu(target), before, strict=True)]

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
            probe = _probe(goal)
            raws = list(self.requests("bench-growth", self.cards(probe)))
            before, start = self._cpu(self.ours), time.perf_counter()
            await self._play(raws)
            took_s = time.perf_counter() - start
            api_s, redis_s, _ = self._used(self.ours, before)
            rows.append(Growth(sold, probe / took_s, api_s / probe * 1e6, redis_s / probe * 1e6))
            sold += probe
        return rows

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

    async def audit(self) -> str:
        """The engine's audit of all that was measured; a fast lie is no figure."""
        self.note("audit of all that was sold")
        try:
            await sale("audit", settings=self.rig.settings)
        except EngineError as error:
            return str(error)
        return CLEAN

    async def _sell(self, campaign: str, count: int) -> None:
        await self._play(list(self.requests(campaign, self.cards(count))))

    async def _play(self, raws: list[bytes]) -> None:
        count = len(raws)
        tally = await closed(self.rig.address, raws, count, min(CONNECTIONS, count))
        if (got := tally.outcomes())[SOLD] != count:
            raise OfferError(f"sold {got[SOLD]} of {count}: {dict(got)}")

    def cards(self, count: int) -> range:
        """Numbers of cards that have bought nothing yet."""
        first, self.next_card = self.next_card, self.next_card + count
        return range(first, first + count)

    def requests(self, campaign: str, cards: range) -> Iterator[bytes]:
        """Purchases of one ticket by these cards."""
        return self.mint.requests(self.rig.address, campaign, SHOWING, cards)

    def feed(self, campaign: str, cards: range, *, cycle: bool = False) -> Feed:
        """Write such purchases to a file."""
        file = self.rig.folder / f"{campaign}-{cards.start}.requests"
        return write_feed(file, self.requests(campaign, cards), cycle=cycle)


def _probe(goal: int) -> int:
    return min(goal, PROBE_MAX)


def middle(cases: list[Case]) -> Case:
    """The one with the median rate."""
    rate = statistics.median_low([case.rate for case in cases])
    return next(case for case in cases if case.rate == rate)


def median(cases: list[Case]) -> Case:
    """The round whose share of the constant is the median, whole."""
    ratio = statistics.median_low([case.ratio for case in cases])
    return next(case for case in cases if case.ratio == ratio)
