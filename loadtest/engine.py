"""A whole engine (``sale up``) as a child process, and the command line beside it.

Demo and tests meet the engine as a stranger does: by its command line and its HTTP API.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sale import config
from sale.config import Settings
from sale.host.embedded import find
from sale.host.embedded.child import launch_command

START_S: Final = 90.0
STOP_S: Final = 20.0
KILL_S: Final = 5.0
COMMAND_S: Final = 120.0
PORTS_TRIED: Final = 20
LOG_TAIL_LINES: Final = 15


class EngineError(Exception):
    """The engine, or a command of it, failed; the message is for people."""


@dataclass(frozen=True)
class Engine:
    """A running engine. ``address`` and ``metrics_address`` are ``host:port``."""

    process: asyncio.subprocess.Process
    data_dir: Path
    address: str
    metrics_address: str

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.address}"

    async def ended(self) -> None:
        """Wait until it ends by itself, which it should not. Raises EngineError then."""
        status = await self.process.wait()
        raise EngineError(f"sale up ended with {status}:\n{_tail(self.data_dir / 'logs/up.log')}")

    async def command(self, *arguments: str) -> bytes:
        """Run ``sale ARGUMENTS`` on this engine and return its stdout. Raises EngineError."""
        return await sale(*arguments, settings={"SALE_DATA_DIR": str(self.data_dir)})


async def run_program(
    *command: str,
    settings: Mapping[str, str] | None = None,
    within_s: float = COMMAND_S,
    cwd: Path | None = None,
) -> tuple[int, bytes, str]:
    """Run a program to its end: exit status, stdout, and what it said on stderr.

    Raises EngineError where it is not done in time.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=environment(**(settings or {})),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(within_s):
            out, complaint = await process.communicate()
    except TimeoutError:
        name = Path(command[0]).name
        raise EngineError(f"{name}: not done in {within_s:.0f} s") from None
    finally:
        await stop(process)
    return process.returncode or 0, out, complaint.decode("utf-8", "replace").strip()


async def sale(*arguments: str, settings: Mapping[str, str]) -> bytes:
    """Run ``sale ARGUMENTS`` with these settings and return its stdout. Raises EngineError."""
    command = (sys.executable, "-m", "sale", *arguments)
    status, out, complaint = await run_program(*command, settings=settings)
    if status:
        said = complaint or out.decode("utf-8", "replace").strip()
        raise EngineError(f"sale {' '.join(arguments)}: exit {status}: {said}")
    return out


def find_database(data_dir: Path) -> str:
    """URL of the PostgreSQL that runs in a data directory. Raises EngineError."""
    endpoints = find(data_dir)
    if endpoints is None or endpoints.database_url is None:
        raise EngineError(f"data directory {data_dir}: no embedded PostgreSQL is running there")
    return endpoints.database_url


def engine_settings(file: Path | None = None, **options: str) -> Settings:
    """The engine's settings, read as it reads them: file, environment, then the options given.

    Raises SettingsError.
    """
    given = dict(os.environ)
    if options.get("signing_key_file"):
        given.pop("SALE_SIGNING_KEY", None)  # one of the two, and an option comes first
    told = {name: value or None for name, value in options.items()}
    return config.load(file, environment=given, **told)


def environment(**settings: str) -> dict[str, str]:
    """Our environment with only these settings: one left over would point at another engine."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SALE_")}
    return clean | settings


def free_address(preferred: int) -> str:
    """``127.0.0.1:port`` with the preferred port or the next free one. Raises EngineError."""
    for port in range(preferred, preferred + PORTS_TRIED):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"
    raise EngineError(f"no free port from {preferred} to {preferred + PORTS_TRIED - 1}")


def cancelled_by_signals() -> None:
    """Have Ctrl-C and SIGTERM cancel the running task, so that its children are stopped in order.

    Also where SIGINT was ignored when we were started, as a shell does for a background job.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)


async def stop(process: asyncio.subprocess.Process, *, within_s: float = STOP_S) -> None:
    """End a child: SIGTERM, a bounded wait, then SIGKILL."""
    for number, wait_s in ((signal.SIGTERM, within_s), (signal.SIGKILL, KILL_S)):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await process.wait()


@contextlib.asynccontextmanager
async def engine_up(
    data_dir: Path,
    *,
    address: str = "127.0.0.1:0",
    metrics_address: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Engine]:
    """Run ``sale up`` on a data directory until the block ends.

    Raises:
        EngineError: it did not become ready; the message ends with what it logged last.

    """
    metrics_address = metrics_address or free_address(9108)
    logs = data_dir / "logs"
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = logs / "up.log"
    arguments = ["--data-dir", str(data_dir), "--listen", address]
    arguments += ["--metrics-listen", metrics_address]
    with log.open("wb") as stream:
        process = await asyncio.create_subprocess_exec(
            *launch_command("TERM", program=[sys.executable, "-m", "sale", "up", *arguments]),
            env=environment(**(settings or {})),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stream,
        )
    reader: asyncio.Task[None] | None = None
    try:
        ready = await _wait_ready(process, log)
        reader = asyncio.create_task(_drain(process))
        yield Engine(process, data_dir, ready, metrics_address)
    finally:
        await stop(process)
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


async def _wait_ready(process: asyncio.subprocess.Process, log: Path) -> str:
    """Read stdout up to ``ready http://H:P``; return ``H:P``."""
    if process.stdout is None:
        raise EngineError("sale up: no stdout")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_S):
            async for line in process.stdout:
                if line.startswith(b"ready http://"):
                    return line.decode().split("http://")[1].strip().rstrip("/")
            await process.wait()
    how = "is not ready" if process.returncode is None else f"ended with {process.returncode}"
    raise EngineError(f"sale up {how}; it said last:\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(lines) or "(nothing)"


async def _drain(process: asyncio.subprocess.Process) -> None:
    """Read on, so that the child never blocks on a full pipe."""
    while process.stdout is not None and await process.stdout.read(65_536):
        pass
