"""The way in for purchases that aiohttp serves: let in, refused, or among those who stand."""

import asyncio
import time
from typing import Final

from aiohttp import web

from sale.api.request import ENGINE
from sale.domain.problem import Problem, Refused
from sale.http.overload import MUST_WAIT, RETRY_MIN_S, TURN
from sale.http.waiting_line import WaitingLine
from sale.members.purchase import PurchaseDesk

WAITERS_MAX: Final = 16_384
"""Purchases that aiohttp holds in the crowd: 7 kB each, beside 4 for its connection."""


class LineFull(Refused):
    """Refused without a choice: too many stand already. Its connection is closed behind it."""


class Admission:
    """Lets purchases in that aiohttp serves, behind whoever stands in the crowd.

    They stand in that of the fast path, in one order: refusing each at once, they overtook it, and
    took the CPU of those who would have been sold to.
    """

    def __init__(self, desk: PurchaseDesk, waiting_line: WaitingLine) -> None:
        self.waiting_line = waiting_line
        self._desk = desk
        self._waiters = 0

    def admit(self, now: float) -> int:
        """Like the desk's: 0, a Retry-After, or ``MUST_WAIT``; then ``stand`` is to be awaited."""
        return MUST_WAIT if self.waiting_line else self._desk.admit(now)

    async def wait(self, request: web.Request, now: float) -> int:
        """Wait among the crowd, some seconds at most; give 0 or a Retry-After. Raises LineFull."""
        if self._waiters >= WAITERS_MAX:
            wait_s = request.app[ENGINE].overload.refuse(TURN, now)
            raise LineFull(Problem.OVERLOADED, retry_after_s=wait_s)
        waiters = _Waiter(self._desk, request)
        self._waiters += 1
        try:
            self.waiting_line.join(waiters, now)
            return await waiters.wait_s
        finally:
            self._waiters -= 1


class _Waiter:
    """A purchase in the crowd whose handler awaits ``wait_s``."""

    __slots__ = ("_desk", "_request", "wait_s")
    lost: Final = False  # called all the same: its handler must end

    def __init__(self, desk: PurchaseDesk, request: web.Request) -> None:
        self._desk = desk
        self._request = request
        self.wait_s: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def called(self, _: float) -> None:
        """Be let in or refused; nothing is asked for whose client or handler has gone.

        Most who send no more while they stand have left, and would be sold to.
        """
        if self.wait_s.done():
            return
        handler = self._request.protocol
        left = handler.transport is None or getattr(handler, "client_ended", False)
        now = time.monotonic()
        self.wait_s.set_result(RETRY_MIN_S if left else self._desk.admit(now, called=True))
