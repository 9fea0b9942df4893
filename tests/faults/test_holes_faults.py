"""Faults of other flash-sale systems, by row number, whose tests need broken parts.

The others are in ``tests/test_holes.py``.
"""

import asyncio
import time

import pytest
from rig import Rig

from loadtest.books.answers import Answer
from sale.stock.keys import campaign_keys
from sale.stock.scripts import PURCHASE

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

RIG = {"workers": 2, "proxied": [("*", "redis"), ("*", "postgres")]}
AWAY_S = 15.0
NOTICED_S = 2.0
"""A member notices an answer that takes longer."""


async def test_row_03_members_do_not_notice_15_s_without_postgresql(rig: Rig) -> None:
    """PostgreSQL away for 15 s: acknowledged orders are retried three times, then gone."""
    campaign = await rig.campaign(tickets=100_000, card_limit=60)
    load = await rig.rush(campaign, rate=100)
    await asyncio.sleep(0.5)
    for link in rig.links("postgres"):
        link.cut()
    await asyncio.sleep(AWAY_S)
    sold = await rig.sold(campaign)
    behind = sold - await rig.written(campaign)
    for link in rig.links("postgres"):
        link.heal()
    started = time.monotonic()
    # The orders sold meanwhile. During a rush PostgreSQL is always some events behind.
    while await rig.written(campaign) < sold:
        assert time.monotonic() - started < AWAY_S / 2, "it does not catch up"
        await asyncio.sleep(0.05)
    await load.finish()

    print(f"{behind} events behind, caught up in {time.monotonic() - started:.2f} s")
    assert behind > 500
    unnoticed = {"", "limit-exceeded", "idempotency-mismatch"}
    assert [answer for answer in load.answers if answer.code not in unnoticed] == []
    assert [answer for answer in load.answers if noticed(answer)] == []
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_row_07_order_with_a_lost_answer_keeps_its_tickets(rig: Rig) -> None:
    """A confirmation timed out, and the system returned the stock although it had arrived."""
    campaign = await rig.campaign(tickets=4)
    phone, link = rig.phone(campaign, timeout_s=2.0), rig.link("serve-1", "redis")
    attempt = phone.attempt(3)
    assert (await rig.phone(campaign).buy(1, of="serve-1")).status == 201
    link.trap(PURCHASE.sha.encode(), holding="down")
    first = await phone.ask(attempt, of="serve-1")
    assert first.status in {0, 503}
    link.drop()  # the confirmation is lost
    link.heal()

    other = await rig.phone(campaign).buy(1)
    assert b'"sold-out"' in other.body
    again = phone.read(attempt, await phone.ask(attempt, of="serve-2"))
    assert (again.status, again.replayed, again.told_quantity) == (201, True, 3)
    assert await remaining(rig, campaign) == 0
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_row_08_crash_after_commit_leaves_nothing_to_repair(rig: Rig) -> None:
    """A crash between the database's commit and the next step was never repaired."""
    campaign = await rig.campaign(tickets=1_000, card_limit=30)
    await rig.settle()
    link = rig.link("writer-1", "postgres")
    link.trap(b"COMMIT", holding="down")
    load = await rig.rush(campaign, seconds=1.0, rate=100)
    await asyncio.wait_for(link.sprung.wait(), 5)
    await asyncio.sleep(0.3)
    before = await rig.written(campaign)
    rig.kill("writer-1")
    link.heal()
    await rig.start("writer-1")
    await load.over()

    assert before > 0
    await rig.settle()
    assert await rig.verdict(campaign) == []
    async with rig.database() as connection:
        numbers = await connection.fetch(
            "SELECT seq FROM event WHERE campaign_id = $1 ORDER BY seq", campaign
        )
    assert [row["seq"] for row in numbers] == list(range(1, len(numbers) + 1))


async def test_row_11_unwritten_orders_count_after_a_loss_of_redis(rig: Rig) -> None:
    """After a loss of Redis, stock was reloaded from the database without the queued orders."""
    campaign = await rig.campaign(tickets=400, card_limit=30)
    await rig.settle()
    rig.kill("writer-1")
    load = await rig.rush(campaign, seconds=1.0, rate=100, quantity=1)
    await load.over()
    left = await remaining(rig, campaign)
    assert await rig.written(campaign) < await rig.sold(campaign)
    await rig.restore_redis(None)
    await rig.start("redis")
    await rig.settle()

    assert await remaining(rig, campaign) == left
    load = await rig.rush(campaign, seconds=2.0, rate=400, quantity=1, seed=2)
    await load.over()
    assert await remaining(rig, campaign) == 0
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_row_12_no_reconciliation_returns_tickets_in_flight(rig: Rig) -> None:
    """A "reconciliation" overwrote Redis by the database during sales."""
    campaign = await rig.campaign(tickets=100_000, card_limit=60)
    await rig.settle()
    async with rig.redis() as redis:
        head = campaign_keys(campaign).head
        epoch = await redis.hget(head, "epoch")
        rig.stop("writer-1")  # the database is behind all the time
        load = await rig.rush(campaign, rate=100)
        left = [await remaining(rig, campaign)]
        for _ in range(3):
            await asyncio.sleep(0.3)
            ran = await rig.sale("recover", campaign, "--json")
            assert (ran.status, ran.json()["changed"]) == (0, False), ran
            left.append(await remaining(rig, campaign))
        rig.cont("writer-1")
        await load.finish()
        assert await redis.hget(head, "epoch") == epoch
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0]
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_row_17_damage_of_one_campaign_stays_there(rig: Rig) -> None:
    """A negative stock reloaded all campaigns during the sale; one failure failed all of them."""
    sound = await rig.campaign(tickets=100_000, card_limit=60)
    damaged = await rig.campaign(tickets=100, card_limit=60)
    load = await rig.rush(sound, rate=100)
    async with rig.redis() as redis:
        epoch = await redis.hget(campaign_keys(sound).head, "epoch")
        await redis.hset(campaign_keys(damaged).stock, "r0", -5)
        refused = await rig.phone(damaged).buy()
        await asyncio.sleep(1.5)
        ran = await rig.sale("recover", damaged, "--json")
        assert (ran.status, ran.json()["changed"]) == (0, True), ran
        assert await redis.hget(campaign_keys(sound).head, "epoch") == epoch
    assert refused.status in {409, 503}
    assert await rig.selling(damaged, within_s=5) < 5
    await load.finish()
    assert {answer.status for answer in load.answers} <= {201, 409, 422}
    await rig.settle()
    assert await rig.verdict(sound, damaged) == []


def noticed(answer: Answer) -> bool:
    return answer.status == 0 or answer.received_at - answer.sent_at > NOTICED_S


async def remaining(rig: Rig, campaign: str) -> int:
    status, live = await rig.admin("GET", f"/{campaign}/live")
    assert status == 200, live
    return sum(showing["remaining"] for showing in live["showings"])
