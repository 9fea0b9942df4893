"""A whole campaign in one process: both stores, the writer and the scheduler."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from stock_maker import Bid, Stock, campaign, key, member

from sale.bootstrap import Stores
from sale.config import Settings
from sale.db import deployment
from sale.db.pool import open_pool
from sale.domain.campaign import Campaign
from sale.jobs.scheduler import Scheduler
from sale.jobs.writer import LedgerWriter
from sale.operators.campaigns import Actor, CampaignDesk
from sale.operators.steps import STEPS
from sale.stock.catalogue import CampaignNow
from sale.stock.connection import open_redis
from sale.stock.scripts import Scripts
from sale.trust.audit import AuditReport, audit
from sale.trust.history import applied_number, wait_applied
from sale.trust.recover import Recovery, recover

DEADLINE_S = 10.0
ME = Actor("cli:me")


class Shop:
    """Both stores, one campaign, and a writer that can be stopped."""

    def __init__(self, redis: Redis, pool: asyncpg.Pool, database_url: str, nonce: str) -> None:
        self.redis, self.pool, self.database_url = redis, pool, database_url
        self.scripts = Scripts(redis, nonce)
        self.desk = CampaignDesk(redis, self.scripts, pool)
        self.stock = Stock(redis, nonce=nonce)
        self.nonce = nonce
        self._writing: tuple[asyncio.Event, asyncio.Task[None]] | None = None

    async def start_writer(self, **settings: Any) -> None:
        stop = asyncio.Event()
        writer = LedgerWriter(
            self.redis,
            self.scripts,
            self.database_url,
            Settings(**settings),
            pause_campaign=self.desk.pause_for,
        )
        self.writer = writer
        self._writing = (stop, asyncio.create_task(writer.run(stop)))

    async def stop_writer(self) -> None:
        if self._writing is not None:
            stop, task = self._writing
            self._writing = None
            stop.set()
            await asyncio.wait_for(task, DEADLINE_S)

    @contextlib.asynccontextmanager
    async def scheduling(self, **settings: Any) -> AsyncIterator[CollectorRegistry]:
        registry, stop = CollectorRegistry(), asyncio.Event()
        stores = self.stores(**settings)
        task = asyncio.create_task(Scheduler(stores, self.database_url, registry).run(stop))
        try:
            yield registry
        finally:
            stop.set()
            await asyncio.wait_for(task, DEADLINE_S)

    def stores(self, **settings: Any) -> Stores:
        return Stores(
            settings=Settings(**{"tick_interval_ms": 50, **settings}),
            redis=self.redis,
            pool=self.pool,
            scripts=self.scripts,
            unions={},
            nonce=self.nonce,
            ticket_secret=b"",
        )

    async def create(self, made: Campaign | None = None) -> None:
        await self.desk.create(made or campaign(10, 5), ME, None, None)

    async def step(self, name: str, reason: str | None = "wanted", **fields: Any) -> None:
        await self.take(name, self.stock.id, reason=reason, **fields)

    async def take(
        self, name: str, campaign_id: str, key: str | None = None, **fields: Any
    ) -> CampaignNow | None:
        """Take an operator's step; ``fields`` are those of its request."""
        step = STEPS[name]
        return await self.desk.take(step, campaign_id, step.request(**fields), ME, key)

    async def buy(self, *numbers: int, key_no: int = 1, quantity: int = 1) -> list[int]:
        """Buy with each member; give the event numbers."""
        bids = [Bid(member(n), key(key_no), quantity) for n in numbers]
        return [told.a for told in await self.stock.buy(*bids)]

    async def applied(self) -> None:
        """Wait until PostgreSQL has all events."""
        (seq,) = await self.stock.head("seq")

        async def applied_now() -> int:
            return await applied_number(self.pool, self.stock.id)

        assert await wait_applied(applied_now, int(seq), patience_s=DEADLINE_S) >= int(seq)

    async def audit(self, **how: Any) -> AuditReport:
        return await audit(self.redis, self.pool, **how)

    async def recover(self, *, dry_run: bool = False, lossless_only: bool = False) -> Recovery:
        return await recover(
            self.redis,
            self.scripts,
            self.pool,
            self.stock.id,
            actor="cli:me",
            dry_run=dry_run,
            lossless_only=lossless_only,
        )

    async def damage(self, *statements: str) -> None:
        """Change PostgreSQL with its triggers disabled."""
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            for statement in statements:
                await connection.execute(statement)

    async def add_cards(self, *numbers: int, status: str = "active") -> None:
        """Add members to the roster, whose numbers are those of ``card``."""
        await self.pool.executemany(
            "INSERT INTO member (member_no, name, union_code, phone, status)"
            " VALUES ($1, '王小明', 'donghuamen', '', $2)",
            [(member(n), status) for n in numbers],
        )


@contextlib.asynccontextmanager
async def open_shop(redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    redis = open_redis(redis_url)
    pool = await open_pool(database_url, max_size=6)
    nonce, _ = await deployment.read(pool)
    shop = Shop(redis, pool, database_url, nonce)
    try:
        yield shop
    finally:
        try:
            await shop.stop_writer()
        finally:
            await redis.aclose()
            await pool.close()


@pytest.fixture(name="shop")
async def shop_fixture(redis: Redis, redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    """Empty stores and a running writer."""
    async with open_shop(redis_url, database_url) as shop:
        await shop.start_writer()
        yield shop
