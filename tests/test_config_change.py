"""A configuration that changes is seen with the next reply, and what is gone is kept nowhere."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from service import CAMPAIGNS, Client, Seen, Service, new_key
from stock_maker import Stock, campaign, open_stock

from sale.stock import catalogue as module
from sale.stock.catalogue import Catalogue, read_campaign
from sale.stock.head import rules_of
from sale.stock.keys import campaign_keys


async def configure(redis: Redis, campaign_id: str, **changes: Any) -> None:
    """Change a campaign's configuration as a script will, under the number of its last event."""
    now = await read_campaign(redis, campaign_id)
    assert now is not None
    changed = msgspec.structs.replace(now.campaign, **changes)
    fields: dict[Any, Any] = {
        "config": msgspec.json.encode(changed),
        "rules": msgspec.msgpack.encode(rules_of(changed)),
        "config_seq": now.seq,
    }
    await redis.hset(campaign_keys(campaign_id).head, mapping=fields)


@contextlib.asynccontextmanager
async def configured(service: Service, campaign_id: str, **changes: Any) -> AsyncIterator[None]:
    """Change a configuration behind the API's back; the audit at the end finds the first one."""
    async with service.redis() as redis:
        before: Any = await redis.hgetall(campaign_keys(campaign_id).head)
        await configure(redis, campaign_id, **changes)
        yield
        fields = {name: before[name] for name in (b"config", b"rules", b"config_seq")}
        await redis.hset(campaign_keys(campaign_id).head, mapping=fields)


async def buy_chunked(client: Client, campaign_id: str, token: str, quantity: int) -> Seen:
    """Buy by a request that the fast path leaves to aiohttp."""

    async def body() -> AsyncIterator[bytes]:
        yield b'{"quantity":%d}' % quantity

    return await client.ask(
        "POST",
        f"{CAMPAIGNS}/{campaign_id}/orders",
        token,
        data=body(),
        headers={"Idempotency-Key": new_key(), "Content-Type": "application/json"},
    )


@pytest.mark.parametrize("buy", [Client.buy, buy_chunked], ids=["fast-path", "aiohttp"])
async def test_changed_configuration_is_seen_after_one_call(
    service: Service, client: Client, buy: Any
) -> None:
    # given: a campaign that this process knows
    campaign_id = await client.campaign(card_limit=50, order_max=1)
    token = service.card().token
    assert (await buy(client, campaign_id, token, 1)).status == 201
    assert (await buy(client, campaign_id, token, 2)).status == 400

    # when it changes, then the reply to one purchase is all that it takes
    async with configured(service, campaign_id, order_max=3, title="another"):
        assert (await buy(client, campaign_id, token, 1)).status == 201
        assert (await buy(client, campaign_id, token, 3)).status == 201
        seen = (await client.get(f"{CAMPAIGNS}/{campaign_id}")).json()
        assert (seen["title"], seen["order_max"]) == ("another", 3)

    # and back again
    assert (await buy(client, campaign_id, token, 1)).status == 201
    assert (await buy(client, campaign_id, token, 2)).status == 400


async def test_read_that_was_begun_before_a_change_is_not_kept(redis: Redis) -> None:
    # given
    stock = await open_stock(redis, 5)
    catalogue = Catalogue(redis)
    old = await catalogue.for_sale(stock.id)
    assert old is not None
    reading = asyncio.create_task(catalogue.read(stock.id))
    await asyncio.sleep(0)
    # when
    assert catalogue.configured(stock.id, 2) is None
    await reading
    # then
    assert catalogue.known(stock.id) is None
    await configure(redis, stock.id, title="another")
    new = await catalogue.for_sale(stock.id)
    assert new is not None
    assert new.title == "another"
    assert catalogue.known(stock.id) == new
    assert catalogue.configured(stock.id, 2) == new


async def test_refusal_by_an_old_configuration_has_it_read_again(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    stock = await open_stock(redis, 5)
    catalogue = Catalogue(redis)
    await catalogue.for_sale(stock.id)
    await configure(redis, stock.id, title="another")
    old = catalogue.known(stock.id)
    assert old is not None
    # when it was read a moment ago, then nothing is read
    catalogue.doubt(stock.id)
    await catalogue.close()
    assert catalogue.known(stock.id) is old
    # when it was read some time ago, then the old one serves until the read ends
    monkeypatch.setattr(module, "FRESH_S", 0.0)
    catalogue.doubt(stock.id)
    assert catalogue.known(stock.id) is old
    await asyncio.gather(*catalogue._reads)
    # then
    new = catalogue.known(stock.id)
    assert new is not None
    assert new.title == "another"


async def test_deleted_campaign_leaves_what_is_known(redis: Redis) -> None:
    # given: a campaign that is known, and that somebody puts back into a draft to delete it
    stock = await open_stock(redis, 5)
    catalogue = Catalogue(redis)
    await catalogue.for_sale(stock.id)
    await redis.hset(stock.keys.head, "state", "draft")
    # when
    await stock.step("delete")
    await catalogue.read(stock.id)
    # then
    assert catalogue.known(stock.id) is None
    assert await catalogue.for_sale(stock.id) is None


async def test_absent_campaign_is_read_once_and_kept_within_bounds(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr(module, "UNKNOWN_MAX", 3)
    monkeypatch.setattr(module, "ABSENT_S", 60.0)
    catalogue, stock = Catalogue(redis), Stock(redis, "late")
    assert await catalogue.now("late") is None
    # when it is made, then the answer of a moment ago is kept
    await stock.create(campaign(5, campaign_id="late"), schedule=True)
    assert await catalogue.now("late") is None
    # until others have taken its place
    for number in range(3):
        assert await catalogue.now(f"other-{number}") is None
    assert await catalogue.now("late") is not None
