"""Leader locks: which process is active and how soon a standby takes over.

The tests use real processes, proxies and PgBouncer.
"""

import asyncio
import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import asyncpg
import pytest
from faults.proxy import Proxy
from redis.asyncio import Redis
from shop import DEADLINE_S, Shop, open_shop
from stock_maker import CAMPAIGN, campaign
from waiting import until, until_equal

from sale.db import locks
from sale.db.migrate import migrate, migrations
from sale.host.embedded.child import launch_command
from sale.jobs.leadership import Leadership, LockLost
from sale.jobs.pooling import UnfitProxy
from sale.ledger.chain import GENESIS
from sale.operators.diagnosis import diagnose

TAKEN_OVER_S = 3.0
START_S = 20.0
LOCKS = {"writer": locks.WRITER, "scheduler": locks.SCHEDULER, "keeper": locks.KEEPER}


def socket_of(database_url: str) -> Path:
    """The unix socket of the tests' PostgreSQL."""
    asked = parse_qs(urlsplit(database_url).query)
    return Path(asked["host"][0]) / f".s.PGSQL.{asked['port'][0]}"


def through(database_url: str, directory: Path, port: int = 5432) -> str:
    """The same database through a socket in ``directory``."""
    parts = urlsplit(database_url)
    return f"postgresql://sale@{parts.path}?host={quote(str(directory))}&port={port}"


async def connected_to(conn: Any, part: str) -> dict[str, bool]:
    """Give the processes that are connected for a lock, by pid, and whether each is active."""
    found = await locks.members(conn, LOCKS[part])
    return {member.who.rpartition(":")[2]: member.active for member in found}


class Host:
    """One machine: its parts that have a lock, and their proxy to PostgreSQL."""

    def __init__(
        self, home: Path, wire: Proxy, parts: dict[str, asyncio.subprocess.Process]
    ) -> None:
        self.home, self.wire, self.parts = home, wire, parts

    def signal(self, number: signal.Signals) -> None:
        for process in self.parts.values():
            process.send_signal(number)

    async def active(self, conn: Any) -> dict[str, bool | None]:
        """Whether it holds each lock; None if it is not connected for it."""
        return {
            part: (await connected_to(conn, part)).get(str(process.pid))
            for part, process in self.parts.items()
        }

    async def works(self, conn: Any, within_s: float = DEADLINE_S) -> None:
        """Wait until it holds all locks."""
        await self._comes_to(conn, True, within_s)

    async def stands_by(self, conn: Any, within_s: float = DEADLINE_S) -> None:
        """Wait until it is connected for all locks and holds none."""
        await self._comes_to(conn, False, within_s)

    async def _comes_to(self, conn: Any, active: bool, within_s: float) -> None:
        wanted = dict.fromkeys(LOCKS, active)

        async def there() -> bool:
            return await self.active(conn) == wanted

        try:
            await until(there, within_s)
        except TimeoutError:
            seen = {part: await connected_to(conn, part) for part in LOCKS}
            ended = {part: (p.pid, p.returncode) for part, p in self.parts.items()}
            said = [
                f"log of {log.parent.name}:\n{log.read_text('utf-8')[-4_000:]}"
                for log in sorted(self.home.parent.glob("*/log"))
            ]
            pytest.fail(
                f"after {within_s:g} s {self.home.name} is not active as wanted ({wanted}).\n"
                f"Connected processes, and whether active: {seen}\n"
                f"Its processes and their exit statuses: {ended}\n" + "\n".join(said)
            )


@contextlib.asynccontextmanager
async def host(home: Path, redis_url: str, database_url: str) -> AsyncIterator[Host]:
    home.mkdir()  # noqa: ASYNC240 - a local directory
    listen = home / ".s.PGSQL.5432"
    async with Proxy(f"unix:{listen}", f"unix:{socket_of(database_url)}") as wire:
        env = {**os.environ, "SALE_REDIS_URL": redis_url}
        env |= {"SALE_DATABASE_URL": through(database_url, home), "SALE_DATA_DIR": str(home / "d")}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        parts: dict[str, asyncio.subprocess.Process] = {}
        with (home / "log").open("ab") as said:
            for part in LOCKS:
                command = [sys.executable, "-m", "sale", part, "--metrics-listen"]
                parts[part] = await asyncio.create_subprocess_exec(
                    *launch_command("KILL", program=[*command, f"unix:{home / part}"]),
                    env=env,
                    stderr=said,
                )
        try:
            yield Host(home, wire, parts)
        finally:
            wire.heal()
            for process in parts.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


@pytest.mark.fault
async def test_standby_host_takes_over_from_a_lost_one(
    redis: Redis, redis_url: str, database_url: str, short_path: Path
):
    took = {}

    async def takes_over(by: Host, what: str, step: str) -> None:
        begun = time.monotonic()
        await shop.step(step)
        await by.works(conn, TAKEN_OVER_S)
        async with asyncio.timeout(TAKEN_OVER_S - (time.monotonic() - begun)):
            await shop.applied()
        took[what] = round(time.monotonic() - begun, 2)

    async with open_shop(redis_url, database_url) as shop, shop.pool.acquire() as conn:
        await shop.create(campaign(10))
        async with host(short_path / "a", redis_url, database_url) as a:
            await a.works(conn, START_S)
            async with host(short_path / "b", redis_url, database_url) as b:
                await b.stands_by(conn, START_S)
                a.signal(signal.SIGSTOP)
                await takes_over(b, "stopped", "open")
                a.signal(signal.SIGCONT)
                await a.stands_by(conn)
                assert all((await b.active(conn)).values())
                b.wire.hold("up")
                b.wire.hold("down")
                await takes_over(a, "cut off", "pause")
                b.wire.cut()
                b.wire.heal()
                await b.stands_by(conn)
                assert all((await a.active(conn)).values())
                a.signal(signal.SIGKILL)
                await takes_over(b, "killed", "resume")
        kinds = await conn.fetch("SELECT kind FROM event ORDER BY seq")
    assert [row["kind"] for row in kinds] == ["created", "opened", "paused", "resumed"]
    print(f"taken over after, in seconds: {took}")


async def test_new_writer_ends_a_stopped_writers_copy(
    redis: Redis, redis_url: str, database_url: str
):
    async with open_shop(redis_url, database_url) as shop:
        await shop.create(campaign(10))
        stopped = await asyncpg.connect(
            database_url, server_settings={"application_name": locks.WRITER_APPLIES}
        )
        async with asyncio.timeout(TAKEN_OVER_S):
            amid = asyncio.Event()

            async def rows() -> AsyncIterator[bytes]:
                amid.set()
                await asyncio.sleep(60)
                yield b""

            begun = f"INSERT INTO campaign (campaign_id, chain) VALUES ('{CAMPAIGN}', '{GENESIS}')"
            await stopped.execute(f"BEGIN; {begun}")
            copying = asyncio.create_task(stopped.copy_to_table("event", source=rows()))
            await amid.wait()
            await shop.start_writer()
            await shop.applied()
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
        stopped.terminate()


class Holder:
    """A lock held in this process."""

    def __init__(self, database_url: str) -> None:
        self.leadership = Leadership(database_url, locks.WRITER)
        self.stood_by = 0
        self.severed = 0
        self.working = asyncio.Event()

    async def lead(self, stop: asyncio.Event, work_s: float = 60.0) -> None:
        async def work() -> None:
            self.working.set()
            try:
                await asyncio.sleep(work_s)
            finally:
                self.working.clear()

        def stand_by() -> None:
            self.stood_by += 1

        def sever() -> None:
            self.severed += 1

        await self.leadership.lead(stop, work, stand_by=stand_by, sever=sever)


async def test_lost_session_cancels_the_holders_work(database_url: str):
    stop, holder, other = asyncio.Event(), Holder(database_url), Holder(database_url)
    assert not holder.leadership.sure
    leading = asyncio.create_task(holder.lead(stop))
    await asyncio.wait_for(holder.working.wait(), TAKEN_OVER_S)
    assert holder.leadership.sure
    waiting = asyncio.create_task(other.lead(stop, work_s=0.0))
    conn = await asyncpg.connect(database_url)

    async def one_each() -> bool:
        active = sorted(each.active for each in await locks.members(conn, locks.WRITER))
        return other.stood_by > 0 and active == [False, True]

    await until(one_each)
    await conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_locks"
        " WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database"
        " WHERE datname = current_database())"
    )
    await conn.close()
    with pytest.raises(LockLost):
        await leading
    assert (holder.severed, holder.working.is_set(), holder.leadership.sure) == (1, False, False)
    await asyncio.wait_for(waiting, TAKEN_OVER_S)


async def test_holder_stopped_during_a_heartbeat_loses_the_lock(
    database_url: str, short_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its session must count as idle at every moment, also between two messages of a statement."""
    monkeypatch.setattr("sale.jobs.leadership.ANSWER_TIMEOUT_S", 60.0)  # a stopped process has none
    listen = f"unix:{short_path / '.s.PGSQL.5432'}"
    async with Proxy(listen, f"unix:{socket_of(database_url)}") as wire:
        stop, holder = asyncio.Event(), Holder(through(database_url, short_path))
        leading = asyncio.create_task(holder.lead(stop))
        await asyncio.wait_for(holder.working.wait(), TAKEN_OVER_S)
        wire.trap(b"pg_backend_pid", "down")
        await asyncio.wait_for(wire.sprung.wait(), TAKEN_OVER_S)
        await asyncio.wait_for(Holder(database_url).lead(stop, work_s=0.0), TAKEN_OVER_S)
        wire.heal()
        with pytest.raises(LockLost):
            await asyncio.wait_for(leading, TAKEN_OVER_S)


@pytest.mark.parametrize("library", ["redis-py", "asyncpg"])
async def test_severed_work_ends_if_a_library_loses_its_cancellation(
    library: str, database_url: str
):
    """Such work would otherwise run beside the next holder, and its process never stand by."""
    conn = await asyncpg.connect(database_url)
    sent = asyncio.get_running_loop().create_future()
    begun, outlived = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        if library == "redis-py":
            begun.set()
            # redis-py sends with ``wait_for``. In Python 3.11 it swallows a cancellation that
            # arrives as the sending ends.
            await asyncio.wait_for(sent, 60)
        else:
            # The rollback of a cut-off transaction fails, and its error replaces the cancellation.
            with contextlib.suppress(asyncpg.InterfaceError):
                async with conn.transaction():
                    begun.set()
                    await asyncio.sleep(60)
        outlived.set()
        await asyncio.sleep(60)

    def sever() -> None:
        conn.terminate()
        if not sent.done():
            sent.set_result(None)

    leadership = Leadership(database_url, locks.WRITER)
    leading = asyncio.create_task(
        leadership.lead(asyncio.Event(), work, stand_by=lambda: None, sever=sever)
    )
    await asyncio.wait_for(begun.wait(), TAKEN_OVER_S)
    other = await asyncpg.connect(database_url)
    await locks.expel(other, locks.WRITER.mine())
    await other.close()
    with pytest.raises(LockLost):
        await asyncio.wait_for(leading, TAKEN_OVER_S)
    # Otherwise the library lost no cancellation, and the test proves nothing.
    assert outlived.is_set() or (library == "redis-py" and sys.version_info >= (3, 12))


async def test_stop_frees_the_lock_even_if_work_does_not_end(
    database_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sale.jobs.leadership.STOP_PATIENCE_S", 0.1)
    stop, holder = asyncio.Event(), Holder(database_url)
    await holder.lead(stop, work_s=0.0)
    leading = asyncio.create_task(holder.lead(stop))
    await asyncio.wait_for(holder.working.wait(), TAKEN_OVER_S)
    stop.set()
    await asyncio.wait_for(leading, TAKEN_OVER_S)
    assert (holder.severed, holder.stood_by) == (1, 0)


async def test_schedulers_record_an_opening_without_postgres(
    redis: Redis, redis_url: str, database_url: str, short_path: Path
):
    """If PostgreSQL cannot say which scheduler is active, each one records openings."""
    listen = f"unix:{short_path / '.s.PGSQL.5432'}"
    async with (
        Proxy(listen, f"unix:{socket_of(database_url)}") as wire,
        open_shop(redis_url, through(database_url, short_path)) as shop,
    ):
        now_s, _ = await redis.time()
        await shop.create(campaign(10, opens_at_ms=(now_s + 5) * 1_000))
        async with shop.scheduling() as first:
            await until_equal(lambda: _active(first), 1)
            async with shop.scheduling() as second:
                await until_equal(lambda: _active(second), 0)
                await asyncio.sleep(0.3)
                assert _active(first) == 1
                assert _remaining(first) == 10
                assert _remaining(second) is None
                for direction in ("up", "down"):
                    wire.hold(direction)
                await until_equal(lambda: _active(second), 1, TAKEN_OVER_S)

                await until_equal(lambda: shop.stock.head("state"), ["open"])
                wire.cut()
                wire.heal()

                async def one_works() -> bool:
                    told = [
                        each.get_sample_value("sale_scheduler_active") for each in (first, second)
                    ]
                    return sorted(map(bool, told)) == [False, True]

                await until(one_works)


def _active(registry: Any) -> float | None:
    return registry.get_sample_value("sale_scheduler_active")


def _remaining(registry: Any) -> float | None:
    labels = {"campaign": CAMPAIGN, "showing": "s0"}
    return registry.get_sample_value("sale_stock_remaining", labels)


async def test_doctor_names_the_active_writer_and_scheduler(
    redis: Redis, redis_url: str, database_url: str
):
    async def roles(shop: Shop) -> tuple[str, str]:
        found = await diagnose(shop.redis, shop.pool)
        return found.writer, found.scheduler

    async with open_shop(redis_url, database_url) as shop:
        assert await roles(shop) == ("none is connected", "none is connected")
        await shop.start_writer()
        async with shop.scheduling(), shop.scheduling():

            async def all_named() -> bool:
                writer, scheduler = await roles(shop)
                me = rf"[^ ]+:{os.getpid()}"
                return bool(
                    re.fullmatch(rf"{me} works", writer)
                    and re.fullmatch(rf"{me} works, 1 on standby \({me}\)", scheduler)
                )

            await until(all_named)


class Pooler:
    """A real PgBouncer before the PostgreSQL of the tests, on a unix socket."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.directory = directory
        self.url = through(database_url, directory)
        self._postgres = socket_of(database_url)

    @contextlib.asynccontextmanager
    async def pooling(self, mode: str, **settings: object) -> AsyncIterator[None]:
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "this test needs pgbouncer (Debian package pgbouncer; scripts/test gets it)"
        config = self.directory / "ini"
        told = {
            "pool_mode": mode,
            "unix_socket_dir": self.directory,
            "listen_port": 5432,
            "auth_type": "any",
            "default_pool_size": 20,
            "max_client_conn": 50,
            **settings,
        }
        lines = [f"{key} = {value}" for key, value in told.items()]
        database = f"* = host={self.directory} port=5433 user=sale"
        config.write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines]), "utf-8")
        command = [program, str(config)]
        if os.getuid() == 0:  # PgBouncer refuses to run as root
            nobody = pwd.getpwnam("nobody")
            for path in (self.directory, config):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            command = [program, "-u", "nobody", str(config)]
        # PostgreSQL's own socket lies in a private directory.
        upstream = self.directory / ".s.PGSQL.5433"
        async with Proxy(f"unix:{upstream}", f"unix:{self._postgres}"):
            upstream.chmod(0o666)
            with (self.directory / "log").open("wb") as said:
                process = await asyncio.create_subprocess_exec(
                    *launch_command("KILL", program=command), stdout=said, stderr=said
                )
            try:
                await until(self._answers)
                yield
            finally:
                process.kill()
                await process.wait()
                print((self.directory / "log").read_text("utf-8")[-2_000:])

    async def _answers(self) -> bool:
        try:
            conn = await asyncpg.connect(self.url, statement_cache_size=0)
        except (OSError, asyncpg.PostgresError):
            return False
        await conn.close()
        return True


@pytest.fixture
def pooler(database_url: str) -> Iterator[Pooler]:
    # Not a directory of pytest: those are private, and PgBouncer runs as another user.
    with tempfile.TemporaryDirectory(prefix="p") as directory:
        yield Pooler(Path(directory), database_url)


@pytest.mark.fault
@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_transaction_pooler_is_refused_with_a_reason(
    pooler: Pooler, mode: str, redis_url: str, short_path: Path
):
    async with pooler.pooling(mode):
        with pytest.raises(UnfitProxy, match=r"pools transactions: .* set database_url"):
            await Holder(pooler.url).lead(asyncio.Event(), work_s=0.0)
        for part in LOCKS:
            ended = await asyncio.to_thread(_run, part, redis_url, pooler.url, short_path)
            assert ended.returncode == 1
            assert ended.stderr.startswith(f"sale: PostgreSQL at {pooler.directory} ")
            assert "a proxy that pools transactions: the lock needs" in ended.stderr


@pytest.mark.fault
@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_migrate_works_through_a_pooler(
    pooler: Pooler, fresh_database: Callable[..., Awaitable[str]], mode: str
):
    url = through(await fresh_database(), pooler.directory)
    async with pooler.pooling(mode):
        assert await migrate(url) == [each.name for each in migrations()]
        assert await migrate(url) == []


def _run(part: str, redis_url: str, database_url: str, home: Path) -> Any:
    env = {**os.environ, "SALE_REDIS_URL": redis_url, "SALE_DATABASE_URL": database_url}
    env |= {"SALE_DATA_DIR": str(home / "d")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-m", "sale", part, "--metrics-listen", f"unix:{home / part}"],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        timeout=START_S,
        check=False,
    )


@pytest.mark.fault
async def test_stopped_holder_behind_a_session_pooler_is_replaced(
    pooler: Pooler, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    async def still(*_: object) -> None:
        await asyncio.sleep(60)

    async with pooler.pooling("session"):
        stop, holder, other = asyncio.Event(), Holder(pooler.url), Holder(pooler.url)
        with monkeypatch.context() as patched:
            patched.setattr(Leadership, "_beat", still)
            stopped = asyncio.create_task(holder.lead(stop))
            await asyncio.wait_for(holder.working.wait(), TAKEN_OVER_S)
        waiting = asyncio.create_task(other.lead(stop))
        await asyncio.wait_for(other.working.wait(), TAKEN_OVER_S)
        assert other.stood_by > 0
        waiting.cancel()
        stopped.cancel()
        await asyncio.gather(waiting, stopped, return_exceptions=True)
        # The next holder gets a session that other clients have used.
        await Holder(pooler.url).lead(asyncio.Event(), work_s=0.0)
        async with open_shop(redis_url, pooler.url) as shop:
            await shop.start_writer()
            await shop.create(campaign(10))
            await shop.applied()


@pytest.mark.fault
async def test_full_session_pooler_is_not_taken_for_a_transaction_one(pooler: Pooler):
    async with pooler.pooling("session", default_pool_size=1):
        await Holder(pooler.url).lead(asyncio.Event(), work_s=0.0)


async def test_pooler_that_refuses_our_settings_is_named(short_path: Path):
    said = b"SERROR\0C08P01\0Munsupported startup parameter: application_name\0\0"

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4_096)
        writer.write(b"E" + (len(said) + 4).to_bytes(4, "big") + said)
        writer.close()

    path = short_path / ".s.PGSQL.5432"
    async with await asyncio.start_unix_server(refuse, path):
        url = f"postgresql://sale@/{secrets.token_hex(2)}?host={quote(str(short_path))}&port=5432"
        with pytest.raises(UnfitProxy, match="a proxy that refuses our settings"):
            await Holder(url).lead(asyncio.Event(), work_s=0.0)
