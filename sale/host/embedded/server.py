"""One embedded server: it is started, awaited, stopped, and started again if it dies."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog

from sale.host.embedded.binaries import EmbeddedError
from sale.host.embedded.child import end, plain_environment, spawn, tail, uncancelled

START_TIMEOUT_S: Final = 60
LOADING_TIMEOUT_S: Final = 600
"""A server first reads its append-only file or write-ahead log."""

STOP_TIMEOUT_S: Final = 15
READY_POLL_S: Final = 0.02
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
STABLE_S: Final = 30
RESTARTS_MAX: Final = 50
DISK_FULL_BYTES: Final = 8 * 1024 * 1024
"""With less space than this, a full disk is the likely cause of a server's end."""

_LOADING: Final = re.compile("LOADING|starting up|recovery")

log = structlog.get_logger()


class Server:
    """One server process: starts it, waits until it is ready, and stops it."""

    def __init__(
        self,
        *,
        name: str,
        home: Path,
        command: list[str],
        log_file: Path,
        prepare: Callable[[], Awaitable[None]],
        ready: Callable[[], Awaitable[str | None]],
        stop_signal: signal.Signals,
    ) -> None:
        self.name = name
        self.home = home
        self.busy = asyncio.Lock()
        self.process: asyncio.subprocess.Process | None = None
        self._command = command
        self._log_file = log_file
        self._prepare = prepare
        self._ready = ready
        self._stop_signal = stop_signal
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Its pid, or None while it does not run."""
        process = self.process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start it and wait until it answers. Raises EmbeddedError with the end of its log."""
        await self._prepare()
        self._stopping = False
        self.process = await spawn(self._command, self._log_file, env=plain_environment())
        try:
            await self._wait_ready(self.process)
        except BaseException:
            await uncancelled(self.stop())
            self._stopping = False  # so that ``died`` is true and ``watch`` tries again
            raise
        log.info("embedded.started", server=self.name, pid=self.process.pid)

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        started = time.monotonic()
        while True:
            obstacle = await self._ready()
            if obstacle is None:
                return
            if process.returncode is not None:
                raise EmbeddedError(
                    f"{self.name} does not start (exit status {process.returncode}):"
                    f" {tail(self._log_file)}"
                )
            limit_s = LOADING_TIMEOUT_S if _LOADING.search(obstacle) else START_TIMEOUT_S
            if time.monotonic() - started > limit_s:
                raise EmbeddedError(f"{self.name} does not answer after {limit_s} s: {obstacle}")
            await asyncio.sleep(READY_POLL_S)

    async def stop(self) -> None:
        """Send its stop signal, after STOP_TIMEOUT_S SIGKILL; return when it is gone."""
        self._stopping = True
        if self.process is not None:
            await end(self.process, self._stop_signal, STOP_TIMEOUT_S)

    @property
    def died(self) -> bool:
        """Whether it ended although nobody stopped it."""
        return not self._stopping and self.pid is None


async def keep_running(server: Server) -> None:
    """Start a server again whenever it dies; see ``EmbeddedServers.watch``."""
    failures = 0
    full = False
    while True:
        started = time.monotonic()
        process = server.process
        if process is not None:
            await process.wait()
        async with server.busy:  # ``restart`` may hold it
            if not server.died:
                await asyncio.sleep(READY_POLL_S)
                continue
            failures = 0 if time.monotonic() - started > STABLE_S else failures + 1
            was_full, full = full, _disk_is_full(server.home)
            if full:
                failures = 0  # never give up: the server runs again once there is space
                if not was_full:
                    log.error("embedded.disk_full", server=server.name, directory=str(server.home))
            if failures > RESTARTS_MAX:
                raise EmbeddedError(f"{server.name} died {failures} times in a row")
            if not (full and was_full):  # on a full disk, log it once, not every few seconds
                log.error("embedded.died", server=server.name, failures=failures)
            pause_s = min(BACKOFF_FIRST_S * 2**failures, BACKOFF_MAX_S)
            await asyncio.sleep(BACKOFF_MAX_S if full else pause_s)
            try:
                await server.start()
            except (EmbeddedError, OSError) as error:
                log.error(  # noqa: TRY400 - one line
                    "embedded.start_failed", server=server.name, error=str(error)
                )


def _disk_is_full(home: Path) -> bool:
    """Whether the disk is almost full. A server that died of it cannot always log that."""
    try:
        disk = os.statvfs(home)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < DISK_FULL_BYTES
