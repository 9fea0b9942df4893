"""A timer for an event loop that is exact to some ten microseconds.

asyncio's own timers are rounded to milliseconds (by epoll, and by libuv), which is as long as an
answer takes; a kernel timer's file wakes the event loop at the time itself. Linux only. Python 3.13
has ``os.timerfd_create``, 3.11 has not, so the C library is called.
"""

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Callable


class Pacer:
    """Calls ``on_tick`` once at the time last set with `at`, as ``time.monotonic()`` counts."""

    class _Moment(ctypes.Structure):
        _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))

    class _Timer(ctypes.Structure):
        pass

    _Timer._fields_ = (("interval", _Moment), ("value", _Moment))

    def __init__(self, on_tick: Callable[[], None]) -> None:
        self._on_tick = on_tick
        self._library = ctypes.CDLL(None, use_errno=True)
        self._timer = self._Timer()
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self._fd: int = self._library.timerfd_create(time.CLOCK_MONOTONIC, flags)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._fired)

    def at(self, moment: float) -> None:
        """Tick at a time; one that has passed ticks at once. The time set before is dropped."""
        value = self._timer.value
        value.s = int(moment)
        value.ns = max(int((moment - value.s) * 1e9), 1)
        absolute = 1
        if self._library.timerfd_settime(self._fd, absolute, ctypes.byref(self._timer), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def close(self) -> None:
        """Stop ticking."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _fired(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
            self._on_tick()
