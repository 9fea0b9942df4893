"""Run Valkey (or Redis) and PostgreSQL as child processes, durable, on unix sockets.

Each server is started through ``launch.py``: it ends with its parent, even after ``kill -9``, and
its successor waits until it is gone. When the parent dies, the kernel sends PostgreSQL a SIGQUIT
(it stops at once and recovers at the next start) and Valkey a SIGTERM; both keep everything that
they acknowledged.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from sale import __version__
from sale.host.embedded import binaries
from sale.host.embedded.binaries import EmbeddedError
from sale.host.embedded.child import uncancelled
from sale.host.embedded.data_dir import DataDirectory, Endpoints, claimed
from sale.host.embedded.postgresql_server import database_url, postgresql_server
from sale.host.embedded.redis_server import redis_server, redis_url
from sale.host.embedded.server import Server, keep_running


class EmbeddedServers:
    """The running servers of a data directory, and the directory itself."""

    def __init__(self, directory: DataDirectory) -> None:
        self._directory = directory
        self._servers: dict[str, Server] = {}
        self.endpoints = Endpoints(None, None)

    @property
    def sockets(self) -> Path:
        """A private directory for sockets; a socket's name in it may have at most 24 bytes."""
        return self._directory.sockets

    @property
    def pids(self) -> dict[str, int]:
        """Pids of the running servers, by ``redis`` and ``postgresql``."""
        return {name: pid for name, server in self._servers.items() if (pid := server.pid)}

    async def restart(self, name: str) -> None:
        """Stop ``redis`` or ``postgresql`` if it runs, and start it. Raises EmbeddedError."""
        server = self._servers[name]
        async with server.busy:
            await server.stop()
            await server.start()

    async def watch(self) -> None:
        """Restart servers that die, until cancelled.

        Raises EmbeddedError when a server has died more than RESTARTS_MAX times without STABLE_S
        between. A server whose disk is full is restarted without this limit: it runs again as soon
        as there is space.
        """
        await _together(keep_running(server) for server in self._servers.values())

    def _place(self, *, redis: bool, postgres: bool) -> None:
        """Set the endpoints of the servers that will run."""
        self.endpoints = Endpoints(
            redis_url(self._directory) if redis else None,
            database_url(self._directory, "sale") if postgres else None,
        )

    async def _start(self, *, redis: bool, postgres: bool) -> None:
        directory = self._directory
        made_by = directory.made_by()
        engine = made_by.get("engine", __version__)
        if engine.startswith("0.1."):
            raise EmbeddedError(
                f"version {engine} wrote the data directory {directory.path}, and this version "
                "does not read it: choose another directory (--data-dir), or use that version"
            )
        if redis:
            found = await asyncio.to_thread(binaries.find_redis, made_by.get("redis"))
            self._servers["redis"] = redis_server(directory, found)
        if postgres:
            found = await asyncio.to_thread(binaries.find_postgresql, made_by.get("postgresql"))
            self._servers["postgresql"] = postgresql_server(directory, found)
        directory.stamp("engine", __version__)
        await _together(server.start() for server in self._servers.values())
        directory.announce(self.endpoints)

    async def _stop(self) -> None:
        self._directory.withdraw()
        await asyncio.gather(*(server.stop() for server in self._servers.values()))


@contextlib.asynccontextmanager
async def running(
    data_dir: Path,
    *,
    redis: bool,
    postgres: bool,
) -> AsyncIterator[EmbeddedServers]:
    """Run the given servers (possibly none) on ``data_dir`` and stop them after the block.

    A server that dies is restarted only while ``watch`` runs.

    Raises:
        EmbeddedError: the directory or a server cannot be used; one line says why.

    """
    with claimed(data_dir) as directory:
        async with running_in(directory, redis=redis, postgres=postgres) as servers:
            yield servers


@contextlib.asynccontextmanager
async def running_in(
    directory: DataDirectory,
    *,
    redis: bool,
    postgres: bool,
    meanwhile: Callable[[EmbeddedServers], Coroutine[Any, Any, None]] | None = None,
) -> AsyncIterator[EmbeddedServers]:
    """Do the same in a directory that this process has locked already.

    ``meanwhile`` runs while the servers start; their endpoints are set before.
    """
    servers = EmbeddedServers(directory)
    servers._place(redis=redis, postgres=postgres)  # noqa: SLF001 - its factory
    works = [servers._start(redis=redis, postgres=postgres)]  # noqa: SLF001
    if meanwhile is not None:
        works.append(meanwhile(servers))
    try:
        await _together(works)
        yield servers
    finally:
        await uncancelled(servers._stop())  # noqa: SLF001


async def _together(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Run all at once; if one fails, cancel the others and raise its error as EmbeddedError."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except ExceptionGroup as failures:
        known, _ = failures.split((EmbeddedError, OSError))
        if known is None:
            raise
        first: BaseException = known
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise EmbeddedError(str(first)) from None
