"""A card's own orders: read in a few round trips, whatever campaigns there are and were."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from stock_maker import Bid, Stock, campaign, card, key, open_stock

from sale.db.pool import open_pool
from sale.domain import Order
from sale.stock.catalogue import Catalogue
from sale.stock.keys import campaign_keys
from sale.stock.scripts import CallReply
from sale.usecases.orders import OwnOrders, TicketCodes

HIDDEN = 150
"""Drafts, and as many that were deleted."""


@pytest.fixture
async def own_orders(redis: Redis, database_url: str) -> AsyncIterator[OwnOrders]:
    pool = await open_pool(database_url, min_size=1, max_size=1)
    yield OwnOrders(Catalogue(redis), redis, pool, TicketCodes(b"secret"))
    await pool.close()


async def page(own_orders: OwnOrders, number: int = 1) -> list[Order]:
    return (await own_orders.page(card(number), None, 50))[0]


async def test_orders_cost_the_same_beside_hidden_campaigns(
    redis: Redis, own_orders: OwnOrders, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = await open_stock(redis, 5)
    await shop.buy(Bid(card(1), key(1)))
    asked = 0
    send = AbstractConnection.send_packed_command

    async def counted(self: AbstractConnection, *args: Any, **kwargs: Any) -> None:
        nonlocal asked
        asked += 1
        await send(self, *args, **kwargs)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
    assert len(await page(own_orders)) == 1
    asked_before, asked = asked, 0
    for number in range(HIDDEN):
        for state in ("draft", "deleted"):
            made = campaign(1, campaign_id=f"{state}-{number}")
            stock = Stock(redis, made.id)
            assert (await stock.create(made)).reply is CallReply.OK
            if state == "deleted":
                assert (await stock.step("delete")).reply is CallReply.OK

    asked = 0
    assert len(await page(own_orders)) == 1
    assert asked <= asked_before


async def test_order_of_new_campaign_is_listed_at_once(redis: Redis, own_orders: OwnOrders) -> None:
    for number in range(5):
        stock = await open_stock(redis, 5, campaign_id=f"c{number}")
        await stock.buy(Bid(card(1), key(1)))
        listed = {order.campaign for order in await page(own_orders)}
        assert listed == {f"c{each}" for each in range(number + 1)}
    assert await page(own_orders, 2) == []


@pytest.mark.parametrize("damage", ["type", "half", "config"])
async def test_damaged_campaign_hides_no_other_orders(
    redis: Redis, own_orders: OwnOrders, damage: str
) -> None:
    for campaign_id in ("sound", "damaged"):
        stock = await open_stock(redis, 5, campaign_id=campaign_id)
        await stock.buy(Bid(card(1), key(1)))
    keys = campaign_keys("damaged")
    if damage == "type":
        await redis.set(keys.cards, "no hash")
    elif damage == "half":
        await redis.hset(keys.cards, card(1), "half a record")
    else:
        await redis.hset(keys.head, "config", "{")
    assert [order.campaign for order in await page(own_orders)] == ["sound"]
