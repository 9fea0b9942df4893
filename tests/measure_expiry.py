"""Measures how soon holds that are due at the same moment are on sale again.

Goal: the figure for 20,000 holds, with and without purchases meanwhile; ``python
tests/measure_expiry.py [HOLDS]``. A scheduler and the writer run in this process on embedded
servers (append-only file, fsync always); two further batchers buy at full rate from a campaign that
is not sold out. Not measured: HTTP, and a machine with more than these servers on it.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from shop import Shop, open_shop
from stock_maker import BEHIND_MAX, Bid, campaign, key, member, now_ms
from waiting import until

from sale.db.migrate import migrate
from sale.host import embedded
from sale.metrics import PurchaseMetrics
from sale.stock.answers import AwaitedPurchase
from sale.stock.batchers import Batchers
from sale.stock.durability import make_whole

HOLDS: Final = 20_000
BATCH: Final = 250
STANDS_AHEAD_MS: Final = 15_000
"""The campaign's clock stands still that far ahead while the holds are made."""
BUYERS: Final = 64
SPARE: Final = 1_000_000


class Buyers:
    """Buyers of one process, each of whom buys again as soon as it is answered."""

    def __init__(self, shop: Shop, made: Any, name: str, first: int) -> None:
        self._batchers = Batchers(
            shop.scripts, name, PurchaseMetrics(), batch_max=256, queue_max=4_096, deadline_s=5.0,
            behind_max=BEHIND_MAX,
        )  # fmt: skip
        self._batcher = self._batchers.of(made)
        self._next = first
        self.took_ms: list[float] = []

    async def run(self) -> None:
        try:
            await asyncio.gather(*(self._buy() for _ in range(BUYERS)))
        finally:
            await self._batchers.close()

    async def _buy(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._next += 1
            bid = AwaitedPurchase(member(self._next), "dongsi", 0, 1, key(1), loop)
            began = time.monotonic()
            assert self._batcher.submit(bid)
            await bid.answer
            self.took_ms.append((time.monotonic() - began) * 1_000)


async def measure(shop: Shop, holds: int, *, buying: bool) -> None:
    """Hold, let all be due at once, and time their return."""
    made = campaign(holds + SPARE, payment="online")
    await shop.create(made)
    await shop.step("open")
    await shop.stock.alter_rules(hold_s=1)
    due_ms = await now_ms(shop.redis) + STANDS_AHEAD_MS
    await shop.stock.set_clock(due_ms - 1_000)
    for at in range(0, holds, BATCH):
        await shop.stock.buy(*(Bid(member(at + n), key(1)) for n in range(BATCH)))
    await shop.stock.alter_rules(hold_s=300)
    await shop.applied()
    buyers = [Buyers(shop, made, f"b{n}", 1_000_000 * n) for n in (1, 2)] if buying else []
    tasks = [asyncio.create_task(each.run()) for each in buyers]
    async with shop.scheduling(tick_interval_ms=250):
        await asyncio.sleep((due_ms - await now_ms(shop.redis)) / 1_000)
        began, quiet = time.monotonic(), [len(each.took_ms) for each in buyers]
        before = [ms for each in buyers for ms in each.took_ms]

        async def back() -> bool:
            ended = f"-inf {due_ms}".split()
            return not await shop.redis.zcount(shop.stock.keys.holds, *ended)

        await until(back, 60.0)
        took_s = time.monotonic() - began
        during = [ms for each, at in zip(buyers, quiet, strict=True) for ms in each.took_ms[at:]]

        async def written() -> bool:
            query = "SELECT count(*) FROM event WHERE kind = 'expired' AND campaign_id = $1"
            return await shop.pool.fetchval(query, made.id) == holds

        await until(written, 60.0)
        written_s = time.monotonic() - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(f"{holds} holds due at once, {'while buying' if buying else 'alone'}:")
    print(f"  on sale after {took_s:.2f} s, in PostgreSQL after {written_s:.2f} s")
    for name, found in (("before", before), ("meanwhile", during)):
        if len(found) > 1:
            p99 = statistics.quantiles(found, n=100)[98]
            print(f"  purchases {name}: {len(found)}, p99 {p99:.0f} ms")


async def _whole(shop: Shop) -> bool:
    """Whether Redis' append-only file is whole, as the scheduler demands."""
    return not await make_whole(shop.redis)


async def main(holds: int) -> None:
    """Measure both ways, each on new servers."""
    for buying in (False, True):
        with tempfile.TemporaryDirectory() as home:
            async with embedded.running(Path(home) / "d", redis=True, postgres=True) as servers:
                redis_url, database_url = (
                    servers.endpoints.redis_url,
                    servers.endpoints.database_url,
                )
                assert redis_url is not None
                assert database_url is not None
                await migrate(database_url)
                async with open_shop(redis_url, database_url) as shop:
                    await until(lambda: _whole(shop))
                    await shop.start_writer()
                    await measure(shop, holds, buying=buying)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else HOLDS))
