"""Orders that live and end, by the scripts alone: hold, expire, pay, give back."""

import asyncio
import random
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from stock_maker import (
    CAMPAIGN,
    Bid,
    Stock,
    key,
    member,
    now_ms,
    open_stock,
)

from sale.db import read
from sale.db.apply import apply_entries
from sale.domain.order import GIVEN_BACK, LOW_BITS, ORDERS_MAX, OrderPlace, OrderState
from sale.ledger.chain import START, Entry
from sale.ledger.fold import CampaignState
from sale.ledger.kinds import KINDS, MEMBER
from sale.stock.mark import Mark
from sale.stock.records import parse_records
from sale.stock.scripts import CallReply, Decision, OrderReply

HOLD_MS = 300_000
PRICE_FEN = 500
EXPIRED, COLLECTED, LATE, WHOLE = 1, 2, 3, 4
"""Why ``cancel.lua`` refuses, see its header."""


@pytest.fixture
async def conn(database_url: str) -> Any:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


class Shop(Stock):
    """A campaign that is paid online, with the steps of an order's life."""

    async def hold(self, n: int, quantity: int = 1, *, key_no: int = 1, showing: int = 0) -> int:
        """Hold tickets for a member; give the order's number."""
        told = await self.buy_one(member(n), key(key_no), quantity, showing)
        assert told.decision is Decision.SOLD
        return int(told.a)

    async def paid(self, n: int, order: int, *, fen: int | None = None) -> OrderReply:
        """Present money that came in."""
        amount = (await self.order(n, order)).quantity * PRICE_FEN if fen is None else fen
        return await self.scripts.pay(await self.place(n, order), member(n), amount)

    async def give_back(
        self, n: int, order: int, *tickets: int, of: int | None = None
    ) -> OrderReply:
        """Give tickets back as the member does, also of another one's order."""
        mark = Mark(await self.incarnation(), self.seen, "")
        place = await self.place(of or n, order)
        return await self.scripts.cancel(
            place, member(n), tickets, MEMBER, None, mark=mark, limited=True
        )

    async def revoke_order(self, n: int, order: int, *tickets: int) -> OrderReply:
        """Cancel as an operator does."""
        place = await self.place(n, order)
        return await self.scripts.cancel(
            place, member(n), tickets, "cli:me", "wanted", mark=None, limited=False
        )

    async def order(self, n: int, order: int) -> Any:
        (found,) = [each for each in (await self.records())[member(n)] if each.seq == order]
        return found

    async def place(self, n: int, order: int) -> OrderPlace:
        return OrderPlace(self.id, order, (await self.order(n, order)).at_ms & LOW_BITS)

    async def pass_time(self, ms: int = HOLD_MS) -> None:
        """Let the campaign's clock stand ``ms`` further on."""
        (clock,) = await self.head("clock")
        await self.set_clock(max(int(clock), await now_ms(self.redis)) + ms)

    async def state(self, n: int, order: int) -> OrderState:
        return (await self.order(n, order)).state  # type: ignore[no-any-return]


async def open_shop(redis: Redis, *tickets: int, **how: Any) -> Shop:
    how.setdefault("cancel_until_ms", await now_ms(redis) + 86_400_000)
    stock = await open_stock(redis, *tickets, payment="online", **how)
    shop = Shop(redis)
    shop.calls = stock.calls
    return shop


async def test_hold_takes_tickets_until_pay_before(redis: Redis) -> None:
    shop = await open_shop(redis, 5)
    reply = await shop.call(Bid(member(1), key(1), 2))
    assert reply[8] == reply[1] + HOLD_MS
    order = await shop.order(1, reply[6] + 1)
    assert (order.state, order.live, order.letters) == (OrderState.HELD, 2, "vv")
    assert await shop.left() == [3]
    books = await shop.check_books()
    assert books.held == {0: 2}


async def test_hold_expires_at_its_moment_and_not_before(redis: Redis) -> None:
    shop = await open_shop(redis, 5)
    order = await shop.hold(1, 2)
    await shop.pass_time(HOLD_MS - 1_000)
    early = await shop.scripts.expire(shop.id)
    assert early.count == 0
    assert early.next_ends_ms == (await shop.order(1, order)).at_ms + HOLD_MS
    await shop.set_clock(early.next_ends_ms)
    done = await shop.scripts.expire(shop.id)
    assert (done.count, done.next_ends_ms) == (1, 0)
    assert await shop.state(1, order) is OrderState.EXPIRED
    assert await shop.left() == [5]
    assert (await shop.scripts.expire(shop.id)).count == 0
    await shop.check_books()


async def test_nobody_is_refused_for_tickets_whose_time_is_up(redis: Redis) -> None:
    shop = await open_shop(redis, 2)
    await shop.hold(1, 2)
    sold_out = await shop.buy_one(member(2), key(1))
    ends_ms = (await shop.peek()).hold_ends_ms
    assert sold_out == (Decision.SOLD_OUT, 0, 2, ends_ms)
    await shop.set_clock(ends_ms)
    assert (await shop.peek()).due
    (reply,) = await shop.call(Bid(member(2), key(1)))
    assert reply == CallReply.DUE
    (reply,) = await shop.call(Bid(member(1), key(2), 2))  # by the limit
    assert reply == CallReply.DUE
    await shop.scripts.expire(shop.id)
    assert (await shop.buy_one(member(2), key(1), 2)).decision is Decision.SOLD
    await shop.check_books()


@pytest.mark.parametrize("step", ["pause", "close"])
async def test_holds_expire_while_nothing_is_sold(redis: Redis, step: str) -> None:
    shop = await open_shop(redis, 2)
    order = await shop.hold(1, 2)
    await shop.step(step)
    await shop.pass_time()
    assert (await shop.scripts.expire(shop.id)).count == 1
    assert await shop.state(1, order) is OrderState.EXPIRED


async def test_nothing_moves_pay_before(redis: Redis) -> None:
    # HOLES 32
    shop = await open_shop(redis, 5)
    await shop.hold(1)
    before = (await shop.peek()).hold_ends_ms
    await shop.pass_time(60_000)
    again = await shop.buy_one(member(1), key(1))
    assert (again.decision, again.c) == (Decision.REPLAYED_CHANGED, before)
    await shop.hold(1, key_no=2)
    await shop.scripts.expire(shop.id)
    await shop.step("pause")
    await shop.step("resume")
    assert (await shop.peek()).hold_ends_ms == before


async def test_old_key_gives_the_ended_order_and_a_new_one_buys(redis: Redis) -> None:
    # HOLES 6, 45
    shop = await open_shop(redis, 1)
    order = await shop.hold(1)
    await shop.pass_time()
    await shop.scripts.expire(shop.id)
    again = await shop.buy_one(member(1), key(1))
    assert again.decision is Decision.REPLAYED_CHANGED
    (record,) = parse_records(again.a)  # type: ignore[arg-type]
    assert (record.seq, record.state) == (order, OrderState.EXPIRED)
    assert (again.b, again.c) == (3, 0)
    assert await shop.hold(1, key_no=2) > order
    await shop.check_books()


async def test_hold_and_expire_for_ever_ends_at_fifty_orders(redis: Redis) -> None:
    # HOLES 46
    shop = await open_shop(redis, 1)
    for key_no in range(ORDERS_MAX):
        await shop.hold(1, key_no=key_no)
        await shop.pass_time()
        await shop.scripts.expire(shop.id)
    told = await shop.buy_one(member(1), key(99))
    assert told.decision is Decision.TOO_MANY_ORDERS
    assert (await shop.buy_one(member(1), key(0))).decision is Decision.REPLAYED_CHANGED
    assert (await shop.buy_one(member(2), key(1))).decision is Decision.SOLD
    await shop.check_books()


async def test_payment_keeps_a_hold_once(redis: Redis) -> None:
    shop = await open_shop(redis, 2)
    order = await shop.hold(1, 2)
    told = await shop.paid(1, order)
    assert (told.reply, told.values[1]) == (CallReply.OK, b"kept")
    for _ in range(2):
        assert (await shop.paid(1, order)).reply is CallReply.REPLAYED
    await shop.pass_time()
    assert (await shop.scripts.expire(shop.id)).count == 0
    assert await shop.state(1, order) is OrderState.CONFIRMED
    books = await shop.check_books()
    assert books.held == {0: 0}


async def test_late_payment_revives_what_is_still_there(redis: Redis) -> None:
    shop = await open_shop(redis, 2)
    order = await shop.hold(1, 2)
    await shop.pass_time()
    assert (await shop.paid(1, order)).reply is CallReply.DUE
    await shop.scripts.expire(shop.id)
    assert (await shop.paid(1, order)).values[1] == b"revived"
    assert await shop.left() == [0]
    assert (await shop.order(1, order)).live == 2
    await shop.check_books()


@pytest.mark.parametrize("lost", ["ticket", "limit", "revoked", "closed", "paused", "cancelled"])
async def test_late_payment_is_returned_where_nothing_is_left_for_it(
    redis: Redis, lost: str
) -> None:
    # HOLES 24, 27: late against a new buyer, a used-up limit, a revocation, the end of sales
    shop = await open_shop(redis, 4)
    order = await shop.hold(1, 3)
    if lost == "cancelled":
        await shop.give_back(1, order)
    await shop.pass_time()
    await shop.scripts.expire(shop.id)
    if lost == "ticket":
        await shop.hold(2, 3)
    elif lost == "limit":
        await shop.hold(1, 1, key_no=2)
    elif lost == "revoked":
        await shop.scripts.sync_revoked(shop.id, 0, 1, [(member(1), False)])
    elif lost in {"closed", "paused"}:
        await shop.step(lost.removesuffix("d"))
    told = await shop.paid(1, order)
    assert (told.reply, told.values[1]) == (CallReply.OK, b"returned")
    record = await shop.order(1, order)
    assert (record.live, record.paid, record.returned) == (0, True, True)
    assert (await shop.paid(1, order)).reply is CallReply.REPLAYED
    await shop.check_books()


async def test_given_back_ticket_is_on_sale_and_off_the_limit_at_once(redis: Redis) -> None:
    shop = await open_shop(redis, 3)
    order = await shop.hold(1, 3)
    await shop.paid(1, order)
    told = await shop.give_back(1, order, 2)
    assert (told.reply, told.values[4]) == (CallReply.OK, 1)
    assert await shop.left() == [1]
    assert (await shop.buy_one(member(1), key(2))).decision is Decision.SOLD
    books = await shop.check_books()
    assert [each.letters for each in books.members[member(1)]] == ["vxv", "v"]


async def test_repeated_cancellation_gives_nothing_back_twice(redis: Redis) -> None:
    # HOLES 9, 26
    shop = await open_shop(redis, 3)
    order = await shop.hold(1, 3)
    await shop.paid(1, order)
    replies = await asyncio.gather(
        shop.give_back(1, order, 1, 2), shop.give_back(1, order, 2, 3), shop.give_back(1, order)
    )
    assert sum(each.values[4] for each in replies) == 3
    assert (await shop.give_back(1, order)).values[0] == 0
    assert await shop.state(1, order) is OrderState.CANCELLED
    assert await shop.left() == [3]
    await shop.check_books()


async def test_unpaid_hold_is_cancelled_whole_only(redis: Redis) -> None:
    shop = await open_shop(redis, 3)
    order = await shop.hold(1, 2)
    told = await shop.give_back(1, order, 1)
    assert (told.reply, told.values[0]) == (CallReply.WRONG_STATE, WHOLE)
    assert (await shop.give_back(1, order)).values[4] == 2
    assert (await shop.paid(1, order)).values[1] == b"returned"
    await shop.check_books()


async def test_member_is_too_late_and_an_operator_is_not(redis: Redis) -> None:
    shop = await open_shop(redis, 3, cancel_until_ms=await now_ms(redis) + 60_000)
    order = await shop.hold(1, 2)
    await shop.paid(1, order)
    await shop.pass_time(60_000)
    told = await shop.give_back(1, order, 1)
    assert (told.reply, told.values[0]) == (CallReply.WRONG_STATE, LATE)
    assert (await shop.revoke_order(1, order, 1)).values[4] == 1
    assert (await shop.revoke_order(1, order, 1)).values[0] == 0
    await shop.check_books()


async def test_wrong_ticket_or_order_changes_nothing(redis: Redis) -> None:
    shop = await open_shop(redis, 3)
    order = await shop.hold(1, 2)
    before = await shop.everything()
    assert (await shop.give_back(1, order, 1, 3)).values[0] == 3
    place = OrderPlace(shop.id, order, 1)
    mark = Mark(await shop.incarnation(), 0, "")
    for told in (
        await shop.scripts.cancel(place, member(1), (), MEMBER, None, mark=mark, limited=True),
        await shop.give_back(2, order, of=1),
        await shop.scripts.pay(place, member(1), 1_000),
    ):
        assert told.reply is CallReply.NOT_FOUND
    assert await shop.everything() == before


async def test_showing_limit_counts_tickets_of_one_showing(redis: Redis) -> None:
    shop = await open_shop(redis, 9, 9, card_limit=3, showing_limit=2)
    await shop.hold(1, 2)
    told = await shop.buy_one(member(1), key(2))
    assert (told.decision, told.a) == (Decision.LIMIT_EXCEEDED, 0)
    await shop.hold(1, 1, key_no=3, showing=1)
    await shop.check_books()


async def test_two_expirers_give_each_hold_back_once(redis: Redis) -> None:
    shop = await open_shop(redis, 1_000)
    for n in range(600):
        await shop.hold(n)
    await shop.pass_time()
    ended = 0
    while any(
        counts := [
            each.count
            for each in await asyncio.gather(*(shop.scripts.expire(shop.id) for _ in range(2)))
        ]
    ):
        ended += sum(counts)
    assert ended == 600
    assert await shop.left() == [1_000]
    await shop.check_books()


async def test_random_lives_are_the_same_in_redis_fold_and_sql(
    redis: Redis, rng: random.Random, conn: Any
) -> None:
    shop = await open_shop(redis, 12, 8, card_limit=4, showing_limit=3)
    orders: list[tuple[int, int]] = []
    for step in range(400):
        n, dice = rng.randint(1, 6), rng.random()
        if dice < 0.4:
            bid = Bid(member(n), key(rng.randint(1, 200)), rng.randint(1, 3), rng.randint(0, 1))
            reply = await shop.call(bid)
            if reply[0] == CallReply.OK and reply[9] >= 0:
                orders.append((n, reply[6] + 1))
        elif dice < 0.5:
            await shop.scripts.expire(shop.id)
        elif dice < 0.6:
            await shop.pass_time(rng.randint(1, HOLD_MS // 2))
        elif orders:
            n, order = rng.choice(orders)
            if dice < 0.8:
                await shop.paid(n, order)
            else:
                count = (await shop.order(n, order)).quantity
                tickets = rng.sample(range(1, count + 1), rng.randint(0, count))
                await (shop.give_back if dice < 0.95 else shop.revoke_order)(n, order, *tickets)
        if step % 40 == 0:
            await shop.check_books()
    books = await shop.check_books()
    entries = await shop.entries()
    kinds = {event.kind for entry in entries for event in entry.events()}
    assert {"held", "paid", "expired", "cancelled"} <= kinds
    assert breaches(entries) == []
    at = START
    while entries:
        some = rng.randint(1, 20)
        done = await apply_entries(conn, CAMPAIGN, entries[:some], after=at)
        assert done.conflicts == []
        at, entries = done.position, entries[some:]
    assert await orders_in_sql(conn) == {
        (no, record.seq): (record.state, record.live, record.changed, record.paid, record.returned)
        for no, records in books.members.items()
        for record in records
    }
    (stored,) = await read.campaigns(conn)
    assert {each.showing_no: each.stock - each.live for each in stored.showings} == books.remaining
    given_back = await conn.fetch("SELECT seq, no FROM ticket WHERE state = 'cancelled'")
    assert {(row["seq"], row["no"]) for row in given_back} == {
        (record.seq, no)
        for records in books.members.values()
        for record in records
        for no, letter in enumerate(record.letters, 1)
        if letter == GIVEN_BACK
    }


def breaches(entries: list[Entry]) -> list[tuple[str, str]]:
    """What the audit finds in these events."""
    state, found = CampaignState(), list[tuple[str, str]]()
    for entry in entries:
        for event in entry.events():
            found += KINDS[event.kind].breaches(state, event)
            state.apply(event)
    return found


async def orders_in_sql(conn: Any) -> dict[tuple[int, int], tuple[Any, ...]]:
    rows = await conn.fetch(
        "SELECT member_no, seq, state, live, changed_by, paid, returned FROM orders"
    )
    return {(row[0], row[1]): tuple(row)[2:] for row in rows}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("state = 'expired', live = 0", "no order changes so"),
        ("state = 'confirmed', paid = true, changed_by = 99", "without an event"),
        ("state = 'expired', live = 0, changed_by = 99", "without an event"),
        ("live = 1, changed_by = 99", "no order changes so"),
        ("state = 'confirmed', changed_by = 99", "no order changes so"),
    ],
)
async def test_sql_refuses_what_no_event_says(
    redis: Redis, conn: Any, change: str, why: str
) -> None:
    shop = await open_shop(redis, 5)
    await shop.hold(1, 2)
    await apply_entries(conn, CAMPAIGN, await shop.entries())
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match=why):
        await conn.execute(f"UPDATE orders SET {change}")


async def test_expiries_by_the_thousand_are_applied_set_based(redis: Redis, conn: Any) -> None:
    shop = await open_shop(redis, 2_000, card_limit=1_000)
    for n in range(8):
        bids = [Bid(member(300 * n + m), key(1)) for m in range(250)]
        await shop.buy(*bids)
    await apply_entries(conn, CAMPAIGN, await shop.entries())
    after = await read.position(conn, CAMPAIGN)
    await shop.pass_time()
    while (await shop.scripts.expire(shop.id)).count:
        pass
    entries = [each for each in await shop.entries() if each.first > after.seq]
    began = asyncio.get_running_loop().time()
    done = await apply_entries(conn, CAMPAIGN, entries, after=after)
    took_s = asyncio.get_running_loop().time() - began
    assert (done.events, done.conflicts) == (2_000, [])
    assert await conn.fetchval("SELECT sum(live) FROM member_use") == 0
    assert took_s < 10, "one by one, not a run at a time"
