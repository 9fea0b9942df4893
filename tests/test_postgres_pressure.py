"""A PostgreSQL that answers and cannot write: logged once in words; recovery is automatic."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import asyncpg
import pytest
from ledger_maker import Ledger, created, sold
from redis.asyncio import Redis
from shop import Shop, open_shop
from stock_maker import CAMPAIGN, campaign
from structlog.testing import capture_logs
from waiting import until

from sale.db import locks
from sale.db.errors import POSTGRES_ERRORS, in_words
from sale.db.pool import close_pool, connect, open_pool
from sale.host import embedded
from sale.jobs import writer
from sale.stock.keys import campaign_keys

TRIES_S = 0.5
"""Long enough for several attempts at a writer's first waits."""


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    """An open campaign; PostgreSQL has its first sale."""
    await shop.create(campaign(100))
    await shop.step("open")
    await shop.buy(1)
    await shop.applied()
    return shop


@contextlib.asynccontextmanager
async def read_only(shop: Shop) -> AsyncIterator[str]:
    async with shop.pool.acquire() as conn:
        await conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await conn.execute("SELECT pg_reload_conf()")
        try:
            yield "it is read-only: cannot execute"
        finally:
            await conn.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await conn.execute("SELECT pg_reload_conf()")


@contextlib.asynccontextmanager
async def refusing(shop: Shop, error: str) -> AsyncIterator[None]:
    """Make PostgreSQL refuse each new event with this error."""
    await shop.pool.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE 'no room' USING ERRCODE = '{error}'; END $$;"
        "CREATE TRIGGER refusing BEFORE INSERT ON event EXECUTE FUNCTION refuse()"
    )
    yield
    await shop.pool.execute("DROP TRIGGER refusing ON event; DROP FUNCTION refuse()")


@contextlib.asynccontextmanager
async def disk_full(shop: Shop) -> AsyncIterator[str]:
    async with refusing(shop, "disk_full"):
        yield "its disk is full: no room"


@contextlib.asynccontextmanager
async def file_trouble(shop: Shop) -> AsyncIterator[str]:
    async with refusing(shop, "io_error"):
        yield "it cannot read or write its files: no room"


@contextlib.asynccontextmanager
async def deadlocks(shop: Shop) -> AsyncIterator[str]:
    async with refusing(shop, "deadlock_detected"):
        yield "DeadlockDetectedError: no room"


@contextlib.asynccontextmanager
async def statement_timeout(shop: Shop) -> AsyncIterator[str]:
    name = await shop.pool.fetchval("SELECT current_database()")
    await shop.pool.execute(
        "CREATE FUNCTION sleepy() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;"
        "CREATE TRIGGER sleeping AFTER INSERT ON event EXECUTE FUNCTION sleepy();"
        f"ALTER DATABASE {name} SET statement_timeout = '100ms'"
    )
    await _end_sessions(shop)
    yield "a statement was cancelled, or took longer than it allows: canceling statement due to"
    await shop.pool.execute(
        f"DROP TRIGGER sleeping ON event; ALTER DATABASE {name} RESET statement_timeout"
    )


async def _end_sessions(shop: Shop) -> None:
    await shop.pool.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'sale-writer%' AND datname = current_database()"
    )


def told(said: list[Any], action: str) -> list[str]:
    return [entry.get("why", "") for entry in said if entry["event"] == action]


def told_once(reasons: list[str]) -> list[str]:
    """The logged reasons; none was logged twice."""
    kinds = [reason.partition(":")[0] for reason in reasons]
    assert len(set(kinds)) == len(kinds)
    return reasons


async def keeps_trying(shop: Shop, said: list[Any]) -> list[str]:
    """Wait until the writer logged that PostgreSQL is away, and no campaign; give the reasons."""

    await until(lambda: bool(told(said, "ledger.postgres_lost")))
    await asyncio.sleep(TRIES_S)
    assert told(said, "ledger.postgres_back") == []
    assert not shop.writer.stuck
    return told(said, "ledger.postgres_lost")


async def comes_back(shop: Shop, said: list[Any]) -> None:
    """Wait until all is applied without a restart, and the writer logged it."""
    await shop.applied()

    await until(lambda: bool(told(said, "ledger.postgres_back")))
    assert not told(said, "ledger.stuck")
    assert (await shop.audit()).clean


@pytest.mark.parametrize(
    "trouble", [read_only, disk_full, file_trouble, deadlocks, statement_timeout]
)
async def test_postgres_that_could_not_write_gets_all_events(
    shop: Shop, trouble: Callable[[Shop], AbstractAsyncContextManager[str]]
):
    with capture_logs() as said:
        async with trouble(shop) as reason:
            assert await shop.buy(2, 3) == [4, 5]  # members do not notice
            reasons = told_once(await keeps_trying(shop, said))
            assert any(why.startswith(reason) for why in reasons)
            assert await shop.buy(4) == [6]
            head = await shop.redis.hmget(campaign_keys(CAMPAIGN).head, "applied", "behind_since")
            assert head[0] == b"3"
            assert head[1]
        await comes_back(shop, said)


async def test_postgres_without_connections_gets_all_events(shop: Shop):
    await shop.stop_writer()
    role = f"limited_{os.getpid()}"
    name = await shop.pool.fetchval("SELECT current_database()")
    async with shop.pool.acquire() as conn:
        # As another user, because limits do not apply to superusers.
        await conn.execute(
            f"CREATE ROLE {role} LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};"
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}"
        )
        shop.database_url = shop.database_url.replace("sale@", f"{role}@", 1)
        try:
            await shop.start_writer()
            await shop.applied()
            with capture_logs() as said:
                await conn.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
                await _end_sessions(shop)
                await shop.buy(2)
                reasons = told_once(await keeps_trying(shop, said))
                words = "it takes no more connections: too many connections for"
                assert any(why.startswith(words) for why in reasons)
                await conn.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
                await comes_back(shop, said)
        finally:
            await shop.stop_writer()
            await conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_refused_first_connection_is_reported_in_words(shop: Shop):
    await shop.stop_writer()
    shop.database_url = shop.database_url.replace("sale@", f"nobody_{os.getpid()}@", 1)
    with capture_logs() as said:
        await shop.pool.execute(f"CREATE ROLE nobody_{os.getpid()} LOGIN CONNECTION LIMIT 0")
        try:
            await shop.start_writer()
            (why,) = await keeps_trying(shop, said)
            assert why.startswith("it takes no more connections: too many connections")
        finally:
            await shop.stop_writer()
            await shop.pool.execute(f"DROP ROLE nobody_{os.getpid()}")


@pytest.mark.fault
async def test_restarted_postgres_gets_all_events(shop: Shop, servers: embedded.EmbeddedServers):
    with capture_logs() as said:
        restarting = asyncio.create_task(servers.restart("postgresql"))
        for n in range(2, 22):
            await shop.buy(n)
            await asyncio.sleep(0.02)
        await restarting
        await comes_back(shop, said)
        assert told(said, "ledger.postgres_lost")


async def test_slow_commits_keep_one_writer_and_refuse_no_sale(shop: Shop):
    await shop.pool.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(1.5); RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER slowly AFTER UPDATE ON campaign DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    with capture_logs() as said:
        for n in range(2, 42):
            await shop.buy(n)
        await shop.applied()
        assert [entry for entry in said if entry["log_level"] != "info"] == []
        assert shop.writer.active
    # All that came during the first slow commit went into the second.
    commits = await shop.pool.fetchval("SELECT count(DISTINCT xmin::text) FROM event WHERE seq > 3")
    assert commits <= 3


async def test_locked_campaign_does_not_delay_the_others(
    redis: Redis, redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writer, "ROW_LOCK_TIMEOUT", "100ms")
    locked, other = Ledger("a-locked-one"), Ledger("green-gift")
    for book in (locked, other):
        await book.append(redis, created(10, campaign_id=book.campaign_id))
    async with open_shop(redis_url, database_url) as shop:
        await shop.start_writer()

        async def has(seq: int, *books: Ledger) -> bool:
            found = await shop.pool.fetch("SELECT campaign_id, applied FROM campaign")
            applied = {row["campaign_id"]: row["applied"] for row in found}
            return all(applied.get(book.campaign_id) == seq for book in books)

        await until(lambda: has(1, locked, other))
        async with shop.pool.acquire() as conn, conn.transaction():
            await conn.execute("SELECT FROM campaign WHERE campaign_id = 'a-locked-one' FOR UPDATE")
            await locked.append(redis, sold(1))
            for n in range(5):
                await other.append(redis, sold(n))
                await until(lambda n=n: has(n + 2, other), 3.0)
            assert await has(1, locked)
        await until(lambda: has(2, locked))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (asyncpg.AdminShutdownError("bye"), "it has ended the connection: bye"),
        (asyncpg.CannotConnectNowError("not yet"), "it is starting or shutting down: not yet"),
        (TimeoutError(), "no answer in time: TimeoutError"),
        (ConnectionRefusedError("nobody there"), "it cannot be reached: nobody there"),
        (asyncpg.InvalidCatalogNameError("no such"), "InvalidCatalogNameError: no such"),
    ],
)
def test_postgres_error_is_put_in_words(error: Exception, words: str):
    assert in_words(error) == words


async def test_long_host_name_does_not_cut_off_the_pid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 80)
    mine = locks.SCHEDULER.mine()
    assert len(mine) == locks.NAME_MAX_BYTES
    assert mine.endswith(f"h:{os.getpid()}")


async def test_pool_logs_nothing_while_postgres_is_away(
    database_url: str, server_database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = await open_pool(database_url)
    name = await pool.fetchval("SELECT current_database()")
    server = await connect(server_database_url, name="test")
    try:
        await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        await server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
        )
        for _ in range(3):
            with pytest.raises(POSTGRES_ERRORS):
                await pool.fetchval("SELECT 1")
            await asyncio.sleep(0.1)
        await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        assert await pool.fetchval("SELECT 1") == 1
    finally:
        await server.close()
        await close_pool(pool)
    assert [record for record in caplog.records if record.name.startswith("asyncpg")] == []
