"""Waiting for a condition, with a limit."""

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.01


async def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait until a condition holds, which may be a coroutine function; TimeoutError if not."""
    async with asyncio.timeout(within_s):
        while True:
            held = condition()
            if inspect.isawaitable(held):
                held = await held
            if held:
                return
            await asyncio.sleep(POLL_S)


async def until_equal(read: Callable[[], object], wanted: object, within_s: float = 10.0) -> None:
    """Wait until ``read`` gives the wanted value; the error has the last value."""
    last: object = None

    async def equal() -> bool:
        nonlocal last
        value = read()
        last = await value if inspect.isawaitable(value) else value
        return last == wanted

    try:
        await until(equal, within_s)
    except TimeoutError:
        raise AssertionError(f"not {wanted!r} within {within_s:g} s but {last!r}") from None


def runs(pid: int) -> bool:
    """Tell whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
