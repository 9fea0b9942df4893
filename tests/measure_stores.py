"""Compares stores that can replace Redis: the figures of ADR 13.

``python tests/measure_stores.py [BINARY …]`` measures the embedded Valkey, the others of
``tests/stores.py``, and the binaries given, in turn on one machine: µs that the server says its
purchase script took (the least of many short rounds, so that other work on the machine matters
little), the CPU time that its process used a purchase, and the memory of 200,000 orders once the
ledger has been written and trimmed.
"""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import redis.asyncio
from stock_maker import Bid, key, member, open_stock
from stores import redis_servers

from sale.host.embedded.binaries import find_redis
from sale.stock.connection import product_of

ORDERS, BATCH, CALLS_A_ROUND = 200_000, 250, 5
DURABLE = ["--port", "0", "--appendonly", "yes", "--appendfsync", "always", "--save", ""]


class Server:
    """A server of its own, and what was measured of it."""

    def __init__(self, binary: Path, home: Path) -> None:
        home.mkdir()
        self.socket = home / "redis.sock"
        self.process = subprocess.Popen(
            [binary, *DURABLE, "--unixsocket", str(self.socket), "--dir", home],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.redis = redis.asyncio.Redis(unix_socket_path=str(self.socket))
        self.least_us = float("inf")
        self.sold = 0

    async def begin(self) -> None:
        """Open a campaign, and remember what is used before the first order."""
        async with asyncio.timeout(20):
            while not self.socket.exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.05)
        self.name = str(product_of(await self.redis.info("server")))
        self.stock = await open_stock(self.redis, ORDERS)
        await self.buy_round()
        self.memory, self.cpu_s, self.counted = *(await self._used()), self.sold

    async def buy_round(self) -> None:
        """Sell in some batches."""
        await self.redis.config_resetstat()
        for _ in range(CALLS_A_ROUND):
            numbers = range(self.sold, self.sold + BATCH)
            await self.stock.buy(*(Bid(member(n), key(1)) for n in numbers))
            self.sold += BATCH
        spent = (await self.redis.info("commandstats"))["cmdstat_evalsha"]["usec"]
        self.least_us = min(self.least_us, spent / (CALLS_A_ROUND * BATCH))

    async def told(self) -> str:
        """Say all in a line."""
        _, cpu_s = await self._used()
        await self.redis.xtrim(self.stock.keys.stream, maxlen=0, approximate=False)
        memory, _ = await self._used()
        orders = self.sold - self.counted
        return (
            f"{self.name:14} {self.least_us:5.2f} µs a purchase in the script,"
            f" {(cpu_s - self.cpu_s) / orders * 1e6:5.2f} µs of CPU,"
            f" {(memory - self.memory) / orders * ORDERS / 1e6:5.1f} MB for {ORDERS:,} orders"
        )

    async def _used(self) -> tuple[int, float]:
        info = await self.redis.info()
        cpu_s = info["used_cpu_user"] + info["used_cpu_sys"]
        return info["used_memory"], cpu_s


@contextlib.contextmanager
def servers(binaries: list[Path]) -> Iterator[list[Server]]:
    """Run them side by side; they work in turn."""
    with tempfile.TemporaryDirectory(prefix="stores-") as directory:
        made = [Server(binary, Path(directory) / str(n)) for n, binary in enumerate(binaries)]
        try:
            yield made
        finally:
            for each in made:
                each.process.kill()
                each.process.wait()


async def measure(binaries: list[Path]) -> None:
    """Measure and print."""
    with servers(binaries) as every:
        for each in every:
            await each.begin()
        for number in range(ORDERS // BATCH // CALLS_A_ROUND - 1):
            for place in range(len(every)):
                await every[(number + place) % len(every)].buy_round()
        for each in every:
            print(await each.told())
            await each.redis.aclose()


if __name__ == "__main__":
    others = [path for _, paths in redis_servers() for path in paths]
    given = [Path(word) for word in sys.argv[1:]]
    asyncio.run(measure([*given, find_redis(None).path, *others]))
