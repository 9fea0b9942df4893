"""Idle connections: what they cost an API process, and what others feel of them.

They are opened in three kinds, one after the other: most have bought once, or sent one request that
aiohttp serves; a tenth has sent nothing yet, and those come last, because the engine gives them
ten seconds. Memory is read around each kind. Another client's purchases come in an open loop at a
rate that is far from any limit: before, beside all of them, and after, which tells how much of a
difference is the machine. Every answer to a purchase is compared with PostgreSQL.

One source address has ports for `PORTS` connections, so they come from as many addresses of
loopback as they need.
"""

import asyncio
import time
from typing import Final, cast

import msgspec
import psutil
from rich.console import Console

from loadtest.bench.cases import STOCK, Bench
from loadtest.bench.open_loop import OpenLoops, spool_of
from loadtest.client import AnswerError
from loadtest.record import SOLD
from loadtest.summary import at_share, judged
from loadtest.tables import grid
from loadtest.tally import Bounds
from loadtest.wire import Response, ResponseParser, get_request
from sale.http.overload import files_allow

CAMPAIGN: Final = "idle"
RATE: Final = 500.0
CONNECTIONS: Final = 64
SPARE: Final = 2 * CONNECTIONS
PORTS: Final = 10_000
ASKED: Final = "/api/v1/time"
OPENING_MAX: Final = 100
OPENED_PER_S: Final = 4_000
SETTLE_S: Final = 0.5
ANSWERED_WITHIN_S: Final = 20.0
ENDED_S: Final = 1.0
SECONDS_MAX: Final = 5.0
"""So that those that have asked nothing are still there at the end."""

BOUNDS: Final = Bounds(connections=CONNECTIONS, warm=CONNECTIONS, warm_s=1.0, retries=0)
BOUGHT, LOOKED, OPENED = "behind a purchase", "behind a GET of aiohttp's", "just opened"


class Kind(msgspec.Struct, frozen=True):
    """Connections of a kind; how much the process grew by each, in bytes."""

    kind: str
    connections: int
    rss: float
    uss: float


class Window(msgspec.Struct, frozen=True):
    """Purchases of another client; ms from the intended time. ``idle``: open at its end."""

    when: str
    idle: int
    p50_ms: float
    p99_ms: float
    unsold: int
    bottleneck: str


class Idle(msgspec.Struct, frozen=True):
    """All of it. ``connections``: as many as the files allow of those that were ``asked`` for.

    ``rss`` and ``uss`` are the process' bytes without them. ``compared`` and ``audit`` as in
    `loadtest.bench.overload`.
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
    measured: bool = True

    def show(self, console: Console) -> None:
        """Print the tables."""
        if self.connections < self.asked:
            console.print(
                f"[yellow]{self.connections:,} connections, not {self.asked:,}: so many files may "
                "be open (ulimit -n)"
            )
        caption = (
            f"Without them {self.rss / 1e6:,.1f} MB resident, {self.uss / 1e6:,.1f} MB unique. The "
            "kernel's own memory is not in it."
        )
        kinds = (
            (each.kind, f"{each.connections:,}", f"{each.rss:,.0f}", f"{each.uss:,.0f}")
            for each in self.kinds
        )
        headings = "|connections|resident, bytes each|unique, bytes each"
        title = f"{self.connections:,} idle connections, one API process"
        console.print(grid(title, headings, kinds, caption))
        windows = (
            (w.when, f"{w.idle:,}", f"{w.p50_ms:.2f}", f"{w.p99_ms:.2f}", f"{w.unsold:,}")
            for w in self.windows
        )
        title = f"{self.rate:,.0f} purchases a second of another client, open loop"
        console.print(grid(title, "|idle beside|p50 ms|p99 ms|unsold", windows))
        for window in self.windows:
            if window.bottleneck:
                console.print(f"[yellow]{window.when}: the generator's limit: {window.bottleneck}")


def shares(connections: int) -> dict[str, int]:
    """How many there are of each kind."""
    opened = connections // 10
    bought = (connections - opened) // 2
    return {BOUGHT: bought, LOOKED: connections - opened - bought, OPENED: opened}


async def idle(bench: Bench, asked: int, seconds: float) -> Idle:
    """Measure. Raises EngineError, AnswerError, OSError …"""
    connections = max(files_allow(asked + SPARE) - SPARE, 1)
    await bench.rig.serve_anew(SALE_CONNECTIONS_MAX=str(connections + SPARE))
    await bench.rig.campaign(CAMPAIGN, STOCK)
    return await _Idling(bench, connections, min(seconds, SECONDS_MAX)).run(asked)


class _Idling:
    """One run on one bench."""

    def __init__(self, bench: Bench, connections: int, seconds: float) -> None:
        self._bench = bench
        self._connections = connections
        self._seconds = seconds
        self._loops = OpenLoops(bench)
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
                each.transport.abort()
        await asyncio.sleep(ENDED_S)
        windows.append(await self._window("after"))
        audit = await self._loops.verdict()
        return Idle(
            asked, self._connections, RATE, rss, uss, kinds, windows, self._loops.answers, audit
        )

    def _memory(self) -> tuple[int, int]:
        told = self._process.memory_full_info()
        return int(told.rss), int(told.uss)

    async def _opened(self, kind: str, count: int) -> Kind:
        """Open all of a kind, and see what they have taken."""
        self._bench.note(f"{count:,} connections: {kind}")
        if not count:
            return Kind(kind, 0, 0.0, 0.0)
        cards = self._bench.cards(count)
        raws, wanted = [b""] * count, 0
        if kind == LOOKED:
            raws, wanted = [get_request(self._bench.rig.address, ASKED)] * count, 200
        elif kind == BOUGHT:
            raws, wanted = list(self._bench.requests(CAMPAIGN, cards)), 201
        before, first, spool = self._memory(), len(self._stand), spool_of(cards)
        await self._open(raws)
        if wanted:
            async with asyncio.timeout(ANSWERED_WITHIN_S):
                answers = [await each.answer for each in self._stand[first:]]
            for number, answer in enumerate(answers):
                if answer.status != wanted:
                    raise AnswerError(f"{kind}: {answer.status} {answer.body[:200]!r} {answer.why}")
                spool(number, answer.status, False, answer.body)  # noqa: FBT003
        if kind == BOUGHT:
            await self._loops.compare(CAMPAIGN, spool)
        await asyncio.sleep(SETTLE_S)
        rss, uss = self._memory()
        return Kind(kind, count, (rss - before[0]) / count, (uss - before[1]) / count)

    async def _open(self, raws: list[bytes]) -> None:
        """Open a connection for each request, at a pace, and send it."""
        began = time.monotonic()
        for at in range(0, len(raws), OPENING_MAX):
            await asyncio.gather(*(self._one(raw) for raw in raws[at : at + OPENING_MAX]))
            ahead_s = at / OPENED_PER_S - (time.monotonic() - began)
            await asyncio.sleep(max(ahead_s, 0))

    async def _one(self, raw: bytes) -> None:
        host, _, port = self._bench.rig.address.rpartition(":")
        source = (f"127.0.0.{2 + len(self._stand) // PORTS}", 0)
        _, standing = await asyncio.get_running_loop().create_connection(
            _Standing, host, int(port), local_addr=source
        )
        self._stand.append(standing)
        standing.transport.write(raw)

    async def _window(self, when: str) -> Window:
        """Let another client buy for a while."""
        self._bench.note(f"purchases of another client, {when}")
        tally, spool = await self._loops.offer(CAMPAIGN, RATE, self._seconds, BOUNDS)
        still = sum(each.open for each in self._stand)
        await self._loops.compare(CAMPAIGN, spool)
        took_ms = tally.took_ms(SOLD)
        return Window(
            when=when,
            idle=still,
            p50_ms=at_share(took_ms, 0.5),
            p99_ms=at_share(took_ms, 0.99),
            unsold=len(tally.offsets) - len(took_ms),
            bottleneck=judged(tally).bottleneck,
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
