"""A card's orders, and the doctor: a few round trips, whatever campaigns there are and were."""

from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from stock_maker import Bid, Stock, campaign, key, member, open_stock
from test_order_life import open_shop

from sale.db import read
from sale.db.apply import apply_entries
from sale.domain.order import Order
from sale.members.orders import OwnOrders, TicketCodes
from sale.operators.diagnosis import diagnose
from sale.stock.catalogue import Catalogue
from sale.stock.keys import campaign_keys
from sale.stock.scripts import CallReply

HIDDEN = 150
"""Drafts, and as many that were deleted."""


@pytest.fixture
def own_orders(redis: Redis, pool: asyncpg.Pool) -> OwnOrders:
    return OwnOrders(Catalogue(redis), redis, pool, TicketCodes(b"secret"))


async def page(own_orders: OwnOrders, number: int = 1) -> list[Order]:
    return (await own_orders.page(member(number), None, 50))[0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often Redis was sent something, in its one element."""
    count = [0]
    send = AbstractConnection.send_packed_command

    async def counted(self: AbstractConnection, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        await send(self, *args, **kwargs)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
    return count


async def hide_many(redis: Redis) -> None:
    for number in range(HIDDEN):
        for state in ("draft", "deleted"):
            made = campaign(1, campaign_id=f"{state}-{number}")
            stock = Stock(redis, made.id)
            assert (await stock.create(made)).reply is CallReply.OK
            if state == "deleted":
                assert (await stock.step("delete")).reply is CallReply.OK


async def test_orders_cost_the_same_beside_hidden_campaigns(
    redis: Redis, own_orders: OwnOrders, asked: list[int]
) -> None:
    shop = await open_stock(redis, 5)
    await shop.buy(Bid(member(1), key(1)))
    asked[0] = 0
    assert len(await page(own_orders)) == 1
    before = asked[0]
    await hide_many(redis)
    asked[0] = 0
    assert len(await page(own_orders)) == 1
    assert 0 < asked[0] <= before


async def test_doctor_costs_the_same_beside_many_campaigns(
    redis: Redis, pool: asyncpg.Pool, asked: list[int]
) -> None:
    await open_stock(redis, 5)
    asked[0] = 0
    assert len((await diagnose(redis, pool)).campaigns) == 1
    before = asked[0]
    await hide_many(redis)
    asked[0] = 0
    assert len((await diagnose(redis, pool)).campaigns) == 1 + HIDDEN
    assert 0 < asked[0] <= before


async def test_order_of_new_campaign_is_listed_at_once(redis: Redis, own_orders: OwnOrders) -> None:
    for number in range(5):
        stock = await open_stock(redis, 5, campaign_id=f"c{number}")
        await stock.buy(Bid(member(1), key(1)))
        listed = {order.campaign for order in await page(own_orders)}
        assert listed == {f"c{each}" for each in range(number + 1)}
    assert await page(own_orders, 2) == []


@pytest.mark.parametrize("damage", ["type", "half", "config"])
async def test_damaged_campaign_hides_no_other_orders(
    redis: Redis, own_orders: OwnOrders, damage: str
) -> None:
    for campaign_id in ("sound", "damaged"):
        stock = await open_stock(redis, 5, campaign_id=campaign_id)
        await stock.buy(Bid(member(1), key(1)))
    keys = campaign_keys("damaged")
    if damage == "type":
        await redis.set(keys.members, "no hash")
    elif damage == "half":
        await redis.hset(keys.members, member(1), "half a record")
    else:
        await redis.hset(keys.head, "config", "{")
    assert [order.campaign for order in await page(own_orders)] == ["sound"]


async def test_orders_are_told_where_postgres_dies_in_mid_call(
    redis: Redis, own_orders: OwnOrders, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    shop = await open_stock(redis, 5)
    await shop.buy(Bid(member(1), key(1)))

    async def dies(*_: object, **__: object) -> None:
        raise asyncpg.InternalClientError("got result for unknown protocol state 3")

    monkeypatch.setattr(read, "orders_of_member", dies)
    # When
    told = await page(own_orders)
    # Then
    assert [order.campaign for order in told] == [shop.id]


async def test_orders_read_alike_from_redis_and_postgresql(
    redis: Redis, pool: asyncpg.Pool, own_orders: OwnOrders
) -> None:
    # Given an order in each state that a script can bring about
    shop = await open_shop(redis, 50, card_limit=50, order_max=3)
    expired, late, confirmed, part, cancelled, unpaid, refused = [
        await shop.hold(1, 3, key_no=n) for n in range(7)
    ]
    for order in (confirmed, part, cancelled):
        await shop.paid(1, order)
    await shop.give_back(1, part, 2)
    await shop.give_back(1, cancelled)
    await shop.give_back(1, unpaid)
    await shop.give_back(1, refused)
    await shop.paid(1, refused)
    await shop.pass_time()
    await shop.scripts.expire(shop.id)
    await shop.paid(1, late)
    held = await shop.hold(1, 2, key_no=7)
    states = {
        expired: ("expired", "none"), late: ("confirmed", "paid"),
        confirmed: ("confirmed", "paid"), part: ("confirmed", "refunding"),
        cancelled: ("cancelled", "refunding"), unpaid: ("cancelled", "none"),
        refused: ("cancelled", "refunding"), held: ("held", "due"),
    }  # fmt: skip

    async def told() -> tuple[list[Order], list[Order]]:
        listed = await page(own_orders)
        return listed, [await own_orders.one(member(1), each.order_no) for each in listed]

    # When
    in_redis = await told()
    async with pool.acquire() as connection:
        await apply_entries(connection, shop.id, await shop.entries())
    await redis.flushall()
    own_orders = OwnOrders(Catalogue(redis), redis, pool, TicketCodes(b"secret"))
    in_postgresql = await told()
    # Then
    assert in_redis == in_postgresql
    assert in_redis[0] == in_redis[1]
    assert [(each.state, each.payment.state) for each in in_redis[0]] == [
        states[seq] for seq in sorted(states, reverse=True)
    ]
