"""The supervisor with stub parts: ready line, restarts, merged metrics, an orderly stop."""

# ruff: noqa: ASYNC240 - small local files

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
import redis.exceptions
from prometheus_client import CollectorRegistry, Counter, Histogram
from waiting import runs, until

from sale import bootstrap, config
from sale.api.app import listen_on
from sale.host import supervisor
from sale.host.metrics_server import MergedMetrics, MetricsAddressError, serving_metrics
from sale.host.supervisor import SupervisorError

STUB = (sys.executable, str(Path(__file__).with_name("stub_part.py")))


@pytest.fixture(autouse=True)
def importable_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.fixture
async def system(
    short_path: Path, redis_url: str, server_database_url: str
) -> AsyncIterator["System"]:
    system = System(short_path / "data", redis_url, server_database_url)
    yield system
    await system.stop()


class System:
    """A supervisor in this process, with the stores of the tests."""

    def __init__(self, data_dir: Path, redis_url: str, database_url: str) -> None:
        self.data_dir = data_dir
        self.settings = config.load(
            environment={},
            redis_url=redis_url,
            database_url=database_url,
            data_dir=data_dir,
            listen="127.0.0.1:0",
            metrics_listen="127.0.0.1:0",
            workers=2,
        )
        self.task: asyncio.Task[None] | None = None

    async def start(self, **changes: Any) -> str:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        settings = config.load(
            environment={}, **{**{f: getattr(self.settings, f) for f in FIELDS}, **changes}
        )
        self.task = asyncio.create_task(
            supervisor.run(settings, on_ready=ready.set_result, command=STUB)
        )
        await asyncio.wait({self.task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            await self.task
        return ready.result()

    async def stop(self) -> None:
        if self.task is not None and not self.task.done():
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(self.task, 20)

    def register(self) -> dict[str, object]:
        return json.loads((self.data_dir / "run" / "processes.json").read_text())

    def pids(self) -> dict[str, int]:
        return self.register()["processes"]  # type: ignore[return-value]

    async def metrics(self) -> str:
        return await get(f"http://{self.register()['metrics_listen']}/metrics")


FIELDS = ("redis_url", "database_url", "data_dir", "listen", "metrics_listen", "workers")


async def get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


def value(text: str, sample: str) -> float:
    return sum(
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(sample)
    )


async def test_all_parts_run_and_stop_in_order(system: System) -> None:
    url = await system.start()

    pids = system.pids()
    assert set(pids) == {"serve-1", "serve-2", "writer", "keeper", "scheduler"}
    assert (system.data_dir / "migrated").exists()
    assert (system.data_dir / "signing.key").stat().st_mode & 0o777 == 0o600
    answered = {json.loads(await get(f"{url}/ping"))["pid"] for _ in range(40)}
    assert answered == {pids["serve-1"], pids["serve-2"]}

    await system.stop()
    stopped = (system.data_dir / "stopped").read_text().split()
    assert stopped[:2] == ["serve", "serve"]
    assert sorted(stopped[2:]) == ["keeper", "scheduler", "writer"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert not (system.data_dir / "run" / "processes.json").exists()


@pytest.mark.parametrize("part", ["serve-1", "serve-2", "writer"])
async def test_ready_waits_for_each_part_to_show_its_metrics(system: System, part: str) -> None:
    (system.data_dir / "run").mkdir(parents=True)
    unready = system.data_dir / f"unready-{part}"
    unready.touch()
    starting = asyncio.create_task(system.start())

    async def answers() -> bool:
        with contextlib.suppress(OSError, aiohttp.ClientError, KeyError):
            return "ok" in await get(f"http://{system.register()['listen']}/readyz")
        return False

    await until(answers)
    # Several READY_POLL_S, so that the supervisor has seen the API answer too.
    await asyncio.sleep(20 * supervisor.READY_POLL_S)
    assert not starting.done()
    unready.unlink()
    await asyncio.wait_for(starting, 5)


@pytest.mark.fault
async def test_killed_part_restarts_and_counters_do_not_fall(system: System) -> None:
    url = await system.start()
    for _ in range(20):
        await get(f"{url}/ping")
    text = await system.metrics()
    assert value(text, 'sale_pings_total{part="serve"}') == 20
    assert value(text, "sale_redis_up") == 0, "the minimum is shown"
    before = system.pids()

    for name in ("serve-1", "writer"):
        os.kill(before[name], signal.SIGKILL)

    async def replaced() -> bool:
        now = system.pids()
        return now.keys() == before.keys() and all(
            now[name] != before[name] for name in ("serve-1", "writer")
        )

    await until(replaced)
    assert value(await system.metrics(), 'sale_pings_total{part="serve"}') == 20
    await get(f"{url}/ping")
    assert value(await system.metrics(), 'sale_pings_total{part="serve"}') == 21


@pytest.mark.fault
async def test_renewing_one_worker_refuses_no_connection(system: System) -> None:
    url = await system.start(workers=1)
    await get(f"{url}/ping")
    before = system.pids()
    refused = 0

    os.kill(os.getpid(), signal.SIGHUP)

    async def renewed() -> bool:
        nonlocal refused
        try:
            await get(f"{url}/ping")
        except aiohttp.ClientError as error:
            # The stub does not drain, and Linux resets a handshake whose listener is closed in it.
            refused += getattr(error, "errno", None) == errno.ECONNREFUSED
        pid = before["serve-1"]
        return system.pids()["serve-1"] != pid and not Path(f"/proc/{pid}").exists()

    await until(renewed)
    assert refused == 0
    after = system.pids()
    assert {name: after[name] for name in ("writer", "keeper", "scheduler")} == {
        name: before[name] for name in ("writer", "keeper", "scheduler")
    }
    assert value(await system.metrics(), 'sale_pings_total{part="serve"}') >= 1


@pytest.mark.fault
async def test_failed_renewal_keeps_the_old_process(
    system: System, capfd: pytest.CaptureFixture[str]
) -> None:
    url = await system.start()
    before = system.pids()
    (system.data_dir / "dies-serve").touch()

    os.kill(os.getpid(), signal.SIGHUP)

    async def failed() -> bool:
        nonlocal output
        output += "".join(capfd.readouterr())
        return "supervisor.renewal_failed" in output

    output = ""
    await until(failed)
    assert system.pids() == before
    assert json.loads(await get(f"{url}/ping"))["pid"] in before.values()
    (system.data_dir / "dies-serve").unlink()


@pytest.mark.fault
def test_closed_terminal_stops_instead_of_restarting() -> None:
    program = (
        "import asyncio, os, sys; from sale.lifetime import restart_on_signal\n"
        "os.setsid(); os.open(sys.argv[1], os.O_RDWR)\n"
        "async def main():\n"
        "    stop = asyncio.Event()\n"
        "    with restart_on_signal(stop) as restart:\n"
        "        print('ready', flush=True)\n"
        "        await asyncio.wait_for(restart.wait(), 10)\n"
        "        print('restart', flush=True)\n"
        "        await asyncio.wait_for(stop.wait(), 10)\n"
        "        print('stop', flush=True)\n"
        "asyncio.run(main())\n"
    )
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program, os.ttyname(theirs)], stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "restart\n"
        os.close(ours)
        assert process.stdout.readline() == "stop\n"


async def test_address_in_use_is_named(system: System) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SupervisorError, match=rf"{address}.*in use"):
            await system.start(listen=address)
        with pytest.raises(MetricsAddressError, match=rf"{address}.*in use"):
            await system.start(metrics_listen=address)


async def test_directory_in_use_is_reported_before_its_address(system: System) -> None:
    url = await system.start()
    words = ("--data-dir", str(system.data_dir), "up", "--listen", url.removeprefix("http://"))
    second = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sale", *words), stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(second.communicate(), 20)
    assert second.returncode == 1
    assert f"{system.data_dir}: in use by pid {os.getpid()}" in said.decode()


async def test_name_with_several_addresses_binds_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(host: str, port: int, **_: object) -> list[Any]:
        assert host == "somewhere"
        kinds = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kinds, ("127.0.0.2", port)), (*kinds, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    with supervisor._reserved("somewhere:0") as address, listen_on(address) as listener:
        assert listener.getsockname()[0] == "127.0.0.2"
        assert address == f"somewhere:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    "error", [asyncpg.InterfaceError("closed"), redis.exceptions.ConnectionError(), OSError()]
)
async def test_start_waits_for_a_late_store(error: Exception) -> None:
    answers = [error, error, None]

    async def attempt() -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "there"

    assert await bootstrap._patiently(attempt, 5) == "there"


async def test_port_can_be_bound_again_at_once(system: System) -> None:
    url = await system.start()
    await get(f"{url}/ping")
    await system.stop()
    assert await system.start(listen=url.removeprefix("http://")) == url


async def test_failed_migrations_start_no_part(system: System) -> None:
    system.data_dir.mkdir()
    (system.data_dir / "run").mkdir()
    (system.data_dir / "broken").touch()
    with pytest.raises(SupervisorError, match="migrations failed"):
        await system.start()
    assert not (system.data_dir / "stopped").exists()


async def test_part_that_never_starts_is_named(system: System) -> None:
    system.data_dir.mkdir()
    (system.data_dir / "run").mkdir()
    (system.data_dir / "dies-serve").touch()
    with pytest.raises(SupervisorError, match=r"serve-[12] does not start"):
        await system.start()


@pytest.mark.fault
async def test_killed_supervisor_leaves_no_process(short_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from sale import config;"
        "from sale.host import supervisor; import uvloop;"
        "settings = config.load(environment={}, data_dir=Path(sys.argv[1]),"
        " listen='127.0.0.1:0', metrics_listen='127.0.0.1:0');"
        "uvloop.run(supervisor.run(settings, on_ready=lambda url: print('ready', url, flush=True),"
        " command=sys.argv[2:]))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(short_path / "data"), *STUB),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            if line.startswith(b"ready http://127.0.0.1:"):
                break
        register = json.loads((short_path / "data" / "run" / "processes.json").read_text())
        pids = register["processes"]
        assert set(pids) == {"serve-1", "writer", "keeper", "scheduler", "redis", "postgresql"}
    finally:
        process.kill()
        await process.communicate()

    await until(lambda: not any(map(runs, pids.values())), 5)


async def test_restarted_child_keeps_its_counters_and_labels(short_path: Path) -> None:
    merged = MergedMetrics()
    awkward = 'a "quoted" \\ back\nnew 电影'
    for process in (1, 2):
        registry = CollectorRegistry()
        Counter("sale_x", "X.", ["what"], registry=registry).labels(awkward).inc(process)
        Histogram("sale_y", "Y.", buckets=(1, 2), registry=registry).observe(1.5)
        path = short_path / f"m{process}"
        async with serving_metrics(f"unix:{path}", registry):
            merged.follow("child", path)
            text = await merged.render()
    assert value(text, "sale_x_total{") == 3
    assert r'what="a \"quoted\" \\ back\nnew 电影"' in text
    assert value(text, 'sale_y_bucket{le="2.0"}') == 2
    assert value(text, "sale_y_count") == 2
    assert "# TYPE sale_x_total counter" in text
    assert value(await merged.render(), "sale_x_total{") == 3, "a silent child keeps its values"
