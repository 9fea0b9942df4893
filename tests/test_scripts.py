"""The Lua scripts on a real Redis: each script, each reply, each boundary."""

import random
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from stock_maker import (
    NONCE,
    PROCESS,
    Bid,
    Result,
    Stock,
    campaign,
    key,
    member,
    memory_kept_tiny,
    now_ms,
    open_stock,
    operation,
    results,
)

from sale.domain.campaign import STOCK_MAX
from sale.ledger.chain import CorruptLedger
from sale.stock.catalogue import read_campaign
from sale.stock.records import RECORD, parse_records, read_member
from sale.stock.scripts import CallReply, Decision, Scripts, Untrusted

HOUR_MS = 3_600_000
no_memory = asynccontextmanager(memory_kept_tiny)


# Stock: INV-1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stock_size", [0, 1, 10])
@pytest.mark.parametrize("in_one_call", [True, False])
async def test_stock_of_n_sells_exactly_n(redis: Redis, stock_size: int, in_one_call: bool) -> None:
    """HOLES.md row 1: ``>=`` sells 11 of 10."""
    stock = await open_stock(redis, stock_size)
    bids = [Bid(member(n), key(1)) for n in range(stock_size + 3)]
    if in_one_call:
        answers = await stock.buy(*bids)
    else:
        answers = [(await stock.buy(bid))[0] for bid in bids]
    assert [a.decision for a in answers] == [Decision.SOLD] * stock_size + [Decision.SOLD_OUT] * 3
    assert {a.a for a in answers[stock_size:]} == {0}
    assert await stock.left() == [0]
    await stock.check_books()


async def test_mixed_quantities_sell_the_last_ticket(redis: Redis) -> None:
    stock = await open_stock(redis, 10)
    answers = await stock.buy(
        *(Bid(member(n), key(1), quantity) for n, quantity in enumerate([3, 3, 3, 2, 3, 1, 1]))
    )
    assert [(a.decision, a.a) for a in answers[3:]] == [
        (Decision.SOLD_OUT, 1),
        (Decision.SOLD_OUT, 1),
        (Decision.SOLD, answers[2].a + 1),
        (Decision.SOLD_OUT, 0),
    ]
    assert await stock.left() == [0]


async def test_showings_have_their_own_stock_and_share_the_limit(redis: Redis) -> None:
    stock = await open_stock(redis, 1, 5, card_limit=3)
    answers = await stock.buy(
        Bid(member(1), key(1), 1, 0),
        Bid(member(2), key(1), 1, 0),
        Bid(member(1), key(2), 2, 1),
        Bid(member(1), key(3), 1, 1),
    )
    assert [a.decision for a in answers] == [
        Decision.SOLD, Decision.SOLD_OUT, Decision.SOLD, Decision.LIMIT_EXCEEDED,
    ]  # fmt: skip
    assert await stock.left() == [0, 3]


async def test_lost_stock_is_not_told_as_sold_out(redis: Redis) -> None:
    stock = await open_stock(redis, 5, 5)
    await redis.hdel(stock.keys.stock, "r1")
    reply = await stock.call(Bid(member(1), key(1), 1, 0), Bid(member(2), key(1), 1, 1))
    assert reply == [CallReply.BROKEN]
    assert await redis.hget(stock.keys.stock, "r0") == b"5"
    with pytest.raises(Untrusted):
        await stock.peek(2)


@pytest.mark.parametrize("quantity", [0, -1, 3, 10**9])
async def test_no_such_quantity(redis: Redis, quantity: int) -> None:
    stock = await open_stock(redis, 5, 5, card_limit=3, order_max=2)
    before = await stock.left()
    answer = await stock.buy_one(member(1), key(1), quantity, 0)
    assert answer.decision is Decision.BAD_QUANTITY
    assert await stock.left() == before
    await stock.check_books()


# Limit: INV-2 -----------------------------------------------------------------------------------


async def test_limit_is_passed_to_the_ticket_and_no_further(redis: Redis) -> None:
    stock = await open_stock(redis, 100, card_limit=3, order_max=2)
    assert (await stock.buy_one(member(1), key(1), 2)).b == 1
    refused = await stock.buy_one(member(1), key(2), 2)
    assert (refused.decision, refused.a) == (Decision.LIMIT_EXCEEDED, 1)
    assert (await stock.buy_one(member(1), key(3), 1)).b == 0
    refused = await stock.buy_one(member(1), key(4), 1)
    assert (refused.decision, refused.a) == (Decision.LIMIT_EXCEEDED, 0)
    assert await stock.left() == [97]


async def test_limit_holds_within_one_batch(redis: Redis) -> None:
    stock = await open_stock(redis, 100, card_limit=2, order_max=1)
    answers = await stock.buy(*(Bid(member(1), key(n)) for n in range(5)))
    assert [a.decision for a in answers] == [Decision.SOLD] * 2 + [Decision.LIMIT_EXCEEDED] * 3
    assert [a.b for a in answers[:2]] == [1, 0]
    assert await stock.left() == [98]
    await stock.check_books()


async def test_limit_is_told_before_the_stock(redis: Redis) -> None:
    stock = await open_stock(redis, 1, card_limit=1)
    await stock.buy(Bid(member(1), key(1)))
    assert (await stock.buy_one(member(1), key(2))).decision is Decision.LIMIT_EXCEEDED
    assert (await stock.buy_one(member(2), key(2))).decision is Decision.SOLD_OUT


# Keys: INV-4 ------------------------------------------------------------------------------------


async def test_same_key_gives_the_same_order(redis: Redis) -> None:
    stock = await open_stock(redis, 10)
    sold = await stock.buy_one(member(1), key(1), 2)
    await stock.buy_one(member(1), key(2), 1)
    replayed = await stock.buy_one(member(1), key(1), 2)
    assert replayed.decision is Decision.REPLAYED
    assert replayed.a == sold.a
    assert replayed.b == 0
    assert replayed.c == (await stock.entries())[2].at_ms
    assert await stock.left() == [7]


async def test_same_key_twice_in_one_batch_is_one_order(redis: Redis) -> None:
    stock = await open_stock(redis, 10)
    first, second, third = await stock.buy(
        Bid(member(1), key(1)), Bid(member(1), key(1)), Bid(member(1), key(1), 2)
    )
    assert (first.decision, second.decision) == (Decision.SOLD, Decision.REPLAYED)
    assert first.a == second.a
    assert third.decision is Decision.KEY_MISMATCH
    assert await stock.left() == [9]


async def test_same_key_with_other_content_is_refused(redis: Redis) -> None:
    stock = await open_stock(redis, 10, 10)
    await stock.buy_one(member(1), key(1), 1, 0)
    assert (await stock.buy_one(member(1), key(1), 2, 0)).decision is Decision.KEY_MISMATCH
    assert (await stock.buy_one(member(1), key(1), 1, 1)).decision is Decision.KEY_MISMATCH
    assert await stock.left() == [9, 10]


async def test_key_belongs_to_the_card(redis: Redis) -> None:
    """HOLES.md row 15: the key was not scoped to the buyer."""
    stock = await open_stock(redis, 10)
    first = await stock.buy_one(member(1), key(1))
    second = await stock.buy_one(member(2), key(1), 2)
    assert second.decision is Decision.SOLD
    assert second.a != first.a


async def test_refusal_is_not_remembered_under_its_key(redis: Redis) -> None:
    """HOLES.md row 5: a failed first try was replayed as success."""
    stock = await open_stock(redis, 0)
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD_OUT
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD_OUT
    await stock.scripts.add_stock(stock.id, operation(), 0, 1)
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD


@pytest.mark.parametrize("since", ["sold out", "paused", "closed"])
async def test_replay_and_mismatch_do_not_depend_on_later_state(redis: Redis, since: str) -> None:
    """HOLES.md row 23: nothing gave the member the order again."""
    stock = await open_stock(redis, 2, card_limit=2)
    sold = await stock.buy_one(member(1), key(1))
    if since == "sold out":
        await stock.buy_one(member(2), key(1))
    else:
        await stock.step("pause" if since == "paused" else "close")
    replayed = await stock.buy_one(member(1), key(1))
    assert (replayed.decision, replayed.a) == (Decision.REPLAYED, sold.a)
    assert (await stock.buy_one(member(1), key(1), 2)).decision is Decision.KEY_MISMATCH
    told = {"sold out": Decision.SOLD_OUT, "paused": Decision.PAUSED, "closed": Decision.CLOSED}
    assert (await stock.buy_one(member(3), key(1))).decision is told[since]


# Window: INV-7 ----------------------------------------------------------------------------------


async def scheduled_stock(redis: Redis, opens_at_ms: int, closes_at_ms: int | None = None) -> Stock:
    stock = Stock(redis)
    made = campaign(9, opens_at_ms=opens_at_ms, closes_at_ms=closes_at_ms)
    assert (await stock.create(made, schedule=True)).state == "scheduled"
    await stock.load_roster()
    return stock


@pytest.mark.parametrize(
    ("offset_ms", "decision"),
    [
        (-1, Decision.NOT_OPEN),
        (0, Decision.SOLD),
        (1, Decision.SOLD),
        (999, Decision.SOLD),
        (1_000, Decision.CLOSED),
        (1_001, Decision.CLOSED),
    ],
)
async def test_window_is_kept_to_the_millisecond(
    redis: Redis, offset_ms: int, decision: Decision
) -> None:
    opens_at_ms = await now_ms(redis) + HOUR_MS
    stock = await scheduled_stock(redis, opens_at_ms, opens_at_ms + 1_000)
    await stock.set_clock(opens_at_ms + offset_ms)
    answer = await stock.buy_one(member(1), key(1))
    assert answer.decision is decision
    if decision is Decision.NOT_OPEN:
        assert answer.a == opens_at_ms
    await stock.check_books()


async def test_purchase_records_an_opening_in_the_past(redis: Redis) -> None:
    stock = await scheduled_stock(redis, await now_ms(redis) - 1)
    sold = await stock.buy_one(member(1), key(1))
    assert sold.decision is Decision.SOLD
    events = [event for entry in await stock.entries() for event in entry.events()]
    assert [event.kind for event in events] == ["created", "scheduled", "opened", "sold"]
    assert events[2].actor == "clock"
    assert sold.a == 4


async def test_missed_window_is_recorded_and_sells_nothing(redis: Redis) -> None:
    now = await now_ms(redis)
    stock = await scheduled_stock(redis, now - 2_000, now - 1_000)
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.CLOSED
    books = await stock.check_books()
    assert (books.state, books.seq) == ("closed", 4)


async def test_closing_moment_closes_what_is_paused_too(redis: Redis) -> None:
    now = await now_ms(redis)
    stock = await scheduled_stock(redis, now - 1_000, now + HOUR_MS)
    assert (await stock.step("pause")).state == "paused"
    await stock.set_clock(now + HOUR_MS)
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.CLOSED
    assert (await stock.step("resume")).reply is CallReply.WRONG_STATE


async def test_clock_never_goes_back(redis: Redis) -> None:
    ahead = await now_ms(redis) + HOUR_MS
    stock = await open_stock(redis, 9)
    await stock.set_clock(ahead)
    reply = await stock.call(Bid(member(1), key(1)))
    assert reply[1] == ahead
    await stock.step("pause")
    assert [entry.at_ms for entry in await stock.entries()][-2:] == [ahead, ahead]
    assert (await stock.peek(1)).now_ms == ahead
    assert int((await stock.head("clock"))[0]) == ahead


async def test_clock_is_that_of_redis(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    before = await now_ms(redis)
    reply = await stock.call(Bid(member(1), key(1)))
    assert before <= reply[1] <= await now_ms(redis)


# Eligibility: INV-9 -----------------------------------------------------------------------------


async def test_revoked_card_buys_nothing_until_it_is_restored(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD
    assert (await stock.scripts.sync_revoked(stock.id, 0, 1, [(member(1), False)])).seq == 1
    # Even its own order is not told: the card is checked before the key.
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.CARD_REVOKED
    assert (await stock.buy_one(member(1), key(2))).decision is Decision.CARD_REVOKED
    await stock.scripts.sync_revoked(stock.id, 1, 2, [(member(1), True)])
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.REPLAYED


@pytest.mark.parametrize(
    ("union", "allowed"), [("dhm", True), ("jsm", True), ("dh", False), ("m", False), ("", False)]
)
async def test_only_the_unions_of_the_campaign_buy(redis: Redis, union: str, allowed: bool) -> None:
    stock = await open_stock(redis, 9, unions=("dhm", "jsm"))
    answer = await stock.buy_one(member(1), key(1), union=union)
    assert answer.decision is (Decision.SOLD if allowed else Decision.NOT_ELIGIBLE)


async def test_card_and_union_are_told_before_state_and_stock(redis: Redis) -> None:
    stock = await open_stock(redis, 0, unions=("dhm",))
    await stock.scripts.sync_revoked(stock.id, 0, 1, [(member(1), False)])
    await stock.step("pause")
    first, second, third = await stock.buy(
        Bid(member(1), key(1), union="x"),
        Bid(member(2), key(1), union="x"),
        Bid(member(2), key(1), union="dhm"),
    )
    assert first.decision is Decision.CARD_REVOKED
    assert second.decision is Decision.NOT_ELIGIBLE
    assert third.decision is Decision.PAUSED


async def test_revoked_members_take_four_bytes_each(redis: Redis) -> None:
    stock = Stock(redis)
    await stock.create(campaign(9))
    await stock.load_roster(*(member(n) for n in range(4_000)))
    assert await redis.object("ENCODING", stock.keys.revoked) == b"intset"
    assert await redis.memory_usage(stock.keys.revoked) < 4_000 * 4 + 1_000


async def test_steps_of_the_roster_are_taken_in_order_and_once(redis: Redis) -> None:
    stock = Stock(redis)
    assert (await stock.scripts.sync_revoked(stock.id, -1, 4, [])).reply is CallReply.MISSING
    await stock.create(campaign(9))
    for n in (1, 2):
        more = await stock.scripts.sync_revoked(stock.id, -1, -1, [(member(n), False)])
        assert more.reply is CallReply.OK
    assert await redis.hget(stock.keys.head, "roster_rev") is None
    await stock.load_roster(rev=4)
    late = await stock.scripts.sync_revoked(stock.id, 3, 4, [(member(3), False)])
    assert (late.reply, late.seq) == (CallReply.STALE, 4)
    assert await redis.smembers(stock.keys.revoked) == {str(member(n)).encode() for n in (1, 2)}
    assert (await stock.scripts.sync_revoked(stock.id, 4, 6, [(member(1), True)])).seq == 6
    assert await read_member(redis, stock.id, member(2)) == ([], {}, True)
    assert await read_member(redis, stock.id, member(1)) == ([], {}, False)


# Trust: INV-8 -----------------------------------------------------------------------------------


async def refused_as(stock: Stock, reply: CallReply, **mark: int) -> None:
    """A purchase is refused as a whole, for that reason, and nothing has changed."""
    before = await stock.everything()
    assert await stock.call(Bid(member(1), key(9)), **mark) == [reply]
    assert await stock.everything() == before


async def test_campaign_without_head_is_missing(redis: Redis) -> None:
    stock = Stock(redis)
    await refused_as(stock, CallReply.MISSING)
    assert (await stock.step("open")).reply is CallReply.MISSING
    assert (await stock.scripts.tick(stock.id)).reply is CallReply.MISSING
    assert (await stock.scripts.add_stock(stock.id, operation(), 0, 1)).reply is CallReply.MISSING
    assert (await stock.scripts.verify(stock.id, 0, "0" * 40)).reply is CallReply.MISSING
    with pytest.raises(Untrusted, match="missing"):
        await stock.peek(1)


async def test_nothing_is_sold_before_the_revoked_cards_are_loaded(redis: Redis) -> None:
    stock = Stock(redis)
    await stock.create(campaign(9))
    await stock.step("open")
    await refused_as(stock, CallReply.UNVERIFIED)
    await stock.load_roster()
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD


@pytest.mark.parametrize("field", ["nonce", "run_id", "replid"])
async def test_unverified_redis_sells_nothing_until_it_is_verified(
    redis: Redis, field: str
) -> None:
    stock = await open_stock(redis, 9)
    await redis.hset(stock.keys.head, field, "f" * 40)
    await refused_as(stock, CallReply.UNVERIFIED)
    assert (await stock.step("pause")).reply is CallReply.UNVERIFIED
    assert (await stock.scripts.tick(stock.id)).reply is CallReply.UNVERIFIED
    added = await stock.scripts.add_stock(stock.id, operation(), 0, 1)
    assert added.reply is CallReply.UNVERIFIED
    with pytest.raises(Untrusted, match="unverified"):
        await stock.peek(1)
    seq, chain = await stock.head("seq", "chain")
    assert (await stock.scripts.verify(stock.id, int(seq), chain)).reply is CallReply.OK
    assert (await stock.buy_one(member(1), key(9))).decision is Decision.SOLD


async def test_other_deployment_is_not_believed(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    stock.scripts = Scripts(redis, NONCE[::-1])
    await refused_as(stock, CallReply.UNVERIFIED)


async def test_only_the_very_head_that_was_compared_is_verified(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    seq, chain = await stock.head("seq", "chain")
    await redis.hset(stock.keys.head, "run_id", "f" * 40)
    for other in [(int(seq) + 1, chain), (int(seq) - 1, chain), (int(seq), chain[::-1])]:
        assert (await stock.scripts.verify(stock.id, *other)).reply is CallReply.STALE
        await refused_as(stock, CallReply.UNVERIFIED)


async def test_recovering_campaign_sells_nothing_and_lets_nobody_act(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    sold = await stock.buy_one(member(1), key(1))
    seq, chain = await stock.head("seq", "chain")
    await stock.scripts.verify(stock.id, int(seq), chain, "lost an event")
    assert (await stock.buy_one(member(2), key(1))).decision is Decision.RECOVERING
    assert (await stock.buy_one(member(1), key(1))).a == sold.a
    assert (await stock.step("pause")).state == "recovering"
    added = await stock.scripts.add_stock(stock.id, operation(), 0, 1)
    assert (added.reply, added.state) == (CallReply.WRONG_STATE, "recovering")
    assert (await stock.peek(1)).state == "recovering"
    assert (await stock.scripts.tick(stock.id)).state == "recovering"
    assert (await stock.scripts.verify(stock.id, int(seq), chain)).reply is CallReply.OK
    assert (await stock.buy_one(member(2), key(1))).decision is Decision.SOLD


async def test_head_behind_what_a_process_has_seen_is_stale(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    seq, epoch = (int(value) for value in await stock.head("seq", "epoch"))
    await refused_as(stock, CallReply.STALE, seen=seq + 1)
    with pytest.raises(Untrusted, match="stale"):
        await stock.peek(1, seen=seq + 1)
    assert await stock.buy(Bid(member(1), key(1)), seen=seq)
    assert await stock.buy(Bid(member(2), key(1)), seen=seq + 1)
    await refused_as(stock, CallReply.UNCHECKED, epoch=epoch + 1)
    with pytest.raises(Untrusted, match="unchecked"):
        await stock.peek(1, epoch=epoch + 1)


@pytest.mark.parametrize("damage", ["deleted", "behind", "ahead", "emptied"])
async def test_stream_that_does_not_end_at_the_head_is_broken(redis: Redis, damage: str) -> None:
    stock = await open_stock(redis, 9)
    await stock.buy_one(member(1), key(1))
    last = (await stock.entries())[-1].last
    if damage == "deleted":
        await redis.delete(stock.keys.stream)
    elif damage == "behind":
        await redis.xdel(stock.keys.stream, f"{last}-0")
    elif damage == "ahead":
        await redis.xadd(stock.keys.stream, {"n": 1}, id=f"{last + 1}-0")
    else:
        await redis.xtrim(stock.keys.stream, maxlen=0, approximate=False)
    await refused_as(stock, CallReply.BROKEN)
    assert (await stock.step("pause")).reply is CallReply.BROKEN
    assert (await stock.scripts.tick(stock.id)).reply is CallReply.BROKEN
    added = await stock.scripts.add_stock(stock.id, operation(), 0, 1)
    assert added.reply is CallReply.BROKEN
    with pytest.raises(Untrusted, match="broken"):
        await stock.peek(1)


async def test_campaign_is_not_made_over_a_ledger_without_its_head(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    await redis.delete(stock.keys.head, stock.keys.operations)
    assert (await stock.create(campaign(9))).reply is CallReply.BROKEN


# Delayed calls: INV-4 ---------------------------------------------------------------------------


async def test_delayed_duplicate_after_its_retry_sells_nothing(redis: Redis) -> None:
    stock = await open_stock(redis, 0)
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD_OUT  # call 1
    await stock.buy_one(member(1), key(1))  # call 2: its retry, refused too
    await stock.scripts.add_stock(stock.id, operation(), 0, 9)
    for late in (1, 2):
        before = await stock.everything()
        assert await stock.call(Bid(member(1), key(1)), call=late) == [CallReply.LATE]
        assert await stock.everything() == before
    assert (await stock.buy(Bid(member(1), key(1)), call=3))[0].decision is Decision.SOLD


async def test_calls_are_numbered_for_each_process(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    await stock.buy(Bid(member(1), key(1)), call=100)
    await stock.buy(Bid(member(2), key(1)), call=1, process="p2")
    assert await stock.call(Bid(member(3), key(1)), call=99) == [CallReply.LATE]
    assert await redis.hgetall(stock.keys.calls) == {PROCESS.encode(): b"100", b"p2": b"1"}


# Out of memory, lost scripts --------------------------------------------------------------------


async def test_out_of_memory_is_refused_before_the_first_write(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    await stock.buy_one(member(1), key(1))
    before = await stock.everything()
    async with no_memory(redis):
        calls = [
            stock.call(Bid(member(2), key(1)), Bid(member(3), key(1))),
            stock.step("pause"),
            stock.scripts.add_stock(stock.id, operation(), 0, 1),
        ]
        for call in calls:
            with pytest.raises(ResponseError, match=r"OOM|maxmemory"):
                await call
        peek = await stock.peek(1)
        assert peek.remaining == (8,)
    assert await stock.everything() == before
    await stock.check_books()
    assert (await stock.buy_one(member(2), key(1))).decision is Decision.SOLD
    await stock.check_books()


async def test_scripts_are_sent_again_where_redis_has_forgotten_them(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    await redis.script_flush()
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD
    await redis.script_flush()
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.REPLAYED
    await redis.script_flush()
    assert (await stock.peek(1)).remaining == (8,)
    await redis.script_flush()
    assert (await stock.step("pause")).reply is CallReply.OK


# Whole batches ----------------------------------------------------------------------------------


async def test_whole_batch_is_one_entry_and_each_is_answered(redis: Redis) -> None:
    stock = await open_stock(redis, 300, 10)
    reply = await stock.call(*(Bid(member(n), key(n), 1, n % 2) for n in range(256)))
    decisions = [answer.decision for answer in results(reply, 256)]
    assert len(reply) == 9 + 256 + 4  # who gets none is told so in one place
    assert decisions.count(Decision.SOLD) == 128 + 10
    assert decisions.count(Decision.SOLD_OUT) == 128 - 10
    entry = (await stock.entries())[-1]
    assert (entry.first, entry.last) == (3, 2 + 138)
    assert reply[1:6] == [entry.at_ms, entry.last, entry.chain.encode(), 1, 500]
    await stock.check_books()


async def test_batch_of_nothing_but_refusals_writes_no_event(redis: Redis) -> None:
    stock = await open_stock(redis, 0)
    before = len(await stock.entries())
    reply = await stock.call(*(Bid(member(n), key(n)) for n in range(256)))
    assert reply[2] == 2
    assert len(await stock.entries()) == before


async def test_records_hold_the_largest_values(redis: Redis) -> None:
    showings = [0] * 499 + [STOCK_MAX]
    stock = await open_stock(redis, *showings, card_limit=1_000)
    sold = await stock.buy_one(member(1), "f" * 16, 1_000, 499)
    value: Any = await redis.hget(stock.keys.members, member(1))
    assert len(value) == RECORD.size + 1_000
    [record] = parse_records(value)
    assert (record.seq, record.showing, record.quantity) == (sold.a, 499, 1_000)
    assert record.key_hash == "f" * 16
    assert record.at_ms == (await stock.entries())[-1].at_ms
    replayed = await stock.buy_one(member(1), "f" * 16, 1_000, 499)
    assert (replayed.decision, replayed.c) == (Decision.REPLAYED, record.at_ms)
    with pytest.raises(ValueError, match="whole records"):
        parse_records(value[:-1])


# Operators' steps -------------------------------------------------------------------------------

STATES = ("draft", "scheduled", "open", "paused", "closed", "deleted")
AFTER = {
    ("schedule", "draft"): "scheduled",
    ("schedule", "scheduled"): "scheduled",
    ("open", "draft"): "open",
    ("open", "scheduled"): "open",
    ("pause", "open"): "paused",
    ("resume", "paused"): "open",
    ("close", "scheduled"): "closed",
    ("close", "open"): "closed",
    ("close", "paused"): "closed",
    ("reopen", "closed"): "open",
    ("delete", "draft"): "deleted",
}
ACTIONS = ("schedule", "open", "pause", "resume", "close", "reopen", "delete")
WAY = {
    "draft": (),
    "scheduled": ("schedule",),
    "open": ("open",),
    "paused": ("open", "pause"),
    "closed": ("open", "close"),
    "deleted": ("delete",),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ACTIONS)
async def test_steps_lead_from_state_to_state_and_no_other_way(
    redis: Redis, action: str, state: str
) -> None:
    later = await now_ms(redis) + HOUR_MS
    stock = Stock(redis)
    await stock.create(campaign(9))
    for step in WAY[state]:
        assert (await stock.step(step, opens_at_ms=later)).reply is CallReply.OK
    before = await stock.everything()
    reply = await stock.step(action, opens_at_ms=later)
    expected = AFTER.get((action, state))
    if expected is None:
        assert (reply.reply, reply.state) == (CallReply.WRONG_STATE, state)
        assert await stock.everything() == before
    else:
        assert (reply.reply, reply.state) == (CallReply.OK, expected)
    books = await stock.check_books()
    assert books.state == (expected or state)


@pytest.mark.parametrize(
    ("state", "decision"),
    [
        ("draft", Decision.DRAFT),
        ("scheduled", Decision.NOT_OPEN),
        ("open", Decision.SOLD),
        ("paused", Decision.PAUSED),
        ("closed", Decision.CLOSED),
        ("deleted", Decision.DRAFT),
    ],
)
async def test_only_what_is_open_sells_and_peek_says_the_same(
    redis: Redis, state: str, decision: Decision
) -> None:
    stock = Stock(redis)
    await stock.create(campaign(9))
    await stock.load_roster()
    for step in WAY[state]:
        await stock.step(step, opens_at_ms=await now_ms(redis) + HOUR_MS)
    assert (await stock.peek(1)).state == state
    assert (await stock.buy_one(member(1), key(1))).decision is decision


async def test_schedule_needs_a_moment_before_the_closing(redis: Redis) -> None:
    closes = await now_ms(redis) + HOUR_MS
    stock = Stock(redis)
    await stock.create(campaign(9, closes_at_ms=closes))
    assert (await stock.step("schedule")).reply is CallReply.INVALID
    assert (await stock.step("schedule", opens_at_ms=closes)).reply is CallReply.INVALID
    assert (await stock.step("schedule", opens_at_ms=closes - 1)).reply is CallReply.OK
    # Scheduled once more without a moment: the moment stays.
    assert (await stock.step("schedule")).reply is CallReply.OK
    assert (await stock.check_books()).opens_at_ms == closes - 1


async def test_opening_by_hand_moves_the_opening_to_now(redis: Redis) -> None:
    before = await now_ms(redis)
    stock = await scheduled_stock(redis, before + HOUR_MS)
    assert (await stock.step("open")).state == "open"
    books = await stock.check_books()
    assert books.opens_at_ms is not None
    assert before <= books.opens_at_ms <= await now_ms(redis)
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD


async def test_reopening_clears_a_closing_moment_that_has_passed(redis: Redis) -> None:
    now = await now_ms(redis)
    stock = await scheduled_stock(redis, now - 1_000, now + HOUR_MS)
    await stock.set_clock(now + HOUR_MS)
    assert (await stock.scripts.tick(stock.id)).state == "closed"
    assert (await stock.step("reopen")).state == "open"
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD
    assert (await stock.check_books()).closes_at_ms is None


async def test_reopening_keeps_a_closing_moment_still_to_come(redis: Redis) -> None:
    now = await now_ms(redis)
    stock = await scheduled_stock(redis, now - 1_000, now + HOUR_MS)
    await stock.step("close")
    assert (await stock.step("reopen")).state == "open"
    books = await stock.check_books()
    assert (books.opens_at_ms, books.closes_at_ms) == (now - 1_000, now + HOUR_MS)


async def test_reopening_before_the_opening_opens_at_once(redis: Redis) -> None:
    now = await now_ms(redis)
    stock = await scheduled_stock(redis, now + HOUR_MS)
    await stock.step("close")
    await stock.step("reopen")
    assert (await stock.buy_one(member(1), key(1))).decision is Decision.SOLD
    assert (await stock.check_books()).opens_at_ms <= await now_ms(redis)  # type: ignore[operator]


@pytest.mark.parametrize("schedule", [False, True])
async def test_campaign_is_made_once(redis: Redis, schedule: bool) -> None:
    opens = await now_ms(redis) + HOUR_MS
    stock, by = Stock(redis), operation("op1")
    made = campaign(9, opens_at_ms=opens)
    first = await stock.create(made, schedule=schedule, by=by)
    assert (first.reply, first.state) == (CallReply.OK, "scheduled" if schedule else "draft")
    before = await stock.everything()
    again = await stock.create(made, schedule=schedule, by=by)
    assert (again.reply, again.seq) == (CallReply.REPLAYED, first.seq)
    other = await stock.create(made, by=operation("op1", "other"))
    assert other.reply is CallReply.MISMATCH
    assert (await stock.create(made)).reply is CallReply.EXISTS
    assert await stock.everything() == before
    await stock.check_books()


async def test_draft_that_is_made_anew_goes_on_numbering(redis: Redis) -> None:
    stock = Stock(redis)
    await stock.create(campaign(5, 6, 7))
    assert (await stock.step("delete")).state == "deleted"
    made = await stock.create(campaign(2, card_limit=1))
    assert (made.reply, made.seq, made.state) == (CallReply.OK, 3, "draft")
    await stock.load_roster()
    await stock.step("open")
    answers = await stock.buy(*(Bid(member(n), key(1)) for n in range(3)))
    assert [a.decision for a in answers] == [Decision.SOLD, Decision.SOLD, Decision.SOLD_OUT]
    assert (await stock.buy_one(member(0), key(2))).decision is Decision.LIMIT_EXCEEDED
    books = await stock.check_books()
    assert (books.seq, books.tickets) == (6, {0: 2})


async def test_step_is_taken_once_a_key(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    by = operation("op1")
    paused = await stock.step("pause", by)
    await stock.step("resume")
    before = await stock.everything()
    again = await stock.step("pause", by)
    assert (again.reply, again.seq, again.state) == (CallReply.REPLAYED, paused.seq, "open")
    other = await stock.step("close", operation("op1", "other"))
    assert other.reply is CallReply.MISMATCH
    assert await stock.everything() == before
    await stock.check_books()


async def test_stock_is_added_once_a_key(redis: Redis) -> None:
    """HOLES.md row 9: 11 tickets of 10 after a repeat."""
    stock, by = await open_stock(redis, 1, 4), operation("op1")
    await stock.buy_one(member(1), key(1))
    first = await stock.scripts.add_stock(stock.id, by, 0, 5)
    assert (first.reply, first.tickets, first.remaining) == (CallReply.OK, 6, 5)
    again = await stock.scripts.add_stock(stock.id, by, 0, 5)
    assert (again.reply, again.seq, again.tickets, again.remaining) == (
        CallReply.REPLAYED, first.seq, 6, 5,
    )  # fmt: skip
    other = await stock.scripts.add_stock(stock.id, operation("op1", "other"), 1, 9)
    assert other.reply is CallReply.MISMATCH
    assert await stock.left() == [5, 4]
    await stock.check_books()


@pytest.mark.parametrize(("showing", "add"), [(1, 5), (0, 0), (0, -1), (0, STOCK_MAX)])
async def test_impossible_stock_is_not_added(redis: Redis, showing: int, add: int) -> None:
    stock = await open_stock(redis, 1)
    before = await stock.everything()
    reply = await stock.scripts.add_stock(stock.id, operation(), showing, add)
    assert reply.reply is CallReply.INVALID
    assert await stock.everything() == before


async def test_stock_may_be_filled_to_the_most(redis: Redis) -> None:
    stock = await open_stock(redis, 1)
    reply = await stock.scripts.add_stock(stock.id, operation(), 0, STOCK_MAX - 1)
    assert (reply.reply, reply.tickets) == (CallReply.OK, STOCK_MAX)
    await stock.check_books()


@pytest.mark.parametrize("state", STATES)
async def test_stock_is_added_in_every_state_but_deleted(redis: Redis, state: str) -> None:
    stock = Stock(redis)
    await stock.create(campaign(9))
    for step in WAY[state]:
        await stock.step(step, opens_at_ms=await now_ms(redis) + HOUR_MS)
    reply = await stock.scripts.add_stock(stock.id, operation(), 0, 1)
    wanted = CallReply.WRONG_STATE if state == "deleted" else CallReply.OK
    assert (reply.reply, reply.state) == (wanted, state)
    await stock.check_books()


async def test_adding_stock_records_what_the_clock_has_changed(redis: Redis) -> None:
    stock = await scheduled_stock(redis, await now_ms(redis) - 1)
    reply = await stock.scripts.add_stock(stock.id, operation(), 0, 1)
    assert (reply.seq, reply.state) == (4, "open")
    await stock.check_books()


async def test_tick_records_a_moment_once(redis: Redis) -> None:
    now = await now_ms(redis) + HOUR_MS
    stock = await scheduled_stock(redis, now, now + 1_000)
    waiting = await stock.scripts.tick(stock.id)
    assert (waiting.state, waiting.tickets) == ("scheduled", 0)
    await stock.set_clock(now)
    opened = await stock.scripts.tick(stock.id)
    assert (opened.seq, opened.state, opened.tickets) == (3, "open", 1)
    assert (await stock.scripts.tick(stock.id)).tickets == 0
    await stock.set_clock(now + 1_000)
    assert (await stock.scripts.tick(stock.id)).state == "closed"
    assert (await stock.check_books()).seq == 4


async def test_peek_says_what_is_left_and_writes_nothing(redis: Redis) -> None:
    stock = await open_stock(redis, 3, 0)
    await stock.buy_one(member(1), key(1), 2)
    before = await stock.everything()
    peek = await stock.peek(2, seen=3)
    assert (peek.seq, peek.epoch, peek.state, peek.roster_rev) == (3, 1, "open", 0)
    assert peek.remaining == (1, 0)
    assert await stock.everything() == before


async def test_peek_counts_what_the_clock_has_changed(redis: Redis) -> None:
    opens = await now_ms(redis) + HOUR_MS
    stock = await scheduled_stock(redis, opens, opens + 1)
    peek = await stock.peek(1)
    assert (peek.state, peek.opens_at_ms) == ("scheduled", opens)
    await stock.set_clock(opens)
    assert (await stock.peek(1)).state == "open"
    await stock.set_clock(opens + 1)
    assert (await stock.peek(1)).state == "closed"
    now = await read_campaign(redis, stock.id)
    assert now is not None
    assert (now.state, now.recorded) == ("closed", "scheduled")


async def test_words_of_operators_come_back_as_they_were(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    words = 'he said "stop", \\ and\nleft: ]] 停 \u2028 {"a":1}'
    await stock.step("pause", operation(actor='o"n', reason=words))
    [event] = (await stock.entries())[-1].events()
    assert (event.kind, event.actor, event.reason) == ("paused", 'o"n', words)
    await stock.check_books()


# The ledger: INV-5 ------------------------------------------------------------------------------


async def test_any_change_to_an_entry_is_seen(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    await stock.buy(Bid(member(1), key(1)), Bid(member(2), key(1)))
    entries = await stock.entries()
    forged = msgspec.structs.replace(
        entries[-1], payload=entries[-1].payload.replace(b"%d" % member(1), b"%d" % member(7))
    )
    assert not forged.follows(entries[-2].chain)
    with pytest.raises(CorruptLedger):
        msgspec.structs.replace(entries[-1], first=2).events()


async def test_fold_of_random_calls_is_what_redis_holds(redis: Redis, rng: random.Random) -> None:
    now = await now_ms(redis) + HOUR_MS
    for campaign_id in ("random-a", "random-b", "random-c"):
        stock = Stock(redis, campaign_id)
        made = campaign(
            *(rng.randint(0, 12) for _ in range(rng.randint(1, 3))),
            campaign_id=campaign_id,
            card_limit=rng.randint(1, 4),
            closes_at_ms=now + 50,
        )
        await stock.create(made)
        await stock.load_roster()
        for turn in range(80):
            await random_turn(stock, rng, len(made.showings), made.order_max)
            if turn % 20 == 0:
                now += rng.randint(1, 30)
                await stock.set_clock(now)
        books = await stock.check_books()
        for showing, tickets in books.tickets.items():
            sold = [r.quantity for rs in books.members.values() for r in rs if r.showing == showing]
            assert books.remaining[showing] == tickets - sum(sold) >= 0
        for records in books.members.values():
            assert sum(record.quantity for record in records) <= made.card_limit


async def random_turn(stock: Stock, rng: random.Random, showings: int, order_max: int) -> None:
    dice = rng.random()
    if dice < 0.6:
        await stock.buy(*(
            Bid(
                member(rng.randint(1, 8)), key(rng.randint(1, 4)), rng.randint(1, order_max),
                rng.randrange(showings),
            )
            for _ in range(rng.randint(1, 12))
        ))  # fmt: skip
    elif dice < 0.7:
        await stock.scripts.add_stock(
            stock.id,
            operation(f"op{rng.randint(1, 9)}"),
            rng.randrange(showings),
            rng.randint(1, 3),
        )
    elif dice < 0.75:
        await stock.scripts.tick(stock.id)
    else:
        moment: Any = rng.choice([None, int((await stock.head("clock"))[0]) + rng.randint(-3, 3)])
        action = rng.choice([a for a in ACTIONS if a != "delete"])
        await stock.step(action, operation(f"op{rng.randint(1, 30)}"), opens_at_ms=moment)


async def test_answers_name_events_of_the_ledger(redis: Redis) -> None:
    stock = await open_stock(redis, 5)
    answers: list[Result] = await stock.buy(*(Bid(member(n), key(1), 1 + n % 2) for n in range(5)))
    sold = {a.a: n for n, a in enumerate(answers) if a.decision is Decision.SOLD}
    events = {event.seq: event for entry in await stock.entries() for event in entry.events()}
    for seq, n in sold.items():
        event = events[seq]
        assert (event.member_no, event.quantity) == (member(n), 1 + n % 2)
        assert (event.key_hash, event.price_fen, event.showing) == (key(1), 500, 0)


# How far PostgreSQL is behind -------------------------------------------------------------------


async def test_no_sale_if_postgres_lacks_too_many_events(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    (seq,) = await stock.head("seq")
    await stock.scripts.set_applied(stock.id, int(seq), None)
    first = await stock.buy(Bid(member(1), key(1)), behind_max=(2, 10**6))
    second = await stock.buy(Bid(member(2), key(1)), behind_max=(2, 10**6))
    assert [told[0].decision for told in (first, second)] == [Decision.SOLD] * 2
    replayed, refused = await stock.buy(
        Bid(member(1), key(1)), Bid(member(3), key(1)), behind_max=(2, 10**6)
    )
    assert (replayed.decision, refused.decision) == (Decision.REPLAYED, Decision.BEHIND)
    await stock.scripts.set_applied(stock.id, int(seq) + 1, await now_ms(redis))
    assert (await stock.buy(Bid(member(3), key(1)), behind_max=(2, 10**6)))[0].decision is (
        Decision.SOLD
    )
    await stock.check_books()


async def test_no_sale_if_postgres_is_behind_too_long(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    (seq,) = await stock.head("seq")
    await stock.scripts.set_applied(stock.id, int(seq), None)
    bounds = (10**6, 1_000)
    assert (await stock.buy(Bid(member(1), key(1)), behind_max=bounds))[0].decision is Decision.SOLD
    since = int((await stock.head("behind_since"))[0])
    await stock.set_clock(since + 1_000)
    assert (await stock.buy(Bid(member(2), key(1)), behind_max=bounds))[0].decision is Decision.SOLD
    await stock.set_clock(since + 1_001)
    assert (await stock.buy(Bid(member(3), key(1)), behind_max=bounds))[
        0
    ].decision is Decision.BEHIND
    # The writer has carried the first of the two: the other is younger than the bound.
    await stock.scripts.set_applied(stock.id, int(seq) + 1, since + 1_000)
    assert (await stock.buy(Bid(member(3), key(1)), behind_max=bounds))[0].decision is Decision.SOLD
    await stock.scripts.set_applied(stock.id, int(seq) + 3, None)
    assert await stock.head("behind_since") == [""]


async def test_applied_number_above_the_head_is_ignored(redis: Redis) -> None:
    stock = await open_stock(redis, 9)
    (seq,) = await stock.head("seq")
    told = await stock.scripts.set_applied(stock.id, int(seq) + 1, None)
    assert told.reply is CallReply.STALE
    assert (await stock.scripts.set_applied("no-such", 1, None)).reply is CallReply.MISSING


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
async def test_call_whose_writes_are_partly_lost_sells_nothing(redis: Redis, kept: int) -> None:
    stock = await open_stock(redis, 9)
    torn = await stock.everything()
    await stock.buy_one(member(1), key(1))
    (row,) = await redis.xrevrange(stock.keys.stream, count=1)
    whole = {name: await redis.hgetall(name) for name in (stock.keys.members, stock.keys.stock)}
    calls = await redis.hgetall(stock.keys.calls)
    for name in stock.keys:
        await redis.delete(name)
        if name == stock.keys.head:
            await redis.hset(name, mapping=torn[name])
            await redis.hset(name, "applied", 0)
        elif torn[name] is not None:
            await redis.restore(name, 0, torn[name])
    # The script's writes, in its order, as far as they were stored.
    writes = [
        redis.xadd(stock.keys.stream, row[1], id=row[0]),
        redis.hset(stock.keys.members, mapping=whole[stock.keys.members]),
        redis.hset(stock.keys.stock, mapping=whole[stock.keys.stock]),
        redis.hset(stock.keys.calls, mapping=calls),
    ]
    for number, write in enumerate(writes):
        if number < kept:
            await write
        else:
            write.close()
    await refused_as(stock, CallReply.BROKEN)
