"""Campaigns that are paid online, on the running system: no file can ask for one yet."""

from typing import Any

from service import Service
from stock_maker import Stock, campaign, now_ms

from sale.db import deployment
from sale.stock.scripts import CallReply

HOLD_MS = 300_000


async def online_campaign(service: Service, redis: Any, tickets: int = 100) -> Stock:
    """Make a campaign that is paid online and sells."""
    async with service.database() as connection:
        nonce, _ = await deployment.read(connection)
    made = campaign(
        tickets,
        campaign_id=service.new_id(),
        payment="online",
        cancel_until_ms=await now_ms(redis) + 86_400_000,
    )
    stock = Stock(redis, made.id, nonce)
    assert (await stock.create(made)).reply is CallReply.OK
    assert (await stock.step("open")).reply is CallReply.OK
    return stock


async def pass_hold(stock: Stock) -> None:
    """Let the campaign's clock stand at the end of every hold."""
    await stock.set_clock(await now_ms(stock.redis) + HOLD_MS)
