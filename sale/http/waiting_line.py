"""The crowd before the door: purchases that were read and wait until there is time to look at them.

A refusal costs a good part of what a purchase costs, most of it in the kernel. So a process that
refuses everybody at once, as fast as they come, sells nothing any more: all its time goes into
refusals, fewer purchases leave the queue, and because they leave it slowly still more are refused.
That state feeds itself. So beyond capacity requests are only read, and stand here. They are called
in order, for ``CALL_S`` at a time so that batches are answered between, as long as there is room
for them, or as ``Admission.may_refuse`` allows to refuse; nobody stands longer than about
``STAND_S``, and that counts towards the purchase's deadline. Who stands asks nothing more: a
connection stands for one request at a time.
"""

import asyncio
import time
from collections import deque
from typing import Final, Protocol

from sale.http.overload import Admission

CALL_S: Final = 0.005
LATE_S: Final = 0.002
"""A pause that took so much longer than asked for: the process has no time to spare."""

STAND_S: Final = 4.0


class Standing(Protocol):
    """A request that waits; ``lost`` once there is nobody to answer. It may stand several times."""

    @property
    def lost(self) -> bool: ...  # noqa: D102

    def called(self, since: float) -> None:
        """Look at the request now, and answer it or queue it. Must not raise."""


class Crowd:
    """Who stands before the door of one process, in the order in which they came."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._loop = asyncio.get_running_loop()
        self._standing: deque[tuple[float, Standing]] = deque()
        self._calling: asyncio.Handle | None = None
        self._paused_at = 0.0
        self.emptying = False
        """Whether everybody is called at once: the process is to stop."""

    def __len__(self) -> int:
        return len(self._standing)

    def join(self, request: Standing, now: float) -> None:
        """Stand behind all others; ``called`` comes once."""
        self._standing.append((now, request))
        self._admission.standing = len(self._standing)
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
            if self._standing:
                soon = self._loop.call_soon
                self._calling = (
                    self._loop.call_later(CALL_S, self._call) if paused else soon(self._call)
                )

    def _call_some(self) -> bool:
        """Call whom there is time for; whether it is better to pause then."""
        standing, admission = self._standing, self._admission
        began = now = time.monotonic()
        if self._paused_at:
            admission.breathes(easily=now - self._paused_at < CALL_S + LATE_S)
            self._paused_at = 0.0
        while standing and now - began < CALL_S:
            since, request = standing[0]
            if request.lost:
                standing.popleft()
                admission.standing = len(standing)
                continue
            due = self.emptying or now - since > STAND_S
            if not (due or admission.has_room(now) or admission.may_refuse(now)):
                self._paused_at = now
                return True
            standing.popleft()
            admission.standing = len(standing)
            request.called(since)
            now = time.monotonic()
        return False
