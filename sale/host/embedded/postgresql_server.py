"""The embedded PostgreSQL: its cluster, its settings, its database, and when it is ready."""

import asyncio
import os
import pwd
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import quote

import asyncpg

from sale.db.errors import POSTGRES_ERRORS
from sale.host.embedded.binaries import EmbeddedError, Program
from sale.host.embedded.child import (
    end,
    launch_command,
    plain_environment,
    spawn,
    tail,
    uncancelled,
)
from sale.host.embedded.data_dir import DataDirectory
from sale.host.embedded.server import STOP_TIMEOUT_S, Server
from sale.store_urls import PostgresUrl

INITDB_TIMEOUT_S: Final = 120
POSTGRESQL_PORT: Final = 5432
"""Names the socket; nothing listens on a network."""

NOBODY: Final = 65_534


def postgresql_server(directory: DataDirectory, program: Program) -> Server:
    """Make the PostgreSQL of a data directory; it is not started yet."""
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

    return Server(
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
        plain_environment(),
    )
    try:
        async with asyncio.timeout(INITDB_TIMEOUT_S):
            status = await process.wait()
    finally:
        await uncancelled(end(process, signal.SIGTERM, STOP_TIMEOUT_S))
    if status != 0:
        raise EmbeddedError(f"initdb failed (exit status {status}): {tail(log_file)}")
    new.replace(home)


async def _prepare_database(directory: DataDirectory, home: Path) -> str | None:
    """Create the database ``sale`` if it is missing; None if done, else the obstacle in words."""
    if not _says_ready(home):
        return "starting up"
    try:
        url = PostgresUrl.read(database_url(directory, "postgres"))
        connection = await asyncpg.connect(**url.connection(), timeout=5)
    except POSTGRES_ERRORS as error:
        return repr(error)
    try:
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = 'sale'"):
            await connection.execute("CREATE DATABASE sale")
    except POSTGRES_ERRORS as error:
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


def database_url(directory: DataDirectory, database: str) -> str:
    """Give the URL of a database of this PostgreSQL."""
    host = quote(str(directory.sockets / "pg"))
    return f"postgresql://sale@/{database}?host={host}&port={POSTGRESQL_PORT}"
