"""Durability levels: faults of Redis' configuration, and answers that wait for replicas."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from service import Client, Service, new_key
from shop import Shop, open_shop
from stock_maker import BEHIND_MAX, NONCE, Stock, campaign, key, member, open_stock, operation
from waiting import until

from sale.bootstrap import open_stores
from sale.config import Durability, Settings, SettingsError, load
from sale.host.embedded.binaries import find_redis
from sale.lifetime import cancel_and_wait
from sale.metrics import PurchaseMetrics
from sale.stock.answers import Answer, AwaitedPurchase
from sale.stock.batchers import Batchers
from sale.stock.connection import open_redis, product_of, too_old
from sale.stock.durability import durability_faults, make_whole
from sale.stock.scripts import CallReply, Decision, NotReplicated, Scripts
from sale.trust import durability_watch
from sale.trust.durability_watch import DurabilityWatch
from sale.trust.readiness import reasons

ANSWER_WITHIN_S = 5.0
REPLICA_TIMEOUT_MS = 80
SOUND = {
    "appendonly": "yes",
    "appendfsync": "always",
    "save": "",
    "repl-diskless-sync-delay": "0",
}


class Server:
    """A Redis server in its own process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.port = process, port
        self.url = f"redis://127.0.0.1:{port}/0"
        self.redis: Redis = open_redis(self.url, max_connections=4)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    @contextlib.contextmanager
    def stopped(self) -> Any:
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)


@contextlib.asynccontextmanager
async def server(
    directory: Path, *, preloading: Mapping[str, str] | None = None, **settings: str
) -> AsyncIterator[Server]:
    """Run a Redis server in ``directory``, which may hold data; ``settings`` are those of its file.

    ``preloading`` is added to its environment.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - a local directory
    given = SOUND | {name.replace("_", "-"): value for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        str(find_redis(None).path),
        *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)),
        *(word for name, value in given.items() for word in (f"--{name}", *value.split(" "))),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, **(preloading or {})},
    )
    found = Server(process, port)
    try:
        await until(lambda: answers(found.redis))
        yield found
    finally:
        await found.redis.aclose()
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


async def answers(redis: Redis) -> bool:
    with contextlib.suppress(RedisConnectionError):
        return bool(await redis.ping())
    return False


async def whole(redis: Redis) -> bool:
    """Start a rewrite of the append-only file if it needs one; return whether it is whole."""
    return await make_whole(redis) == ""


class Pair:
    """A primary and its synchronized replica."""

    def __init__(self, primary: Server, replica: Server) -> None:
        self.primary, self.replica = primary, replica

    async def in_step(self) -> bool:
        """Whether the replica is attached, counted as good, and has received everything."""
        info = await self.primary.redis.info("replication")
        if info.get("min_slaves_good_slaves") != 1:
            return False
        # On a connection that wrote nothing, WAIT counts a replica that received nothing. The
        # first acknowledgement of a write may take a second.
        async with self.primary.redis.pipeline(transaction=False) as pipe:
            replies = await pipe.set("in-step", 1).delete("in-step").wait(1, 100).execute()
        return bool(replies[-1] == 1)


@contextlib.asynccontextmanager
async def pair_in(directory: Path) -> AsyncIterator[Pair]:
    async with (
        server(directory / "a", repl_diskless_sync="yes", min_replicas_to_write="1") as primary,
        server(directory / "b", appendonly="no") as replica,
    ):
        await replica.redis.replicaof("127.0.0.1", primary.port)
        pair = Pair(primary, replica)
        await until(pair.in_step)
        await until(lambda: whole(primary.redis))
        yield pair


@pytest.fixture(scope="module")
async def kept_pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with pair_in(tmp_path_factory.mktemp("pair")) as pair:
        yield pair


@pytest.fixture
async def pair(kept_pair: Pair) -> Pair:
    await until(kept_pair.in_step)
    await kept_pair.primary.redis.flushall()
    await kept_pair.primary.redis.script_flush()
    return kept_pair


@pytest.fixture(scope="module")
async def kept_alone(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Redis]:
    async with server(tmp_path_factory.mktemp("alone") / "r") as alone:
        await until(lambda: whole(alone.redis))
        yield alone.redis


@pytest.fixture
async def alone(kept_alone: Redis) -> AsyncIterator[Redis]:
    """A correctly configured Redis; its settings are restored after the test."""
    yield kept_alone
    for name in ("appendonly", "appendfsync"):
        await kept_alone.config_set(name, SOUND[name])
    await kept_alone.config_set("no-appendfsync-on-rewrite", "no")
    await kept_alone.config_set("maxmemory-policy", "noeviction")
    await until(lambda: whole(kept_alone))


async def faults(redis: Redis, level: Durability, replicas_min: int = 1) -> list[str]:
    return await durability_faults(redis, level, replicas_min)


# Configuration of Redis ---------------------------------------------------------------------------


async def test_sound_redis_has_no_fault(alone: Redis) -> None:
    assert await faults(alone, "fsync") == []
    assert await faults(alone, "relaxed") == []


@pytest.mark.parametrize(
    ("name", "value", "says", "levels"),
    [
        ("appendonly", "no", "appendonly is off", {"fsync", "replicated", "relaxed"}),
        ("appendfsync", "everysec", "appendfsync is everysec", {"fsync", "replicated"}),
        ("appendfsync", "no", "appendfsync is no", {"fsync", "replicated", "relaxed"}),
        ("no-appendfsync-on-rewrite", "yes", "on-rewrite", {"fsync", "replicated", "relaxed"}),
        ("maxmemory-policy", "allkeys-lru", "keys may be", {"fsync", "replicated", "relaxed"}),
    ],
)
async def test_weak_setting_is_a_fault_at_the_levels_it_breaks(
    alone: Redis, name: str, value: str, says: str, levels: set[Durability]
) -> None:
    await alone.config_set(name, value)
    told: set[Durability] = set()
    for level in ("fsync", "replicated", "relaxed"):
        if any(says in fault for fault in await faults(alone, level)):
            told.add(level)
    assert told == levels
    assert (await faults(alone, "relaxed") == []) is ("relaxed" not in levels)


async def test_evicted_keys_are_a_fault_after_the_policy_is_fixed(tmp_path: Path) -> None:
    async with server(tmp_path / "r", maxmemory_policy="allkeys-lru") as found:
        used = (await found.redis.info("memory"))["used_memory"]
        await found.redis.config_set("maxmemory", used + 1_000_000)
        for n in range(200):
            await found.redis.set(f"filler{n}", "x" * 10_000)
        await found.redis.config_set("maxmemory-policy", "noeviction")
        await until(lambda: whole(found.redis))
        for level in ("fsync", "relaxed"):
            (fault,) = await faults(found.redis, level)
            assert "were evicted" in fault


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"redis_version": "6.2.14"}, "Redis 6.2.14 is too old: 7.0 is the oldest Redis that"),
        ({"redis_version": "5.0.7"}, "Redis 5.0.7 is too old"),
        ({"redis_version": "7.0.0"}, ""),
        ({"redis_version": "8.2.3"}, ""),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.5"}, ""),
        ({"redis_version": "7.2.4", "valkey_version": "10.0.0"}, ""),
    ],
)
def test_server_that_is_too_old_is_named(info: dict[str, str], says: str) -> None:
    told = too_old(product_of(info))
    assert told.startswith(says)
    assert bool(told) is bool(says)


async def test_server_that_is_too_old_is_refused_at_the_start(database_url: str) -> None:
    async def says_6_2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = b"redis_version:6.2.14\r\n"
        while count := (await reader.readline()).strip()[1:]:
            words = [
                (await reader.readline(), await reader.readline())[1] for _ in range(int(count))
            ]
            is_info = words[0].strip().upper() == b"INFO"
            writer.write(b"$%d\r\n%s\r\n" % (len(info), info) if is_info else b"+OK\r\n")
        writer.close()

    async with await asyncio.start_server(says_6_2, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0", database_url=database_url)
        with pytest.raises(SettingsError, match=r"^Redis 6\.2\.14 is too old: 7\.0 is the oldest"):
            async with open_stores(settings):
                pass


async def test_forbidden_config_command_is_a_fault(tmp_path: Path) -> None:
    async with server(tmp_path / "r", rename_command="CONFIG HIDDEN") as found:
        await until(lambda: whole(found.redis))
        for level in ("fsync", "relaxed"):
            (fault,) = await faults(found.redis, level)
            assert fault.startswith("cannot be read: appendfsync")


async def test_user_without_config_permission_is_a_fault(alone: Redis) -> None:
    await alone.acl_setuser("managed", True, ["+x"], keys=["*"], commands=["+@all", "-config"])
    port = alone.connection_pool.connection_kwargs["port"]
    async with Redis(port=port, username="managed", password="x") as managed:
        (fault,) = await faults(managed, "fsync")
    assert fault.startswith("cannot be read: appendfsync")
    await alone.acl_deluser("managed")


async def test_replica_at_level_fsync_is_a_fault(pair: Pair) -> None:
    (fault,) = await faults(pair.primary.redis, "fsync")
    assert "1 replica(s) attached" in fault
    assert "must be replicated" in fault
    assert await faults(pair.primary.redis, "replicated") == []
    assert await faults(pair.primary.redis, "relaxed") == []


async def test_redis_that_is_a_replica_is_a_fault_at_each_level(pair: Pair) -> None:
    for level in ("fsync", "replicated", "relaxed"):
        assert any(
            "is a replica of 127.0.0.1" in f for f in await faults(pair.replica.redis, level)
        )


async def test_too_few_replicas_or_min_replicas_is_a_fault(pair: Pair, alone: Redis) -> None:
    told = "; ".join(await faults(pair.primary.redis, "replicated", 2))
    assert "1 replica(s) online, 2 needed" in told
    assert "min-replicas-to-write is 1, not 2" in told
    told = "; ".join(await faults(alone, "replicated"))
    assert "0 replica(s) online, 1 needed" in told
    assert "min-replicas-to-write is 0, not 1" in told


async def test_durability_check_decides_whether_a_host_is_ready(alone: Redis, pool: Any) -> None:
    await alone.config_set("appendfsync", "everysec")
    for given, ready in (
        ({"durability_check": "refuse"}, False),
        ({"durability_check": "warn"}, True),
        ({"durability": "relaxed"}, True),
        ({"durability": "replicated"}, False),
    ):
        stores: Any = SimpleNamespace(redis=alone, pool=pool, settings=Settings(**given), nonce="")
        assert (await reasons(stores) == []) is ready, given


async def test_audit_of_a_weak_redis_depends_on_the_level(shop: Shop) -> None:
    await shop.create()
    await shop.redis.config_set("appendfsync", "everysec")
    try:
        weak, sound = await shop.audit(), await shop.audit(durability="relaxed")
    finally:
        await shop.redis.config_set("appendfsync", "always")
    assert sound.clean
    assert {found.invariant for each in weak.campaigns for found in each.findings} == {"INV-3"}


@pytest.mark.parametrize(
    ("name", "weak"),
    [("appendfsync", "everysec"), ("no-appendfsync-on-rewrite", "yes"), ("appendonly", "no")],
)
async def test_setting_weakened_while_it_runs_halts_sales(
    service: Service, client: Client, name: str, weak: str
) -> None:
    campaign = await client.campaign()
    card, key_once = service.card(), new_key()

    async def status_is(status: int) -> bool:
        return (await client.buy(campaign, card.token, key=key_once)).status == status

    # Each of the two API processes ends its halt by itself: one of them may still be halted.
    await until(lambda: status_is(201))
    async with service.redis() as redis:
        sound = (await redis.config_get(name))[name]
        await redis.config_set(name, weak)
        try:
            await until(lambda: status_is(503))
            unready = await client.get("/readyz")
            assert (unready.status, unready.json()["status"]) == (503, "unavailable")
            assert name in str(unready.json()["reasons"])
            assert int(unready.headers["Retry-After"]) >= 1
            assert (await client.get("/healthz")).status == 200
            doctor = await service.asale("doctor", "--json")
            assert (doctor.status, name in str(doctor.json()["faults"])) == (1, True)
            # One that is made there sells nothing either, although nobody has to verify it.
            other = await client.campaign()
            assert (await client.buy(other, card.token)).status == 503
        finally:
            await redis.config_set(name, sound)

        async def other_sells() -> bool:
            return (await client.buy(other, card.token)).status == 201

        await until(lambda: status_is(201))
        await until(other_sells)

    async def is_ready() -> bool:
        return (await client.get("/readyz")).status == 200

    await until(is_ready)


async def test_campaign_made_on_a_weak_redis_sells_nothing(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        server(tmp_path / "r", appendfsync="everysec") as found,
        open_shop(found.url, database_url) as shop,
    ):
        await shop.create()
        await shop.step("open")
        async with shop.scheduling():
            batchers = Batchers(
                shop.scripts, "p", PurchaseMetrics(),
                batch_max=1, queue_max=1, deadline_s=1, behind_max=BEHIND_MAX,
            )  # fmt: skip
            watch = DurabilityWatch(found.redis, batchers, Settings())
            batchers.check_redis = watch.look
            batcher = batchers.of(campaign(10, 5))
            assert not await batcher.check_acknowledged()
            assert batchers.halted.startswith("redis: appendfsync is everysec")
            await found.redis.config_set("appendfsync", "always")

            await until(batcher.check_acknowledged)
            assert batchers.halted == ""
            await batchers.close()


async def test_watch_goes_on_after_a_failed_check(
    alone: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Exception | list[str]] = [KeyError("run_id"), ["appendonly is off"]]

    async def look(*_: object) -> list[str]:
        found = looks.pop(0) if len(looks) > 1 else looks[0]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(durability_watch, "durability_faults", look)
    monkeypatch.setattr(durability_watch, "INTERVAL_S", 0.01)
    batchers = Batchers(
        Scripts(alone, NONCE), "p", PurchaseMetrics(),
        batch_max=1, queue_max=1, deadline_s=1, behind_max=BEHIND_MAX,
    )  # fmt: skip
    watching = asyncio.create_task(DurabilityWatch(alone, batchers, Settings()).run())

    try:
        await until(lambda: batchers.halted == "redis: appendonly is off")
    finally:
        await cancel_and_wait([watching])
        await batchers.close()


async def test_recovery_does_not_verify_a_weak_redis(database_url: str, tmp_path: Path) -> None:
    home = tmp_path / "r"
    async with server(home) as found, open_shop(found.url, database_url) as shop:
        await shop.start_writer()
        await shop.create()
        await shop.step("open")
        await shop.applied()
        await shop.stop_writer()
    async with (
        server(home, appendfsync="everysec") as found,
        open_shop(found.url, database_url) as shop,
    ):
        run_id = (await found.redis.info("server"))["run_id"]

        async def verified() -> bool:
            return await shop.stock.head("run_id") == [run_id]

        async with shop.scheduling():
            await asyncio.sleep(1.5)  # several rounds, each with an attempt to recover it
            assert not await verified()
            await found.redis.config_set("appendfsync", "always")
            await until(verified)


def test_only_level_replicated_waits_for_replicas(tmp_path: Path) -> None:
    file = tmp_path / "sale.toml"
    file.write_text("replicas_min = 2\n", "utf-8")
    assert load(file, {}).replicas_awaited is None
    assert load(file, {"SALE_DURABILITY": "replicated"}).replicas_awaited == (2, 500)
    for name, value in (("SALE_DURABILITY", "safe"), ("SALE_REPLICA_TIMEOUT_MS", "0")):
        with pytest.raises(SettingsError, match=name):
            load(file, {name: value})


# Answers that wait for replicas -------------------------------------------------------------------


class Buyer:
    """The batcher of one API process, whose answers wait for one replica."""

    def __init__(self, stock: Stock, batchers: Batchers) -> None:
        self.stock, self.batchers = stock, batchers
        self.batcher = batchers.of(campaign(100))

    def submit(self, n: int, key_no: int = 1) -> AwaitedPurchase:
        loop = asyncio.get_running_loop()
        purchase = AwaitedPurchase(member(n), "district", 0, 1, key(key_no), loop)
        assert self.batcher.submit(purchase)
        return purchase

    async def buy(self, n: int, key_no: int = 1) -> Answer:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            return await self.submit(n, key_no).answer


@contextlib.asynccontextmanager
async def buying(pair: Pair, *, deadline_s: float = 3.0) -> AsyncIterator[Buyer]:
    # A single connection: a reply out of order would go to the next call.
    client = open_redis(pair.primary.url, max_connections=1)
    batchers = Batchers(
        Scripts(client, NONCE, replicas=(1, REPLICA_TIMEOUT_MS)),
        "buyer-1",
        PurchaseMetrics(),
        batch_max=256,
        queue_max=1_000,
        deadline_s=deadline_s,
        behind_max=(1_000_000, 900_000),
    )
    try:
        yield Buyer(await open_stock(pair.primary.redis, 100), batchers)
    finally:
        await batchers.close()
        await client.aclose()


async def sold_on(server_: Server, stock: Stock) -> int:
    """Number of members with an order in a Redis."""
    return await server_.redis.hlen(stock.keys.members)


async def test_replica_has_each_answered_order(pair: Pair) -> None:
    async with buying(pair) as buyer:
        for n in range(1, 21):
            assert (await buyer.buy(n)).decision is Decision.SOLD
            assert await sold_on(pair.replica, buyer.stock) == n


async def test_replies_stay_in_order_after_script_flush(pair: Pair) -> None:
    async with buying(pair) as buyer:
        for n in range(1, 4):
            await pair.primary.redis.script_flush()
            assert (await buyer.buy(n)).decision is Decision.SOLD
        assert await buyer.batchers._scripts.redis.ping() is True
        await buyer.stock.check_books()


@pytest.mark.fault
async def test_answer_waits_for_a_stopped_replica(pair: Pair) -> None:
    async with buying(pair) as buyer:
        assert (await buyer.buy(1)).decision is Decision.SOLD
        with pair.replica.stopped():
            purchase = buyer.submit(2)
            await asyncio.sleep(3 * REPLICA_TIMEOUT_MS / 1000)
            assert not purchase.answer.done()
            assert await sold_on(pair.primary, buyer.stock) == 2
        async with asyncio.timeout(ANSWER_WITHIN_S):
            answer = await purchase.answer
        # The first call sold it; the repeats found it by its key.
        assert answer.decision is Decision.REPLAYED
        assert await sold_on(pair.replica, buyer.stock) == 2
        await buyer.stock.check_books()


@pytest.mark.fault
async def test_order_without_replica_is_unknown_and_repeatable(pair: Pair) -> None:
    async with buying(pair, deadline_s=0.9) as buyer:
        with pair.replica.stopped():
            started = time.monotonic()
            assert (await buyer.buy(1)).decision is None
            assert time.monotonic() - started < 2.0
            # A repeat is unknown too while the replica lacks the order.
            assert (await buyer.buy(1)).decision is None
        await until(pair.in_step)
        answer = await buyer.buy(1)
        assert answer.decision is Decision.REPLAYED
        assert await buyer.stock.left() == [99]
        assert len((await buyer.stock.records())[member(1)]) == 1
        await buyer.stock.check_books()


@pytest.mark.fault
async def test_step_without_replica_is_unknown_and_repeatable(pair: Pair) -> None:
    stock = await open_stock(pair.primary.redis, 10)
    pauses = operation("pause-1")
    # Two clients, so that the repeat runs on a connection that has written nothing.
    async with Redis(port=pair.primary.port) as one, Redis(port=pair.primary.port) as other:
        first, second = (
            Scripts(client, NONCE, replicas=(1, REPLICA_TIMEOUT_MS)) for client in (one, other)
        )
        with pair.replica.stopped():
            for scripts in (first, second):
                with pytest.raises(NotReplicated, match="0 of 1 replicas"):
                    await scripts.transition(stock.id, "pause", pauses)
        await until(pair.in_step)
        again = await second.transition(stock.id, "pause", pauses)
    assert again.reply is CallReply.REPLAYED
    assert [event.kind for entry in await stock.entries() for event in entry.events()].count(
        "paused"
    ) == 1


@pytest.mark.fault
async def test_promoted_replica_has_each_answered_order(tmp_path: Path) -> None:
    async with pair_in(tmp_path) as pair, buying(pair, deadline_s=0.6) as buyer:
        answers = await asyncio.gather(*(buyer.buy(n) for n in range(40)))
        with pair.replica.stopped():
            lost = asyncio.gather(*(buyer.buy(n) for n in range(40, 50)))
            await asyncio.sleep(0.1)
            pair.primary.send(signal.SIGKILL)
            assert {answer.decision for answer in await lost} == {None}
        await pair.replica.redis.replicaof("NO", "ONE")
        held = await Stock(pair.replica.redis).records()
        assert {answer.decision for answer in answers} == {Decision.SOLD}
        for n, answer in enumerate(answers):
            assert [record.seq for record in held[member(n)]] == [answer.value]
