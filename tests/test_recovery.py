"""Recovery: from every loss that the ledger can heal, and refused where it cannot."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis
from shop import Shop, open_shop
from stock_maker import BEHIND_MAX, CAMPAIGN, Bid, campaign, key, member, packed
from waiting import until

from sale.db import claims
from sale.domain.problem import Problem, Refused
from sale.ledger.chain import GENESIS, Event
from sale.ledger.fold import CampaignState
from sale.stock.keys import CAMPAIGNS, rebuilt_keys
from sale.stock.mark import NOT_CHECKED
from sale.stock.rebuild import freeze
from sale.stock.records import read_member
from sale.stock.scripts import CallReply, Decision, Scripts
from sale.trust.recover import Unsafe
from sale.trust.refill import refill
from sale.trust.verify import verify_all


@pytest.fixture
async def shop(redis: Redis, redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    """A campaign that sells: cards 1 to 4 have bought, card 1 all it may; card 9 is revoked."""
    async with open_shop(redis_url, database_url) as shop:
        await shop.start_writer()
        await shop.add_cards(*range(1, 9))
        await shop.add_cards(9, status="cancelled")
        await shop.create(campaign(20, 5))
        await shop.step("open")
        await shop.buy(1, 2, quantity=2)
        await shop.buy(1, key_no=2)
        await shop.step("stock", showing="s1", add=4)
        await shop.buy(3, 4)
        await shop.applied()
        yield shop


def _who():  # type: ignore[no-untyped-def]
    from sale.operators.campaigns import Actor

    return Actor("cli:me"), "wanted"


async def lose_everything(shop: Shop) -> None:
    await shop.redis.flushall()


async def lose_head(shop: Shop) -> None:
    await shop.redis.delete(shop.stock.keys.head)


async def lose_stock(shop: Shop) -> None:
    await shop.redis.hset(shop.stock.keys.stock, "r0", 20)


async def lose_a_card(shop: Shop) -> None:
    await shop.redis.hdel(shop.stock.keys.members, member(1))


async def lose_the_cards(shop: Shop) -> None:
    await shop.redis.delete(shop.stock.keys.members)


async def lose_the_stream(shop: Shop) -> None:
    await shop.redis.delete(shop.stock.keys.stream)


async def lose_the_last_entry(shop: Shop) -> None:
    (row,) = await shop.redis.xrevrange(shop.stock.keys.stream, count=1)
    await shop.redis.xdel(shop.stock.keys.stream, row[0])


async def lose_an_old_entry(shop: Shop) -> None:
    row = (await shop.redis.xrange(shop.stock.keys.stream, count=2))[1]
    await shop.redis.xdel(shop.stock.keys.stream, row[0])


async def lose_the_revoked(shop: Shop) -> None:
    await shop.redis.delete(shop.stock.keys.revoked)


async def lose_an_operation(shop: Shop) -> None:
    await shop.redis.delete(shop.stock.keys.operations)


async def garble_the_head(shop: Shop) -> None:
    await shop.redis.hset(shop.stock.keys.head, mapping={"clock": "", "config": "{"})


async def lose_half_the_head(shop: Shop) -> None:
    await shop.redis.hdel(shop.stock.keys.head, "config", "chain")


async def garble_the_limit(shop: Shop) -> None:
    await shop.stock.alter_rules(card_limit=30)


DAMAGES = [
    lose_everything,
    lose_head,
    lose_stock,
    lose_a_card,
    lose_the_cards,
    lose_the_stream,
    lose_the_last_entry,
    lose_an_old_entry,
    lose_the_revoked,
    lose_an_operation,
    garble_the_head,
    lose_half_the_head,
    garble_the_limit,
]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_recovery_repairs_each_kind_of_damage(
    shop: Shop, damage: Callable[[Shop], Awaitable[None]]
):
    before = await shop.stock.head("seq", "state", "opens_at", "closes_at", "config_seq")
    orders = {n: await read_member(shop.redis, CAMPAIGN, member(n)) for n in range(1, 10)}
    left, operations = await shop.stock.left(), await shop.redis.hgetall(shop.stock.keys.operations)
    await damage(shop)

    seen = await shop.stock.everything()
    told = await shop.recover(dry_run=True)
    assert told.differences
    assert not told.changed
    assert await shop.stock.everything() == seen

    done = await shop.recover()
    assert done.changed
    assert done.differences
    assert await shop.stock.head("state", "opens_at", "closes_at", "config_seq") == before[1:]
    assert await shop.stock.head("seq", "epoch") == [str(int(before[0]) + 1), "2"]
    assert {n: await read_member(shop.redis, CAMPAIGN, member(n)) for n in range(1, 10)} == orders
    assert await shop.stock.left() == left
    assert await shop.redis.hgetall(shop.stock.keys.operations) == operations
    assert await shop.redis.sismember(CAMPAIGNS, CAMPAIGN)
    assert await shop.redis.exists(*rebuilt_keys(CAMPAIGN)) == 0

    assert await shop.stock.call(Bid(member(5), key(1)), epoch=1) == [CallReply.UNCHECKED]
    # It sells on, within the limits, and remembers its keys; who has not looked at it is refused.
    replayed, over, sold, revoked = await shop.stock.buy(
        Bid(member(1), key(2)), Bid(member(1), key(3)),
        Bid(member(5), key(1)), Bid(member(9), key(1)),
    )  # fmt: skip
    assert replayed.decision is Decision.REPLAYED
    assert over.decision is Decision.LIMIT_EXCEEDED
    assert sold.decision is Decision.SOLD
    assert revoked.decision is Decision.CARD_REVOKED
    await shop.applied()
    report = await shop.audit()
    assert report.clean, report
    row = await shop.pool.fetchrow(
        "SELECT actor, reason FROM audit_log WHERE action LIKE '%recov%'"
    )
    assert row["actor"] == "cli:me"
    assert row["reason"]
    assert (await shop.recover()).says.endswith("nothing is wrong")


async def test_recovery_of_a_sound_campaign_changes_nothing(shop: Shop):
    before = await shop.stock.everything()
    for dry_run in (True, False):
        done = await shop.recover(dry_run=dry_run)
        assert not done.changed
        assert done.differences == []
    assert await shop.stock.everything() == before


async def test_recovery_does_not_disturb_sales(shop: Shop):
    await shop.step("stock", showing="s0", add=5_000)
    selling = True

    async def sell() -> int:
        n = 100
        while selling:
            await shop.buy(*range(n, n + 20))
            n += 20
            await asyncio.sleep(0)
        return n - 100

    task = asyncio.create_task(sell())
    for _ in range(10):
        done = await shop.recover()
        assert (done.changed, done.differences) == (False, [])
    selling = False
    assert await task > 0


async def test_recovery_verifies_an_unverified_redis(shop: Shop):
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    assert (await shop.stock.call(Bid(member(5), key(1))))[0] == CallReply.UNVERIFIED
    assert (await shop.recover(dry_run=True)).differences == []
    done = await shop.recover()
    assert done.changed
    assert "verified" in done.says
    assert await shop.stock.head("epoch") == ["1"]
    await shop.buy(5)


async def test_verification_keeps_the_mark_of_damaged_stock(shop: Shop):
    await lose_stock(shop)
    await freeze(shop.redis, CAMPAIGN, "Redis has another stock than the ledger says")
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    for _ in range(2):
        assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
        assert (await shop.stock.buy_one(member(5), key(1))).decision is Decision.RECOVERING
    assert (await shop.recover()).changed
    assert (await shop.stock.buy_one(member(5), key(1))).decision is Decision.SOLD
    await freeze(shop.redis, CAMPAIGN, "by mistake")
    assert "verified" in (await shop.recover()).says
    assert (await shop.stock.buy_one(member(6), key(1))).decision is Decision.SOLD


async def test_recovery_registers_a_missing_id(shop: Shop):
    await shop.redis.srem(CAMPAIGNS, CAMPAIGN)
    assert "not registered" in str(await shop.audit())
    assert (await shop.recover()).changed
    assert (await shop.audit()).clean


async def test_recovery_of_an_old_copy_restores_newer_orders(shop: Shop):
    copy = {key_name: await shop.redis.dump(key_name) for key_name in shop.stock.keys}
    await shop.buy(6, quantity=3)
    await shop.applied()
    await _restore(shop, copy)
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    assert (await shop.stock.call(Bid(member(6), key(2))))[0] == CallReply.UNVERIFIED
    done = await shop.recover()
    assert done.redis_seq < done.applied
    assert (await shop.stock.buy_one(member(6), key(2))).decision is Decision.LIMIT_EXCEEDED
    await shop.applied()
    assert (await shop.audit()).clean


async def test_recovery_takes_unapplied_events_from_the_stream(shop: Shop):
    await shop.stop_writer()
    await shop.buy(6, quantity=3)
    await shop.buy(7)
    for damage in (lose_head, lose_the_cards):
        await damage(shop)
        assert (await shop.recover()).changed
        assert (await shop.stock.buy_one(member(6), key(2))).decision is Decision.LIMIT_EXCEEDED
        assert (await shop.stock.buy_one(member(7), key(1))).decision is Decision.REPLAYED
    await shop.start_writer()
    await shop.applied()
    assert (await shop.audit()).clean
    assert await shop.stock.head("epoch") == ["3"]


async def test_recovery_of_diverged_copies_keeps_the_ledger(shop: Shop):
    copy = {key_name: await shop.redis.dump(key_name) for key_name in shop.stock.keys}
    (forked_at,) = await shop.buy(6)
    await shop.applied()
    await shop.stop_writer()
    await _restore(shop, copy)
    await shop.buy(7)
    (beyond,) = await shop.buy(8)
    told = await shop.recover(dry_run=True)
    assert (told.conflicts, told.filled, told.voided) == (1, 1, [])
    assert await shop.pool.fetchval("SELECT count(*) FROM conflict") == 0
    with pytest.raises(Unsafe, match="1 conflicts"):
        await shop.recover(lossless_only=True)
    done = await shop.recover()
    assert (done.conflicts, done.filled, done.voided) == (1, 1, [])
    conflicts = await shop.pool.fetch(
        "SELECT seq, source, (event->>'member_no')::int AS member FROM conflict"
    )
    assert [tuple(row) for row in conflicts] == [(forked_at, "forked", member(7))]
    # Who stands in the ledger keeps the order, who has none may buy, and no number is used twice.
    again, kept, new = await shop.stock.buy(
        Bid(member(6), key(1)), Bid(member(8), key(1)), Bid(member(7), key(1))
    )
    assert (again.decision, again.a) == (Decision.REPLAYED, forked_at)
    assert (kept.decision, kept.a) == (Decision.REPLAYED, beyond)
    assert (new.decision, new.a) == (Decision.SOLD, beyond + 2)
    await shop.start_writer()
    await shop.applied()
    report = await shop.audit()
    assert [finding.invariant for finding in report.campaigns[0].findings] == ["INV-3"]


async def test_gap_in_the_stream_is_filled_from_card_records(shop: Shop):
    await shop.stop_writer()
    _, second = await shop.buy(6, 7)
    await shop.buy(8)
    await shop.redis.xdel(shop.stock.keys.stream, f"{second}-0")
    done = await shop.recover()
    assert (done.filled, done.voided, done.conflicts) == (3, [], 0)
    await shop.start_writer()
    await shop.applied()
    assert (await shop.audit()).clean


async def test_events_that_no_store_has_are_voided(shop: Shop):
    await shop.stop_writer()
    first, second = await shop.buy(6, 7)
    (third,) = await shop.buy(8)
    await shop.redis.xdel(shop.stock.keys.stream, f"{second}-0")
    await shop.redis.hdel(shop.stock.keys.members, member(6), member(7))
    with pytest.raises(Unsafe, match="2 numbers voided"):
        await shop.recover(lossless_only=True)
    done = await shop.recover()
    assert (done.filled, done.voided, done.conflicts) == (1, [(first, second)], 0)
    assert (await shop.stock.buy_one(member(6), key(1))).a == third + 2
    await shop.start_writer()
    await shop.applied()
    async with shop.pool.acquire() as connection:
        assert await claims.voided(connection, CAMPAIGN) == [(first, second)]
    assert (await shop.audit()).clean


async def test_recovery_of_an_unknown_id_is_refused(shop: Shop):
    shop.stock.id = "no-such"
    with pytest.raises(Refused) as refused:
        await shop.recover()
    assert refused.value.problem is Problem.NOT_FOUND


async def test_only_one_of_two_recoveries_runs(shop: Shop):
    await lose_everything(shop)
    done = await asyncio.gather(shop.recover(), shop.recover(), return_exceptions=True)
    assert sum(isinstance(each, Refused) or not each.changed for each in done) == 1
    assert await shop.stock.head("epoch") == ["2"]


async def test_recovery_keeps_a_paused_or_deleted_state(shop: Shop):
    await shop.step("pause")
    draft = campaign(3, campaign_id="green-gift")
    await shop.create(draft)
    await shop.take("delete", "green-gift")
    await shop.applied()
    await until(lambda: _deleted(shop))
    await lose_everything(shop)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    await shop.recover()
    assert (await shop.stock.buy_one(member(5), key(1))).decision is Decision.PAUSED
    with pytest.raises(Refused, match="recover it first"):
        await shop.create(draft)
    shop.stock.id = "green-gift"
    await shop.recover()
    await shop.create(draft)
    shop.stock.id = CAMPAIGN
    await shop.applied()


async def test_redis_of_another_deployment_is_not_trusted(shop: Shop):
    other = Scripts(shop.redis, "another")
    reply = await other.purchase(
        shop.stock.keys, "p9", 1, NOT_CHECKED, BEHIND_MAX, packed([Bid(member(5), key(1))])
    )
    assert reply[0] == CallReply.UNVERIFIED


async def _restore(shop: Shop, copy: dict[str, bytes | None]) -> None:
    for key_name, value in copy.items():
        await shop.redis.delete(key_name)
        if value is not None:
            await shop.redis.restore(key_name, 0, value)


async def _deleted(shop: Shop) -> bool:
    return bool(
        await shop.pool.fetchval(
            "SELECT state = 'deleted' FROM campaign WHERE campaign_id = 'green-gift'"
        )
    )


async def test_long_event_in_conflict_is_kept_once(shop: Shop) -> None:
    # Given: too long for an index, also when compressed
    reason = "".join(random.Random(1).choices("0123456789abcdef", k=20_000))
    strays = [
        (Event(900, 1_430_442_000_000, 1, "paused", data={"reason": reason + end}), "why")
        for end in ("", "!")
    ]
    async with shop.pool.acquire() as connection:
        # When
        for _ in range(2):
            await claims.record_forked(connection, CAMPAIGN, strays)
        # Then
        assert len(await claims.conflicts(connection, CAMPAIGN)) == 2


async def test_refill_of_many_numbers_gives_others_turns() -> None:
    # Given
    books = CampaignState(config={})
    began, gaps, last = time.monotonic(), [0.0], time.monotonic()

    async def watch() -> None:
        nonlocal last
        while True:
            await asyncio.sleep(0)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    watching = asyncio.create_task(watch())
    # When
    done = await refill(books, 0, [], 200_000)
    entries = await done.entries(GENESIS)
    took_s = time.monotonic() - began
    watching.cancel()
    # Then
    assert (done.voided, entries[-1].last) == ([(1, 200_000)], 200_000)
    assert max(gaps) < took_s / 4
