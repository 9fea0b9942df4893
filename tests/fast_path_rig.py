"""Two API processes in one, with the fast path and without, and their clients."""

import asyncio
import contextlib
import gc
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import uvloop
from aiohttp.log import server_logger
from fast_path_client import Exchange, Wire
from service import Client, Service, free_port, in_s, showings

from sale.api import request
from sale.api.app import Api, listening
from sale.bootstrap import Engine, open_engine
from sale.config import Settings
from sale.http import client, connection, delegation, fast_path
from sale.http.aiohttp_handler import LoneHandler
from sale.http.connection import Connection
from sale.http.fast_path import FastPath

UNBOUNDED = (
    *("turn_max_ms", "waiting_max", "wait_max_ms"),
    *("card_campaign_per_s", "card_per_s", "address_per_s"),
)
ACCEPTED_WITHIN_TURNS = 200
KERNEL_HOLDS = 128 * 1024
LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
LAST = b"GET /healthz HTTP/1.1\r\nHost: sale\r\nConnection: close\r\n\r\n"
TIME = b"GET /api/v1/time HTTP/1.1\r\nHost: sale\r\n\r\n"
WISH = b'{"quantity":1}'
T = TypeVar("T")

_numbers = itertools.count(1)


ACCEPTED: set[Any] = set()
"""Addresses of clients whose connections the server's loop, which is this one, has accepted."""


async def _accepted(address: Any) -> None:
    """Wait until the server reads a connection, bounded: pieces sent before come as one read."""
    for _ in range(ACCEPTED_WITHIN_TURNS):
        await asyncio.sleep(0)
        if address in ACCEPTED:
            ACCEPTED.discard(address)
            for _ in range(2):  # it begins to read in the turn after
                await asyncio.sleep(0)
            return


@dataclass
class Side:
    """One of the two: an engine and its listener."""

    name: str
    port: int
    engine: Engine
    api: Api

    @property
    def fast_path(self) -> FastPath:
        assert self.api._fast_path is not None
        return self.api._fast_path

    @property
    def connection(self) -> Connection:
        """The one connection that there is."""
        (connection,) = self.fast_path.connections
        return connection

    async def connect(self, *, reads: bool = True) -> Wire:
        """Open a connection, by a client that reads what comes, or nothing."""
        sock = socket.socket()
        sock.setblocking(False)
        if not reads:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_HOLDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        await _accepted(sock.getsockname())
        transport, wire = await loop.create_connection(Wire, sock=sock)
        if not reads:
            transport.pause_reading()
        return wire

    @contextlib.asynccontextmanager
    async def wire(self, **how: Any) -> AsyncIterator[Wire]:
        wire = await self.connect(**how)
        try:
            yield wire
        finally:
            wire.transport.abort()
            await wire.closed.wait()

    async def ask(self, *pieces: bytes, count: int = 1, heads: Sequence[bool] = ()) -> Exchange:
        """Send pieces on a connection of their own, take the answers, and see how it goes on.

        What follows is a last request: it is answered too, unless the connection was closed.
        """
        async with self.wire() as wire:
            wire.heads = heads
            if count == len(pieces):
                for number, piece in enumerate(pieces):
                    await wire.send(piece)
                    told = await wire.answers(number + 1)
            else:
                await wire.send(*pieces)
                told = await wire.answers(count)
            if not told.closed:
                await wire.send(LAST)
                told = await wire.until_closed()
            told.closed = not told.answers or b'{"status":"ok"' not in told.answers[-1].raw
            return told

    async def orders_of(self, member: "Member") -> int:
        """How many orders a card has."""
        told = await self.ask(member.buy(body=b"", method=b"GET", target=b"/api/v1/orders"))
        return len(told.answers[0].body["items"])


@dataclass
class World:
    """Campaigns in each state, members, and the loop that the two sides live on."""

    service: Service
    loop_name: str
    loop: asyncio.AbstractEventLoop
    campaigns: dict[str, str]
    revoked: str

    def run(self, work: Coroutine[Any, Any, T], within_s: float = 60) -> T:
        """Run a coroutine beside the two sides."""

        async def bounded() -> T:
            async with asyncio.timeout(within_s):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), self.loop).result()

    def card(self) -> tuple[str, str]:
        """Number and token of a member who has bought nothing."""
        number = 40_000_000 + next(_numbers)
        now_s = int(time.time() // 1_000 * 1_000)  # one second for all: tokens of one length
        token = self.service.token(number, now_s=now_s, ttl_s=90_000)
        return str(number), token

    def member(self) -> "Member":
        return Member(self, *self.card())

    @contextlib.asynccontextmanager
    async def side(self, *, fast_path: bool, **changes: Any) -> AsyncIterator[Side]:
        """Open an engine; limits and overload are off where ``changes`` do not set them."""
        port = free_port()
        unbounded = dict.fromkeys(UNBOUNDED, 0)
        settings = Settings(
            **{
                "redis_url": self.service.redis_url,
                "database_url": self.service.database_url,
                "data_dir": self.service.data_dir,
                "listen": f"127.0.0.1:{port}",
                "fast_path": fast_path,
                **unbounded,
                **changes,
            }
        )
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(open_engine(settings))
            api = await stack.enter_async_context(listening(engine))
            stack.enter_context(_accepted_noted(Connection if fast_path else LoneHandler))
            # A kernel holds megabytes else, and the process never sees that its client stopped.
            api._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_HOLDS)
            side = Side("fast path" if fast_path else "aiohttp", port, engine, api)
            for campaign in self.campaigns:  # from now on it knows them
                await side.ask(self.member().buy(campaign))
            yield side

    @contextlib.asynccontextmanager
    async def both(self, **changes: Any) -> AsyncIterator[tuple[Side, Side]]:
        async with (
            self.side(fast_path=True, **changes) as fast_path,
            self.side(fast_path=False, **changes) as aiohttp,
        ):
            yield fast_path, aiohttp


@contextlib.contextmanager
def _accepted_noted(kind: Any) -> Iterator[None]:
    """Note the client's address of each connection that is accepted."""
    made = kind.connection_made

    def note(self: Any, transport: Any) -> None:
        ACCEPTED.add(transport.get_extra_info("peername"))
        made(self, transport)

    with mock.patch.object(kind, "connection_made", note):
        yield


@dataclass
class Member:
    """A card's requests, as bytes."""

    world: World
    card: str
    token: str
    key_no: int = 0

    def headers(self) -> dict[str, bytes]:
        self.key_no += 1
        return {
            "Host": b"sale",
            "Authorization": b"Bearer " + self.token.encode(),
            "Idempotency-Key": b"key-%d" % self.key_no,
            "Content-Type": b"application/json",
        }

    def buy(
        self,
        campaign: str = "open",
        body: bytes = WISH,
        *extra: bytes,
        drop: Sequence[str] = (),
        method: bytes = b"POST",
        target: bytes | None = None,
        version: bytes = b"HTTP/1.1",
        **changes: bytes,
    ) -> bytes:
        """A purchase, or a part of one.

        ``extra`` are whole header lines; ``changes`` are values of headers, ``_`` for ``-``; a
        length is added where none is given and it is not in ``drop``.
        """
        headers = self.headers()
        headers["Content-Length"] = b"%d" % len(body)
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        lines = [name.encode() + b": " + headers[name] for name in headers if name not in drop]
        if target is None:
            named = self.world.campaigns.get(campaign, campaign)
            target = f"/api/v1/campaigns/{named}/orders".encode()
        start = method + b" " + target + b" " + version
        return b"\r\n".join([start, *lines, *extra, b"", body])


@contextlib.contextmanager
def world_on(
    service: Service, loop_name: str, made: dict[str, str], revoked: str
) -> Iterator[World]:
    """A loop in a thread of its own, on which tests put their coroutines."""
    loop = LOOPS[loop_name]()
    thread = threading.Thread(target=loop.run_forever, name=f"fast-path-{loop_name}")
    thread.start()
    thresholds = gc.get_threshold()
    try:
        with mock.patch.object(server_logger, "disabled", new=True):
            yield World(service, loop_name, loop, made, revoked)
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def make_campaigns(service: Service) -> dict[str, str]:
    """Campaigns in every state, by what they are."""
    async with Client(service) as client:
        made = {
            "open": await client.campaign(tickets=1_000_000),
            "sold-out": await client.campaign(tickets=0),
            "not-open": await client.campaign(opens_at=in_s(30 * 86_400)),
            "paused": await client.campaign(),
            "closed": await client.campaign(),
            "draft": await client.campaign(draft=True),
            "halls": await client.campaign(showings=showings(1_000, 0)),
            "theirs": await client.campaign(unions=["donghuamen"]),
        }
        for each in ("paused", "closed"):
            await client.step(made[each], "pause" if each == "paused" else "close")
        return made


@contextlib.contextmanager
def bounds(**values: Any) -> Iterator[None]:
    """Change bounds in each module of the connections that has them."""
    with contextlib.ExitStack() as stack:
        for module in (client, connection, delegation, fast_path, request):
            names = {name: value for name, value in values.items() if hasattr(module, name)}
            if names:
                stack.enter_context(mock.patch.multiple(module, **names))
        yield


def shorter(**seconds: float) -> contextlib.AbstractContextManager[None]:
    """Shorten the bounds of a connection; a sweep has to begin within the block."""
    short = {"SWEEP_S": 0.02, "HEAD_WITHIN_S": 1.0, "BODY_WITHIN_S": 1.0}
    return bounds(**{**short, **seconds})
