"""Recovery where Redis lost its last events: orders held, paid, given back, expired."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from shop import Shop, open_shop
from stock_maker import CAMPAIGN, campaign, member, now_ms
from test_witness import Api, finish, going_back, seqs

from sale.db import claims, payments
from sale.domain.order import LOW_BITS, OrderPlace, OrderState
from sale.domain.problem import Refused
from sale.ledger.chain import Event, parse_row
from sale.ledger.fold import OrderRecord
from sale.ledger.kinds import CANCELLED, EXPIRED, HELD, MEMBER, PAID
from sale.members.cancel import give_back
from sale.stock.answers import AwaitedPurchase
from sale.stock.keys import REPORTS
from sale.stock.scripts import CallReply, Decision, OrderReply
from sale.trust.auto_recovery import AutoRecovery
from sale.trust.losses import losses
from sale.trust.verify import verify_all

PRICE_FEN = 500
HOLD_MS = 300_000
GRACE_MS = 60_000
MADE = campaign(5, payment="online", cancel_until_ms=4_102_444_800_000)


class Orders:
    """The open campaign of a shop, which is paid online, and two API processes."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.a, self.b = Api(shop, "a", MADE), Api(shop, "b", MADE)

    async def of(self, n: int) -> list[OrderRecord]:
        return (await self.shop.stock.records()).get(member(n), [])

    async def place(self, n: int) -> OrderPlace:
        """Place of the member's first order."""
        order = (await self.of(n))[0]
        return OrderPlace(CAMPAIGN, order.seq, order.at_ms & LOW_BITS)

    async def pay(self, n: int) -> OrderReply:
        """Present the money of the member's first order, which PostgreSQL has first (R2)."""
        amount = (await self.of(n))[0].quantity * PRICE_FEN
        place = await self.place(n)
        number = "".join(chr(ord("a") + int(digit)) for digit in f"{place.seq:026d}")
        async with self.shop.pool.acquire() as connection:
            await payments.begin(
                connection, number, f"order-{place.seq}", place, member(n), amount, "test",
                place.seq, place.seq,
            )  # fmt: skip
            await payments.record_paid(connection, number, amount, "ref")
        return await self.shop.scripts.pay(place, member(n), amount)

    async def give_back(self, n: int, *tickets: int, by: Api) -> int:
        """Give tickets back through an API process."""
        return await give_back(
            self.shop.scripts, await self.place(n), member(n), tickets, MEMBER, None,
            batcher=by.batcher, limited=True,
        )  # fmt: skip

    async def hold_ends(self) -> None:
        """Let every hold be due, and end it."""
        ends = await self.pay_before()
        await self.shop.stock.set_clock(max(ends.values()))
        assert (await self.shop.scripts.expire(CAMPAIGN)).count == len(ends)

    async def pay_before(self) -> dict[str, int]:
        rows = await self.shop.redis.zrange(self.shop.stock.keys.holds, 0, -1, withscores=True)
        return {name.decode(): int(ends) for name, ends in rows}

    async def recover_by_itself(self, *apis: Api) -> None:
        """Recover as the scheduler does: only if nothing is lost."""
        for api in apis:
            await api.check_acknowledged()
        unfit = await verify_all(self.shop.redis, self.shop.scripts, self.shop.pool)
        assert unfit == [CAMPAIGN]
        recovery = AutoRecovery(self.shop.redis, self.shop.scripts, self.shop.pool, allowed=True)
        await recovery.recover_unfit(unfit)
        assert await verify_all(self.shop.redis, self.shop.scripts, self.shop.pool) == []

    async def finish(self) -> None:
        """Let the writer apply all of it; nothing is lost, and nothing contradicts."""
        report = await finish(self.shop)
        assert report.clean, report
        listed = await losses(self.shop.pool, CAMPAIGN)
        assert (listed.voided, listed.conflicts) == ([], [])
        async with self.shop.pool.acquire() as connection:
            assert {each.settled for each in await claims.settle(connection)} <= {"stands"}

    async def kinds(self) -> list[str]:
        rows = await self.shop.pool.fetch("SELECT kind FROM event ORDER BY seq")
        return [row["kind"] for row in rows]


@pytest.fixture
async def orders(redis: Redis, redis_url: str, database_url: str) -> AsyncIterator[Orders]:
    """PostgreSQL has only `created` and `opened`; its writer is stopped."""
    async with open_shop(redis_url, database_url) as shop:
        await shop.start_writer()
        await shop.create(MADE)
        await shop.step("open")
        await shop.applied()
        await shop.stop_writer()
        orders = Orders(shop)
        yield orders
        for api in (orders.a, orders.b):
            await api.close()


# One lost step ---------------------------------------------------------------------------------


async def test_lost_holds_are_filled_and_last_as_they_were_told(orders: Orders) -> None:
    async with going_back(orders.shop):
        told = await orders.a.buy(1, 2)
    await orders.recover_by_itself(orders.a)
    again = await orders.b.buy(1, 2)
    assert [each.decision for each in again] == [Decision.REPLAYED_CHANGED] * 2
    assert [(each.value, each.pay_before_ms) for each in again] == [
        (each.value, each.pay_before_ms) for each in told
    ]
    assert await orders.shop.stock.left() == [3]
    await orders.finish()


async def test_lost_cancellation_is_handed_in_and_filled(orders: Orders) -> None:
    seqs(await orders.a.buy(1, 2))
    await orders.pay(1)
    async with going_back(orders.shop):
        done = await orders.give_back(1, by=orders.a)
        await orders.give_back(2, by=orders.a)
    await orders.recover_by_itself(orders.a)
    (first,), (second,) = await orders.of(1), await orders.of(2)
    assert (first.state, first.letters, first.changed) == (OrderState.CANCELLED, "x", done)
    assert second.state is OrderState.CANCELLED
    assert await orders.give_back(1, by=orders.b) == 0
    assert await orders.shop.stock.left() == [5]
    assert await orders.pay_before() == {}
    await orders.finish()


async def test_lost_payment_is_voided_and_presented_again(orders: Orders) -> None:
    # PostgreSQL has the payment, so no API process keeps the step (R2).
    seqs(await orders.a.buy(1))
    ends = await orders.pay_before()
    async with going_back(orders.shop):
        assert (await orders.pay(1)).values[1] == b"kept"
        told = seqs(await orders.a.buy(2))
    await orders.a.check_acknowledged()
    assert await verify_all(orders.shop.redis, orders.shop.scripts, orders.shop.pool) == [CAMPAIGN]
    done = await orders.shop.recover()
    assert (done.filled, done.voided, done.conflicts) == (1, [(told[0] - 1, told[0] - 1)], 0)
    assert (await orders.of(1))[0].state is OrderState.HELD
    assert ends.items() <= (await orders.pay_before()).items()
    assert (await orders.pay(1)).values[1] == b"kept"
    assert (await orders.pay(1)).reply is CallReply.REPLAYED
    report = await finish(orders.shop)
    assert report.clean, report
    assert (await losses(orders.shop.pool, CAMPAIGN)).voided == done.voided


# A lost step and a sale after it ---------------------------------------------------------------


async def test_lost_expiry_and_resale_are_both_filled(orders: Orders) -> None:
    """A torn tail with an expiry and a resale.

    No process is told of an expiry: the recovery ends what was due before it fills in the sale.
    """
    seqs(await orders.a.buy(1, 2, 3, 4, 5))
    async with going_back(orders.shop):
        await orders.hold_ends()
        told = seqs(await orders.b.buy(6, 7))
    await orders.recover_by_itself(orders.b)
    again = await orders.a.buy(6, 7)
    assert [each.value for each in again] == told
    assert [(await orders.of(n))[0].state for n in range(1, 6)] == [OrderState.EXPIRED] * 5
    assert await orders.shop.stock.left() == [3]
    await orders.finish()
    assert (await orders.kinds())[-8:] == [EXPIRED] * 5 + [HELD] * 2 + ["recovered"]


async def test_sale_between_hides_no_lost_expiry(orders: Orders) -> None:
    """Found by the random tails: the first sales after the expiries did not need their tickets."""
    seqs(await orders.a.buy(1, 2, 3))
    async with going_back(orders.shop):
        await orders.hold_ends()
        told = seqs(await orders.b.buy(4, 5, 6, 7))
    await orders.recover_by_itself(orders.b)
    assert [each.value for each in await orders.a.buy(4, 5, 6, 7)] == told
    assert [(await orders.of(n))[0].state for n in (1, 2, 3)] == [OrderState.EXPIRED] * 3
    await orders.finish()


async def test_expiry_that_nothing_follows_is_repeated(orders: Orders) -> None:
    seqs(await orders.a.buy(1))
    async with going_back(orders.shop):
        await orders.hold_ends()
    assert await verify_all(orders.shop.redis, orders.shop.scripts, orders.shop.pool) == []
    assert (await orders.of(1))[0].state is OrderState.HELD
    await orders.hold_ends()
    await orders.finish()


async def test_lost_cancellation_and_resale_are_both_filled(orders: Orders) -> None:
    """A torn tail with a cancellation and a resale, each told by another process."""
    seqs(await orders.a.buy(1, 2, 3, 4, 5))
    await orders.pay(1)
    async with going_back(orders.shop):
        await orders.give_back(1, by=orders.a)
        told = seqs(await orders.b.buy(6))
    await orders.recover_by_itself(orders.a, orders.b)
    assert [each.value for each in await orders.a.buy(6)] == told
    assert (await orders.of(1))[0].state is OrderState.CANCELLED
    assert await orders.shop.stock.left() == [0]
    await orders.finish()


async def test_resale_of_an_unknown_cancellation_is_listed(orders: Orders) -> None:
    """The process that was told of the cancellation died: its ticket cannot be sold twice."""
    seqs(await orders.a.buy(1, 2, 3, 4, 5))
    async with going_back(orders.shop):
        await orders.give_back(1, by=orders.a)
        told = seqs(await orders.b.buy(6))
    await orders.b.check_acknowledged()
    await orders.shop.redis.hdel(REPORTS, "a")
    await verify_all(orders.shop.redis, orders.shop.scripts, orders.shop.pool)
    done = await orders.shop.recover()
    assert (done.filled, done.voided) == (0, [(told[0] - 1, told[0])])
    assert (await orders.of(1))[0].live == 1
    await orders.shop.start_writer()
    await orders.shop.applied()
    async with orders.shop.pool.acquire() as connection:
        await claims.settle(connection)
    (listed,) = (await losses(orders.shop.pool, CAMPAIGN)).conflicts
    assert (listed.seq, listed.kind, listed.member) == (told[0], HELD, member(6))


async def test_hold_that_was_due_ends_before_a_lost_cancellation(orders: Orders) -> None:
    """The claims after a lost expiry name another order: nothing of them needs the tickets."""
    seqs(await orders.a.buy(1, 2))
    await orders.pay(2)
    async with going_back(orders.shop):
        await orders.hold_ends()
        await orders.give_back(2, by=orders.b)
    await orders.b.check_acknowledged()
    await verify_all(orders.shop.redis, orders.shop.scripts, orders.shop.pool)
    done = await orders.shop.recover()
    assert (done.filled, done.conflicts) == (1, 0)
    assert (await orders.of(2))[0].state is OrderState.CANCELLED
    report = await finish(orders.shop)
    assert report.clean, report


async def test_two_cancellations_are_filled_where_the_stream_lost_them(orders: Orders) -> None:
    """The members' records survive and show both as one: what processes know comes first."""
    seqs(await orders.a.buy(1, 2))
    stock = orders.shop.stock
    told = seqs(await _buy(orders.a, 3, 3))
    await orders.pay(3)
    lost = [await orders.give_back(3, no, by=orders.a) for no in (1, 3)]
    for seq in lost:
        await orders.shop.redis.xdel(stock.keys.stream, f"{seq}-0")
    await orders.a.check_acknowledged()
    done = await orders.shop.recover()
    assert (done.filled, done.voided, done.conflicts) == (2, [], 0)
    (order,) = await orders.of(3)
    assert (order.seq, order.letters, order.changed) == (told[0], "xvx", lost[1])
    await orders.finish()


async def _buy(api: Api, n: int, quantity: int) -> Any:
    loop = asyncio.get_running_loop()
    bid = AwaitedPurchase(member(n), "dongsi", 0, quantity, "0" * 16, loop)
    assert api.batcher.submit(bid)
    return [await bid.answer]


# Grace -----------------------------------------------------------------------------------------


async def test_no_hold_ends_within_a_minute_after_a_recovery(orders: Orders) -> None:
    shop = orders.shop
    seqs(await orders.a.buy(1))
    async with going_back(shop):
        seqs(await orders.b.buy(2))
    before = await orders.pay_before()
    await orders.recover_by_itself(orders.b)
    ends = await orders.pay_before()
    assert before.items() <= ends.items()
    (clock,) = await shop.stock.head("clock")
    (grace,) = await shop.stock.head("grace_until")
    assert int(grace) == int(clock) + GRACE_MS
    # The holds are due, and end only when the minute is over.
    await shop.redis.hset(shop.stock.keys.head, "grace_until", max(ends.values()) + GRACE_MS)
    await shop.stock.set_clock(max(ends.values()) + GRACE_MS - 1_000)
    assert (await shop.scripts.expire(CAMPAIGN)).count == 0
    assert await orders.pay_before() == ends
    assert (await orders.pay(1)).values[1] == b"kept"
    await shop.stock.set_clock(max(ends.values()) + GRACE_MS)
    assert (await shop.scripts.expire(CAMPAIGN)).count == 1
    assert (await orders.of(2))[0].state is OrderState.EXPIRED
    await orders.finish()


async def test_restart_on_whole_files_has_no_grace(orders: Orders) -> None:
    shop = orders.shop
    seqs(await orders.a.buy(1))
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    await orders.hold_ends()
    await orders.finish()


# Rebuild and audit -----------------------------------------------------------------------------


async def _life(orders: Orders) -> None:
    """An order of each state, and holds that last."""
    seqs(await orders.a.buy(1, 2, 3))
    await orders.hold_ends()
    await orders.pay(1)  # revived
    seqs(await orders.a.buy(4, 5, 6))
    await orders.pay(4)
    await orders.give_back(4, by=orders.a)
    await orders.give_back(5, by=orders.a)
    await orders.pay(5)  # returned


async def test_campaign_with_holds_is_rebuilt_from_postgres(orders: Orders) -> None:
    shop = orders.shop
    await _life(orders)
    await shop.start_writer()
    await shop.applied()
    before = [await shop.stock.records(), await orders.pay_before(), await _stock(shop)]
    assert len(before[1]) == 1
    await shop.redis.unlink(*shop.stock.keys)
    assert (await shop.recover()).changed
    assert [await shop.stock.records(), await orders.pay_before(), await _stock(shop)] == before
    await shop.applied()
    assert (await shop.audit()).clean


async def _stock(shop: Shop) -> dict[bytes, bytes]:
    return await shop.redis.hgetall(shop.stock.keys.stock)  # type: ignore[no-any-return]


@pytest.mark.parametrize("damage", ["lost", "moved", "foreign", "count", "state", "letters"])
async def test_audit_and_recovery_find_damaged_holds(orders: Orders, damage: str) -> None:
    shop, keys = orders.shop, orders.shop.stock.keys
    await _life(orders)
    await shop.start_writer()
    await shop.applied()
    assert (await shop.audit()).clean
    before = await orders.pay_before()
    ((name, ends),) = before.items()
    records = await shop.stock.records()
    if damage == "lost":
        await shop.redis.zrem(keys.holds, name)
    elif damage == "moved":
        await shop.redis.zadd(keys.holds, {name: ends + 1})
    elif damage == "foreign":
        await shop.redis.zadd(keys.holds, {f"3:{member(1)}": ends})
    elif damage == "count":
        await shop.redis.hincrby(keys.stock, "h0", 1)
    else:
        value = bytearray(await shop.redis.hget(keys.members, str(member(6))))
        value[33] = 2 if damage == "state" else value[33]
        value[-1] = ord("x") if damage == "letters" else value[-1]
        await shop.redis.hset(keys.members, str(member(6)), bytes(value))
    assert not (await shop.audit()).clean
    assert (await shop.recover()).changed
    assert (await orders.pay_before(), await shop.stock.records()) == (before, records)
    await shop.applied()
    assert (await shop.audit()).clean


# Each kind, there and back ---------------------------------------------------------------------


async def test_each_kind_reads_back_from_its_row_and_from_sql(orders: Orders) -> None:
    shop = orders.shop
    await _life(orders)
    await shop.step("stock", showing="s0", add=3)
    for step in ("pause", "resume", "close", "reopen"):
        await shop.step(step)
    events = [event for entry in await shop.stock.entries() for event in entry.events()]
    assert {HELD, EXPIRED, PAID, CANCELLED, "stock_added", "closed"} <= {e.kind for e in events}
    for event in events:
        again = parse_row(event.seq, event.at_ms, event.epoch, msgspec.json.encode(event.row()))
        assert again == event
    await shop.start_writer()
    await shop.applied()
    rows = await shop.pool.fetch("SELECT seq, event_row(e) AS row FROM event e ORDER BY seq")
    assert [msgspec.json.decode(row["row"]) for row in rows] == [event.row() for event in events]
    async with shop.pool.acquire() as connection:
        await claims.hand_in(connection, CAMPAIGN, "a", events)
        await claims.hand_in(connection, CAMPAIGN, "b", events)  # the same rows
        assert await claims.unsettled(connection, CAMPAIGN, 0) == events
        settled = await claims.settle(connection)
    assert [(each.seq, each.settled) for each in settled] == [
        (event.seq, "stands") for event in events
    ]


# Random tails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(4))
async def test_random_lost_tail_is_filled_in(orders: Orders, rng: random.Random, turn: int) -> None:
    """Whatever processes acknowledged after the last file of Redis stands after the recovery."""
    shop = orders.shop
    numbers = list(range(1, 9))
    seqs([each for each in await orders.a.buy(1, 2, 3) if each.decision is Decision.SOLD])
    await orders.pay(2)
    told: list[Event] = []
    async with going_back(shop):
        for step in range(12):
            api, n, dice = rng.choice([orders.a, orders.b]), rng.choice(numbers), rng.random()
            if dice < 0.5:
                await api.buy(n, key_no=step + 10)
            elif dice < 0.6:
                (clock,) = await shop.stock.head("clock")
                behind = max(int(clock), await now_ms(shop.redis))
                await shop.stock.set_clock(behind + rng.choice([1_000, HOLD_MS]))
            elif await orders.of(n) and (await orders.of(n))[0].live:
                with contextlib.suppress(Refused):
                    await orders.give_back(n, by=api)
        told = [*orders.a.batcher.unapplied.events(), *orders.b.batcher.unapplied.events()]
    beyond = [event for event in told if event.seq > int((await shop.stock.head("seq"))[0])]
    assert beyond, "nothing was lost"
    for api in (orders.a, orders.b):
        await api.check_acknowledged()
    await verify_all(shop.redis, shop.scripts, shop.pool)
    done = await shop.recover()
    assert done.conflicts == 0, done
    await shop.start_writer()
    await shop.applied()
    rows = await shop.pool.fetch("SELECT seq, event_row(e) AS row FROM event e")
    ledger = {row["seq"]: msgspec.json.decode(row["row"]) for row in rows}
    assert {event.seq: event.row() for event in told}.items() <= ledger.items()
    report = await shop.audit()
    assert report.clean, report
