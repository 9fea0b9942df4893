"""Whether both stores answer this process: the gauges ``sale_redis_up`` and ``sale_postgres_up``.

Each API process, writer and scheduler asks by itself, so that an alert about a store does not
depend on the scheduler, which may have died.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Final

import asyncpg
from prometheus_client import Gauge
from redis.asyncio import Redis

from sale.background import keep_running
from sale.lifetime import cancel_and_wait
from sale.metrics import StoreMetrics

INTERVAL_S: Final = 2.0
ANSWER_TIMEOUT_S: Final = 2.0


class StoreWatch:
    """Asks both stores at an interval until cancelled."""

    def __init__(self, redis: Redis, pool: asyncpg.Pool, metrics: StoreMetrics) -> None:
        self._redis = redis
        self._pool = pool
        self._metrics = metrics

    async def run(self) -> None:
        """Ask every two seconds, each store with a bound of its own."""
        while True:
            await asyncio.gather(
                _ask(self._redis.ping(), self._metrics.redis_up),
                _ask(self._pool.fetchval("SELECT 1"), self._metrics.postgres_up),
            )
            await asyncio.sleep(INTERVAL_S)


@contextlib.asynccontextmanager
async def watching(redis: Redis, pool: asyncpg.Pool, metrics: StoreMetrics) -> AsyncIterator[None]:
    """Watch while the block runs."""
    watch = asyncio.create_task(keep_running(StoreWatch(redis, pool, metrics).run))
    try:
        yield
    finally:
        await cancel_and_wait([watch])


async def _ask(answer: Awaitable[object], up: Gauge) -> None:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await answer
    except Exception:  # noqa: BLE001 - after any error the store has not answered
        up.set(0)
    else:
        up.set(1)
