"""The scheduler ends holds on time, whatever else happens."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from shop import Shop, open_shop
from stock_maker import CAMPAIGN, Bid, Stock, campaign, key, member, now_ms
from test_leadership import START_S, Host, host
from waiting import until, until_equal

from sale.stock.rebuild import freeze

TICKETS = 8_000
ON_TIME_MS = 1_000
HOLD_S = 300


def online(*tickets: int, **how: Any) -> Any:
    return campaign(*tickets, payment="online", **how)


async def hold(shop: Shop, *numbers: int, for_s: float, stock: Stock | None = None) -> None:
    """Hold a ticket for each member for a time that no campaign file allows."""
    stock = stock or shop.stock
    await stock.alter_rules(hold_s=for_s)
    await stock.buy(*(Bid(member(n), key(1)) for n in numbers))
    await stock.alter_rules(hold_s=HOLD_S)


async def held(stock: Stock) -> int:
    return int(await stock.redis.zcard(stock.keys.holds))


def shown(registry: CollectorRegistry, campaign_id: str = CAMPAIGN) -> float | None:
    return registry.get_sample_value("sale_holds", {"campaign": campaign_id})


async def check_on_time(shop: Shop, count: int) -> None:
    """Each hold ended within a second after its moment, and never before it."""
    rows = await shop.pool.fetch(
        "SELECT extract(epoch FROM e.at - o.pay_before) * 1000 AS late"
        " FROM event e JOIN orders o ON o.campaign_id = e.campaign_id AND o.seq = e.order_seq"
        " WHERE e.kind = 'expired'"
    )
    assert len(rows) == count
    assert all(0 <= row["late"] <= ON_TIME_MS for row in rows)


async def test_holds_end_on_time_without_a_request(shop: Shop) -> None:
    await shop.create(online(10))
    await shop.step("open")
    await hold(shop, 1, 2, for_s=0.5)
    await hold(shop, 3, for_s=1.2)
    await hold(shop, 4, for_s=HOLD_S)
    async with shop.scheduling() as registry:
        await until_equal(lambda: shown(registry), 4)
        await until_equal(lambda: held(shop.stock), 1)
        await until_equal(lambda: shown(registry), 1)
    assert await shop.stock.left() == [9]
    await shop.applied()
    await check_on_time(shop, 3)
    counted = shop.writer.metrics
    assert counted.expired._value.get() == 3
    assert (await shop.audit()).clean


@pytest.mark.parametrize("step", ["pause", "close"])
async def test_holds_of_a_campaign_that_sells_nothing_end(shop: Shop, step: str) -> None:
    await shop.create(online(10))
    await shop.step("open")
    await hold(shop, 1, for_s=1.0)
    await shop.step(step)
    async with shop.scheduling() as registry:
        await until_equal(lambda: held(shop.stock), 0)
        await until_equal(lambda: shown(registry), 0)
    await shop.applied()
    await check_on_time(shop, 1)


@pytest.mark.parametrize("damage", ["holds", "order", "type"])
async def test_trouble_of_one_campaign_delays_no_other(shop: Shop, damage: str) -> None:
    other = Stock(shop.redis, "a-damaged-one", shop.nonce)
    for made in (online(10), online(10, campaign_id=other.id)):
        await shop.create(made)
        await shop.take("open", made.id, reason="wanted")
    await hold(shop, 1, for_s=0.5)
    await hold(shop, 1, for_s=0.3, stock=other)
    if damage == "holds":
        await shop.redis.zadd(other.keys.holds, {"no order": 1})
    elif damage == "order":
        await shop.redis.zadd(other.keys.holds, {f"1:{member(9)}": 1})
    else:
        await shop.redis.delete(other.keys.holds)
        await shop.redis.set(other.keys.holds, "no holds")
    async with shop.scheduling() as registry:
        labels = {"campaign": other.id}
        await until_equal(lambda: registry.get_sample_value("sale_campaign_troubled", labels), 1)
        await until_equal(lambda: held(shop.stock), 0)
        await shop.applied()
    await check_on_time(shop, 1)
    assert await other.left() == [9]


async def test_nothing_ends_while_a_campaign_is_recovering(shop: Shop) -> None:
    await shop.create(online(10))
    await shop.step("open")
    await hold(shop, 1, for_s=0.1)
    await freeze(shop.redis, CAMPAIGN, "damaged")
    async with shop.scheduling(auto_recover=False) as registry:
        await until_equal(lambda: shown(registry), 1)
        await asyncio.sleep(0.5)
        assert await held(shop.stock) == 1
        await shop.redis.hdel(shop.stock.keys.head, "recovering", "recovering_by")
        await shop.redis.hset(shop.stock.keys.head, "grace_until", await now_ms(shop.redis) + 1_500)
        await asyncio.sleep(1.2)
        assert await held(shop.stock) == 1
        await until_equal(lambda: held(shop.stock), 0, 1.5)


async def test_holds_are_due_when_the_clock_of_redis_jumped(shop: Shop) -> None:
    """The campaign's clock does not go back with the machine's: the scheduler follows the first."""
    await shop.create(online(10))
    await shop.step("open")
    await hold(shop, 1, 2, for_s=HOLD_S)
    async with shop.scheduling():
        await shop.stock.set_clock(await now_ms(shop.redis) + HOLD_S * 1_000)
        await until_equal(lambda: held(shop.stock), 0, 3.0)
    await shop.stock.check_books()


async def hold_at_once(shop: Shop, count: int) -> int:
    """Hold ``count`` tickets that are all due at the same moment; give that (ms)."""
    stands_ms = await now_ms(shop.redis) + 5_000
    await shop.stock.set_clock(stands_ms)
    for at in range(0, count, 250):
        await hold(shop, *range(at, min(at + 250, count)), for_s=1)
    return stands_ms + 1_000


@pytest.mark.fault
async def test_scheduler_killed_amid_expiry_loses_nothing(
    redis: Redis, redis_url: str, database_url: str, short_path: Path
) -> None:
    async with open_shop(redis_url, database_url) as shop, shop.pool.acquire() as conn:
        await shop.create(online(TICKETS))
        await shop.step("open")
        async with (
            host(short_path / "a", redis_url, database_url) as a,
            host(short_path / "b", redis_url, database_url) as b,
        ):
            await until(lambda: _ready(conn, a, b), START_S)
            works = a if (await a.active(conn))["scheduler"] else b
            await hold_at_once(shop, TICKETS)

            async def amid() -> bool:
                return 0 < await held(shop.stock) < TICKETS - 500

            await until(amid, 15.0)
            works.parts["scheduler"].send_signal(signal.SIGKILL)
            left = await held(shop.stock)
            await until_equal(lambda: held(shop.stock), 0, 15.0)
            await shop.applied()
        ended = await conn.fetch("SELECT order_seq FROM event WHERE kind = 'expired'")
        assert len({row["order_seq"] for row in ended}) == len(ended) == TICKETS
        assert await shop.stock.left() == [TICKETS]
        assert (await shop.audit()).clean
    assert left > 0, "the scheduler was killed too late to show anything"


async def _ready(conn: Any, *hosts: Host) -> bool:
    """Whether each part of each host is connected, and one of the schedulers works."""
    active = [await each.active(conn) for each in hosts]
    known = all(value is not None for each in active for value in each.values())
    return known and any(each["scheduler"] for each in active)
