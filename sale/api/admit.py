"""Admission of purchases that aiohttp serves: let in, refused, or put into the waiting line."""

import asyncio
import time
from typing import Final

from aiohttp import web

from sale.api.request import ENGINE, LastAnswer
from sale.domain.problem import Problem
from sale.http.overload import MUST_WAIT, RETRY_MIN_S, TURN
from sale.http.waiting_line import WaitingLine
from sale.members.purchase import PurchaseDesk

WAITERS_MAX: Final = 16_384
"""Purchases that aiohttp holds in the line: 7 kB each, beside 4 for its connection."""


class LineFull(LastAnswer):
    """Refused without a choice: too many wait already."""


class Admission:
    """Lets purchases in that aiohttp serves, behind those that wait already.

    There is one waiting line for both paths. When aiohttp refused each of its purchases at once,
    they overtook the line, and took the CPU of purchases that would have been sold to.
    """

    def __init__(self, desk: PurchaseDesk, waiting_line: WaitingLine) -> None:
        self.waiting_line = waiting_line
        self._desk = desk
        self._waiters = 0

    def admit(self, now: float) -> int:
        """Like the desk's: 0, a Retry-After, or ``MUST_WAIT``; then ``wait`` is to be awaited."""
        return MUST_WAIT if self.waiting_line else self._desk.admit(now)

    async def wait(self, request: web.Request, now: float) -> int:
        """Wait in the line, some seconds at most; give 0 or a Retry-After. Raises LineFull."""
        if self._waiters >= WAITERS_MAX:
            wait_s = request.app[ENGINE].overload.refuse(TURN, now)
            raise LineFull(Problem.OVERLOADED, retry_after_s=wait_s)
        waiter = _Waiter(self._desk, request)
        self._waiters += 1
        try:
            self.waiting_line.join(waiter, now)
            return await waiter.wait_s
        finally:
            self._waiters -= 1


class _Waiter:
    """A purchase in the line whose handler awaits ``wait_s``."""

    __slots__ = ("_desk", "_request", "wait_s")
    lost: Final = False  # called all the same: its handler must end

    def __init__(self, desk: PurchaseDesk, request: web.Request) -> None:
        self._desk = desk
        self._request = request
        self.wait_s: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def called(self, _: float) -> None:
        """Let it in or refuse it; a request whose client or handler has gone is refused.

        Most clients that end their sending side while they wait have left.
        """
        if self.wait_s.done():
            return
        handler = self._request.protocol
        left = handler.transport is None or getattr(handler, "client_ended", False)
        now = time.monotonic()
        self.wait_s.set_result(RETRY_MIN_S if left else self._desk.admit(now, called=True))


WAITING: Final = web.AppKey("waiting", Admission)
