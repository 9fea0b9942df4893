"""The embedded servers are durable, own their directory, and end with their parent."""

# ruff: noqa: ASYNC240 - small local files

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio as redis_lib
from waiting import runs, until

from sale.host import embedded
from sale.host.embedded import binaries, launch
from sale.host.embedded.binaries import EmbeddedError, Program
from sale.host.embedded.child import launch_command

HOLD = """
import asyncio, sys
from pathlib import Path
from sale.host import embedded

async def main():
    async with embedded.running(Path(sys.argv[1]), redis=True, postgres=True) as servers:
        print(servers.endpoints.redis_url, servers.endpoints.database_url,
              *servers.pids.values(), flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def another_process(data_dir: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLD, str(data_dir)),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def facts(process: asyncio.subprocess.Process) -> tuple[str, str, list[int]]:
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(b"unix://"):
            redis_url, database_url, *pids = line.decode().split()
            return redis_url, database_url, [int(pid) for pid in pids]
    raise AssertionError("the other process printed no URLs")


async def test_defaults_are_durable_and_open_no_network_port(
    servers: embedded.EmbeddedServers, redis: redis_lib.Redis, server_database_url: str
) -> None:
    settings = await redis.config_get("*")
    connection = await asyncpg.connect(server_database_url)
    try:
        shown = {
            name: await connection.fetchval(f"SHOW {name}")
            for name in ("fsync", "synchronous_commit", "listen_addresses", "server_encoding")
        }
    finally:
        await connection.close()

    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["no-appendfsync-on-rewrite"] == "no"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["save"] == ""
    assert settings["port"] == "0"
    assert shown == {
        "fsync": "on",
        "synchronous_commit": "on",
        "listen_addresses": "",
        "server_encoding": "UTF8",
    }
    assert set(servers.pids) == {"redis", "postgresql"}


@pytest.mark.fault
async def test_killed_parent_stops_both_servers_and_keeps_the_data(short_path: Path) -> None:
    data_dir = short_path / "data"
    async with another_process(data_dir) as parent:
        redis_url, database_url, pids = await facts(parent)
        async with redis_lib.from_url(redis_url) as client:
            await client.set("kept", "yes")
        connection = await asyncpg.connect(database_url)
        await connection.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)")
        await connection.close()
        assert embedded.find(data_dir) == embedded.Endpoints(redis_url, database_url)

        parent.kill()
        await parent.wait()

        async with embedded.running(data_dir, redis=True, postgres=True) as again:
            # The new servers wait until the old ones are gone.
            await until(lambda: not any(map(runs, pids)), 0.1)
            async with redis_lib.from_url(redis_url) as client:
                assert await client.get("kept") == b"yes"
            connection = await asyncpg.connect(database_url)
            assert await connection.fetchval("SELECT n FROM kept") == 7
            await connection.close()
            last = list(again.pids.values())
    await until(lambda: not any(map(runs, last)), 0.1)
    assert embedded.find(data_dir) is None


@pytest.mark.fault
async def test_watched_server_restarts_with_its_data(short_path: Path) -> None:
    async with embedded.running(short_path / "data", redis=True, postgres=True) as servers:
        assert servers.endpoints.redis_url
        watching = asyncio.create_task(servers.watch())
        before = servers.pids
        async with redis_lib.from_url(servers.endpoints.redis_url) as client:
            await client.set("kept", "yes")
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)

        await until(
            lambda: all(servers.pids.get(name) not in {None, pid} for name, pid in before.items()),
            within_s=20,
        )
        await servers.restart("postgresql")
        await servers.restart("redis")

        async with redis_lib.from_url(servers.endpoints.redis_url) as client:
            assert await client.get("kept") == b"yes"
        watching.cancel()
        await asyncio.wait([watching])


async def test_directory_in_use_names_the_pid(short_path: Path) -> None:
    async with embedded.running(short_path / "data", redis=False, postgres=False):
        with pytest.raises(EmbeddedError, match=rf"in use by pid {os.getpid()}"):
            async with embedded.running(short_path / "data", redis=False, postgres=False):
                pass
    async with embedded.running(short_path / "data", redis=False, postgres=False):
        pass


async def test_servers_of_two_directories_run_side_by_side(
    short_path: Path, redis: redis_lib.Redis
) -> None:
    async with embedded.running(short_path / "other", redis=True, postgres=False) as other:
        assert other.endpoints.redis_url
        assert other.endpoints.database_url is None
        async with redis_lib.from_url(other.endpoints.redis_url) as client:
            await client.set("mine", "1")
        assert await redis.get("mine") is None


async def test_long_path_gets_a_short_private_socket_directory(tmp_path: Path) -> None:
    data_dir = tmp_path / "长 目录" / ("x" * 90)
    async with embedded.running(data_dir, redis=True, postgres=True) as servers:
        sockets = servers.sockets
        assert not sockets.is_relative_to(data_dir)
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert embedded.find(data_dir) == servers.endpoints
        assert servers.endpoints.database_url
        connection = await asyncpg.connect(servers.endpoints.database_url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
    assert not sockets.exists()


async def test_new_directory_is_private_and_stamped(short_path: Path) -> None:
    async with embedded.running(short_path / "data", redis=True, postgres=False):
        versions = json.loads((short_path / "data" / "versions.json").read_text())
    assert re.fullmatch(r"(Redis|Valkey) \d+\.\d+", versions["redis"])
    assert "engine" in versions
    assert stat.S_IMODE((short_path / "data").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"redis": "5.0"}, "Redis 5.0 wrote the data directory"),
        ({"redis": "99.1"}, "Redis 99.1 wrote the data directory"),
        ({"postgresql": "9"}, "PostgreSQL 9 wrote the data directory"),
        ({"engine": "0.1.0"}, r"version 0\.1\.0 wrote the data directory.*--data-dir"),
    ],
)
async def test_data_of_an_unsupported_version_is_refused(
    short_path: Path, versions: dict[str, str], says: str
) -> None:
    (short_path / "versions.json").write_text(json.dumps(versions))
    with pytest.raises(EmbeddedError, match=says):
        async with embedded.running(short_path, redis=True, postgres=True):
            pass


async def test_data_without_a_stamp_is_refused(short_path: Path) -> None:
    (short_path / "redis").mkdir()
    (short_path / "redis" / "appendonly.aof").touch()
    with pytest.raises(EmbeddedError, match=r"versions.json, .* is missing"):
        async with embedded.running(short_path, redis=True, postgres=False):
            pass


async def test_directory_with_other_files_is_not_touched(short_path: Path) -> None:
    (short_path / "holiday.jpg").touch()
    short_path.chmod(0o755)
    with pytest.raises(EmbeddedError, match="is not empty and no data directory of sale"):
        async with embedded.running(short_path, redis=True, postgres=False):
            pass
    assert stat.S_IMODE(short_path.stat().st_mode) == 0o755


async def test_file_in_place_of_the_directory_is_refused(short_path: Path) -> None:
    (short_path / "data").touch()
    with pytest.raises(EmbeddedError, match="not writable"):
        async with embedded.running(short_path / "data", redis=True, postgres=False):
            pass


async def test_read_only_directory_is_refused() -> None:
    # Even root cannot make directories in /proc.
    with pytest.raises(EmbeddedError, match="not writable"):
        async with embedded.running(Path("/proc/data"), redis=True, postgres=False):
            pass


async def test_unfinished_cluster_is_replaced(short_path: Path) -> None:
    half = short_path / "postgresql.new-1"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    (short_path / "versions.json").write_text("{}")
    async with embedded.running(short_path, redis=False, postgres=True) as servers:
        assert servers.endpoints.database_url
    assert not half.exists()


async def test_missing_binary_error_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_working", lambda *_: [])
    with pytest.raises(EmbeddedError, match="SALE_REDIS_URL"):
        binaries.find_redis(None)
    with pytest.raises(EmbeddedError, match="SALE_DATABASE_URL"):
        binaries.find_postgresql(None)


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (None, "Valkey 9.1"),
        ("Valkey 9.1", "Valkey 9.1"),
        ("Valkey 8.0", "Valkey 9.1"),
        ("Valkey 10.0", None),
        ("6.2", "Valkey 9.1"),
        ("7.0", "Valkey 9.1"),
        ("Redis 7.4", "Redis 8.2"),
        ("Redis 8.4", None),
        ("Redis 6.0", None),
    ],
)
def test_server_is_chosen_by_the_version_of_the_data(
    monkeypatch: pytest.MonkeyPatch, stamp: str | None, expected: str | None
) -> None:
    here = [Program(Path("/wheel"), "Valkey", (9, 1)), Program(Path("/system"), "Redis", (8, 2))]
    monkeypatch.setattr(binaries, "_working", lambda *_: here)
    if expected is None:
        with pytest.raises(EmbeddedError, match=f"{stamp} wrote .* only Valkey 9.1, Redis 8.2 is"):
            binaries.find_redis(stamp)
    else:
        assert binaries.find_redis(stamp).name == expected


def test_refusal_names_the_server_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64'\n")
    old.chmod(0o755)
    monkeypatch.setattr(binaries, "redis_candidates", lambda: [old])
    with pytest.raises(EmbeddedError, match=f"{old} is Redis 6.2, which is too old") as refused:
        binaries.find_redis(None)
    assert "\n" not in str(refused.value)


async def test_data_of_redis_6_opens_in_the_present_server(short_path: Path) -> None:
    home = short_path / "redis"
    home.mkdir()
    # Redis 6.2 wrote one append-only file.
    (home / "appendonly.aof").write_bytes(
        b"*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n*3\r\n$3\r\nSET\r\n$4\r\nkept\r\n$3\r\nyes\r\n"
    )
    (short_path / "versions.json").write_text('{"redis": "6.2"}')
    for _ in range(2):
        async with embedded.running(short_path, redis=True, postgres=False) as servers:
            assert servers.endpoints.redis_url
            async with redis_lib.from_url(servers.endpoints.redis_url) as client:
                assert await client.get("kept") == b"yes"
    stamp = json.loads((short_path / "versions.json").read_text())["redis"]
    assert stamp == binaries.find_redis(None).name


async def test_launcher_names_a_missing_program() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", launch.__file__, "--parent", str(os.getpid())),
        *("--signal", "KILL", "--", "/nowhere/redis-server"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == launch.EXIT_FAILED
    assert said.startswith(b"cannot start /nowhere/redis-server")
    assert b"Traceback" not in said


async def test_launcher_starts_nothing_after_its_parent_died() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", launch.__file__, "--parent", "1", "--signal", "KILL"),
        *("--", shutil.which("echo") or "echo", "started"),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode == launch.EXIT_FAILED
    assert said == b""


def test_launched_program_can_access_a_private_directory(tmp_path: Path) -> None:
    """initdb finds postgres with access(2), and root's clone may lie in a private directory."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    probe = shutil.copy2(shutil.which("test") or "/usr/bin/test", private / "test")
    as_root = os.geteuid() == 0
    options = ["--run-as=65534:65534"] if as_root else []

    done = subprocess.run(
        launch_command("KILL", *options, program=[str(probe), "-x", str(probe)]),
        check=False,
        timeout=20,
    )

    assert done.returncode == 0
