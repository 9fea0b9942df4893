"""The HTTP application, as a list of its parts, and the process that serves it.

A process that is to stop drains (``Api.drain``): it accepts the connections that wait at its
listener and closes the listener, sells nothing more, answers the requests under way, ends kept
connections with their next answer, and ends within the purchase deadline and a little. Other
processes share the address by SO_REUSEPORT and accept later connections. Closing kept connections
at once was rejected: a request that crosses the close sees a reset, which a client cannot tell from
a lost answer.
"""

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

import structlog
from aiohttp import web

from sale.api.admit import WAITING, Admission
from sale.api.dispatch import add_routes
from sale.api.fast_routes import make_fast_path
from sale.api.openapi import build_document
from sale.api.pages import PAGES, Pages
from sale.api.refusals import ProblemRefusals
from sale.api.request import ENGINE
from sale.api.routes import ROUTES
from sale.bootstrap import Engine
from sale.config import StartError
from sale.http.aiohttp_handler import Handler, LoneHandler
from sale.http.bounds import BODY_MAX
from sale.http.connection import Connection
from sale.http.waiting_line import WaitingLine
from sale.shared_port import claim, first_address

BACKLOG: Final = 4_096
KEPT_GRACE_S: Final = 0.5
"""Longest time that a kept connection may still bring a request, whose answer closes it."""

DRAIN_POLL_S: Final = 0.01
CANCEL_TIMEOUT_S: Final = 0.25  # aiohttp waits this long twice for a handler that is past its time
STOPPING: Final = "stopping"

log = structlog.get_logger()


def make_app(engine: Engine, waiting_line: WaitingLine) -> web.Application:
    """Put the application together. There is no middleware: see ``dispatch.py``."""
    app = web.Application(client_max_size=BODY_MAX)
    app[ENGINE] = engine
    app[WAITING] = Admission(engine.desk, waiting_line)
    app[PAGES] = Pages(build_document(ROUTES))
    add_routes(app, ROUTES)
    return app


@contextlib.asynccontextmanager
async def listening(engine: Engine, listener: socket.socket | None = None) -> AsyncIterator["Api"]:
    """Serve on ``settings.listen`` while the block runs, then drain.

    ``listener`` is bound to it already (``listen_on``). Raises StartError.
    """
    waiting_line = WaitingLine(
        engine.overload
    )  # one for both ways in, or one would overtake the other
    runner = web.AppRunner(make_app(engine, waiting_line), shutdown_timeout=CANCEL_TIMEOUT_S)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - set up just now
    api = Api(engine, runner.server, waiting_line)
    try:
        await api.listen(listener or listen_on(engine.stores.settings.listen))
        yield api
    finally:
        await api.drain()
        await api.close()
        await runner.cleanup()


class Api:
    """The listener of one process and its connections."""

    def __init__(self, engine: Engine, server: web.Server, waiting_line: WaitingLine) -> None:
        self._engine = engine
        self._waiting_line = waiting_line
        self._handlers = server
        self._refusals = ProblemRefusals(engine)
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._name: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._fast_path = (
            make_fast_path(engine, server, waiting_line)
            if engine.stores.settings.fast_path
            else None
        )
        self.draining = False

    async def listen(self, listener: socket.socket) -> None:
        """Take connections from now on. Raises StartError."""
        self._listener = listener
        self._name = claim(listener, self._engine.stores.nonce)
        spare_collector()
        self._server = await self._loop.create_server(
            self._connection, sock=self._listener, backlog=BACKLOG
        )
        log.info("api.listening", address=bound_address(listener))

    async def drain(self) -> None:
        """Stop as the module says; once, however often it is called."""
        if self.draining or self._server is None:
            return
        self.draining = True
        self._waiting_line.emptying = True
        if self._fast_path is not None:
            self._fast_path.drain()
        self._engine.batchers.halt("drain", STOPPING)
        log.info("api.stopping", connections=len(self._connections))
        waiting = self._close_listener()
        for each in waiting:
            # The client may have gone already.
            with contextlib.suppress(OSError):
                await self._loop.connect_accepted_socket(self._connection, each)
        started = time.monotonic()
        limit_s = self._engine.stores.settings.purchase_deadline_ms / 1000
        while (open_ones := self._connections) and time.monotonic() - started < limit_s:
            if time.monotonic() - started > KEPT_GRACE_S and not any(c.busy for c in open_ones):
                break
            await asyncio.sleep(DRAIN_POLL_S)

    async def close(self) -> None:
        """Call no more waiters, and close the fast path's connections.

        aiohttp's runner closes its own connections.
        """
        self._waiting_line.close()
        if self._fast_path is not None:
            await self._fast_path.close()

    def _close_listener(self) -> list[socket.socket]:
        """Accept the connections that wait at the listener, give them, and close it."""
        waiting: list[socket.socket] = []
        if self._listener is None:
            return waiting
        with contextlib.suppress(OSError):  # BlockingIOError: none is left
            while self._server is not None and len(waiting) < BACKLOG:
                waiting.append(self._listener.accept()[0])
        if self._server is not None:
            self._server.close()
        self._listener.close()
        if self._name is not None:
            self._name.close()
        return waiting

    @property
    def _connections(self) -> Sequence[Connection | Handler]:
        if self._fast_path is not None:
            return list(self._fast_path.connections)
        every = self._handlers.connections
        return [handler for handler in every if isinstance(handler, Handler)]

    def _connection(self) -> Connection | Handler:
        if self._fast_path is not None:
            return Connection(self._fast_path)
        return LoneHandler(
            self._handlers,
            refusals=self._refusals,
            draining=self._is_draining,
            overload=self._engine.overload,
        )

    def _is_draining(self) -> bool:
        return self.draining


def spare_collector() -> None:
    """Make garbage collections rare, and exclude objects that live as long as the process.

    Requests that wait for their batch are thousands of live objects, and the default thresholds
    walk them again and again. Turning the collector off was no faster. Memory stays bounded,
    because collections still come.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def bound_address(listener: socket.socket) -> str:
    """Give the address to which a socket is bound, with the real port if 0 was requested."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_on(address: str) -> socket.socket:
    """Bind with SO_REUSEPORT: the API processes of one deployment share one address.

    It looks for other holders of the address before it listens (``shared_port.py``). Raises
    StartError.
    """
    listener = None
    try:
        family, where = first_address(address)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(where)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise StartError(f"address {address}: {error.strerror or error}") from None
    return listener
