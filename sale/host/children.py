"""One part of ``sale up``: a child process that is started again when it dies, or renewed.

A renewal starts the new process, waits until it serves, and only then ends the old one. They share
the API's address by SO_REUSEPORT, so this holds with a single API process too.
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
from sale.host.embedded.servers import end, launch_command, spawn
from sale.host.metrics_server import MergedMetrics

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STABLE_S = 30
RESTARTS_MAX = 50  # in a row, without a stable time between
COMES_UP_TIMEOUT_S = 60  # at a renewal; a part waits 30 s for its stores
POLL_S = 0.02
STDERR = 2  # stdout is for the one line that says ready

log = structlog.get_logger()


class SupervisorError(StartError):
    """The system cannot be run; the message is one line for people."""


class Life:
    """One process of a part, from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process, listen: Path) -> None:
        self.process = process
        self.listen = listen
        """Socket of its metrics: there from the moment that the part does its work."""

    async def comes_up(self) -> bool:
        """Wait until it does its work, bounded; False where it does not."""
        deadline = time.monotonic() + COMES_UP_TIMEOUT_S
        while time.monotonic() < deadline and self.process.returncode is None:
            if self.listen.exists():
                return True
            await asyncio.sleep(POLL_S)
        return False


class Child:
    """One part under the name that it has in the register; ``put`` and ``drop`` keep that.

    ``failures`` counts deaths in a row: an end with status 0 is not one, because a part ends so
    only when somebody told it to.
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
        self._life: Life | None = None
        self._lives: set[Life] = set()

    @property
    def listening(self) -> bool:
        """Whether it has come as far as serving its metrics."""
        return self._life is not None and self._life.listen.exists()

    async def prepare(self) -> None:
        """Start it already, but let it do nothing before ``keep_running``: it is imported."""
        async with self._busy:
            self._life = await self._start(held=True)

    async def keep_running(self) -> None:
        """Start it again and again until cancelled. Raises SupervisorError if it keeps dying."""
        while True:
            async with self._busy:
                if self._life is None:
                    self._life = await self._start()
                life = self._life
                _let_go(life.process)
            started = time.monotonic()
            status = await life.process.wait()
            async with self._busy:  # it may be that it was just renewed
                self._bury(life)
                if self._life is not life:
                    continue
                self._life = None
            await self._mourn(status, time.monotonic() - started)

    async def renew(self) -> bool:
        """Put a new process in its place; False, with the old one kept, where none comes up."""
        async with self._busy:
            old = self._life
            new = await self._start()
            if not await new.comes_up():
                log.error("supervisor.renewal_failed", child=self.name)
                await self._end(new)
                return False
            self._life = new
            self._put(self.name, new.process.pid)
        if old is not None:
            await self._end(old)
        return True

    async def stop(self) -> None:
        """End it gently, bounded; returns when it is gone."""
        await asyncio.gather(*(self._end(life) for life in list(self._lives)))

    async def _start(self, *, held: bool = False) -> Life:
        # A new socket each time, so that what is read from it can only be this life's.
        listen = self._sockets / f"m-{self.name}-{next(self._starts)}"
        listen.unlink(missing_ok=True)
        program = [*self._command, "--metrics-listen", f"unix:{listen}"]
        stdin = asyncio.subprocess.DEVNULL
        if held:
            program, stdin = [*program, "--held"], asyncio.subprocess.PIPE
        command = launch_command("KILL", program=program)
        process = await spawn(command, STDERR, self._environment, stdin)
        life = Life(process, listen)
        self._lives.add(life)
        if self._life is None:
            self._put(self.name, process.pid)
        self._metrics.follow(listen.name, listen)
        return life

    async def _mourn(self, status: int, lived_s: float) -> None:
        if status == 0:
            log.info("supervisor.child_ended", child=self.name)
            await asyncio.sleep(BACKOFF_FIRST_S)
            return
        self.failures = 0 if lived_s > STABLE_S else self.failures + 1
        log.error("supervisor.child_died", child=self.name, status=status, failures=self.failures)
        if self.failures > RESTARTS_MAX:
            raise SupervisorError(f"{self.name} died {self.failures} times in a row")
        await asyncio.sleep(min(BACKOFF_FIRST_S * 2**self.failures, BACKOFF_MAX_S))

    async def _end(self, life: Life) -> None:
        await end(life.process, signal.SIGTERM, self._stop_timeout_s)
        self._bury(life)

    def _bury(self, life: Life) -> None:
        """Forget a process that has ended, keeping what it counted."""
        self._lives.discard(life)
        with contextlib.suppress(OSError):
            life.listen.unlink(missing_ok=True)
        self._drop(self.name, life.process.pid)
        self._metrics.bury(life.listen.name)


def _let_go(process: asyncio.subprocess.Process) -> None:
    """Tell one that is held to begin; one that is not, or has died meanwhile, is told nothing."""
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(b"\n")
        process.stdin.close()
