"""Background tasks of a process: watches and sweeps that run until the process ends."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

RETRY_AFTER_S: Final = 1.0

log = structlog.get_logger()


async def keep_running(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``work`` until it returns; log each failure and start it again after a second.

    Nobody awaits a background task before the process ends, so without this a failure would stop
    it unnoticed.
    """
    while True:
        try:
            return await work()
        except Exception:
            log.exception("background.failed", work=getattr(work, "__qualname__", repr(work)))
        await asyncio.sleep(RETRY_AFTER_S)
