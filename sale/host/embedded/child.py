"""Starts and ends child processes that end with their parent.

A child is started through ``launch.py``, so that it ends even if its parent is killed. The parent
is the *thread* that runs the event loop: it must live as long as the children.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Final

import structlog

from sale.host.embedded import launch

LOG_MAX_BYTES: Final = 16 * 1024 * 1024
LOG_TAIL_BYTES: Final = 1_500

log = structlog.get_logger()


def launch_command(parent_dies: str, *options: str, program: list[str]) -> list[str]:
    """Command line that runs ``program`` and ends it by SIG``parent_dies`` when this process ends.

    ``options`` are those of ``launch.py``.
    """
    launcher = [sys.executable, "-I", "-S", str(Path(launch.__file__))]
    parent = ["--parent", str(os.getpid()), "--signal", parent_dies]
    return [*launcher, *parent, *options, "--", *program]


async def spawn(
    command: list[str],
    log_file: Path | int,
    env: dict[str, str],
    stdin: int = asyncio.subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Start a child that appends to ``log_file``; a large file is renamed to ``.log.old`` first."""
    if isinstance(log_file, int):
        return await asyncio.create_subprocess_exec(
            *command, stdin=stdin, stdout=log_file, stderr=log_file, env=env
        )
    with contextlib.suppress(FileNotFoundError):
        if log_file.stat().st_size > LOG_MAX_BYTES:  # noqa: ASYNC240 - a local file, at a start
            log_file.replace(log_file.with_suffix(".log.old"))  # noqa: ASYNC240
    with log_file.open("ab") as stream:
        return await spawn(command, stream.fileno(), env)


async def end(
    process: asyncio.subprocess.Process, number: signal.Signals, timeout_s: float
) -> None:
    """Signal a child, wait ``timeout_s``, kill it if it still runs; return when it is gone."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        await asyncio.wait_for(process.wait(), timeout_s)
    except TimeoutError:
        log.warning("process.killed", pid=process.pid, after_s=timeout_s)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def plain_environment() -> dict[str, str]:
    """Environment of a server, without variables that could change its settings."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {"LC_ALL": "C", "TZ": "UTC", **kept}


def tail(file: Path) -> str:
    """Give the last lines of a log as one line."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - LOG_TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    except OSError as error:
        return str(error)
    return " | ".join(line.strip() for line in lines[-3:]) or f"see {file}"


async def uncancelled(work: Awaitable[None]) -> None:
    """Finish ``work`` although the caller is cancelled, then raise the cancellation."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.done():
                break
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
