"""Redis dies with a torn append-only file, and again before the file was rewritten.

The file is torn within the last order's transaction, as after a power cut. Some servers cut it in
the middle of that transaction. What they append is then lost at the next start, or they do not
start after an interrupted rewrite. So no sale may be answered there before the rewrite has ended.
"""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest
from redis.asyncio import Redis
from service import new_key
from shop import Shop, open_shop
from stock_maker import Bid, campaign, key, member
from test_durability import Server, faults, server, whole
from waiting import until

from sale.host.embedded.binaries import find_redis
from sale.stock.durability import make_whole, rewrite_trouble
from sale.stock.keys import WHOLE
from sale.stock.scripts import Decision

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

TORN_BYTES = 9
"""Bytes missing at the end: the transaction's last command."""
SLOW_REWRITE = {"rdb-key-save-delay": "300000"}
"""Microseconds per key: the rewrite of a campaign's eight keys takes two seconds or more."""
NOT_WHOLE = "not known to be whole"


def newest_file(home: Path) -> Path:
    return max(home.rglob("*.incr.aof"), key=lambda file: int(file.name.split(".")[-3]))


def tear(home: Path) -> None:
    file = newest_file(home)
    os.truncate(file, file.stat().st_size - TORN_BYTES)


async def die(found: Server) -> None:
    found.send(signal.SIGKILL)
    await found.process.wait()


async def needs_rewrite(redis: Redis) -> bool:
    return any(NOT_WHOLE in fault for fault in await faults(redis, "fsync"))


async def sells(shop: Shop, *numbers: int) -> bool:
    """Buy as a new process, so that call numbers begin anew after each start of Redis."""
    bids = [Bid(member(n), key(1)) for n in numbers]
    told = await shop.stock.buy(*bids, process=new_key())
    return all(each.decision is Decision.SOLD for each in told)


async def trusted(shop: Shop) -> bool:
    run_id = (await shop.redis.info("server"))["run_id"]
    told = await shop.redis.hmget(shop.stock.keys.head, ["run_id", "recovering"])
    return told == [run_id.encode(), None]


@pytest.fixture
async def torn(tmp_path: Path, database_url: str) -> tuple[Path, list[str]]:
    """Files whose last order was torn off, and the cards of the earlier orders."""
    home = tmp_path / "r"
    async with server(home) as found, open_shop(found.url, database_url) as shop:
        await until(lambda: whole(found.redis))
        await shop.start_writer()
        await shop.create(campaign(1_000))
        await shop.step("open")
        assert await sells(shop, 1, 2, 3)
        await shop.applied()
        await shop.stop_writer()
        assert await sells(shop, 4)
        await die(found)
    tear(home)
    return home, [member(n) for n in (1, 2, 3)]


async def test_second_crash_before_the_rewrite_ended_loses_nothing(
    torn: tuple[Path, list[str]], database_url: str
) -> None:
    home, stand = torn
    async with server(home, **SLOW_REWRITE) as found, open_shop(found.url, database_url) as shop:
        shut = await needs_rewrite(found.redis)
        async with shop.scheduling():
            if shut:
                await until(lambda: rewriting(found.redis))
                assert not await trusted(shop), "it sells before its file is whole"
                assert await needs_rewrite(found.redis)
            else:
                await until(lambda: trusted(shop))
                assert not await rewriting(found.redis), "a needless rewrite"
                assert await sells(shop, 5, 6)
                stand += [member(5), member(6)]
        await die(found)
    if shut:
        assert not await starts(home)
        repair(home)
    async with server(home) as found, open_shop(found.url, database_url) as shop:
        async with shop.scheduling():
            await until(lambda: trusted(shop))
            assert sorted(await shop.stock.records()) == stand
            assert await sells(shop, 7)
        await die(found)
    async with server(home) as found, open_shop(found.url, database_url) as shop:
        async with shop.scheduling():
            await until(lambda: trusted(shop))
        assert sorted(await shop.stock.records()) == [*stand, member(7)]
        await shop.start_writer()
        await shop.applied()
        assert [each.findings for each in (await shop.audit()).campaigns] == [[]]
        await shop.stop_writer()


async def test_failed_rewrite_keeps_sales_shut_and_is_reported(
    torn: tuple[Path, list[str]], database_url: str
) -> None:
    home, _ = torn
    async with server(home, **SLOW_REWRITE) as found, open_shop(found.url, database_url) as shop:
        redis = found.redis
        if not await needs_rewrite(redis):
            await redis.bgrewriteaof()
            kill_rewriter(found)
            await until(lambda: trouble(redis))
            assert await faults(redis, "fsync") == [], "answered orders are safe in spite of it"
            return
        await make_whole(redis)
        kill_rewriter(found)
        await until(lambda: trouble(redis))
        assert any("its rewrite failed" in fault for fault in await faults(redis, "fsync"))
        async with shop.scheduling() as registry:
            await until(lambda: rewriting(redis))
            kill_rewriter(found)
            await until(lambda: told_failed(registry))
            assert not await trusted(shop)
            await redis.config_set("rdb-key-save-delay", "0")
            await until(lambda: trusted(shop))
            assert await sells(shop, 5)
            assert await trouble(redis) == ""


async def test_append_only_file_turned_on_later_is_awaited(tmp_path: Path) -> None:
    async with server(tmp_path / "r", **SLOW_REWRITE) as found:
        redis = found.redis
        await redis.mset({f"key-{n}": n for n in range(8)})
        await redis.config_set("rdb-key-save-delay", "0")
        await until(lambda: whole(redis))
        await redis.config_set("appendonly", "no")
        assert await make_whole(redis) == ""
        assert await faults(redis, "fsync") == ["appendonly is off: a restart forgets everything"]
        await redis.config_set("rdb-key-save-delay", SLOW_REWRITE["rdb-key-save-delay"])
        await redis.config_set("appendonly", "yes")
        assert NOT_WHOLE in (await faults(redis, "relaxed"))[0]
        assert NOT_WHOLE in await make_whole(redis)
        await until(lambda: whole(redis))
        assert await faults(redis, "fsync") == []


async def test_later_failed_rewrite_does_not_stop_sales(tmp_path: Path) -> None:
    async with server(tmp_path / "r", **SLOW_REWRITE) as found:
        redis = found.redis
        await until(lambda: whole(redis))
        await redis.mset({f"key-{n}": n for n in range(8)})
        await redis.bgrewriteaof()
        assert await faults(redis, "fsync") == []
        kill_rewriter(found)
        await until(lambda: trouble(redis))
        if await redis.get(WHOLE) is not None:  # the key is set only if the store needs a rewrite
            assert await whole(redis)
        assert await faults(redis, "fsync") == []


async def rewriting(redis: Redis) -> bool:
    return bool((await redis.info("persistence"))["aof_rewrite_in_progress"])


async def trouble(redis: Redis) -> str:
    return await rewrite_trouble(redis)


async def told_failed(registry: object) -> bool:
    return registry.get_sample_value("sale_redis_rewrite_failed") == 1.0  # type: ignore[attr-defined]


def kill_rewriter(found: Server) -> None:
    """Kill the child that rewrites the file, as the kernel does when memory runs out."""
    children = Path(f"/proc/{found.process.pid}/task/{found.process.pid}/children")
    (child,) = children.read_text("utf-8").split()
    os.kill(int(child), signal.SIGKILL)


async def starts(home: Path) -> bool:
    try:
        async with asyncio.timeout(5), server(home):
            return True
    except TimeoutError:
        return False


def repair(home: Path) -> None:
    """Repair as docs/FAULTS.md says: cut the torn transaction in every file."""
    tool = home.with_name("redis-check-aof")
    tool.symlink_to(find_redis(None).path)  # the server binary acts as the tool under this name
    for file in home.rglob("*.incr.aof"):
        subprocess.run([tool, "--fix", file], input=b"y\n", check=True, stdout=subprocess.DEVNULL)
