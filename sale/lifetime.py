"""When a process is told to end, or to renew itself: a signal sets an event, and nothing else.

And how work ends that has to, whether it was told or has lost what it works for.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final

import structlog

CANCEL_AGAIN_S: Final = 0.1
"""What goes on this long after it was cancelled is cancelled anew."""

log = structlog.get_logger()


@contextlib.contextmanager
def told_to_stop() -> Iterator[asyncio.Event]:
    """Give an event that SIGTERM and SIGINT set, while the block runs."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    try:
        yield told
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def told_to_restart(stop: asyncio.Event) -> Iterator[asyncio.Event]:
    """Give an event that SIGHUP sets, while the block runs.

    A terminal that goes away sends the same signal and means the end: then ``stop`` is set, unless
    the process was started to outlive its terminal (``nohup``).
    """
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    had_terminal = _has_terminal()

    def hung_up() -> None:
        if not had_terminal or _has_terminal():
            told.set()
        elif not outlives:
            stop.set()

    loop.add_signal_handler(signal.SIGHUP, hung_up)
    try:
        yield told
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def ends_in_time(
    work: Coroutine[Any, Any, None], stop: asyncio.Event, within_s: float
) -> None:
    """Do ``work``, which heeds ``stop``; what has not ended ``within_s`` after it is cancelled."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=within_s)
        if not task.done():
            log.warning("process.cut_short", after_s=within_s)
    finally:
        waiting.cancel()
        task.cancel()
        await asyncio.wait({task, waiting})
    if not task.cancelled():
        task.result()


async def ended(
    tasks: Sequence[asyncio.Future[Any]], *, first: Callable[[], None] = lambda: None
) -> None:
    """Cancel tasks until all of them have ended, calling ``first`` before each try.

    Once is not enough, as libraries lose cancellations and the work goes on for ever. redis-py
    sends by ``wait_for``, which in Python 3.11 swallows one that meets the end of the sending; and
    asyncpg's transaction, cut off, puts an InterfaceError in its place, which reads as PostgreSQL's
    being away. A process that wakes from a stop does all at once, and so meets them often.
    """
    while going_on := [task for task in tasks if not task.done()]:
        first()
        for task in going_on:
            task.cancel()
        await asyncio.wait(going_on, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)  # whatever they raised is no news


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
