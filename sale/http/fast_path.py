"""The fast path: hot routes without aiohttp, on the same port and the same connections.

Every connection of a process is ours (``connection.py``). It looks at each request where it begins.
A request of a fast route (``fast_routes.py``) whose head is plain (``request_head.py``) is answered
by the route's handler, without a task, future, request or response object. Every other request is
delegated, whole and alone, to an aiohttp handler that the connection keeps inside
(``delegation.py``), and when that has answered, the next request is looked at again: phones and
balancers mix both on one connection. What cannot be cut out for certain (chunked, ``Expect``,
``Upgrade``, HTTP/1.0, ``Connection: close``, whatever llhttp refuses) is delegated with all that
follows, for good. So a request that two parsers might see differently is never cut by one and read
by the other.

The answer does not depend on the path: ``tests/test_fast_path.py`` compares both. The reasons, and
what was rejected, are in ADR 0012.

Bounds of a connection (``bounds.py``): ``HEAD_MAX`` bytes of a head and ``HEAD_WITHIN_S`` for it to
come whole, ``BODY_MAX`` and ``BODY_WITHIN_S`` for a body, one request under way or in the waiting
line (``waiting_line.py``), ``HELD_MAX`` bytes that wait behind it, ``UNENDED_MAX`` of a head that
does not end, ``KEEPALIVE_S`` between requests, ``UNREAD_WITHIN_S`` for a client that does not read
its answers. All of them together hold about ``HELD_BY_ALL_MAX``.

A client that shuts down its sending side gets the answers to all that it sent whole; then its
connection is closed. A client that has left looks the same until it is written to. So its request
under way is answered, but a request in the waiting line, for which nothing is done yet, is refused
at once.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog

from sale.background import keep_running
from sale.http.bounds import HELD_BY_ALL_MAX, HELD_MAX
from sale.http.delegation import MakeDelegate
from sale.http.fast_routes import FastRoutes
from sale.http.overload import RETRY_MAX_S, Overload
from sale.http.request_head import HeadReader
from sale.http.waiting_line import WaitingLine

if TYPE_CHECKING:
    from sale.http.client import ClientConnection
    from sale.http.connection import Connection

SWEEP_S: Final = 1.0

log = structlog.get_logger()


class FastPath:
    """The connections of one API process, and what they share.

    ``overloaded`` gives the answer of an overloaded process, by its Retry-After in seconds and
    whether it is the connection's last.
    """

    def __init__(
        self,
        routes: FastRoutes,
        overload: Overload,
        waiting_line: WaitingLine,
        *,
        make_delegate: MakeDelegate,
        overloaded: Callable[[int, bool], bytes],
    ) -> None:
        self.routes = routes
        self.overload = overload
        self.waiting_line = waiting_line
        self.make_delegate = make_delegate
        self.loop = asyncio.get_running_loop()
        self.heads = HeadReader(routes)
        self.connections: set[Connection] = set()
        self.draining = False
        self.held = 0
        """Bytes that wait on all connections."""
        self.unread: dict[ClientConnection, None] = {}
        """Those that are not read on because all together hold too much, in their order."""
        self._reads_on = False
        self.now = self.loop.time()
        """The loop's clock, to the second: deadlines need no better."""
        self.outbox: list[tuple[Connection, bytes]] = []
        """Answers that are sent together, in the loop's next turn."""
        self.say_overloaded = overloaded
        self._word_overloaded()
        self._sweeper = self.loop.create_task(keep_running(self._sweep))

    @property
    def overfull(self) -> bool:
        """Whether all connections together hold more than they should."""
        return self.held > HELD_BY_ALL_MAX

    def hold(self, more: int) -> None:
        """Count bytes that wait on a connection, or no longer do."""
        self.held += more
        if self.unread and not self._reads_on and self.held < HELD_BY_ALL_MAX:
            self._reads_on = True
            self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        """Let some be read on; the others when it is known what these bring."""
        self._reads_on = False
        room = HELD_BY_ALL_MAX - self.held
        while self.unread and room > 0:
            next(iter(self.unread)).bound_what_is_held()
            room -= HELD_MAX
        self.hold(0)

    def send_outbox(self) -> None:
        """Send what is in the outbox."""
        outbox, self.outbox = self.outbox, []
        for connection, wire in outbox:
            try:
                connection.send(wire)
            except Exception:
                log.exception("connection.not_answered")

    def drain(self) -> None:
        """Make each answer its connection's last from now on."""
        self.send_outbox()  # what was worded before does not say that it is the last
        self.draining = True

    def is_draining(self) -> bool:
        """Whether each answer must be its connection's last."""
        return self.draining

    async def close(self) -> None:
        """Close every connection that is left. The waiting line has to be closed before."""
        self._sweeper.cancel()
        self.send_outbox()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        for connection in list(self.connections):
            connection.close()

    async def _sweep(self) -> None:
        """End connections that are past their deadline: one look a second at all of them.

        A timer a connection would be moved with every request.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.now = self.loop.time()
            self._word_overloaded()
            for connection in [each for each in self.connections if each.deadline < now]:
                try:
                    connection.expire()
                except Exception:
                    log.exception("connection.not_ended")
                    self.connections.discard(connection)

    def _word_overloaded(self) -> None:
        """Make the answers of an overloaded process anew: their date has changed."""
        self.overloaded = tuple(self.say_overloaded(s, False) for s in range(RETRY_MAX_S + 1))  # noqa: FBT003
