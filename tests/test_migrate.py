"""Migrations run once even if many processes start together, and refuse unknown schemas."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest

from sale.db.migrate import (
    DatabaseNewer,
    Migration,
    MigrationChanged,
    MigrationError,
    migrate,
    migrations,
    pending,
)
from sale.db.queries import load
from sale.domain.card import mask_card

FreshDatabase = Callable[..., Awaitable[str]]
NAMES = [migration.name for migration in migrations()]
RELEASED = {
    "0001_ledger": "b4a640bd5f670827",
    "0002_roster": "e2ff18900d3ffe6a",
    "0003_card_change_clock": "3d53a25b5e7897cf",
    "0004_card_union_change": "a7757c3dd500ab17",
    "0005_card_feed_index": "c91ba5f43fdb7c1d",
    "0006_recovery": "6eb5acd776166c67",
    "0007_rehearsals": "f1f97cf1e84106ee",
}
"""Released migrations, and the first 16 digits of their SHA-256."""


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


def test_released_migrations_are_unchanged() -> None:
    told = {each.name: each.sha256[:16] for each in migrations() if each.name in RELEASED}
    assert told == RELEASED


async def test_upgraded_database_keeps_old_revocations(fresh_database: FreshDatabase) -> None:
    url = await fresh_database()
    await migrate(url, tuple(each for each in migrations() if each.name in RELEASED))
    connection = await asyncpg.connect(url)
    try:
        for card_no, status in CARDS_BEFORE.items():
            await connection.execute(ADD_CARD, card_no, status)
        for action, card_no in (
            ("card.revoke", "880000000001"),
            ("card.revoke", "880000000002"),
            ("card.restore", "880000000002"),
        ):
            target = f"card {mask_card(card_no)} {card_no[-1] * 16}"
            await connection.execute(ADD_AUDIT, action, target)
        await migrate(url)
        revoked = await connection.fetch("select card_no from card where revoked")
    finally:
        await connection.close()
    assert [row["card_no"] for row in revoked] == ["880000000001"]


CARDS_BEFORE = {
    "880000000001": "cancelled",
    "880000000002": "cancelled",
    "880000000003": "cancelled",
    "880000000004": "active",
}
ADD_CARD = """
    insert into card (card_no, name, union_code, phone, status) values ($1, '甲', 'x', '', $2)
"""
ADD_AUDIT = "insert into audit_log (actor, action, target) values ('cli:a', $1, $2)"


def test_migrations_are_read_once_per_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = migrations()
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "0001_of_a_newer_version.sql").write_text("SELECT 1;")
    monkeypatch.setattr("sale.db.migrate.resources.files", lambda package: tmp_path)

    assert migrations() == known
