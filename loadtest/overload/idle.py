"""Connections that only stand there: what they cost an API process, and what others feel of them.

They are opened in three kinds, one after the other: most have bought once, or asked once for what
aiohttp answers; a tenth has asked nothing yet, and those come last, because the engine gives them
ten seconds. Memory is looked at around each kind. Another client's purchases come in an open loop
at a rate that is far from any limit: before, beside all of them, and after, which tells how much of
a difference is the machine. Every answer to a purchase is compared with PostgreSQL.

One source address has ports for `PORTS` connections, so they come from as many addresses of
loopback as they need.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final, cast

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from loadtest.bench.measure import STOCK, Bench
from loadtest.client import AnswerError
from loadtest.latency import at_share
from loadtest.overload.measure import OPENED_PER_S, SETTLE_S, serve_anew
from loadtest.overload.spool import Compared, Spool
from loadtest.overload.tables import print_books
from loadtest.record import SOLD, Record
from loadtest.rush import arrivals
from loadtest.rush.loop import OpenLoop
from loadtest.rush.summary import fill
from loadtest.rush.tally import Bounds
from loadtest.rush.worker import summed_up
from loadtest.wire import Response, ResponseParser, get_request
from sale.http.overload import files_allow

CAMPAIGN: Final = "idle"
RATE: Final = 500.0
CONNECTIONS: Final = 64
SPARE: Final = 2 * CONNECTIONS
PORTS: Final = 10_000
ASKED: Final = "/api/v1/time"
OPENING_MAX: Final = 100
ANSWERED_WITHIN_S: Final = 20.0
BEGINS_IN_S: Final = 1.0
SECONDS_MAX: Final = 5.0
"""So that those that have asked nothing are still there at the end."""

BOUGHT, LOOKED, OPENED = "behind a purchase", "behind a GET of aiohttp's", "just opened"


class Kind(msgspec.Struct, frozen=True):
    """Connections of a kind; how much the process grew by each, in bytes."""

    kind: str
    connections: int
    rss: float
    uss: float


class Window(msgspec.Struct, frozen=True):
    """Purchases of another client; ms from the intended moment. ``idle``: open at its end."""

    when: str
    idle: int
    p50_ms: float
    p99_ms: float
    unsold: int
    bottleneck: str


class Idle(msgspec.Struct, frozen=True):
    """All of it. ``connections``: as many as the files allow of those that were ``asked`` for.

    ``rss`` and ``uss`` are the process' bytes without them. ``compared`` and ``audit`` as in
    `loadtest.overload.measure`.
    """

    asked: int
    connections: int
    rate: float
    rss: int
    uss: int
    kinds: list[Kind]
    windows: list[Window]
    compared: int
    audit: str


def shares(connections: int) -> dict[str, int]:
    """How many there are of each kind."""
    opened = connections // 10
    bought = (connections - opened) // 2
    return {BOUGHT: bought, LOOKED: connections - opened - bought, OPENED: opened}


async def idle(bench: Bench, asked: int, seconds: float) -> Idle:
    """Measure. Raises EngineError, AnswerError, OSError …"""
    connections = max(files_allow(asked + SPARE) - SPARE, 1)
    await serve_anew(bench.rig, SALE_CONNECTIONS_MAX=str(connections + SPARE))
    await bench.rig.campaign(CAMPAIGN, STOCK)
    return await _Idling(bench, connections, min(seconds, SECONDS_MAX)).run(asked)


class _Idling:
    """One run on one bench."""

    def __init__(self, bench: Bench, connections: int, seconds: float) -> None:
        self._bench = bench
        self._rig = bench.rig
        self._connections = connections
        self._seconds = seconds
        self._compared = Compared(bench)
        self._process = psutil.Process(bench.rig.pid("serve"))
        self._stand: list[_Standing] = []

    async def run(self, asked: int) -> Idle:
        """Measure everything."""
        try:
            windows = [await self._window("before")]
            rss, uss = self._memory()
            kinds = [
                await self._opened(kind, count) for kind, count in shares(self._connections).items()
            ]
            windows.append(await self._window("beside"))
        finally:
            for each in self._stand:
                each.abort()
        await asyncio.sleep(BEGINS_IN_S)
        windows.append(await self._window("after"))
        return Idle(
            asked=asked,
            connections=self._connections,
            rate=RATE,
            rss=rss,
            uss=uss,
            kinds=kinds,
            windows=windows,
            compared=self._compared.answers,
            audit=await self._compared.verdict(),
        )

    def _memory(self) -> tuple[int, int]:
        told = self._process.memory_full_info()
        return int(told.rss), int(told.uss)

    async def _opened(self, kind: str, count: int) -> Kind:
        """Open all of a kind, and see what they have taken."""
        self._bench.note(f"{count:,} connections: {kind}")
        if not count:
            return Kind(kind, 0, 0.0, 0.0)
        spool = None
        raws: Sequence[bytes] = [b""] * count
        wanted = 0
        if kind == LOOKED:
            raws, wanted = [get_request(self._rig.address, ASKED)] * count, 200
        elif kind == BOUGHT:
            cards = self._bench.cards(count)
            raws, wanted, spool = list(self._bench.requests(CAMPAIGN, cards)), 201, Spool(cards)
        before = self._memory()
        first = len(self._stand)
        await self._open(raws)
        answered = self._stand[first:]
        if wanted:
            async with asyncio.timeout(ANSWERED_WITHIN_S):
                answers = [await each.answer for each in answered]
            for number, answer in enumerate(answers):
                if answer.status != wanted:
                    raise AnswerError(f"{kind}: {answer.status} {answer.body[:200]!r} {answer.why}")
                if spool is not None:
                    spool(number, answer.status, False, answer.body)  # noqa: FBT003
        if spool is not None:
            await self._compared.add(CAMPAIGN, spool)
        await asyncio.sleep(SETTLE_S)
        rss, uss = self._memory()
        return Kind(kind, count, (rss - before[0]) / count, (uss - before[1]) / count)

    async def _open(self, raws: Sequence[bytes]) -> None:
        """Open a connection for each request, at a pace, and send it."""
        began = time.monotonic()
        for at in range(0, len(raws), OPENING_MAX):
            await asyncio.gather(*(self._one(raw) for raw in raws[at : at + OPENING_MAX]))
            ahead_s = at / OPENED_PER_S - (time.monotonic() - began)
            await asyncio.sleep(max(ahead_s, 0))

    async def _one(self, raw: bytes) -> None:
        host, _, port = self._rig.address.rpartition(":")
        source = (f"127.0.0.{2 + len(self._stand) // PORTS}", 0)
        _, standing = await asyncio.get_running_loop().create_connection(
            _Standing, host, int(port), local_addr=source
        )
        self._stand.append(standing)
        standing.transport.write(raw)

    async def _window(self, when: str) -> Window:
        """Let another client buy for a while."""
        offsets = arrivals.make("poisson", RATE, self._seconds, seed=1)
        cards = self._bench.cards(len(offsets))
        raws, spool = list(self._bench.requests(CAMPAIGN, cards)), Spool(cards)
        self._bench.note(f"purchases of another client, {when}")
        bounds = Bounds(connections=CONNECTIONS, warm=CONNECTIONS, warm_s=BEGINS_IN_S, retries=0)
        loop = OpenLoop(self._rig.address, offsets, raws.__getitem__, spool, bounds)
        tally = await loop.run(time.monotonic() + BEGINS_IN_S)
        still = sum(each.open for each in self._stand)
        record = Record(name=CAMPAIGN, campaign=CAMPAIGN, started_at="", duration_s=0.0)
        fill(record, [summed_up(offsets, tally)])
        await self._compared.add(CAMPAIGN, spool)
        took_ms = [
            (done_at - offset) * 1e3
            for offset, done_at, outcome in zip(offsets, tally.done_at, tally.outcome, strict=True)
            if tally.codes[outcome] == SOLD
        ]
        return Window(
            when=when,
            idle=still,
            p50_ms=at_share(took_ms, 0.5),
            p99_ms=at_share(took_ms, 0.99),
            unsold=record.offered - len(took_ms),
            bottleneck=record.bottleneck,
        )


class _Standing(asyncio.Protocol):
    """A connection of which one answer is awaited, or none."""

    def __init__(self) -> None:
        self.open = False
        self.transport: asyncio.Transport
        self.answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._parser = ResponseParser()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        for answer in self._parser.feed(data, most=1):
            if not self.answer.done():
                self.answer.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if not self.answer.done():
            self.answer.set_result(Response(0, b"", b"", f"connection lost: {error}"))

    def abort(self) -> None:
        self.transport.abort()


def print_idle(result: Idle, console: Console) -> None:
    """Print the tables."""
    if result.connections < result.asked:
        console.print(
            f"[yellow]{result.connections:,} connections, not {result.asked:,}: so many files may "
            "be open (ulimit -n)"
        )
    table = Table(title=f"{result.connections:,} idle connections, one API process")
    for heading in ("", "connections", "resident, bytes each", "unique, bytes each"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind in result.kinds:
        table.add_row(kind.kind, f"{kind.connections:,}", f"{kind.rss:,.0f}", f"{kind.uss:,.0f}")
    table.caption = (
        f"Without them {result.rss / 1e6:,.1f} MB resident, {result.uss / 1e6:,.1f} MB unique. The "
        "kernel's own memory is not in it."
    )
    console.print(table)
    table = Table(title=f"{result.rate:,.0f} purchases a second of another client, open loop")
    for heading in ("", "idle beside", "p50 ms", "p99 ms", "unsold"):
        table.add_column(heading, justify="right" if heading else "left")
    for window in result.windows:
        figures = (f"{window.p50_ms:.2f}", f"{window.p99_ms:.2f}", f"{window.unsold:,}")
        table.add_row(window.when, f"{window.idle:,}", *figures)
    console.print(table)
    for window in result.windows:
        if window.bottleneck:
            console.print(f"[yellow]{window.when}: the generator's limit: {window.bottleneck}")
    print_books(result.compared, result.audit, console)
