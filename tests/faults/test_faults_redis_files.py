"""Redis returns with its files, with torn files, with old files, or with none."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from proxy import Direction
from rig import Rig, told_number
from waiting import until

from sale.stock.process_reports import REPORT_EVERY_S

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

RIG = {"workers": 2, "proxied": [("scheduler-1", "redis")]}
SELLING_AGAIN_S = 5.0
RECOVERED_S = 12.0
LOST_ORDERS = 400


async def test_sales_resume_after_redis_returns_with_its_files(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign)
    for _ in range(3):
        await asyncio.sleep(0.5)
        rig.kill("redis")
        await rig.start("redis")
        took_s = await rig.selling(campaign, within_s=SELLING_AGAIN_S)
        print(f"selling {took_s:.2f} s after Redis was back")
    await load.finish()
    await rig.settle()
    assert await rig.voided(campaign) == set()
    assert await rig.verdict(campaign) == []


async def test_torn_tail_is_filled_in_by_api_processes(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=10_000, card_limit=30)
    await rig.settle()
    rig.kill("writer-1")  # PostgreSQL does not know the tail
    load = await rig.rush(campaign, seconds=1.0)
    await load.over()
    sold = await rig.sold(campaign)

    await rig.tear_redis(20_000)
    await rig.start("redis")
    torn = await rig.sold(campaign)
    took_s = await rig.selling(campaign, within_s=RECOVERED_S)

    print(f"{sold - torn} events were torn off; selling {took_s:.2f} s after Redis was back")
    assert sold > torn > 0
    await rig.settle()
    assert await rig.voided(campaign) == set()
    assert await rig.verdict(campaign) == []


async def test_old_copy_lacking_400_orders_is_filled_in(rig: Rig, tmp_path: Path) -> None:
    campaign = await rig.campaign(tickets=1_000, card_limit=30)
    await go_back_in_time(rig, campaign, tmp_path / "old")
    took_s = await rig.selling(campaign, within_s=RECOVERED_S)

    print(f"selling {took_s:.2f} s after an old Redis was back")
    load = await rig.rush(campaign, seconds=2.0, rate=400, quantity=1, odd=False, seed=3)
    await load.over()  # the load only finishes
    assert any(answer.code == "sold-out" for answer in load.answers)
    await rig.settle()
    assert await rig.voided(campaign) == set()
    assert await rig.verdict(campaign) == []


async def test_old_copy_voids_orders_that_only_a_dead_process_knew(
    rig: Rig, tmp_path: Path
) -> None:
    campaign = await rig.campaign(tickets=1_000, card_limit=30)
    await go_back_in_time(rig, campaign, tmp_path / "old", losing="serve-2")

    # No process decides alone that an answered order is lost: the campaign stays shut.
    started = time.monotonic()
    while time.monotonic() - started < 3:
        answer = await rig.phone(campaign).buy()
        assert answer.status == 503, answer.body
        assert b'"unavailable"' in answer.body
        assert answer.header("retry-after")
    told_before = {told_number(answer) for answer in rig.book(campaign)} - {0}

    would = await recover(rig, campaign, "--dry-run")
    done = await recover(rig, campaign)
    print(done["says"])
    assert would["voided"] == done["voided"]
    took_s = await rig.selling(campaign, within_s=SELLING_AGAIN_S)
    print(f"selling {took_s:.2f} s after the recovery")
    await rig.settle()

    voided = await rig.voided(campaign)
    listed = {n for first, last in done["voided"] for n in range(first, last + 1)}
    assert voided == listed
    assert 0 < len(voided & told_before) < LOST_ORDERS
    load = await rig.rush(campaign, seconds=2.0, rate=400, quantity=1, odd=False, seed=3)
    await load.over()
    told_after = {told_number(answer) for answer in rig.book(campaign)} - {0} - told_before
    assert min(told_after) > max(told_before)
    await rig.settle()
    assert await rig.verdict(campaign, voided=voided) == []


async def test_empty_redis_gets_every_answered_order_back(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=10_000, card_limit=30)
    load = await rig.rush(campaign)
    await asyncio.sleep(1.0)
    await rig.restore_redis(None)
    await rig.start("redis")
    took_s = await rig.selling(campaign, within_s=RECOVERED_S)
    before = load.sold()
    await asyncio.sleep(0.5)
    await load.finish()

    print(f"selling {took_s:.2f} s after an empty Redis was there")
    assert load.sold() > before > 50
    await rig.settle()
    assert await rig.voided(campaign) == set()
    assert await rig.verdict(campaign) == []


@pytest.mark.parametrize(
    ("word", "holding"),
    [
        pytest.param(b":new:", "up", id="before-it-is-built-beside"),
        pytest.param(b"-- recover.lua:", "up", id="before-the-flip"),
        pytest.param(b"-- recover.lua:", "down", id="after-the-flip"),
    ],
)
async def test_killed_recovery_is_completed_by_the_next(
    rig: Rig, word: bytes, holding: Direction
) -> None:
    campaign = await rig.campaign(tickets=10_000, card_limit=30)
    load = await rig.rush(campaign)
    await asyncio.sleep(0.5)
    link = rig.link("scheduler-1", "redis")
    link.trap(word, holding=holding)
    await rig.restore_redis(None)
    await rig.start("redis")
    await asyncio.wait_for(link.sprung.wait(), RECOVERED_S)
    await asyncio.sleep(0.2)
    rig.kill("scheduler-1")
    link.heal()
    await rig.start("scheduler-1")
    took_s = await rig.selling(campaign, within_s=RECOVERED_S)
    await load.finish()

    print(f"selling {took_s:.2f} s after the scheduler was back")
    await rig.settle()
    assert await rig.voided(campaign) == set()
    assert await rig.verdict(campaign) == []


async def test_check_finds_orders_lost_with_a_torn_tail(rig: Rig) -> None:
    """A test of the rig: its check must find orders that were removed from the files by hand."""
    campaign = await rig.campaign(tickets=10_000, card_limit=30)
    await rig.settle()
    rig.kill("writer-1")
    load = await rig.rush(campaign, seconds=0.7, rate=100)
    await load.over()
    for name in ("serve-1", "serve-2"):
        rig.kill(name)
    await rig.tear_redis(20_000)
    await rig.start_all()
    found = await rig.verdict(campaign, within_s=2)
    assert any(f"{campaign}: lost: " in line or "clients were told" in line for line in found)
    cards = rig.card_numbers.values()
    assert not [line for line in found if any(card in line for card in cards)]


async def go_back_in_time(rig: Rig, campaign: str, copy: Path, losing: str | None = None) -> None:
    """Sell 400 orders that neither PostgreSQL nor the copy has; restart Redis with the copy."""
    load = await rig.rush(campaign, seconds=0.4, quantity=1)
    await load.over()
    await rig.settle()
    rig.kill("writer-1")
    before = await rig.sold(campaign)
    await rig.copy_redis(copy)
    load = await rig.rush(campaign, rate=400, quantity=1, odd=False, seed=2)
    await until(lambda: has_sold(rig, campaign, before + LOST_ORDERS))
    await load.finish()
    assert await rig.written(campaign) == before
    if losing is not None:
        # No process knows the numbers that the dead one assigned after the others' last report.
        await asyncio.sleep(3 * REPORT_EVERY_S)
        rig.kill(losing)
    await rig.restore_redis(copy)
    await rig.start("redis")


async def recover(rig: Rig, campaign: str, *options: str) -> dict[str, Any]:
    """Recover as an operator; retry if the scheduler is recovering at the same time."""
    for _ in range(10):
        ran = await rig.sale("recover", campaign, "--json", *options)
        if ran.status == 0:
            break
        assert "already" in ran.err, ran
        await asyncio.sleep(0.3)
    return ran.json()


async def has_sold(rig: Rig, campaign: str, seq: int) -> bool:
    return await rig.sold(campaign) >= seq
