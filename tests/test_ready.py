"""Readiness: once a host is ready, also after ``kill -9`` of everything, purchases succeed."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from redis.asyncio import Redis
from service import (
    ADMIN,
    Card,
    Client,
    Service,
    campaign_table,
    free_port,
    metric,
    read_metrics,
    running_service,
)
from shop import Shop
from stock_maker import CAMPAIGN
from test_durability import Server, server, whole
from waiting import until, until_equal

from sale.bootstrap import Stores
from sale.cli.processes import RELEASED_WITHIN_S
from sale.config import Settings
from sale.stock import process_reports
from sale.stock.keys import CAMPAIGNS, REPORTS, VERIFIED, campaign_keys
from sale.stock.process_reports import (
    ProcessReport,
    collect_reports,
    has_ended,
    read_identity,
    report,
)
from sale.stock.rebuild import freeze
from sale.trust.readiness import reasons
from sale.trust.verify import unverified, verify_all

NOT_VERIFIED = "campaigns are not verified yet"


@pytest.mark.fault
@pytest.mark.timeout(120)
def test_system_sells_once_ready_after_kill_of_everything(short_path: Path) -> None:
    data_dir = short_path / "data"
    with running_service(data_dir, killed=True) as service:
        service.admin_token = service.operator("admin")[1]
        service.take_roster()
        campaign = service.new_id()
        asyncio.run(open_and_sell(service, campaign, before := service.cards(50)))
        kill_everything(service)
    log_file = data_dir.with_name("up.log")
    with running_service(data_dir) as service:
        # The first request is a purchase, so that no earlier request can have waited instead.
        asyncio.run(sell(service, campaign, before))
        lines = [json.loads(line) for line in log_file.read_text("utf-8").splitlines()]
    actions = [line["action"] for line in lines]
    assert actions.index("campaign.verified") < actions.index("supervisor.ready")
    assert not [line for line in lines if line.get("why") == "unverified"], "a purchase waited"


async def open_and_sell(service: Service, campaign: str, cards: list[Card]) -> None:
    async with Client(service) as client:
        table = campaign_table(campaign, 1_000)
        made = await client.ask("POST", ADMIN, service.admin_token, json=table)
        assert made.status == 201, made
        for card in cards:
            assert (await client.buy(campaign, card.token)).status == 201


async def sell(service: Service, campaign: str, cards: list[Card]) -> None:
    async with Client(service, spread=True) as client:
        for card in cards[:10]:
            assert (await client.buy(campaign, card.token)).status == 201
        assert (await client.get("/readyz")).json()["status"] == "ok"


def kill_everything(service: Service) -> None:
    told = service.told()
    for pid in [told["supervisor"], *told["processes"].values()]:
        os.kill(pid, signal.SIGKILL)
    service.process.wait(10)


async def test_process_serves_metrics_once_nothing_halts_it(
    short_path: Path, database_url: str
) -> None:
    async with server(short_path / "r", appendfsync="everysec") as weak:
        await until(lambda: whole(weak.redis))
        async with serving(short_path, weak, database_url) as (_, url):
            await until(lambda: says(url, "appendfsync"))
            await asyncio.sleep(0.5)  # it has listened and answered all this time
            assert not (short_path / "m").exists()
            await weak.redis.config_set("appendfsync", "always")
            await until(lambda: exists(short_path / "m"))
            halted = metric(await read_metrics(short_path / "m"), "sale_halted")
            assert halted == 0


async def test_halted_process_ends_at_once_on_sigterm(short_path: Path, database_url: str) -> None:
    async with (
        server(short_path / "r", appendfsync="everysec") as weak,
        serving(short_path, weak, database_url) as (process, url),
    ):
        await until(lambda: says(url, "appendfsync"))
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        assert time.monotonic() - started < RELEASED_WITHIN_S / 2


@contextlib.asynccontextmanager
async def serving(
    folder: Path, redis: Server, database_url: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run ``sale serve``; yield the process and its URL."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "SALE_REDIS_URL": redis.url,
        "SALE_DATABASE_URL": database_url,
        "SALE_DATA_DIR": str(folder),
        "SALE_SIGNING_KEY": "k" * 32,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sale", "serve", "--listen", address),
        *("--metrics-listen", f"unix:{folder}/m"),
        env=os.environ | settings,
    )
    try:
        yield process, f"http://{address}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def says(url: str, word: str) -> bool:
    with contextlib.suppress(OSError, aiohttp.ClientError):
        async with aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as answer:
            return word in await answer.text()
    return False


async def exists(path: Path) -> bool:
    return path.exists()  # noqa: ASYNC240 - a local socket


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    await shop.create()
    await shop.step("open")
    await shop.applied()
    return shop


def stores(shop: Shop) -> Stores:
    return Stores(
        settings=Settings(), redis=shop.redis, pool=shop.pool, scripts=shop.scripts, unions={},
        nonce=shop.nonce, ticket_secret=b"",
    )  # fmt: skip


async def come_back(shop: Shop) -> None:
    """Make all heads look like those of an earlier Redis."""
    for campaign_id in await shop.redis.smembers(CAMPAIGNS):
        await shop.redis.hset(campaign_keys(campaign_id.decode()).head, "run_id", "0" * 40)
    await shop.redis.delete(VERIFIED)


async def test_host_is_unready_until_campaigns_are_verified(shop: Shop) -> None:
    assert await reasons(stores(shop)) == []
    await come_back(shop)
    (why,) = await reasons(stores(shop))
    assert NOT_VERIFIED in why
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    assert await reasons(stores(shop)) == []


async def test_other_deployment_is_not_taken_as_verified(shop: Shop) -> None:
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    assert await unverified(shop.redis, shop.nonce) == 0
    assert await unverified(shop.redis, "of another deployment") > 0


async def test_host_is_ready_despite_a_recovering_campaign(shop: Shop) -> None:
    await freeze(shop.redis, CAMPAIGN, "an operator said so")
    await shop.redis.sadd(CAMPAIGNS, "damaged")
    await shop.redis.set(campaign_keys("damaged").head, "no hash")
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    await shop.redis.delete(VERIFIED)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == sorted([CAMPAIGN, "damaged"])
    assert await unverified(shop.redis, shop.nonce) == 0
    assert await reasons(stores(shop)) == []


async def test_scheduler_verifies_before_its_next_tick(shop: Shop) -> None:
    await come_back(shop)

    # The tick is a minute, so only an immediate first round can verify in time.
    async with shop.scheduling(tick_interval_ms=60_000):
        await until_equal(lambda: unverified(shop.redis, shop.nonce), 0)


async def test_process_that_ended_here_is_not_waited_for(redis: Redis) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - a moment
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
    ) as other:
        place = f"{process_reports._host()} {other.pid} {process_reports._started(other.pid)}"
        assert not has_ended(place)
        other.kill()
        other.wait()
    assert has_ended(place)
    assert not has_ended(process_reports.this_process())
    elsewhere = f"another-host/pid:[1] {other.pid} 1"
    assert not has_ended(elsewhere)
    assert not has_ended("")

    now_ms = (await read_identity(redis)).now_ms
    for name, where in (("here", place), ("elsewhere", elsewhere), ("older", "")):
        await report(redis, name, ProcessReport(now_ms, "the-redis-before", {}, where))
    assert (await collect_reports(redis)).silent == ["elsewhere", "older"]
    await redis.delete(REPORTS)
    await report(redis, "here", ProcessReport(now_ms, "the-redis-before", {}, place))
    assert (await collect_reports(redis)).silent == []
