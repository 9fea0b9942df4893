"""The keeper against a provider of the tests' own: money goes back once, whatever happens."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest
from money_maker import PRICE_FEN, Till, open_till
from shop import Shop
from stock_maker import member
from waiting import until, until_equal

from sale.db import payments
from sale.domain.order import OrderState
from sale.jobs import keeper as keeper_module
from sale.jobs.keeper import PUT_OFF_MAX_S, STUCK_AFTER, Keeper, backoff_s
from sale.members.pay import payment_number
from sale.members.provider import Paid
from sale.members.test_provider import TestProvider
from sale.operators.diagnosis import diagnose

TAKEN_OVER_S = 3.0
REFUNDS = 200


@pytest.fixture
async def till(shop: Shop) -> Till:
    return await open_till(shop)


@contextlib.asynccontextmanager
async def working(keeper: Keeper) -> AsyncIterator[asyncio.Event]:
    """While the block runs, so does the keeper, unless the event is set."""
    stop = asyncio.Event()
    task = asyncio.create_task(keeper.run(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 15.0)


async def one_refund(till: Till, *plan: str) -> str:
    """Sell an order and give it back; its refund is due and goes by ``plan``."""
    await till.sell(1)
    await till.give_back(1)
    (number,) = await till.refunds()
    till.bank.plan[number] = list(plan)
    return number


async def state_of(till: Till, number: str) -> tuple[str, int]:
    row = (await till.refunds())[number]
    return row["state"], row["tries"]


async def test_refund_that_timed_out_is_found_done(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "PROVIDER_TIMEOUT_S", 0.1)
    number = await one_refund(till, "lost", "done")
    keeper = till.keeper()
    await keeper.refund()
    assert await state_of(till, number) == ("due", 1)
    assert (await till.refunds())[number]["trouble"] == "TimeoutError"
    await till.hurry()
    await keeper.refund()
    assert (await state_of(till, number))[0] == "done"
    assert till.bank.returned == {number: PRICE_FEN}
    assert till.bank.asked[number] == 2


async def test_refund_accepted_twice_goes_back_once(till: Till) -> None:
    number = await one_refund(till, "accepted", "refused", "accepted", "away", "done")
    keeper = till.keeper()
    states = []
    for _ in range(5):
        await till.hurry()
        await keeper.refund()
        states.append((await state_of(till, number))[0])
    assert states == ["sent", "due", "sent", "sent", "done"]
    assert till.bank.returned == {number: PRICE_FEN}
    assert (till.bank.asked[number], till.bank.asked[f"query {number}"]) == (2, 3)


@pytest.mark.parametrize("fails", ["refused", "away", "broken"])
async def test_refund_that_fails_for_ever_is_stuck_and_shown(till: Till, fails: str) -> None:
    number = await one_refund(till, fails)
    keeper = till.keeper()
    for tries in range(1, STUCK_AFTER + 1):
        assert (await state_of(till, number))[0] == "due"
        await till.hurry()
        await keeper.refund()
        assert (await state_of(till, number))[1] == tries
    assert (await state_of(till, number))[0] == "stuck"
    await till.hurry()
    await keeper.refund()
    assert till.bank.asked[number] == STUCK_AFTER, "a stuck refund is left to people"

    shop = till.shop
    async with shop.pool.acquire() as connection:
        (shown,) = await payments.stuck(connection)
        (row,) = await payments.money(connection, None, None, "UTC")
    assert (shown.what, shown.number, shown.amount_fen) == ("refund", number, PRICE_FEN)
    assert (row.taken_fen, row.kept_fen, row.stuck_fen) == (PRICE_FEN, 0, PRICE_FEN)
    found = await diagnose(shop.redis, shop.pool)
    assert found.money == ["1 refunds are stuck, 500 fen: sale report money"]
    assert not found.sound
    async with working(keeper):
        await until_equal(lambda: till.shown("sale_refunds", state="stuck"), 1)
        # What docs/OPERATIONS.md tells people to do once the cause is gone.
        till.bank.plan[number] = ["done"]
        await shop.pool.execute(
            "UPDATE refund SET state = 'due', tries = 0, next_at = now()"
            " WHERE refund_no = $1 AND state = 'stuck'",
            number,
        )
        await until(lambda: till.bank.returned == {number: PRICE_FEN})
        await until_equal(lambda: till.shown("sale_refunds", state="stuck"), 0)
    assert (await shop.audit()).clean


async def test_disputed_payment_is_shown_to_people(till: Till) -> None:
    await till.hold(1)
    async with till.shop.pool.acquire() as connection:
        await payments.record_paid(connection, payment_number(till.orders[1]), 499, "ref")
    keeper = till.keeper()
    await keeper.present_taken()
    await keeper.ask()
    found = await diagnose(till.shop.redis, till.shop.pool)
    assert found.money == ["1 payments are disputed, 499 fen: sale report money"]


async def test_refund_that_takes_days_is_not_stuck(till: Till) -> None:
    number = await one_refund(till, *["accepted"] * (STUCK_AFTER + 5), "away", "accepted")
    keeper = till.keeper()
    for _ in range(STUCK_AFTER + 5):
        await till.hurry()
        await keeper.refund()
    await till.hurry()
    await keeper.refund()
    assert await state_of(till, number) == ("sent", 1)
    assert till.bank.asked[number] == 1
    await till.shop.damage("UPDATE refund SET created_at = now() - interval '1 day'")
    await till.hurry()
    await keeper.refund()
    wait_s = await till.shop.pool.fetchval("SELECT extract(epoch FROM next_at - now()) FROM refund")
    assert 590 < wait_s <= 600, "an old one is asked about rarely, so that it delays no other"


async def test_refunds_arrive_once_though_keepers_are_cancelled(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    # HOLES 31
    monkeypatch.setattr(keeper_module, "TAKEN_FOR_S", 0.3)
    numbers = range(1, REFUNDS + 1)
    await till.sell(*numbers)
    await till.give_back(*numbers)
    expected = {number: row["amount_fen"] for number, row in (await till.refunds()).items()}
    assert len(expected) == REFUNDS
    chance = random.Random(31)
    till.bank.pause_s = 0.005
    cancelled = 0
    async with asyncio.timeout(60):
        while len(await _undone(till)):
            keeper = till.keeper(refunds_per_s=500)
            turns = [asyncio.create_task(keeper.refund()) for _ in range(2)]
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            for turn in turns:
                cancelled += turn.cancel()
            await asyncio.gather(*turns, return_exceptions=True)
    assert till.bank.returned == expected
    assert cancelled > 3
    assert max(till.bank.asked.values()) > 1, "no keeper was cancelled in the middle of a refund"
    assert (await till.shop.audit()).clean


async def _undone(till: Till) -> list[str]:
    return [number for number, row in (await till.refunds()).items() if row["state"] != "done"]


async def test_standby_takes_over_from_a_killed_keeper(till: Till) -> None:
    first, second = till.keeper(), None
    one = till.registry
    killed = asyncio.create_task(first.run(asyncio.Event()))
    await until_equal(lambda: one.get_sample_value("sale_keeper_active"), 1)
    second = till.keeper()
    async with working(second):
        await until(lambda: second.active is False)
        await till.hold(*range(1, 41))
        await till.take_money(*range(1, 21))
        await asyncio.sleep(0.1)
        killed.cancel()
        await asyncio.gather(killed, return_exceptions=True)
        assert one.get_sample_value("sale_keeper_active") == 0
        await till.take_money(*range(21, 41))
        await until_equal(lambda: till.shown("sale_keeper_active"), 1, TAKEN_OVER_S)
        await till.hurry()
        await until_equal(lambda: _confirmed(till), 40)
    await till.shop.applied()
    paid = await till.shop.pool.fetch("SELECT order_seq FROM event WHERE kind = 'paid'")
    assert len({row["order_seq"] for row in paid}) == len(paid) == 40
    assert (await till.shop.audit()).clean


async def _confirmed(till: Till) -> int:
    records = await till.shop.stock.records()
    return sum(each.state is OrderState.CONFIRMED for rows in records.values() for each in rows)


def test_backoff_is_bounded() -> None:
    waits = [backoff_s(tries) for tries in range(1, STUCK_AFTER + 1)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (2.0, PUT_OFF_MAX_S)
    assert 600 < sum(waits) < 3_600, "a refund is stuck only after a quarter of an hour"
    assert backoff_s(10**9) == PUT_OFF_MAX_S


async def test_bad_row_stops_no_other(till: Till) -> None:
    await till.sell(*range(1, 7))
    await till.give_back(1, 2, 3)
    bad, *good = await till.refunds()
    till.bank.plan[bad] = ["broken"]
    await till.hold(7, 8, 9)
    await till.take_money(7, 8, 9)
    await till.shop.damage(
        f"UPDATE payment SET order_no = 'unreadable' WHERE order_no = '{till.orders[7]}'"
    )
    keeper = till.keeper()
    await keeper.refund()
    await keeper.present_taken()
    assert set(till.bank.returned) == set(good)
    records = await till.shop.stock.records()
    states = [records[member(n)][0].state for n in (7, 8, 9)]
    assert states == [OrderState.HELD, OrderState.CONFIRMED, OrderState.CONFIRMED]
    trouble = await till.shop.pool.fetchval(
        "SELECT trouble FROM payment WHERE order_no = 'unreadable'"
    )
    assert trouble == "its order number cannot be read"


async def test_silent_provider_delays_no_presentation(till: Till) -> None:
    till.bank.silent = True
    await till.hold(*range(1, 101))
    await till.hurry()
    async with working(till.keeper()) as stop:
        await until_equal(lambda: till.shown("sale_keeper_active"), 1)
        await asyncio.sleep(0.5)  # the keeper waits for the provider
        await till.take_money(1)
        await until_equal(lambda: _confirmed(till), 1, 2.0)
        stop.set()


async def test_refunds_keep_within_their_rate(till: Till) -> None:
    await till.sell(*range(1, 51))
    await till.give_back(*range(1, 51))
    async with working(till.keeper(refunds_per_s=10)) as stop:
        await until(lambda: len(till.bank.returned))
        await asyncio.sleep(1.5)
        stop.set()
        assert 5 <= len(till.bank.returned) <= 25


async def test_keeper_waits_while_redis_is_not_trusted(till: Till) -> None:
    await till.hold(1)
    await till.take_money(1)
    await till.shop.redis.hset(till.shop.stock.keys.head, "recovering", "by hand")
    keeper = till.keeper()
    await keeper.present_taken()
    assert await _confirmed(till) == 0
    assert till.shown("sale_payments_total", outcome="not-presented") == 1
    await till.shop.redis.hdel(till.shop.stock.keys.head, "recovering")
    await till.hurry()
    await keeper.present_taken()
    assert await _confirmed(till) == 1
    assert till.shown("sale_payments_total", outcome="presented") == 1


async def test_payment_that_never_reached_its_provider_is_closed(till: Till) -> None:
    provider = TestProvider(till.shop.pool, b"secret")
    await till.hold(1)
    payment_no = payment_number(till.orders[1])
    assert (await provider.close(payment_no)).paid is Paid.CLOSED
    await provider.create(payment_no, PRICE_FEN, 2**41, "/")  # comes late
    payment, notice = await provider.act(payment_no, "paid")
    assert payment is not None
    assert (payment.state, notice) == ("closed", None)
