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
from typing import Final

import msgspec
import psutil
from rich.console import Console

from loadtest.bench.cases import STOCK, Bench
from loadtest.bench.open_loop import Checked, OpenLoops, spool_of
from loadtest.client import AnswerError, Client
from loadtest.record import SOLD
from loadtest.summary import at_share, judged
from loadtest.tables import figures
from loadtest.tally import Bounds
from loadtest.wire import get_request
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


class Idle(Checked, frozen=True, kw_only=True):
    """All of it. ``connections``: as many as the files allow of those that were ``asked`` for.

    ``rss`` and ``uss`` are the process' bytes without them.
    """

    asked: int
    connections: int
    rate: float
    rss: int
    uss: int
    kinds: list[Kind]
    windows: list[Window]

    def show(self, console: Console) -> None:
        """Print the tables."""
        if self.connections < self.asked:
            console.print(
                f"[yellow]{self.connections:,} connections, not {self.asked:,}: so many files may "
                "be open (ulimit -n)"
            )
        columns = {
            "": "{.kind}",
            "connections": "{.connections:,}",
            "resident, bytes each": "{.rss:,.0f}",
            "unique, bytes each": "{.uss:,.0f}",
        }
        caption = (
            f"Without them {self.rss / 1e6:,.1f} MB resident, {self.uss / 1e6:,.1f} MB unique. The "
            "kernel's own memory is not in it."
        )
        title = f"{self.connections:,} idle connections, one API process"
        console.print(figures(title, columns, self.kinds, caption))
        columns = {
            "": "{.when}",
            "idle beside": "{.idle:,}",
            "p50 ms": "{.p50_ms:.2f}",
            "p99 ms": "{.p99_ms:.2f}",
            "unsold": "{.unsold:,}",
        }
        title = f"{self.rate:,.0f} purchases a second of another client, open loop"
        console.print(figures(title, columns, self.windows))
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
        self._clients: list[Client] = []

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
            await asyncio.gather(*(client.close() for client in self._clients))
        await asyncio.sleep(ENDED_S)
        windows.append(await self._window("after"))
        return Idle(
            asked=asked,
            connections=self._connections,
            rate=RATE,
            rss=rss,
            uss=uss,
            kinds=kinds,
            windows=windows,
            audit=await self._loops.verdict(),
            compared=self._loops.answers,
        )

    def _memory(self) -> tuple[int, int]:
        told = self._process.memory_full_info()
        return int(told.rss), int(told.uss)

    async def _opened(self, kind: str, count: int) -> Kind:
        """Open all of a kind, at a pace, and see what they have taken."""
        self._bench.note(f"{count:,} connections: {kind}")
        if not count:
            return Kind(kind, 0, 0.0, 0.0)
        address, cards = self._bench.rig.address, self._bench.cards(count)
        raws, wanted = [b""] * count, 0
        if kind == LOOKED:
            raws, wanted = [get_request(address, ASKED)] * count, 200
        elif kind == BOUGHT:
            raws, wanted = list(self._bench.requests(CAMPAIGN, cards)), 201
        before, spool, began = self._memory(), spool_of(cards), time.monotonic()

        async def one(number: int) -> None:
            source = f"127.0.0.{2 + len(self._clients) // PORTS}"
            client = Client(address, timeout_s=ANSWERED_WITHIN_S, source=source)
            self._clients.append(client)
            await client.__aenter__()
            if wanted:
                answer = await client.request(raws[number])
                if answer.status != wanted:
                    raise AnswerError(f"{kind}: {answer.status} {answer.body[:200]!r} {answer.why}")
                spool(number, answer.status, False, answer.body)  # noqa: FBT003

        for at in range(0, count, OPENING_MAX):
            await asyncio.gather(*map(one, range(at, min(at + OPENING_MAX, count))))
            await asyncio.sleep(max(at / OPENED_PER_S - (time.monotonic() - began), 0))
        if kind == BOUGHT:
            await self._loops.compare(CAMPAIGN, spool)
        await asyncio.sleep(SETTLE_S)
        rss, uss = self._memory()
        return Kind(kind, count, (rss - before[0]) / count, (uss - before[1]) / count)

    async def _window(self, when: str) -> Window:
        """Let another client buy for a while."""
        self._bench.note(f"purchases of another client, {when}")
        tally, spool = await self._loops.offer(CAMPAIGN, RATE, self._seconds, BOUNDS)
        still = sum(client.open for client in self._clients)
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
