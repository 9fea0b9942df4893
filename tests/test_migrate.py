"""Migrations run once even if many processes start together, and refuse unknown schemas."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest

from sale.db.migrate import (
    DatabaseNewer,
    DatabaseOlder,
    Migration,
    MigrationChanged,
    MigrationError,
    migrate,
    migrations,
    pending,
)
from sale.db.queries import load

FreshDatabase = Callable[..., Awaitable[str]]
NAMES = [migration.name for migration in migrations()]
OF_0_1 = "b4a640bd5f670827".ljust(64, "0")
"""SHA-256 of the first migration of version 0.1, as far as it is looked at."""


def migration(name: str, text: str) -> Migration:
    return Migration(name, text, hashlib.sha256(text.encode()).hexdigest())


async def fetchval(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_twenty_migrators_run_each_migration_once(fresh_database: FreshDatabase) -> None:
    url = await fresh_database()
    applied = await asyncio.gather(*(migrate(url) for _ in range(20)))
    assert sorted(name for names in applied for name in names) == NAMES
    assert await fetchval(url, "select count(*) from schema_migration") == len(NAMES)


async def test_second_migrate_changes_nothing(database_url: str) -> None:
    assert await migrate(database_url) == []


async def test_newer_database_is_refused(database_url: str) -> None:
    future = migration("9999_future", "create table future (x int)")
    assert await migrate(database_url, (*migrations(), future)) == ["9999_future"]
    with pytest.raises(DatabaseNewer, match="9999_future"):
        await migrate(database_url)


async def test_edited_migration_is_refused_and_runs_nothing(database_url: str) -> None:
    first, *others = migrations()
    edited = migration(first.name, first.text + "-- edited")
    new = migration("9999_new", "create table never_made (x int)")
    with pytest.raises(MigrationChanged, match=first.name):
        await migrate(database_url, (edited, *others, new))
    assert await fetchval(database_url, "select to_regclass('never_made')") is None


async def test_failed_migration_is_rolled_back_and_can_be_fixed(database_url: str) -> None:
    broken = migration("9998_broken", "create table half (x int); select 1 / 0")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(database_url, (*migrations(), broken))
    assert await fetchval(database_url, "select to_regclass('half')") is None
    mended = migration("9998_broken", "create table half (x int)")
    assert await migrate(database_url, (*migrations(), mended)) == ["9998_broken"]


async def test_pending_names_what_is_missing_and_changes_nothing(
    fresh_database: FreshDatabase,
) -> None:
    url = await fresh_database()
    connection = await asyncpg.connect(url)
    try:
        assert await pending(connection) == NAMES
        assert await fetchval(url, "select to_regclass('schema_migration')") is None
        await migrate(url)
        assert await pending(connection) == []
    finally:
        await connection.close()


async def test_every_table_has_a_comment(database_url: str) -> None:
    bare = await fetchval(
        database_url,
        """
        select array_agg(c.relname::text) from pg_class c
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')
           and c.relname <> 'schema_migration' and obj_description(c.oid, 'pg_class') is null
        """,
    )
    assert bare is None


def test_migrations_are_named_and_in_order() -> None:
    assert sorted(NAMES) == NAMES
    assert len({name[:4] for name in NAMES}) == len(NAMES)


def test_missing_sql_topic_is_an_error() -> None:
    assert load("migrate")["record"].startswith("insert into schema_migration")
    with pytest.raises(FileNotFoundError):
        load("no_such_topic")


def test_migration_errors_share_a_base_class() -> None:
    assert issubclass(DatabaseNewer, MigrationError)
    assert issubclass(MigrationChanged, MigrationError)


async def test_database_of_version_0_1_is_refused(fresh_database: FreshDatabase) -> None:
    url = await fresh_database()
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(load("migrate")["create_table"])
        await connection.execute(load("migrate")["record"], "0001_ledger", OF_0_1)
        with pytest.raises(DatabaseOlder, match=r"version 0\.1.*use a new, empty database"):
            await pending(connection)
        with pytest.raises(DatabaseOlder) as refused:
            await migrate(url)
        assert len(str(refused.value).splitlines()) == 1
        assert await connection.fetchval("select to_regclass('campaign')") is None
    finally:
        await connection.close()


def test_migrations_are_read_once_per_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = migrations()
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "0001_of_a_newer_version.sql").write_text("SELECT 1;")
    monkeypatch.setattr("sale.db.migrate.resources.files", lambda package: tmp_path)

    assert migrations() == known
