"""Work beside what a process is for: watches and sweeps that go on for as long as it runs."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

AGAIN_S: Final = 1.0

log = structlog.get_logger()


async def kept_up(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do ``work`` again, a second later, each time that it fails; end once it returns.

    Nobody awaits such work before the end of the process. A fault that ended it would be noticed by
    nothing but what it no longer does.
    """
    while True:
        try:
            return await work()
        except Exception:
            log.exception("background.failed", work=getattr(work, "__qualname__", repr(work)))
        await asyncio.sleep(AGAIN_S)
