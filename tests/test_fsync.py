"""Redis answers after the fsync that covers the answer, shown with a slow and logged fsync.

Killing a server cannot show this, because the kernel keeps its writes, synced or not. A library
that is preloaded into the server makes each fsync slow, and logs how much of the file it covered
and when it returned (``slow_fsync.c``).
"""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.asyncio import Redis
from stock_maker import BEHIND_MAX, NONCE, campaign, key, member, open_stock
from test_durability import Server, server

from sale.metrics import PurchaseMetrics
from sale.stock.answers import AwaitedPurchase
from sale.stock.batchers import Batchers
from sale.stock.connection import open_redis, product_of
from sale.stock.durability import durability_faults
from sale.stock.scripts import Decision, Scripts

DELAY_MS = 40
PROCESSES = 12
ORDERS_EACH = 6
APART_S = 0.013
"""Processes call at different moments, also while others wait for their fsync."""


class Sync(NamedTuple):
    """One fsync: the file's inode, its size when the fsync began, and when it returned."""

    inode: int
    size: int
    at_ns: int


class Slow(NamedTuple):
    """A server with a slow fsync, and the log of its fsyncs."""

    server: Server
    directory: Path
    notes: Path

    def early(self, told: dict[str, int]) -> list[str]:
        """Cards that got their answer (ns) before its fsync returned."""
        files = {file.stat().st_ino: file.read_bytes() for file in self.directory.rglob("*.aof")}
        syncs = [Sync(*map(int, line.split())) for line in self.notes.read_text().splitlines()]
        assert syncs
        early = []
        for number, at_ns in told.items():
            ends = {
                inode: data.index(b"EXEC\r\n", data.index(str(number).encode()))
                for inode, data in files.items()
                if str(number).encode() in data  # otherwise it is not written yet
            }
            if not any(s.size > ends.get(s.inode, s.size) and s.at_ns <= at_ns for s in syncs):
                early.append(number)
        return early


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that slows a server's fsync; building it needs a C compiler."""
    built = tmp_path_factory.mktemp("library") / "slow_fsync.so"
    source = Path(__file__).with_name("slow_fsync.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", built, source],
        check=True,
        timeout=60,
    )
    return built


@contextlib.asynccontextmanager
async def slow(directory: Path, library: Path, **settings: str) -> AsyncIterator[Slow]:
    notes = directory.with_suffix(".syncs")
    preloading = {
        "LD_PRELOAD": str(library),
        "SYNC_LOG": str(notes),
        "SYNC_DELAY_MS": str(DELAY_MS),
    }
    async with server(directory, preloading=preloading, **settings) as found:
        yield Slow(found, directory, notes)


async def rush(url: str) -> dict[str, int]:
    """Buy from many processes at once; give the moment (ns) of each answer by member."""
    told: dict[str, int] = {}

    async def process(number: int) -> None:
        client = open_redis(url, max_connections=1)
        batchers = Batchers(
            Scripts(client, NONCE), f"p-{number}", PurchaseMetrics(),
            batch_max=256, queue_max=1_000, deadline_s=10, behind_max=BEHIND_MAX,
        )  # fmt: skip
        batcher = batchers.of(campaign(1_000))
        loop = asyncio.get_running_loop()
        try:
            for n in range(number, PROCESSES * ORDERS_EACH, PROCESSES):
                purchase = AwaitedPurchase(member(n), "district", 0, 1, key(1), loop)
                assert batcher.submit(purchase)
                answer = await purchase.answer
                told[member(n)] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                assert answer.decision is Decision.SOLD
                await asyncio.sleep(APART_S * (number % 5))
        finally:
            await batchers.close()
            await client.aclose()

    async with asyncio.timeout(30):
        await asyncio.gather(*(process(number) for number in range(PROCESSES)))
    return told


@pytest.mark.parametrize("threads", [1, 4])
async def test_answer_comes_after_its_fsync_or_is_refused(
    tmp_path: Path, library: Path, threads: int
) -> None:
    async with slow(tmp_path / "r", library, io_threads=str(threads)) as found:
        redis = found.server.redis
        faults = [each for each in await durability_faults(redis, "fsync", 1) if "io-th" in each]
        await open_stock(redis, 1_000)
        told = await rush(found.server.url)

        early = found.early(told)
        product = product_of(await redis.info("server"))
        print(f"{product}: {len(early)} of {len(told)} answers before their fsync: {faults}")
        assert len(told) == PROCESSES * ORDERS_EACH
        if product.name == "Redis" and product.version >= (8,) and threads > 1:
            (fault,) = faults
            assert fault.startswith(f"io-threads is {threads}: Redis 8")
            assert "set io-threads 1" in fault
            relaxed = await durability_faults(redis, "relaxed", 1)
            assert not any("io-threads" in each for each in relaxed)
        else:
            assert early == []
            assert faults == []


async def test_trace_detects_answers_before_their_fsync(tmp_path: Path, library: Path) -> None:
    async with slow(tmp_path / "r", library, appendfsync="everysec") as found:
        await open_stock(found.server.redis, 1_000)
        told = await rush(found.server.url)
        assert len(found.early(told)) > len(told) / 2


async def test_io_threads_added_at_run_time_keep_the_fsync_order(
    tmp_path: Path, library: Path
) -> None:
    async with slow(tmp_path / "r", library) as found:
        redis = found.server.redis
        await open_stock(redis, 1_000)
        if not await _takes_threads(redis):
            assert (await redis.config_get("io-threads"))["io-threads"] == "1"
            return
        told = await rush(found.server.url)
        assert found.early(told) == []


async def _takes_threads(redis: Redis) -> bool:
    """Whether this product can change ``io-threads`` at run time (Valkey from 9.0 on)."""
    with contextlib.suppress(Exception):
        return bool(await redis.config_set("io-threads", "4"))
    return False


@pytest.mark.parametrize(
    ("info", "refused"),
    [
        ({"redis_version": "6.2.14"}, True),
        ({"redis_version": "7.0.15"}, False),
        ({"redis_version": "7.4.2"}, False),
        ({"redis_version": "8.0.0"}, True),
        ({"redis_version": "8.6.1"}, True),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "7.2.5"}, False),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.10"}, False),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "9.1.4"}, False),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "10.0.0"}, True),
        ({"redis_version": "7.2.4", "server_name": "other", "other_version": "7.0.0"}, True),
    ],
)
def test_io_threads_of_an_untested_version_are_refused(info: dict[str, str], refused: bool) -> None:
    from sale.stock.durability import _threads_faults

    product = product_of(info)
    assert list(_threads_faults(product, {"io-threads": "1"})) == []
    told = list(_threads_faults(product, {"io-threads": "2"}))
    assert bool(told) is refused
    assert not told or str(product) in told[0]
