"""Waiting between two tries: bounded, and over at once when the process is told to stop."""

import asyncio
import contextlib
from typing import Final

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 1.0


class Backoff:
    """A wait that doubles, up to a second."""

    def __init__(self) -> None:
        self._wait_s = BACKOFF_FIRST_S

    def next(self) -> float:
        """Seconds to wait before the next try."""
        wait_s, self._wait_s = self._wait_s, min(self._wait_s * 2, BACKOFF_MAX_S)
        return wait_s

    def reset(self) -> None:
        """It worked: the next wait is short again."""
        self._wait_s = BACKOFF_FIRST_S


async def pause(stop: asyncio.Event, wait_s: float) -> None:
    """Wait ``wait_s``, or until ``stop`` is set.

    Not by ``wait_for``: in Python 3.11 it swallows a cancellation that meets the event.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await stop.wait()
