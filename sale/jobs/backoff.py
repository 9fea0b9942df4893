"""Bounded waits between two attempts, which end at once when the process stops."""

import asyncio
import contextlib
from typing import Final

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 1.0


class Backoff:
    """A wait that doubles up to BACKOFF_MAX_S."""

    def __init__(self) -> None:
        self._wait_s = BACKOFF_FIRST_S

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        wait_s, self._wait_s = self._wait_s, min(self._wait_s * 2, BACKOFF_MAX_S)
        return wait_s

    def reset(self) -> None:
        """Begin with the shortest wait again, after a success."""
        self._wait_s = BACKOFF_FIRST_S


async def pause(stop: asyncio.Event, wait_s: float) -> None:
    """Wait ``wait_s``, or until ``stop`` is set.

    This does not use ``wait_for``, which in Python 3.11 swallows a cancellation that arrives
    together with the event.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await stop.wait()
