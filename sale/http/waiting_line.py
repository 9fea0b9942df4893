"""The crowd before the door: purchases that were read and wait until there is time to look at them.

A refusal costs a good part of what a purchase costs, most of it in the kernel. So a process that
refuses everybody at once, as fast as they come, sells nothing any more: all its time goes into
refusals, fewer purchases leave the queue, and because they leave it slowly still more are refused.
That state feeds itself. So beyond capacity requests are only read, and stand here. They are called
in order, for ``CALL_S`` at a time so that batches are answered between, as long as there is room
for them, or as ``Overload.may_refuse`` allows to refuse; nobody stands longer than about
``WAIT_S``, and that counts towards the purchase's deadline. Who stands asks nothing more: a
connection stands for one request at a time.
"""

import asyncio
import time
from collections import deque
from typing import Final, Protocol

from sale.http.overload import Overload

CALL_S: Final = 0.005
LATE_S: Final = 0.002
"""A pause that took so much longer than asked for: the process has no time to spare."""

WAIT_S: Final = 4.0


class Waiter(Protocol):
    """A request that waits; ``lost`` once there is nobody to answer. It may stand several times."""

    @property
    def lost(self) -> bool: ...  # noqa: D102

    def called(self, since: float) -> None:
        """Look at the request now, and answer it or queue it. Must not raise."""


class WaitingLine:
    """Who stands before the door of one process, in the order in which they came."""

    def __init__(self, overload: Overload) -> None:
        self._overload = overload
        self._loop = asyncio.get_running_loop()
        self._waiters: deque[tuple[float, Waiter]] = deque()
        self._calling: asyncio.Handle | None = None
        self._paused_at = 0.0
        self.emptying = False
        """Whether everybody is called at once: the process is to stop."""

    def __len__(self) -> int:
        return len(self._waiters)

    def join(self, request: Waiter, now: float) -> None:
        """Stand behind all others; ``called`` comes once."""
        self._waiters.append((now, request))
        self._overload.waiters = len(self._waiters)
        if self._calling is None:
            self._calling = self._loop.call_soon(self._call)

    def close(self) -> None:
        """Call nobody any more."""
        if self._calling is not None:
            self._calling.cancel()

    def _call(self) -> None:
        paused = False
        try:
            paused = self._call_some()
        finally:  # a fault of one must not leave all others standing for ever
            self._calling = None
            if self._waiters:
                soon = self._loop.call_soon
                self._calling = (
                    self._loop.call_later(CALL_S, self._call) if paused else soon(self._call)
                )

    def _call_some(self) -> bool:
        """Call whom there is time for; whether it is better to pause then."""
        waiters, overload = self._waiters, self._overload
        began = now = time.monotonic()
        if self._paused_at:
            overload.breathes(easily=now - self._paused_at < CALL_S + LATE_S)
            self._paused_at = 0.0
        while waiters and now - began < CALL_S:
            since, request = waiters[0]
            if request.lost:
                waiters.popleft()
                overload.waiters = len(waiters)
                continue
            due = self.emptying or now - since > WAIT_S
            if not (due or overload.has_room(now) or overload.may_refuse(now)):
                self._paused_at = now
                return True
            waiters.popleft()
            overload.waiters = len(waiters)
            request.called(since)
            now = time.monotonic()
        return False
