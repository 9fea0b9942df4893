"""The waiting line: purchases that were read and wait until the process has time to examine them.

A refusal costs a large part of what a purchase costs, mostly in the kernel. A process that refuses
all requests as fast as they come spends all its time on refusals; fewer purchases leave the queue,
and because they leave it slowly, still more are refused. Such a process sells nothing any more. So
requests beyond capacity are only read, and wait here. They are called in order, for ``CALL_S`` at a
time so that batches are answered in between, while there is room for them or while
``Overload.may_refuse`` allows a refusal. No request waits longer than about ``WAIT_S``, and this
time counts towards the purchase's deadline. A waiting connection sends no further request: it has
one place in the line.
"""

import asyncio
import time
from collections import deque
from typing import Final, Protocol

from sale.http.overload import Overload

CALL_S: Final = 0.005
LATE_S: Final = 0.002
"""If a pause takes this much longer than requested, the process has no time left."""

WAIT_S: Final = 4.0


class Waiter(Protocol):
    """A waiting request; ``lost`` once its client has gone. It may join the line several times."""

    @property
    def lost(self) -> bool: ...  # noqa: D102

    def called(self, since: float) -> None:
        """Examine the request now, and answer it or queue it. Must not raise."""


class WaitingLine:
    """The waiting requests of one process, in the order of their arrival."""

    def __init__(self, overload: Overload) -> None:
        self._overload = overload
        self._loop = asyncio.get_running_loop()
        self._waiters: deque[tuple[float, Waiter]] = deque()
        self._calling: asyncio.Handle | None = None
        self._paused_at = 0.0
        self.emptying = False
        """Whether all waiters are called at once, because the process stops."""

    def __len__(self) -> int:
        return len(self._waiters)

    def join(self, request: Waiter, now: float) -> None:
        """Join the end of the line; ``called`` is called once."""
        self._waiters.append((now, request))
        self._overload.waiters = len(self._waiters)
        if self._calling is None:
            self._calling = self._loop.call_soon(self._call)

    def close(self) -> None:
        """Call no more waiters."""
        if self._calling is not None:
            self._calling.cancel()

    def _call(self) -> None:
        paused = False
        try:
            paused = self._call_some()
        finally:  # an exception of one waiter must not leave all others waiting for ever
            self._calling = None
            if self._waiters:
                soon = self._loop.call_soon
                self._calling = (
                    self._loop.call_later(CALL_S, self._call) if paused else soon(self._call)
                )

    def _call_some(self) -> bool:
        """Call waiters for CALL_S; return True to pause first because none can be called now."""
        waiters, overload = self._waiters, self._overload
        began = now = time.monotonic()
        if self._paused_at:
            overload.adapt_refusals(time_left=now - self._paused_at < CALL_S + LATE_S)
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
