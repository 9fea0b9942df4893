"""One part of ``sale up``: a child process that the supervisor restarts when it dies.

A renewal starts the new process, waits until it serves, and only then stops the old one. Both share
the API's address through SO_REUSEPORT, so a single API process can be renewed too.
"""

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from sale.config import StartError
from sale.host.embedded.child import end, launch_command, spawn
from sale.host.metrics_server import MergedMetrics

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STABLE_S = 30
RESTARTS_MAX = 50  # in a row, without STABLE_S between them
RENEWAL_TIMEOUT_S = 60  # longer than the 30 s that a part waits for its stores
POLL_S = 0.02
STDERR = 2  # stdout carries only the line that says the system is ready

log = structlog.get_logger()


class SupervisorError(StartError):
    """The system cannot run; the message is one line for people."""


class ChildProcess:
    """One process of a part, from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process, metrics_socket: Path) -> None:
        self.process = process
        self.metrics_socket = metrics_socket
        """The process creates this socket when it begins to work."""

    async def wait_ready(self) -> bool:
        """Wait until the process works; False if it ended or RENEWAL_TIMEOUT_S passed."""
        deadline = time.monotonic() + RENEWAL_TIMEOUT_S
        while time.monotonic() < deadline and self.process.returncode is None:
            if self.metrics_socket.exists():
                return True
            await asyncio.sleep(POLL_S)
        return False


class Child:
    """One part of the system. It reports its process to the register by ``put`` and ``drop``.

    ``failures`` counts failed exits in a row. Exit status 0 is no failure: a part exits so only
    when somebody asked it to stop.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        *,
        sockets: Path,
        metrics: MergedMetrics,
        put: Callable[[str, int], None],
        drop: Callable[[str, int], None],
        stop_timeout_s: float,
    ) -> None:
        self.name = name
        self.failures = 0
        self._command = command
        self._environment = environment
        self._sockets = sockets
        self._metrics = metrics
        self._put = put
        self._drop = drop
        self._stop_timeout_s = stop_timeout_s
        self._starts = itertools.count(1)
        self._busy = asyncio.Lock()
        self._current: ChildProcess | None = None
        self._running: set[ChildProcess] = set()

    @property
    def listening(self) -> bool:
        """Whether its process already serves metrics."""
        return self._current is not None and self._current.metrics_socket.exists()

    async def prepare(self) -> None:
        """Start a process that only imports its modules, and works from ``keep_running`` on."""
        async with self._busy:
            self._current = await self._start(held=True)

    async def keep_running(self) -> None:
        """Restart the process until cancelled. Raises SupervisorError if it keeps failing."""
        while True:
            async with self._busy:
                if self._current is None:
                    self._current = await self._start()
                child = self._current
                _release(child.process)
            started = time.monotonic()
            status = await child.process.wait()
            async with self._busy:  # ``renew`` may have replaced it
                self._forget(child)
                if self._current is not child:
                    continue
                self._current = None
            await self._back_off(status, time.monotonic() - started)

    async def renew(self) -> bool:
        """Replace the process. If the new one does not become ready, keep the old: False."""
        async with self._busy:
            old = self._current
            new = await self._start()
            if not await new.wait_ready():
                log.error("supervisor.renewal_failed", child=self.name)
                await self._end(new)
                return False
            self._current = new
            self._put(self.name, new.process.pid)
        if old is not None:
            await self._end(old)
        return True

    async def stop(self) -> None:
        """Send SIGTERM, after ``stop_timeout_s`` SIGKILL; return when all processes are gone."""
        await asyncio.gather(*(self._end(child) for child in list(self._running)))

    async def _start(self, *, held: bool = False) -> ChildProcess:
        # Each process gets a socket of its own, so that no two processes' metrics can be confused.
        metrics_socket = self._sockets / f"m-{self.name}-{next(self._starts)}"
        metrics_socket.unlink(missing_ok=True)
        program = [*self._command, "--metrics-listen", f"unix:{metrics_socket}"]
        stdin = asyncio.subprocess.DEVNULL
        if held:
            program, stdin = [*program, "--held"], asyncio.subprocess.PIPE
        command = launch_command("KILL", program=program)
        process = await spawn(command, STDERR, self._environment, stdin)
        child = ChildProcess(process, metrics_socket)
        self._running.add(child)
        if self._current is None:
            self._put(self.name, process.pid)
        self._metrics.follow(metrics_socket.name, metrics_socket)
        return child

    async def _back_off(self, status: int, ran_s: float) -> None:
        if status == 0:
            log.info("supervisor.child_ended", child=self.name)
            await asyncio.sleep(BACKOFF_FIRST_S)
            return
        self.failures = 0 if ran_s > STABLE_S else self.failures + 1
        log.error("supervisor.child_died", child=self.name, status=status, failures=self.failures)
        if self.failures > RESTARTS_MAX:
            raise SupervisorError(f"{self.name} died {self.failures} times in a row")
        await asyncio.sleep(min(BACKOFF_FIRST_S * 2**self.failures, BACKOFF_MAX_S))

    async def _end(self, child: ChildProcess) -> None:
        await end(child.process, signal.SIGTERM, self._stop_timeout_s)
        self._forget(child)

    def _forget(self, child: ChildProcess) -> None:
        """Forget a process that has ended; the merged metrics keep its counters."""
        self._running.discard(child)
        with contextlib.suppress(OSError):
            child.metrics_socket.unlink(missing_ok=True)
        self._drop(self.name, child.process.pid)
        self._metrics.retire(child.metrics_socket.name)


def _release(process: asyncio.subprocess.Process) -> None:
    """Let a process that was started with ``--held`` begin; do nothing for any other."""
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(b"\n")
        process.stdin.close()
