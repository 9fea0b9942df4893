"""Fixtures: a real Redis and PostgreSQL per process of the run, a database per test."""

import asyncio
import os
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
import redis.asyncio
from service import client, service, spread  # noqa: F401 - fixtures
from shop import shop_fixture  # noqa: F401

from sale.db.migrate import migrate
from sale.db.pool import open_pool
from sale.host import embedded
from sale.host.embedded import binaries
from sale.stock.durability import make_whole

SEED = pytest.StashKey[int]()
TEMPLATE = "template_sale"
LEAK_GRACE_S = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--redis-server", metavar="BINARY", help="instead of the embedded Valkey")
    parser.addoption("--postgres", metavar="BINARY", help="instead of the embedded PostgreSQL")


def pytest_report_header(config: pytest.Config) -> list[str]:
    stores = (binaries.find_redis(None).name, binaries.find_postgresql(None).name)
    return [
        f"stores: {', '.join(stores)}",
        f"seed: SALE_TEST_SEED={config.stash[SEED]} repeats this run's random choices",
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Choose the stores and the seed; ignore all other settings of the caller."""
    redis_server, postgres = config.getoption("--redis-server"), config.getoption("--postgres")
    if redis_server is not None:
        binaries.redis_candidates = lambda: [Path(redis_server)]
    if postgres is not None:
        binaries.postgresql_candidates = lambda: [Path(postgres)]
    given = int(os.environ.get("SALE_TEST_SEED", "0"))
    shared = getattr(config, "workerinput", {}).get("seed")  # of the process that started this one
    config.stash[SEED] = shared or given or secrets.randbits(32)
    for name in list(os.environ):
        if name.startswith("SALE_"):
            del os.environ[name]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a process of xdist the seed that the report shows."""
    node.workerinput["seed"] = node.config.stash[SEED]


@pytest.hookimpl(trylast=True)  # once ``-m`` has deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that use ``service`` last, those with the most tests at the very end.

    It runs from its first test to the end of the session, and the campaigns that tests leave in it
    cost CPU time for as long: 300 of them, nearly half a core.
    """
    served = {item.path for item in items if "service" in getattr(item, "fixturenames", ())}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: counts[item.path] if item.path in served else 0)


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    return pytestconfig.stash[SEED]


@pytest.fixture
def rng(request: pytest.FixtureRequest, seed: int) -> random.Random:
    """Random choices that depend only on the seed and the test, not on the order of tests."""
    return random.Random(f"{seed} {request.node.nodeid}")


@pytest.fixture(scope="session")
async def servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[embedded.EmbeddedServers]:
    data_dir = tmp_path_factory.mktemp("servers") / "data"
    async with embedded.running(data_dir, redis=True, postgres=True) as servers:
        assert servers.endpoints.redis_url is not None
        # In a deployment the scheduler does this; no scheduler watches this Redis.
        async with redis.asyncio.from_url(servers.endpoints.redis_url) as client:
            while await make_whole(client):  # noqa: ASYNC110 - the condition is another process's
                await asyncio.sleep(0.05)
        yield servers


@pytest.fixture
async def redis_url(servers: embedded.EmbeddedServers) -> str:
    """URL of an empty Redis: each test gets no keys and no scripts of an earlier test."""
    url = servers.endpoints.redis_url
    assert url is not None
    async with redis.asyncio.from_url(url) as emptied:
        await emptied.flushall()
        await emptied.script_flush()
    return url


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator["redis.asyncio.Redis"]:
    """A client of the empty Redis."""
    async with redis.asyncio.from_url(redis_url) as connected:
        yield connected


@pytest.fixture(name="redis")
def redis_fixture(redis_client: "redis.asyncio.Redis") -> "redis.asyncio.Redis":
    return redis_client


@pytest.fixture(scope="session")
def server_database_url(servers: embedded.EmbeddedServers) -> str:
    assert servers.endpoints.database_url is not None
    return servers.endpoints.database_url


@pytest.fixture
async def fresh_database(server_database_url: str) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """``await fresh_database()``: the URL of a new empty database (or a copy of ``template``)."""
    made: list[str] = []

    async def make(template: str = "template0") -> str:
        name = f"test_{secrets.token_hex(6)}"
        await _execute(server_database_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        made.append(name)
        return _with_database(server_database_url, name)

    yield make
    for name in made:
        await _execute(server_database_url, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
async def migrated_template(server_database_url: str) -> str:
    """Name of a migrated database, the template for copies."""
    await _execute(server_database_url, f'CREATE DATABASE "{TEMPLATE}" TEMPLATE template0')
    await migrate(_with_database(server_database_url, TEMPLATE))
    return TEMPLATE


@pytest.fixture
async def database_url(
    fresh_database: Callable[..., Awaitable[str]], migrated_template: str
) -> str:
    """URL of this test's own database, migrated and empty."""
    return await fresh_database(migrated_template)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator["asyncpg.Pool"]:
    """A pool on the test's own database."""
    pool = await open_pool(database_url, max_size=8)
    yield pool
    await pool.close()


@pytest.fixture(scope="module", autouse=True)
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fail a module that leaves a task behind."""
    before = asyncio.all_tasks()
    yield
    deadline = asyncio.get_running_loop().time() + LEAK_GRACE_S
    while leaked := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if asyncio.get_running_loop().time() > deadline:
            pytest.fail(f"tasks left behind: {leaked}")
        await asyncio.sleep(0.01)


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def _with_database(url: str, name: str) -> str:
    # urlunsplit drops the empty host and PostgreSQL's URLs need its slashes.
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"/{name}"))


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for this test with a path short enough for sockets."""
    return tmp_path_factory.mktemp("d")
