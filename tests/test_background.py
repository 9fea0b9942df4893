"""Background tasks restart after a failure: the function, and each process that uses it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from shop import open_shop
from structlog.testing import capture_logs
from waiting import until

from sale import background
from sale.api.app import listening
from sale.background import keep_running
from sale.bootstrap import open_engine
from sale.config import Settings
from sale.http.fast_path import FastPath
from sale.jobs.scheduler import Scheduler
from sale.jobs.writer_lag import LedgerLag
from sale.metrics import StoreMetrics
from sale.trust.disk_watch import DiskWatch
from sale.trust.durability_watch import DurabilityWatch
from sale.trust.store_watch import StoreWatch, watching
from sale.trust.witness import Witness


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_AFTER_S", 0.01)


async def test_failed_work_restarts_and_is_logged() -> None:
    done = []

    async def work() -> None:
        done.append(len(done))
        if len(done) < 3:
            raise KeyError("a fault of ours")

    with capture_logs() as logs:
        await keep_running(work)
    assert done == [0, 1, 2]
    assert [line["event"] for line in logs] == ["background.failed"] * 2
    assert "work" in logs[0]["work"]


async def test_work_ends_when_it_is_cancelled() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(keep_running(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class FailsOnce:
    """Replaces a method that runs for ever with one that fails the first time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.calls = 0

        async def work(*_: Any) -> None:
            self.calls += 1
            if self.calls == 1:
                raise KeyError("a fault of ours")
            await asyncio.Event().wait()

        monkeypatch.setattr(owner, name, work)

    def goes_on(self) -> bool:
        return self.calls == 2


@pytest.mark.parametrize("watch", [DiskWatch, DurabilityWatch, Witness, StoreWatch])
async def test_watches_of_an_api_process_restart(
    watch: type, monkeypatch: pytest.MonkeyPatch,
    redis_url: str, database_url: str, short_path: Path,
) -> None:  # fmt: skip
    broken = FailsOnce(monkeypatch, watch, "run")
    async with open_engine(settings_for(redis_url, database_url, short_path)):
        await until(broken.goes_on)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Scheduler, "_audit_repeatedly"), (StoreWatch, "run")],
    ids=["audit", "watch"],
)
async def test_background_tasks_of_a_scheduler_restart(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch, redis_url: str, database_url: str
) -> None:
    broken = FailsOnce(monkeypatch, owner, name)
    async with open_shop(redis_url, database_url) as shop, shop.scheduling():
        await until(broken.goes_on)


async def test_background_tasks_of_a_writer_restart(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, database_url: str
) -> None:
    lag = FailsOnce(monkeypatch, LedgerLag, "_watch")
    stores = FailsOnce(monkeypatch, StoreWatch, "run")
    async with (
        open_shop(redis_url, database_url) as shop,
        watching(shop.redis, shop.pool, StoreMetrics(CollectorRegistry())),
    ):
        await shop.start_writer()
        await until(lag.goes_on)
        await until(stores.goes_on)


async def test_sweep_of_connections_restarts(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, database_url: str, short_path: Path
) -> None:
    broken = FailsOnce(monkeypatch, FastPath, "_sweep")
    settings = settings_for(redis_url, database_url, short_path)
    async with open_engine(settings) as engine, listening(engine):
        await until(broken.goes_on)


def settings_for(redis_url: str, database_url: str, data_dir: Path) -> Settings:
    return Settings(
        redis_url=redis_url,
        database_url=database_url,
        data_dir=data_dir,
        listen="127.0.0.1:0",
        signing_key="k" * 32,
    )
