"""URLs are parsed strictly, no message holds a password, and the environment is ignored."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from faults.proxy import Proxy
from test_leadership import socket_of

from sale import config
from sale.config import Settings, SettingsError
from sale.db.migrate import MigrationError, migrate
from sale.db.pool import close_pool, connect, open_pool
from sale.stock.connection import open_redis
from sale.store_urls import PostgresUrl, RedisUrl

SECRET = "hunter2"
MISLEADING = {
    "PGHOST": "/nowhere",
    "PGPORT": "1",
    "PGUSER": "nobody-we-know",
    "PGPASSWORD": "wrong",
    "PGDATABASE": "nowhere",
    "PGPASSFILE": "/nowhere/pass",
    "PGSERVICE": "elsewhere",
    "PGSERVICEFILE": "/nowhere/service",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nowhere/root.crt",
    "PGSSLCERT": "/nowhere/ours.crt",
    "PGSSLKEY": "/nowhere/ours.key",
    "PGSSLMINPROTOCOLVERSION": "TLSv9",
    "PGSSLNEGOTIATION": "direct",
    "PGTARGETSESSIONATTRS": "standby",
    "PGOPTIONS": "-c search_path=elsewhere",
    "PGKRBSRVNAME": "x",
    "PGGSSLIB": "none",
    "REDIS_URL": "redis://nowhere:1",
    "REDIS_HOST": "nowhere",
    "LOGNAME": "nobody-we-know",
    "HOME": "/nowhere",
}


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("SALE_REDIS_URL", f"redis://:{SECRET}/x@cache:6379/0"),
        ("SALE_REDIS_URL", f"redis://:{SECRET}#x@cache:6379/0"),
        ("SALE_REDIS_URL", f"redis://:x?{SECRET}=1@cache:6379/0"),
        ("SALE_REDIS_URL", f"redis://:x?{SECRET}@cache:6379/0"),
        ("SALE_REDIS_URL", f"redis://:[{SECRET}@cache:6379/0"),
        ("SALE_REDIS_URL", f"redis://:x@{SECRET}:6379x/0"),
        ("SALE_REDIS_URL", f"redis://:\u2100{SECRET}@cache:6379/0"),
        ("SALE_REDIS_URL", f"redis://:x y{SECRET}@cache:6379/0"),
        ("SALE_REDIS_URL", f"redis:/{SECRET}@cache"),
        ("SALE_REDIS_URL", f"unix://{SECRET}/run/redis.sock"),
        ("SALE_REDIS_URL", "redis://cache:99999/0"),
        ("SALE_REDIS_URL", "redis://cache,other:6379/0"),
        ("SALE_REDIS_URL", "redis:///0"),
        ("SALE_REDIS_URL", "redis://cache/zero"),
        ("SALE_REDIS_URL", "redis://cache/0x1"),
        ("SALE_REDIS_URL", "redis://cache/-1"),
        ("SALE_REDIS_URL", "redis://cache/1/2"),
        ("SALE_REDIS_URL", "redis://cache/\u0661"),
        ("SALE_REDIS_URL", "redis://cache?db=one"),
        ("SALE_REDIS_URL", "redis://cache/1?db=2"),
        ("SALE_REDIS_URL", "redis://cache?socket_timeout=0.001"),
        ("SALE_REDIS_URL", "unix:///run/redis.sock?db=one"),
        ("SALE_DATABASE_URL", f"postgresql://sale:{SECRET}/x@books:5432/sale"),
        ("SALE_DATABASE_URL", f"postgresql://sale:{SECRET}#x@books/sale"),
        ("SALE_DATABASE_URL", f"postgresql://sale:x?{SECRET}@books/sale"),
        ("SALE_DATABASE_URL", f"postgresql://sale:x?a={SECRET}@books/sale"),
        ("SALE_DATABASE_URL", f"postgresql://sale:[{SECRET}@books/sale"),
        ("SALE_DATABASE_URL", f"postgresql://sale:{SECRET}@books:port/sale"),
        ("SALE_DATABASE_URL", f"mysql://sale:{SECRET}@books/sale"),
        ("SALE_DATABASE_URL", f"postgresql://sale@books/sale?password={SECRET}&password=x"),
        ("SALE_DATABASE_URL", "postgresql:///sale"),
        ("SALE_DATABASE_URL", "postgresql://sale@books/sale?service=x"),
        ("SALE_DATABASE_URL", "postgresql://sale@books/sale?passfile=/x"),
        ("SALE_DATABASE_URL", "postgresql://sale@books/sale?search_path=x"),
        ("SALE_DATABASE_URL", "postgresql://sale@books/sale?sslmode=maybe"),
        ("SALE_DATABASE_URL", "postgresql://sale@books/sale?sslmode=verify-full"),
        ("SALE_DATABASE_URL", "postgresql://sale@a,b,c/sale?port=1,2"),
        ("SALE_SIGNING_KEY", SECRET),
    ],
)
def test_bad_url_error_names_the_setting_and_no_password(
    variable: str, url: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=f"^bad settings: {variable}: ") as told:
        config.load(environment={variable: url})
    assert SECRET not in str(told.value)
    file = tmp_path / "sale.toml"
    key = config.ENVIRONMENT[variable]
    file.write_text(f'{key} = """{url}"""\n', "utf-8")
    with pytest.raises(SettingsError, match=f"{key} in {file}: ") as told:
        config.load(file, environment={})
    assert SECRET not in str(told.value)
    file.write_text(f'{key} = ["{SECRET}"]\n', "utf-8")
    with pytest.raises(SettingsError, match=f"{key} in {file}: ") as told:
        config.load(file, environment={})
    assert SECRET not in str(told.value)


def test_redis_url_is_read_as_documented() -> None:
    assert RedisUrl.read("redis://:p%2F%40@cache:6380/3").connection() == {
        "host": "cache", "port": 6_380, "db": 3, "username": None, "password": "p/@",
    }  # fmt: skip
    assert RedisUrl.read("redis://sale:a@b@[::1]").connection() == {
        "host": "::1", "port": 6_379, "db": 0, "username": "sale", "password": "a@b",
    }  # fmt: skip
    assert RedisUrl.read("unix://:pw@/run/a%20b.sock?db=2").connection() == {
        "path": "/run/a b.sock", "db": 2, "username": None, "password": "pw",
    }  # fmt: skip
    secure = RedisUrl.read("rediss://cache/0?ssl_ca_certs=/ca.pem&ssl_check_hostname=false")
    assert secure.tls
    assert secure.connection()["ssl_check_hostname"] is False


def test_postgres_url_is_read_as_documented() -> None:
    url = PostgresUrl.read("postgresql://sale:p%2Fw@a:1,[::1]/books?port=2&sslmode=disable")
    assert (url.hosts, url.ports) == (("a", "::1"), (1, 2))
    assert (url.user, url.password, url.database) == ("sale", "p/w", "books")
    assert url.place == "a:1, ::1:2"
    assert url.connection()["ssl"] is False
    url = PostgresUrl.read("postgresql://%2Frun%2Fpg:5433/sale?user=me&password=pw")
    assert (url.hosts, url.ports, url.user, url.password) == (("/run/pg",), (5_433,), "me", "pw")
    assert PostgresUrl.read("postgresql://books").database == url.read("postgresql://books").user


async def test_driver_environment_is_ignored(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / ".postgresql"
    home.mkdir()
    for name in ("root.crt", "postgresql.crt", "postgresql.key"):
        (home / name).write_text("no certificate")
    by_socket = database_url
    async with Proxy("127.0.0.1:0", f"unix:{socket_of(database_url)}") as proxy:
        by_tcp = f"postgresql://sale@{proxy.listen}{urlsplit(database_url).path}"
        for name, value in {**MISLEADING, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        for url in (by_socket, by_tcp):
            pool = await open_pool(url)
            try:
                assert await pool.fetchval("SELECT current_user") == "sale"
            finally:
                await close_pool(pool)
        assert await migrate(by_tcp) == []
    redis = open_redis(redis_url)
    try:
        assert await redis.ping()
    finally:
        await redis.aclose()


async def test_search_path_makes_no_second_tables(
    fresh_database: Callable[..., Awaitable[str]],
) -> None:
    url = await fresh_database()
    assert await migrate(url)
    name = urlsplit(url).path.removeprefix("/")
    admin = await asyncpg.connect(url)
    try:
        await admin.execute(
            f'CREATE SCHEMA other; ALTER DATABASE "{name}" SET search_path TO other'
        )
        assert await migrate(url) == []
        tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'other'"
        assert await admin.fetchval(tables) == 0
        pool = await open_pool(url, max_size=1)
        try:
            for _ in range(2):  # after connecting, and after its reset in the pool
                assert await pool.fetchval("SELECT count(*) FROM card") == 0
        finally:
            await close_pool(pool)
        single = await connect(url, name="a test")
        assert await single.fetchval("SELECT count(*) FROM campaign") == 0
        await single.close()
    finally:
        await admin.close()


async def test_tables_in_another_schema_are_refused(
    fresh_database: Callable[..., Awaitable[str]],
) -> None:
    url = await fresh_database()
    await migrate(url)
    admin = await asyncpg.connect(url)
    try:
        await admin.execute("ALTER SCHEMA public RENAME TO theirs; CREATE SCHEMA public")
        with pytest.raises(MigrationError, match='in schema "theirs" of the database'):
            await migrate(url)
        left: Any = await admin.fetch("SELECT FROM pg_tables WHERE schemaname = 'public'")
        assert not left
    finally:
        await admin.close()


def test_child_settings_keep_their_urls() -> None:
    settings = Settings(redis_url="redis://:p%2F@cache/0", database_url="postgresql://u@books/sale")
    again = config.load(environment=config.as_environment(settings))
    assert (again.redis_url, again.database_url) == (settings.redis_url, settings.database_url)
    assert os.environ.get("SALE_REDIS_URL") is None
