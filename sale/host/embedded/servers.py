"""Run Valkey (or Redis) and PostgreSQL as child processes, durable, on unix sockets.

Each server is started through ``launch.py``: it ends with its parent, even after ``kill -9``, and
its successor waits until it is gone. When the parent dies, the kernel sends PostgreSQL a SIGQUIT
(it stops at once and recovers at the next start) and Valkey a SIGTERM; both keep everything that
they acknowledged.

The parent is the *thread* that runs the event loop: it must live as long as the servers.
"""

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import asyncpg
import structlog

from sale import __version__
from sale.host.embedded import binaries, launch
from sale.host.embedded.binaries import EmbeddedError, Program
from sale.host.embedded.data_dir import DataDirectory, Endpoints, claimed
from sale.store_urls import PostgresUrl

START_TIMEOUT_S = 60
LOADING_TIMEOUT_S = 600  # a server first reads its append-only file or write-ahead log
INITDB_TIMEOUT_S = 120
STOP_TIMEOUT_S = 15
READY_POLL_S = 0.02
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STABLE_S = 30
RESTARTS_MAX = 50
DISK_FULL_BYTES = 8 * 1024 * 1024  # below this, a full disk is the likely cause of a server's end
LOG_MAX_BYTES = 16 * 1024 * 1024
LOG_TAIL_BYTES = 1_500
POSTGRESQL_PORT = 5432  # names the socket; nothing listens on a network
NOBODY = 65_534
_LOADING = re.compile("LOADING|starting up|recovery")

log = structlog.get_logger()


def launch_command(parent_dies: str, *options: str, program: list[str]) -> list[str]:
    """Command line that runs ``program`` and ends it by SIG``parent_dies`` when this process ends.

    ``options`` are those of ``launch.py``.
    """
    launcher = [sys.executable, "-I", "-S", str(Path(launch.__file__))]
    parent = ["--parent", str(os.getpid()), "--signal", parent_dies]
    return [*launcher, *parent, *options, "--", *program]


class EmbeddedServers:
    """The running servers of a data directory, and the directory itself."""

    def __init__(self, directory: DataDirectory) -> None:
        self._directory = directory
        self._servers: dict[str, _Server] = {}
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
        await _together(_keep_running(server) for server in self._servers.values())

    def _place(self, *, redis: bool, postgres: bool) -> None:
        """Set the endpoints of the servers that will run."""
        self.endpoints = Endpoints(
            _redis_url(self._directory) if redis else None,
            _database_url(self._directory, "sale") if postgres else None,
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
            self._servers["redis"] = _redis(directory, found)
        if postgres:
            found = await asyncio.to_thread(binaries.find_postgresql, made_by.get("postgresql"))
            self._servers["postgresql"] = _postgresql(directory, found)
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
        await _uncancelled(servers._stop())  # noqa: SLF001


class _Server:
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
        self.process = await spawn(self._command, self._log_file, env=_plain_environment())
        try:
            await self._wait_ready(self.process)
        except BaseException:
            await _uncancelled(self.stop())
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
                    f" {_tail(self._log_file)}"
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


async def _keep_running(server: _Server) -> None:
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


def _redis(directory: DataDirectory, program: Program) -> _Server:
    home = directory.path / "redis"
    settings = {
        "port": "0",
        "unixsocket": str(directory.sockets / "redis.sock"),
        "unixsocketperm": "700",
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "aof-use-rdb-preamble": "yes",
        "auto-aof-rewrite-percentage": "100",
        "auto-aof-rewrite-min-size": "64mb",
        "maxmemory": "0",
        "maxmemory-policy": "noeviction",
        "save": "",
        "set-max-intset-entries": "16384",  # revoked members: 4 bytes each instead of about 60
    }

    async def prepare() -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        directory.stamp("redis", program.name)

    arguments = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return _Server(
        name="redis",
        home=home,
        command=launch_command(
            "TERM",
            f"--lock={home}.lock",
            f"--chdir={home}",
            program=[str(program.path), *arguments],
        ),
        log_file=directory.path / "logs" / "redis.log",
        prepare=prepare,
        ready=lambda: _ping_redis(directory.sockets / "redis.sock"),
        stop_signal=signal.SIGTERM,
    )


async def _ping_redis(socket: Path) -> str | None:
    """None if Redis answers, else the obstacle in words."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                writer.write(b"PING\r\n")
                reply = await reader.readline()
            finally:
                writer.close()
                await writer.wait_closed()
    except (OSError, TimeoutError) as error:
        return repr(error)
    return None if reply.startswith(b"+PONG") else reply.decode("utf-8", "replace").strip()


def _postgresql(directory: DataDirectory, program: Program) -> _Server:
    home = directory.path / "postgresql"
    socket_dir = directory.sockets / "pg"
    lock = home.with_name("postgresql.lock")
    owner = _postgresql_owner(home)
    options = [f"--lock-tree={lock}", f"--reach={directory.path}", f"--reach={directory.sockets}"]
    if owner is not None:
        options.append(f"--run-as={owner[0]}:{owner[1]}")
    settings = {
        "listen_addresses": "",
        "port": str(POSTGRESQL_PORT),
        "unix_socket_directories": str(socket_dir),
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": "100",
        "shared_buffers": "128MB",
        # After a crash, one syncfs call instead of one fsync for each of a thousand files.
        "recovery_init_sync_method": "syncfs",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "logging_collector": "off",
    }

    async def prepare() -> None:
        socket_dir.mkdir(mode=0o700, exist_ok=True)
        lock.touch(mode=0o600)
        if owner is not None:
            _give((socket_dir, lock), owner)
        if not home.exists():
            directory.stamp("postgresql", str(program.version[0]))
            await _initdb(home, program, owner, options)

    return _Server(
        name="postgresql",
        home=home,
        command=launch_command(
            "QUIT",
            *options,
            f"--chdir={home}",
            f"--remove={home / 'postmaster.pid'}",
            f"--remove={socket_dir / f'.s.PGSQL.{POSTGRESQL_PORT}.lock'}",
            program=[
                str(program.path),
                *("-D", str(home)),
                *(word for key, value in settings.items() for word in ("-c", f"{key}={value}")),
            ],
        ),
        log_file=directory.path / "logs" / "postgresql.log",
        prepare=prepare,
        ready=lambda: _prepare_database(directory, home),
        stop_signal=signal.SIGINT,
    )


def _postgresql_owner(home: Path) -> tuple[int, int] | None:
    """User and group for PostgreSQL: as root, the data's owner or nobody; else None."""
    if os.geteuid() != 0:
        return None
    if home.exists():
        made = home.stat()
        if made.st_uid != 0:
            return made.st_uid, made.st_gid
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return NOBODY, NOBODY
    return nobody.pw_uid, nobody.pw_gid


def _give(paths: Iterable[Path], owner: tuple[int, int]) -> None:
    for path in paths:
        try:
            os.chown(path, *owner)
        except OSError as error:
            raise EmbeddedError(
                f"PostgreSQL does not run as root, and chown of {path} to user {owner[0]} fails"
                f" ({error.strerror}): run as an ordinary user"
            ) from None


async def _initdb(
    home: Path, program: Program, owner: tuple[int, int] | None, options: list[str]
) -> None:
    """Make the cluster in a temporary directory and rename that, so that an unfinished cluster is
    never used.
    """
    for leftover in home.parent.glob("postgresql.new-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    new = home.with_name(f"postgresql.new-{os.getpid()}")
    new.mkdir(mode=0o700)
    if owner is not None:
        _give((new,), owner)
    command = [
        str(program.path.with_name("initdb")),
        *("-D", str(new), "-U", "sale", "--auth-local=trust", "--auth-host=reject"),
        *("--encoding=UTF8", "--locale=C", "--no-instructions"),
    ]
    log_file = home.parent / "logs" / "initdb.log"
    process = await spawn(
        launch_command("KILL", *options, f"--chdir={new}", program=command),
        log_file,
        _plain_environment(),
    )
    try:
        async with asyncio.timeout(INITDB_TIMEOUT_S):
            status = await process.wait()
    finally:
        await _uncancelled(end(process, signal.SIGTERM, STOP_TIMEOUT_S))
    if status != 0:
        raise EmbeddedError(f"initdb failed (exit status {status}): {_tail(log_file)}")
    new.replace(home)


async def _prepare_database(directory: DataDirectory, home: Path) -> str | None:
    """Create the database ``sale`` if it is missing; None if done, else the obstacle in words."""
    if not _says_ready(home):
        return "starting up"
    try:
        url = PostgresUrl.read(_database_url(directory, "postgres"))
        connection = await asyncpg.connect(**url.connection(), timeout=5)
    except _POSTGRES_ERRORS as error:
        return repr(error)
    try:
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = 'sale'"):
            await connection.execute("CREATE DATABASE sale")
    except _POSTGRES_ERRORS as error:
        return repr(error)
    finally:
        connection.terminate()
    return None


def _says_ready(home: Path) -> bool:
    """Whether PostgreSQL's pid file says that it accepts connections.

    Before that, each attempt to connect would cost PostgreSQL a process while it recovers.
    """
    try:
        return (home / "postmaster.pid").read_text("utf-8").rstrip().endswith("ready")
    except OSError:
        return False


def _redis_url(directory: DataDirectory) -> str:
    return f"unix://{quote(str(directory.sockets / 'redis.sock'))}?db=0"


def _database_url(directory: DataDirectory, database: str) -> str:
    host = quote(str(directory.sockets / "pg"))
    return f"postgresql://sale@/{database}?host={host}&port={POSTGRESQL_PORT}"


def _plain_environment() -> dict[str, str]:
    """Environment of a server, without variables that could change its settings."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {"LC_ALL": "C", "TZ": "UTC", **kept}


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - LOG_TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    except OSError as error:
        return str(error)
    return " | ".join(line.strip() for line in lines[-3:]) or f"see {file}"


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


_POSTGRES_ERRORS: Final = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""As in ``sale.db.errors``, which the import contract does not let this package import."""


async def _uncancelled(work: Awaitable[None]) -> None:
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
