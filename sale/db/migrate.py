"""Bring the schema up to date: ``migrations/NNNN_name.sql``, in order, each once.

A migration that was released is immutable: its SHA-256 is recorded, and a database that ran
another text under the same name is refused. Migrators may start together (every host of a
deployment does): one holds an advisory lock and the others wait, then find nothing to do. Each
file runs in a transaction together with its record, so a crash leaves either all of it or nothing.
The transaction holds the lock and its settings too, because the session may belong to a pooler.
There is no downgrade: the next migration mends a schema.
"""

import functools
import hashlib
import re
from importlib import resources
from typing import Any, Final

import asyncpg
import msgspec
import structlog

from sale.db.locks import MIGRATIONS
from sale.db.pool import COMMAND_TIMEOUT_S, CONNECT_TIMEOUT_S, SCHEMA, connect
from sale.db.queries import load

LOCK_WAIT_S: Final = 120
MIGRATION_TIMEOUT_S: Final = 600.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class MigrationError(Exception):
    """The schema cannot be brought up to date."""


class DatabaseNewer(MigrationError):  # noqa: N818 - reads as a sentence where it is raised
    """The database ran migrations that this version does not know."""


class DatabaseOlder(MigrationError):  # noqa: N818 - reads as a sentence where it is raised
    """The database was made by version 0.1, which cannot be upgraded."""


class MigrationChanged(MigrationError):  # noqa: N818 - reads as a sentence where it is raised
    """A migration that the database ran reads differently now."""


class Migration(msgspec.Struct, frozen=True):
    """One file: ``name`` without the ending, its text and the SHA-256 of it in hex."""

    name: str
    text: str
    sha256: str


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """All migrations of this version, in order. Raises MigrationError for a badly named file.

    Read once: a running process would find the files of a newer version that is installed over it,
    and report them as missing.
    """
    folder = resources.files("sale.db").joinpath("migrations")
    files = sorted((file for file in folder.iterdir()), key=lambda file: file.name)
    found: list[Migration] = []
    for file in files:
        if not file.name.endswith(".sql"):
            continue
        if not _FILE_NAME.fullmatch(file.name):
            raise MigrationError(f"{file.name}: a migration is named NNNN_name.sql")
        text = file.read_text("utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        found.append(Migration(file.name.removesuffix(".sql"), text, digest))
    numbers = [migration.name[:4] for migration in found]
    if len(set(numbers)) != len(numbers):
        raise MigrationError("two migrations have the same number")
    return tuple(found)


async def migrate(database_url: str, known: tuple[Migration, ...] | None = None) -> list[str]:
    """Apply what is missing; return the names applied, in order.

    ``known`` are the migrations of this version; other ones are for tests.

    Raises:
        DatabaseOlder, DatabaseNewer, MigrationChanged: nothing was changed.
        MigrationError: another migrator held the lock for LOCK_WAIT_S.
        BadUrl, asyncpg.PostgresError, OSError, TimeoutError: what was applied before it stays.

    """
    known = migrations() if known is None else known
    connection = await connect(
        database_url,
        name="sale migrate",
        command_timeout=COMMAND_TIMEOUT_S,
        statement_cache_size=0,
    )
    applied: list[str] = []
    try:
        while (name := await _apply_next(connection, known)) is not None:
            log.info("schema.migrated", migration=name)
            applied.append(name)
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)
    return applied


async def pending(connection: Any) -> list[str]:  # noqa: ANN401 - a connection or a pool
    """Names of this version's migrations that the database has not run. Changes nothing.

    Raises DatabaseOlder, DatabaseNewer and MigrationChanged.
    """
    if await connection.fetchval(_SQL["find_table"]) is None:
        return [migration.name for migration in migrations()]
    recorded = {row["name"]: row["sha256"] for row in await connection.fetch(_SQL["recorded"])}
    return [migration.name for migration in _missing(migrations(), recorded)]


async def _apply_next(
    connection: Any,  # noqa: ANN401 - asyncpg has no common interface
    known: tuple[Migration, ...],
) -> str | None:
    """Apply the first migration that is missing; return its name, or None where none is."""
    async with connection.transaction():
        await _lock(connection)
        if await connection.fetchval(_SQL["find_table"]) is None:
            elsewhere = await connection.fetchval(_SQL["find_elsewhere"])
            if elsewhere is not None:
                raise MigrationError(
                    f'the tables of this engine are in schema "{elsewhere}" of the database, not '
                    f"in {SCHEMA}: rename that schema to {SCHEMA}, or use another database"
                )
            await connection.execute(_SQL["create_table"])
        recorded = {row["name"]: row["sha256"] for row in await connection.fetch(_SQL["recorded"])}
        for migration in _missing(known, recorded):
            await connection.execute(migration.text, timeout=MIGRATION_TIMEOUT_S)
            await connection.execute(_SQL["record"], migration.name, migration.sha256)
            return migration.name
    return None


async def _lock(connection: Any) -> None:  # noqa: ANN401 - asyncpg has no common interface
    await connection.execute(
        f"SET LOCAL search_path TO {SCHEMA}; SET LOCAL client_min_messages TO warning;"
        f"SET LOCAL lock_timeout TO '{LOCK_WAIT_S}s'"
    )
    try:
        await connection.execute(
            f"SELECT pg_advisory_xact_lock({MIGRATIONS})",
            timeout=LOCK_WAIT_S + CONNECT_TIMEOUT_S,
        )
    except asyncpg.LockNotAvailableError:
        raise MigrationError(
            f"another migration of this database has been running for {LOCK_WAIT_S} s: "
            "wait for it or end it, then migrate again"
        ) from None
    await connection.execute("SET LOCAL lock_timeout TO DEFAULT")


def _missing(known: tuple[Migration, ...], recorded: dict[str, str]) -> list[Migration]:
    if recorded.get("0001_ledger", "").startswith(_LEDGER_OF_0_1):
        raise DatabaseOlder(
            "version 0.1 wrote the database, and this version does not read it: use a new, empty "
            "database, or use that version"
        )
    names = {migration.name for migration in known}
    unknown = sorted(set(recorded) - names)
    if unknown:
        raise DatabaseNewer(
            f"the database is newer than this version: it ran {', '.join(unknown)}, which are not "
            "known here; use the version that made it"
        )
    for migration in known:
        if recorded.get(migration.name, migration.sha256) != migration.sha256:
            raise MigrationChanged(
                f"migration {migration.name} reads differently from the one this database ran: "
                "a released migration is never edited, write a new one"
            )
    return [migration for migration in known if migration.name not in recorded]


_LEDGER_OF_0_1: Final = "b4a640bd5f670827"
"""The beginning of the SHA-256 of 0001_ledger in version 0.1."""

_FILE_NAME: Final = re.compile(r"[0-9]{4}_[a-z0-9_]+\.sql")
_SQL: Final = load("migrate")
