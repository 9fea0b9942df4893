"""The batcher of a campaign that is paid online: holds, their ends, and orders told again."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from stock_maker import Bid, campaign, key, member
from test_batcher import OpenShop, decisions
from test_batcher import open_shop as the_open_shop
from test_order_life import HOLD_MS, Shop
from test_order_life import open_shop as open_stock

from sale.domain.order import OrderState
from sale.stock.scripts import CallReply, Decision, Expired, Scripts, Untrusted

open_shop = the_open_shop
SHORT_S = 0.6


def online(*tickets: int, **how: Any) -> Any:
    return campaign(*tickets, payment="online", **how)


async def unapplied_and_ledger(stock: Shop, batcher: Any) -> tuple[list[Any], list[Any]]:
    """Give what a process keeps, and what the ledger has of orders."""
    ledger = [event for entry in await stock.entries() for event in entry.events()]
    return list(batcher.unapplied.events()), [each for each in ledger if each.kind == "held"]


@pytest.mark.parametrize("peeks", [False, True])
async def test_purchase_gets_the_tickets_of_due_holds(
    redis: Redis, open_shop: OpenShop, peeks: bool
) -> None:
    stock = await open_stock(redis, 3)
    shop = open_shop(redis, online(3))
    held = await shop.one(member(1), key(1), 3)
    assert (await shop.one(member(2), key(1))).decision is Decision.SOLD_OUT
    if peeks:
        await shop.until_it_peeks()
    await stock.set_clock(held.pay_before_ms)
    answers = await shop.ask(*(Bid(member(n), key(2)) for n in range(2, 6)))
    assert decisions(answers) == [Decision.SOLD] * 3 + [Decision.SOLD_OUT]
    assert answers[0].pay_before_ms == held.pay_before_ms + HOLD_MS
    assert await stock.state(1, held.value) is OrderState.EXPIRED
    await stock.check_books()


async def test_two_processes_sell_the_tickets_of_due_holds_once(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 600)
    shops = [open_shop(redis, online(600), f"shop-{n}", batch_max=64) for n in range(2)]
    await shops[0].ask(*(Bid(member(n), key(1)) for n in range(600)))
    ends_ms = (await stock.peek()).hold_ends_ms
    await stock.set_clock(ends_ms + 10_000)
    bids = [[Bid(member(1_000 * at + n), key(1)) for n in range(1, 401)] for at in (1, 2)]
    answers = await asyncio.gather(
        *(shop.ask(*mine) for shop, mine in zip(shops, bids, strict=True))
    )
    told = decisions([*answers[0], *answers[1]])
    assert (told.count(Decision.SOLD), told.count(Decision.SOLD_OUT)) == (600, 200)
    await stock.check_books()


@pytest.mark.parametrize(
    "error", [RedisConnectionError("lost"), TimeoutError(), Untrusted(CallReply.UNVERIFIED)]
)
async def test_purchase_waits_while_holds_cannot_end(
    redis: Redis, open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stock = await open_stock(redis, 1)
    shop = open_shop(redis, online(1))
    held = await shop.one(member(1), key(1))
    await stock.set_clock(held.pay_before_ms)
    whole, failures = Scripts.expire, [error] * 3

    async def fail(scripts: Scripts, campaign_id: str) -> Expired:
        if failures:
            raise failures.pop()
        return await whole(scripts, campaign_id)

    monkeypatch.setattr(Scripts, "expire", fail)
    assert (await shop.one(member(2), key(1))).decision is Decision.SOLD
    assert failures == []


@pytest.mark.parametrize("peeks", [False, True])
async def test_holds_that_never_end_are_unknown_at_the_deadline(
    redis: Redis, open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch, peeks: bool
) -> None:
    stock = await open_stock(redis, 1)
    shop = open_shop(redis, online(1), deadline_s=SHORT_S)
    held = await shop.one(member(1), key(1))
    assert (await shop.one(member(2), key(1))).decision is Decision.SOLD_OUT
    if peeks:
        await shop.until_it_peeks()
    await stock.set_clock(held.pay_before_ms)
    calls = 0

    async def nothing(scripts: Scripts, campaign_id: str) -> Expired:
        nonlocal calls
        calls += 1
        return Expired(0, 0, held.pay_before_ms, held.pay_before_ms, 0, 1)

    monkeypatch.setattr(Scripts, "expire", nothing)
    began = asyncio.get_running_loop().time()
    answers = await shop.ask(*(Bid(member(n), key(2)) for n in range(2, 5)))
    assert decisions(answers) == [None] * 3
    assert SHORT_S / 2 < asyncio.get_running_loop().time() - began < 3 * SHORT_S
    assert 1 < calls < 100, "it pauses between two attempts"


async def test_grace_that_begins_meanwhile_refuses_as_usual(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 1)
    shop = open_shop(redis, online(1))
    held = await shop.one(member(1), key(1))
    await stock.set_clock(held.pay_before_ms)
    await redis.hset(stock.keys.head, "grace_until", held.pay_before_ms + 60_000)
    refused = await shop.one(member(2), key(1))
    assert (refused.decision, refused.held) == (Decision.SOLD_OUT, 1)
    assert refused.pay_before_ms == held.pay_before_ms
    await stock.set_clock(held.pay_before_ms + 60_000)
    assert (await shop.one(member(2), key(1))).decision is Decision.SOLD


async def test_sold_out_says_how_many_are_held_and_until_when(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 3, 2)
    shop = open_shop(redis, online(3, 2))
    first = await shop.one(member(1), key(1), 2)
    await stock.set_clock(first.now_ms + 5_000)
    await shop.ask(Bid(member(2), key(1)), Bid(member(2), key(2), 2, 1))
    by_script = await shop.ask(Bid(member(3), key(1)), Bid(member(3), key(1), 1, 1))
    await shop.until_it_peeks()
    by_peek = await shop.ask(Bid(member(4), key(1)), Bid(member(4), key(1), 1, 1))
    for told in (by_script, by_peek):
        assert decisions(told) == [Decision.SOLD_OUT] * 2
        assert [each.held for each in told] == [3, 2]
        assert {each.pay_before_ms for each in told} == {first.pay_before_ms}
    await stock.paid(1, first.value)
    assert (await shop.one(member(5), key(1))).held == 1
    await stock.check_books()


async def test_hold_of_the_same_call_is_told_to_the_refused(
    redis: Redis, open_shop: OpenShop
) -> None:
    await open_stock(redis, 2)
    shop = open_shop(redis, online(2))
    sold, refused = await shop.ask(Bid(member(1), key(1), 2), Bid(member(2), key(1)))
    assert (refused.decision, refused.held) == (Decision.SOLD_OUT, 2)
    assert refused.pay_before_ms == sold.pay_before_ms


@pytest.mark.parametrize("peeks", [False, True])
async def test_order_is_told_again_in_its_state(
    redis: Redis, open_shop: OpenShop, peeks: bool
) -> None:
    stock = await open_stock(redis, 6)
    shop = open_shop(redis, online(6))
    sold = await shop.ask(*(Bid(member(n), key(1), 2) for n in (1, 2, 3)))
    orders = {n: answer.value for n, answer in zip((1, 2, 3), sold, strict=True)}
    if peeks:
        await shop.one(member(9), key(1))
        await shop.until_it_peeks()
    again = await shop.ask(*(Bid(member(n), key(1), 2) for n in (1, 2, 3)))
    assert decisions(again) == [Decision.REPLAYED_CHANGED] * 3
    for n, answer, first in zip((1, 2, 3), again, sold, strict=True):
        assert answer.record == await stock.order(n, orders[n])
        assert answer.record.state is OrderState.HELD
        assert (answer.pay_before_ms, answer.card_remaining) == (first.pay_before_ms, 1)
    await stock.paid(2, orders[2])
    await stock.give_back(2, orders[2], 1)
    await stock.give_back(3, orders[3])
    await stock.pass_time()
    await stock.scripts.expire(stock.id)
    again = await shop.ask(*(Bid(member(n), key(1), 2) for n in (1, 2, 3)))
    assert decisions(again) == [Decision.REPLAYED_CHANGED] * 3
    told = {n: answer.record for n, answer in zip((1, 2, 3), again, strict=True)}
    assert told == {n: await stock.order(n, orders[n]) for n in (1, 2, 3)}
    assert [told[n].state for n in (1, 2, 3)] == [
        OrderState.EXPIRED, OrderState.CONFIRMED, OrderState.CANCELLED,
    ]  # fmt: skip
    assert [(each.value, each.card_remaining, each.pay_before_ms) for each in again] == [
        (orders[1], 3, 0), (orders[2], 2, 0), (orders[3], 3, 0),
    ]  # fmt: skip
    assert (await shop.one(member(1), key(1), 1)).decision is Decision.KEY_MISMATCH


async def test_holder_asks_redis_while_others_are_refused_by_peek(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 2)
    here, there = open_shop(redis, online(2)), open_shop(redis, online(2), "shop-2")
    await here.one(member(1), key(1))
    sold = await there.one(member(2), key(1))
    await here.one(member(3), key(1))
    await here.until_it_peeks()
    await stock.give_back(2, sold.value)
    assert (await there.one(member(3), key(1))).decision is Decision.SOLD
    answers = await here.ask(*(Bid(member(n), key(1)) for n in (1, 2, 3, 4)))
    assert decisions(answers) == [Decision.REPLAYED_CHANGED] * 3 + [Decision.SOLD_OUT]
    assert [each.record.state for each in answers[:3]] == [
        OrderState.HELD, OrderState.CANCELLED, OrderState.HELD,
    ]  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True])
async def test_process_keeps_its_holds_as_the_ledger_has_them(
    redis: Redis, open_shop: OpenShop, mixed: bool
) -> None:
    stock = await open_stock(redis, 5)
    shop = open_shop(redis, online(5))
    answers = await shop.ask(*(Bid(member(n), key(n)) for n in range(6 if mixed else 5)))
    assert decisions(answers)[:5] == [Decision.SOLD] * 5
    kept, ledger = await unapplied_and_ledger(stock, shop.batcher)
    assert kept == ledger
    assert {each.pay_before for each in kept} == {answers[0].pay_before_ms}


async def test_process_keeps_a_hold_that_it_told_again(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 5)
    here, there = open_shop(redis, online(5)), open_shop(redis, online(5), "shop-2")
    await here.one(member(1), key(1), 2)
    for _ in range(2):
        again = await there.one(member(1), key(1), 2)
        assert again.decision is Decision.REPLAYED_CHANGED
    kept, ledger = await unapplied_and_ledger(stock, there.batcher)
    assert kept == ledger
