"""Stop and restart by signals, and cancel tasks until they have ended.

A signal handler only sets an event.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final

import structlog

CANCEL_AGAIN_S: Final = 0.1
"""A task that still runs this long after its cancellation is cancelled again."""

log = structlog.get_logger()


@contextlib.contextmanager
def stop_on_signal() -> Iterator[asyncio.Event]:
    """Yield an event that SIGTERM and SIGINT set while the block runs."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def restart_on_signal(stop: asyncio.Event) -> Iterator[asyncio.Event]:
    """Yield an event that SIGHUP sets while the block runs.

    The kernel sends the same signal when the terminal closes. Then ``stop`` is set instead, unless
    the process ignored SIGHUP at its start (``nohup``).
    """
    restart = asyncio.Event()
    loop = asyncio.get_running_loop()
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    had_terminal = _has_terminal()

    def hung_up() -> None:
        if not had_terminal or _has_terminal():
            restart.set()
        elif not outlives:
            stop.set()

    loop.add_signal_handler(signal.SIGHUP, hung_up)
    try:
        yield restart
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def run_until_stopped(
    work: Coroutine[Any, Any, None], stop: asyncio.Event, within_s: float
) -> None:
    """Run ``work``, which should end when ``stop`` is set; cancel it ``within_s`` after that."""
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


async def cancel_and_wait(
    tasks: Sequence[asyncio.Future[Any]], *, first: Callable[[], None] = lambda: None
) -> None:
    """Cancel tasks until all of them have ended, calling ``first`` before each attempt.

    One cancellation is not enough, because libraries lose it and the task runs on. redis-py sends
    with ``wait_for``, which in Python 3.11 swallows a cancellation that arrives as the sending
    ends. A cut-off asyncpg transaction replaces it by an InterfaceError, which the caller takes for
    an unreachable PostgreSQL. Both happen often in a process that resumes after SIGSTOP, because
    all its timers fire at once.
    """
    while running := [task for task in tasks if not task.done()]:
        first()
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)  # callers have read the errors they need


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
