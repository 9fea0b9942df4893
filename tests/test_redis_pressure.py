"""Redis without memory, time or disk space: sales stop with a reason and resume by themselves.

Space is taken from the real disk by a file; where it is to be *full* the threshold is raised
instead, so that nothing has to be mounted.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from own_api import own_api
from redis.asyncio import Redis
from service import CAMPAIGNS, ORDERS, Client, Seen, Service, metric, new_key, read_metrics
from shop import Shop
from waiting import until, until_equal

from sale.host import embedded
from sale.host.embedded import EmbeddedError, server
from sale.host.supervisor import _Register
from sale.metrics import PurchaseMetrics
from sale.stock.batchers import Batchers
from sale.stock.scripts import Scripts
from sale.trust.disk_watch import SPARE_MB, DiskWatch, free_mb, redis_directory

TAKEN_MB = 512
DEADLINE_S = 1.5
ANSWER_SPARE_S = 1.0


@contextlib.asynccontextmanager
async def no_memory(redis: Redis) -> AsyncIterator[None]:
    await redis.config_set("maxmemory", "1")
    try:
        yield
    finally:
        await redis.config_set("maxmemory", "0")


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    """An open campaign, without a writer."""
    await shop.stop_writer()
    await shop.create()
    await shop.step("open")
    return shop


async def test_redis_out_of_memory_stops_only_sales(service: Service, client: Client) -> None:
    campaign, sold_out = await client.campaign(), await client.campaign(tickets=1)
    buyer, other = service.card(), service.card()
    assert (await client.buy(campaign, buyer.token)).status == 201
    assert (await client.buy(sold_out, buyer.token)).status == 201
    key = new_key()
    async with service.redis() as redis:
        with service.stopped("writer"):
            assert (await client.buy(campaign, service.card().token)).status == 201
            await redis.config_set("maxmemory", "1")
        async with no_memory(redis):
            refused = await client.buy(campaign, other.token, key=key)
            assert (refused.status, refused.code) == (503, "unavailable")
            assert refused.headers["Retry-After"]

            async def refusals_go_on() -> bool:
                return (await client.buy(sold_out, other.token)).code == "sold-out"

            await until(refusals_go_on, 5)
            assert await client.remaining(campaign) == [98]
            assert (await client.get(ORDERS, buyer.token)).status == 200
            assert (await client.get(f"{CAMPAIGNS}/{campaign}/availability")).status == 200

            await until(lambda: client.all_applied(campaign))

    async def sold() -> bool:
        return (await client.buy(campaign, other.token, key=key)).status == 201

    await until(sold, 5)
    assert await client.remaining(campaign) == [97]


async def test_writer_applies_and_trims_without_redis_memory(shop: Shop) -> None:
    assert all(await shop.buy(1, 2, 3))
    stream = shop.stock.keys.stream
    entries = await shop.redis.xlen(stream)
    async with no_memory(shop.redis):
        await shop.start_writer(ledger_retention_events=0, ledger_retention_s=0)
        await shop.applied()

        await until_equal(lambda: shop.redis.xlen(stream), 1)
    assert entries > 1
    assert all(await shop.buy(4))
    await shop.applied()
    assert (await shop.audit()).clean


@pytest.mark.fault
async def test_stopped_redis_is_answered_in_time_and_sales_resume(
    service: Service, client: Client, short_path: Path
) -> None:
    known, unknown = await client.campaign(), await client.campaign()
    settings = {"SALE_PURCHASE_DEADLINE_MS": str(int(DEADLINE_S * 1_000))}
    async with (
        own_api(service, short_path, **settings) as api,
        Client(api, spread=True) as here,
    ):
        assert (await here.buy(known, service.card().token)).status == 201
        wishes = [
            (campaign, service.card().token, new_key())
            for campaign in (known, unknown)
            for _ in range(20)
        ]
        with service.stopped("redis"):
            asked = asyncio.gather(*(_timed(here, *wish) for wish in wishes))
            ready = await here.get("/readyz")
            assert ready.status == 503
            assert "redis: not reached" in ready.body.decode()
            answers = await asked
        assert {seen.code for seen, _ in answers} == {"unavailable"}
        assert max(took for _, took in answers) < DEADLINE_S + ANSWER_SPARE_S

        for campaign, token, key in wishes:

            async def settled(campaign: str = campaign, token: str = token, key: str = key) -> bool:
                return (await here.buy(campaign, token, key=key)).status == 201

            await until(settled)
    assert await client.remaining(known) == [79]
    assert await client.remaining(unknown) == [80]


async def _timed(client: Client, campaign: str, token: str, key: str) -> tuple[Seen, float]:
    started = time.monotonic()
    seen = await client.buy(campaign, token, key=key)
    return seen, time.monotonic() - started


async def test_short_redis_pause_only_delays_members(service: Service, client: Client) -> None:
    campaign = await client.campaign()
    cards = service.cards(20)
    async with service.redis() as redis:
        await redis.execute_command("CLIENT", "PAUSE", 2_000)
    answers = await asyncio.gather(*(client.buy(campaign, card.token) for card in cards))
    assert [seen.status for seen in answers] == [201] * 20
    assert await client.remaining(campaign) == [80]


# Disk of Redis -----------------------------------------------------------------------------------


@contextlib.contextmanager
def taken(directory: Path, mb: int) -> Iterator[None]:
    """Use space on the disk of a directory."""
    file = directory / "taken"
    with file.open("wb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, mb * 1024 * 1024)
            yield
        finally:
            file.unlink()


def halting(redis: Redis) -> tuple[Batchers, PurchaseMetrics]:
    """Batchers of which these tests use only ``halt``."""
    metrics = PurchaseMetrics()
    batchers = Batchers(
        Scripts(redis, "nonce"), "p", metrics,
        batch_max=1, queue_max=1, deadline_s=1, behind_max=(1, 1),
    )  # fmt: skip
    return batchers, metrics


async def test_sales_halt_on_a_nearly_full_disk_and_resume(redis: Redis, redis_url: str) -> None:
    directory = await redis_directory(redis, redis_url)
    assert directory is not None
    batchers, metrics = halting(redis)
    bound_mb = free_mb(directory) - TAKEN_MB // 2
    watch = DiskWatch(redis, redis_url, batchers, free_min_mb=bound_mb)

    watch.look(directory)
    assert (batchers.halted, metrics.halted) == ("", False)
    with taken(directory, TAKEN_MB):
        watch.look(directory)
        assert "disk" in batchers.halted
        assert metrics.halted
    watch.look(directory)
    assert (batchers.halted, metrics.halted) == ("", False)


async def test_disk_space_near_the_bound_does_not_toggle_sales(
    redis: Redis, redis_url: str
) -> None:
    directory = await redis_directory(redis, redis_url)
    assert directory is not None
    batchers, _ = halting(redis)
    bound_mb = free_mb(directory) - SPARE_MB // 2
    watch = DiskWatch(redis, redis_url, batchers, free_min_mb=bound_mb)
    with taken(directory, TAKEN_MB):
        watch.look(directory)
    watch.look(directory)
    assert batchers.halted, "above the bound by less than the spare"


async def test_disk_space_does_not_restart_sales_while_stopping(
    redis: Redis, redis_url: str
) -> None:
    directory = await redis_directory(redis, redis_url)
    assert directory is not None
    batchers, _ = halting(redis)
    bound_mb = free_mb(directory) - TAKEN_MB // 2
    watch = DiskWatch(redis, redis_url, batchers, free_min_mb=bound_mb)
    with taken(directory, TAKEN_MB):
        watch.look(directory)
        batchers.halt("drain", "stopping")
    watch.look(directory)
    assert batchers.halted == "stopping"


@pytest.mark.parametrize("url", ["redis://elsewhere:6379/0", "rediss://10.0.0.9/1"])
async def test_disk_of_a_remote_redis_is_not_checked(redis: Redis, url: str) -> None:
    assert await redis_directory(redis, url) is None


async def test_disk_below_its_bound_is_reported_everywhere(
    service: Service, client: Client, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = await client.campaign()
    bound = {"SALE_DISK_FREE_MIN_MB": "1000000000"}
    async with own_api(service, short_path, **bound) as api:
        await api.said("disk.short")
        async with Client(api) as here:
            refused = await here.buy(campaign, service.card().token)
            assert (refused.status, refused.code) == (503, "unavailable")
            ready = await here.get("/readyz")
            assert ready.status == 503
            assert "disk" in str(ready.json()["reasons"])
            assert (await here.get(f"{CAMPAIGNS}/{campaign}")).status == 200
        assert metric(await read_metrics(short_path / "m"), "sale_halted") == 1
    assert await client.remaining(campaign) == [100]
    monkeypatch.setenv("SALE_DISK_FREE_MIN_MB", bound["SALE_DISK_FREE_MIN_MB"])
    told = await service.asale("doctor")
    assert told.status == 1
    assert "nothing is sold" in told.out
    assert (await service.asale("doctor", "--json")).json()["redis_disk_free_mb"] > 0


@pytest.mark.fault
@pytest.mark.parametrize("full", [True, False])
async def test_dying_server_is_given_up_unless_its_disk_is_full(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    monkeypatch.setattr(server, "RESTARTS_MAX", 1)
    monkeypatch.setattr(server, "BACKOFF_MAX_S", 0.1)
    monkeypatch.setattr(server, "DISK_FULL_BYTES", 2**62 if full else 0)
    async with embedded.running(short_path / "d", redis=True, postgres=False) as running:
        watching = asyncio.ensure_future(running.watch())
        try:
            for _ in range(3):
                pid = running.pids.get("redis")
                if pid is None or watching.done():
                    break
                os.kill(pid, signal.SIGKILL)

                async def again(pid: int = pid) -> bool:
                    return watching.done() or running.pids.get("redis", pid) != pid

                await until(again)
            if full:
                assert not watching.done()
                assert running.pids["redis"]
            else:
                with pytest.raises(EmbeddedError, match="died"):
                    await asyncio.wait_for(watching, 10)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def test_full_disk_delays_the_register_and_stops_nothing(tmp_path: Path) -> None:
    register = _Register(tmp_path, SimpleNamespace(pids={}), "a:1", "b:2")  # type: ignore[arg-type]
    register.put("serve-1", 1)  # its directory does not exist
    (tmp_path / "run").mkdir()
    register.put("serve-2", 2)
    assert (tmp_path / "run" / "processes.json").read_text().count("serve-") == 2


def test_log_on_a_full_disk_stops_no_process() -> None:
    program = (
        "from sale.logs import log, set_up_logging; from sale.config import Settings\n"
        "set_up_logging(Settings())\n"
        "for n in range(1_000): log.warning('store.awaited', n=n)\n"
        "print('alive', flush=True)\n"
        "import os; os._exit(0)\n"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.stdout == "alive\n"
