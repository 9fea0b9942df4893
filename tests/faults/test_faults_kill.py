"""Processes are killed, stopped and restarted during a rush: no order is lost, sales resume."""

import asyncio
import time

import pytest
from answer_book import outcome
from rig import Rig

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

RIG = {"workers": 2, "writers": 2, "schedulers": 2}
TAKEOVER_S = 3.0
SELLING_AGAIN_S = 5.0
"""A loose bound, because other tests run in parallel. The test prints the real time."""


async def test_kill_of_everything_in_a_rush_loses_nothing(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign)
    await asyncio.sleep(1.0)
    for name in rig.names:
        rig.kill(name)
    await rig.start_all()
    took_s = await rig.selling(campaign, within_s=SELLING_AGAIN_S)
    before = load.sold()
    await asyncio.sleep(0.5)
    await load.finish()

    print(f"selling {took_s:.2f} s after all parts were started")
    assert before > 50
    assert load.sold() > before
    await rig.settle()
    assert await rig.verdict(campaign) == []


@pytest.mark.parametrize("server", ["redis", "postgres"])
async def test_sales_resume_after_a_server_is_killed(rig: Rig, server: str) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign)
    await asyncio.sleep(0.7)
    rig.kill(server)
    if server == "postgres":
        assert await rig.selling(campaign, within_s=1.0) < 1.0
    await asyncio.sleep(0.3)
    await rig.start(server)
    took_s = await rig.selling(campaign, within_s=SELLING_AGAIN_S)
    await asyncio.sleep(0.5)
    await load.finish()

    print(f"selling {took_s:.2f} s after {server} was back")
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_other_api_process_sells_on_after_a_kill(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign)
    for name in ("serve-1", "serve-2"):
        await asyncio.sleep(0.7)
        rig.kill(name)
        took_s = await rig.selling(campaign, within_s=TAKEOVER_S)
        print(f"selling {took_s:.2f} s after {name} was killed")
        await rig.start(name)
    await load.finish()
    await rig.settle()
    assert await rig.verdict(campaign) == []


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_standby_writer_takes_over_after_a_kill(rig: Rig, how: str) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign, rate=100)
    await asyncio.sleep(0.5)
    for name in ("writer-1", "writer-2"):  # one of them is active
        getattr(rig, how)(name)
        took_s = await written_up(rig, campaign, within_s=TAKEOVER_S + 1)
        print(f"written up {took_s:.2f} s after {name} met {how}")
        if how == "kill":
            await rig.start(name)
        else:
            rig.cont(name)
        await asyncio.sleep(0.3)
    await load.finish()
    await rig.settle()
    assert await rig.verdict(campaign) == []


@pytest.mark.parametrize("name", ["redis", "postgres", "serve-1", "scheduler-1"])
async def test_suspended_process_loses_nothing_when_it_resumes(rig: Rig, name: str) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign)
    await asyncio.sleep(0.5)
    rig.stop(name)
    if name != "redis":  # the other parts sell meanwhile
        assert await rig.selling(campaign, within_s=3.0) < 3.0
    await asyncio.sleep(1.5)
    rig.cont(name)
    took_s = await rig.selling(campaign, within_s=SELLING_AGAIN_S)
    await asyncio.sleep(0.5)
    await load.finish()

    print(f"selling {took_s:.2f} s after {name} woke up")
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_opening_is_on_time_without_a_scheduler(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign)
    rig.kill("scheduler-1")
    rig.kill("scheduler-2")
    other = await rig.campaign(tickets=10)
    assert await rig.selling(other, within_s=1.0) < 1.0
    await load.finish()
    await rig.settle()
    assert await rig.verdict(campaign, other) == []


async def test_rolling_restart_in_a_rush_answers_every_retry(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign, rate=100)
    for name in ("serve-1", "serve-2"):
        await asyncio.sleep(0.5)
        took_s = await rig.term(name)
        print(f"{name} ended in {took_s:.2f} s")
        await rig.start(name)
    await load.finish()

    # Purchases without an answer were retried with the same key, and then got one.
    open_keys = {answer.key for answer in load.answers if answer.status in {0, 503}}
    known = {answer.key for answer in load.answers if answer.status not in {0, 503}}
    assert open_keys <= known
    assert set(outcome(load.answers).refused) <= {
        "limit-exceeded",
        "idempotency-mismatch",
        "unavailable",
        "overloaded",
    }
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def written_up(rig: Rig, campaign: str, within_s: float) -> float:
    """Wait until PostgreSQL has the orders sold until now; give the seconds."""
    started = time.monotonic()
    await asyncio.sleep(0.3)
    goal = await rig.sold(campaign)
    while await rig.written(campaign) < goal:
        assert time.monotonic() - started < within_s, "nobody took over"
        await asyncio.sleep(0.05)
    return time.monotonic() - started
