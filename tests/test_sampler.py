"""The sampler against a real metrics server and real processes that die and come back."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from waiting import until

from loadtest.sampler import SAMPLES_MAX, UNREAD, Sampler, discover_processes, read_metrics
from loadtest.surroundings import describe, plain_settings, plain_url
from sale.config import Settings
from sale.host.metrics_server import serving_metrics

LIMIT_S = 10.0
BUSY = "while True: pass"
IDLE = "import time; time.sleep(60)"
PAGE = """\
# HELP sale_stock_remaining Tickets left.
# TYPE sale_stock_remaining gauge
sale_stock_remaining{campaign="films",showing="general"} 41.0
sale_stock_remaining{campaign="films",showing="evening"} 7.0
sale_stock_remaining{campaign="other",showing="general"} 999.0
# TYPE sale_ledger_lag_events gauge
sale_ledger_lag_events{campaign="films"} 120.0
sale_ledger_lag_events{campaign="other"} 999.0
sale_ledger_lag_seconds{campaign="films"} 0.25
sale_purchases_waiting{campaign="films"} 33.0
sale_connections 64.0
something_else{campaign="films"} 5.0
"""


@pytest.fixture
async def page() -> AsyncIterator[tuple[str, dict[str, str]]]:
    """A metrics address, and what it answers."""
    said = {"text": PAGE}
    async with serving_metrics("127.0.0.1:0", lambda: said["text"]) as address:
        yield address, said


async def python(program: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-c", program, stdin=asyncio.subprocess.DEVNULL
    )


async def gone(*processes: asyncio.subprocess.Process) -> None:
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.wait()


def end(children: Path) -> None:
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGKILL)


def register(data_dir: Path, supervisor: int, **processes: int) -> None:
    """As ``sale up`` writes it, whole."""
    (data_dir / "run").mkdir(exist_ok=True)
    new = data_dir / "run" / "new"
    content = {"supervisor": supervisor, "listen": "x", "processes": processes}
    new.write_bytes(msgspec.json.encode(content))
    new.replace(data_dir / "run" / "processes.json")


async def test_sample_has_the_figures_of_one_campaign(page: tuple[str, dict[str, str]]) -> None:
    async with Sampler(page[0], "films", dict, every_s=0.05) as sampler:
        await until(lambda: len(sampler.samples) >= 3)
    for sample in sampler.samples:
        assert sample.stock == {"general": 41, "evening": 7}
        assert (sample.lag_events, sample.lag_s) == (120, 0.25)
        assert (sample.queue, sample.connections) == (33, 64)
    times = [sample.t for sample in sampler.samples]
    assert times == sorted(times)
    shifted = sampler.since(sampler.started + 1.0)
    assert [sample.t for sample in shifted] == pytest.approx([t - 1 for t in times])
    taken = len(sampler.samples)
    await asyncio.sleep(0.15)
    assert len(sampler.samples) == taken, "it goes on after its block"


async def test_failing_metrics_address_is_sampled_as_unread(
    page: tuple[str, dict[str, str]],
) -> None:
    address, said = page
    said["text"] = 'sale_stock_remaining{campaign="films" 12'
    async with Sampler(address, "films", dict, every_s=0.05) as sampler:
        await until(lambda: sampler.samples)
        said["text"] = "nothing_of_ours 1\n"
        await until(lambda: sampler.samples[-1].queue == 0)
    first, last = sampler.samples[0], sampler.samples[-1]
    assert (first.queue, first.lag_events, first.lag_s, first.stock) == (UNREAD, UNREAD, UNREAD, {})
    assert (last.lag_events, last.connections, last.stock) == (0, 0, {})
    assert "generator-1" in first.processes

    async with Sampler("127.0.0.1:1", "films", dict, every_s=0.05) as sampler:
        await until(lambda: sampler.samples)
    assert sampler.samples[0].connections == UNREAD


async def test_sampler_follows_the_successor_of_a_dead_process(
    page: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    busy, idle = await asyncio.gather(python(BUSY), python(IDLE))
    started = [busy, idle]
    try:
        register(tmp_path, 0, **{"serve-1": busy.pid, "writer": idle.pid})
        async with Sampler(
            page[0], "films", lambda: discover_processes(tmp_path), every_s=0.1
        ) as sampler:

            def seen() -> dict[str, float]:
                latest = sampler.samples[-1].processes if sampler.samples else {}
                return {name: process.cpu for name, process in latest.items()}

            await until(lambda: seen().get("serve-1", 0) > 0.1)
            assert set(seen()) == {"serve-1", "writer", "generator-1"}
            assert seen()["writer"] < 0.1
            assert all(each.rss_bytes > 1e6 for each in sampler.samples[-1].processes.values())
            await gone(busy)
            await until(lambda: "serve-1" not in seen())
            assert "writer" in seen()
            started.append(again := await python(BUSY))
            register(tmp_path, 0, **{"serve-1": again.pid, "writer": idle.pid})
            await until(lambda: seen().get("serve-1", 0) > 0.1)
            (tmp_path / "run" / "processes.json").unlink()
            await until(lambda: set(seen()) == {"generator-1"})
        assert all(0 <= p.cpu < 3 for s in sampler.samples for p in s.processes.values())
    finally:
        await gone(*started)


async def test_sample_of_a_process_includes_its_children(page: tuple[str, dict[str, str]]) -> None:
    parent = await python(f"import os, time\nif os.fork() == 0:\n  {BUSY}\ntime.sleep(60)")
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    try:
        await until(children.read_text)
        async with Sampler(
            page[0], "films", lambda: {"postgresql": parent.pid}, every_s=0.1
        ) as sampler:
            await until(
                lambda: sampler.samples and sampler.samples[-1].processes["postgresql"].cpu > 0.1
            )
    finally:
        end(children)
        await gone(parent)


async def test_full_sampler_drops_every_other_sample(page: tuple[str, dict[str, str]]) -> None:
    sampler = Sampler(page[0], "films", dict, every_s=0.05)
    sampler.samples += [read_metrics("", "films")] * (SAMPLES_MAX - 1)
    async with sampler:
        await until(lambda: len(sampler.samples) < SAMPLES_MAX - 1)
    assert SAMPLES_MAX / 2 <= len(sampler.samples) < SAMPLES_MAX / 2 + 100


def test_metrics_that_are_no_numbers_are_ignored() -> None:
    text = 'sale_ledger_lag_events{campaign="x"} NaN\nsale_connections 3\nsale_connections +Inf\n'
    assert (read_metrics(text, "x").lag_events, read_metrics(text, "x").connections) == (0, 3)
    with pytest.raises(ValueError, match=r"\w"):
        read_metrics("sale_connections{ 3\n", "x")


def test_folder_without_an_engine_has_no_processes(tmp_path: Path) -> None:
    assert discover_processes(tmp_path) == discover_processes(None) == {}


# The surroundings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://sale:hunter2@cache:6379/0", "redis://cache:6379/0"),
        ("unix:///run/redis.sock?db=0&password=hunter2", "unix:///run/redis.sock?db=0"),
        (
            "postgresql:///sale?host=/run/pg&user=sale&password=hunter2&sslpassword=hunter2",
            "postgresql:///sale?host=/run/pg",
        ),
        ("postgresql://u:hunter2@[::1]:5432/sale", "postgresql://[::1]:5432/sale"),
    ],
)
def test_shown_address_has_no_secrets(url: str, shown: str) -> None:
    assert plain_url(url) == shown


async def test_described_settings_name_stores_and_no_secret() -> None:
    settings = Settings(
        redis_url="redis://sale:hunter2@127.0.0.1:1/0",
        database_url="postgresql://sale:hunter2@127.0.0.1:1/sale",
        signing_key="hunter2" * 8,
        signing_key_file=Path("/hunter2"),
    )
    shown = plain_settings(settings)
    assert shown["redis_url"] == "redis://127.0.0.1:1/0"
    assert shown["batch_max"] == str(settings.batch_max)
    told = await describe(settings=settings)
    assert "hunter2" not in repr(told)
    assert told[1]["redis server"] == told[1]["postgresql"] == "not reached"
    assert told[1]["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert {"cores", "memory", "kernel", "load average before"} <= set(told[2])
