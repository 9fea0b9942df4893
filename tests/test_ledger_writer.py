"""The ledger writer, from a real stream to a real database."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from ledger_maker import NOW_MS, Ledger, created, operation, sold
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from shop import open_shop
from stock_maker import CAMPAIGN, campaign
from waiting import until, until_equal

from sale.config import Settings
from sale.db import read
from sale.db.apply import apply_entries
from sale.domain.clock import from_ms
from sale.domain.problem import Problem, Refused
from sale.jobs.leadership import Leadership
from sale.jobs.writer import LedgerWriter
from sale.jobs.writer_metrics import LedgerMetrics
from sale.ledger.chain import CorruptLedger, Entry, parse_entry
from sale.stock.keys import campaign_keys
from sale.stock.rebuild import freeze
from sale.stock.scripts import Scripts
from sale.stock.troubles import read_troubles
from sale.trust.verify import verify_all

DEADLINE_S = 8.0
STREAM = campaign_keys(CAMPAIGN).stream


class Rig:
    """Writers over one Redis and one database, and the campaigns that they asked to pause."""

    def __init__(self, redis: Redis, database_url: str, conn: Any) -> None:
        self.redis, self.database_url, self.conn = redis, database_url, conn
        self.paused: list[str] = []
        self.pausing: Callable[[], None] = lambda: None

    async def pause(self, campaign_id: str, reason: str) -> None:
        self.pausing()
        self.paused.append(campaign_id)

    @contextlib.asynccontextmanager
    async def writing(self, **settings: Any) -> AsyncIterator[LedgerWriter]:
        registry = CollectorRegistry()
        writer = LedgerWriter(
            self.redis,
            Scripts(self.redis, "nonce"),
            self.database_url,
            Settings(**settings),
            pause_campaign=self.pause,
            metrics=LedgerMetrics(registry),
        )
        writer.metrics.registry = registry  # type: ignore[attr-defined]
        stop = asyncio.Event()
        task = asyncio.create_task(writer.run(stop))
        try:
            yield writer
        finally:
            stop.set()
            await asyncio.wait_for(task, DEADLINE_S)

    async def applied(self, campaign_id: str = CAMPAIGN) -> int:
        return (await read.position(self.conn, campaign_id)).seq


def sample(writer: LedgerWriter, name: str, **labels: str) -> float | None:
    registry: CollectorRegistry = writer.metrics.registry  # type: ignore[attr-defined]
    return registry.get_sample_value(name, labels)


@pytest.fixture
async def rig(redis: Redis, database_url: str) -> AsyncIterator[Rig]:
    conn = await asyncpg.connect(database_url)
    yield Rig(redis, database_url, conn)
    await conn.close()


async def test_writer_copies_the_stream_to_postgres(rig: Rig):
    book, other = Ledger(), Ledger("green-gift")
    await book.append(rig.redis, created(10_000), operation("opened"))
    async with rig.writing() as writer:
        for n in range(40):
            await book.append(rig.redis, *(sold(100 * n + i) for i in range(100)))
        await other.append(rig.redis, created(5, campaign_id="green-gift"))

        await until_equal(rig.applied, 4_002)
        await until_equal(lambda: rig.applied("green-gift"), 1)
        await until(lambda: sample(writer, "sale_ledger_lag_events", campaign=CAMPAIGN) == 0)
        assert sample(writer, "sale_ledger_lag_seconds", campaign=CAMPAIGN) == 0
        assert sample(writer, "sale_ledger_written_total") == 4_003
    assert await rig.conn.fetchval("SELECT count(*) FROM orders") == 4_000
    assert await rig.conn.fetchval("SELECT live FROM showing WHERE stock = 10000") == 4_000


async def test_writer_catches_up_a_backlog_of_several_batches(rig: Rig):
    book = Ledger()
    await book.append(rig.redis, created(10_000))
    for n in range(10):
        await book.append(rig.redis, *(sold(256 * n + i) for i in range(256)))
    async with rig.writing(writer_batch_events=512):
        await until_equal(rig.applied, 2_561)


async def test_second_writer_takes_over_when_the_first_ends(rig: Rig):
    book = Ledger()
    await book.append(rig.redis, created(100))
    async with rig.writing() as second_outer:
        await until(lambda: second_outer.active)
        async with rig.writing() as waiting:
            await asyncio.sleep(0.4)
            assert not waiting.active
            # The first loses its lock's connection, as a stopped process does.
            await rig.conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name LIKE 'sale-writer %' AND datname = current_database()"
                " AND EXISTS (SELECT FROM pg_locks l WHERE l.pid = pg_stat_activity.pid"
                " AND l.locktype = 'advisory' AND l.granted)"
            )
            await book.append(rig.redis, sold(1))
            await until_equal(rig.applied, 2)
            await until(lambda: waiting.active != second_outer.active)
    assert await rig.conn.fetchval("SELECT count(*) FROM event") == 2


async def test_writer_without_heartbeat_is_replaced(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    book = Ledger()
    await book.append(rig.redis, created(100))

    async def still(*_: object) -> None:
        await asyncio.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(Leadership, "_beat", still)
        async with rig.writing() as stopped:
            await until(lambda: stopped.active)
            patched.undo()
            async with rig.writing() as other:
                await until(lambda: other.active)
                await book.append(rig.redis, sold(1))
                await until_equal(rig.applied, 2)
                # Both writers act as the active one: only the compare-and-set protects the rows.
                assert stopped.active
    assert await rig.conn.fetchval("SELECT count(*) FROM event") == 2


async def test_conflict_pauses_the_campaign_and_writing_goes_on(rig: Rig):
    def refuse_once() -> None:
        rig.pausing = lambda: None
        raise Refused(Problem.UNAVAILABLE)

    rig.pausing = refuse_once
    book = Ledger()
    await book.append(rig.redis, created(2), operation("opened"))
    await book.append(rig.redis, sold(1), sold(2), sold(3))
    async with rig.writing() as writer:
        await until(lambda: rig.paused == [CAMPAIGN])
        await book.append(rig.redis, operation("stock_added", showing=0, add=5), sold(4))
        await until_equal(rig.applied, 7)
        assert sample(writer, "sale_ledger_conflicts_total", campaign=CAMPAIGN) == 1
        assert sample(writer, "sale_ledger_conflict_rows", campaign=CAMPAIGN) == 1
    assert await rig.conn.fetchval("SELECT count(*) FROM orders") == 3
    assert await rig.conn.fetchval("SELECT seq FROM conflict WHERE paused_at IS NOT NULL") == 5
    assert rig.paused == [CAMPAIGN]


async def test_new_writer_pauses_for_an_earlier_conflict(rig: Rig):
    book = Ledger()
    entry = await book.append(rig.redis, created(0), sold(1))
    await apply_entries(rig.conn, CAMPAIGN, [entry])
    async with rig.writing():
        await until(lambda: rig.paused == [CAMPAIGN])


async def test_conflict_in_an_untrusted_redis_pauses_later(rig: Rig, redis_url: str):
    async with open_shop(redis_url, rig.database_url) as shop:
        await shop.start_writer()
        await shop.create(campaign(10))
        await shop.step("open")
        await shop.applied()
        await shop.stop_writer()
        await shop.buy(1)
        await shop.damage("UPDATE showing SET stock = 0")
        head = campaign_keys(CAMPAIGN).head
        await rig.redis.hset(head, "run_id", "0" * 40)
        await shop.start_writer()

        async def unpaused() -> int:
            found: int = await rig.conn.fetchval(
                "SELECT count(*) FROM conflict WHERE paused_at IS NULL"
            )
            return found

        await until_equal(unpaused, 1)
        await asyncio.sleep(0.2)
        assert await unpaused() == 1
        assert await shop.stock.head("state") == ["open"]
        await verify_all(shop.redis, shop.scripts, shop.pool)
        await until_equal(unpaused, 0)
        assert await shop.stock.head("state") == ["paused"]


async def test_pause_reports_whether_the_campaign_could_sell(rig: Rig, redis_url: str):
    async with open_shop(redis_url, rig.database_url) as shop:
        with pytest.raises(Refused):
            await shop.desk.pause_for(CAMPAIGN, "no such one")
        await shop.create(campaign(10))
        await shop.desk.pause_for(CAMPAIGN, "a draft sells nothing")
        await shop.step("open")
        await freeze(shop.redis, CAMPAIGN, "damaged")
        with pytest.raises(Refused):
            await shop.desk.pause_for(CAMPAIGN, "it will sell again")


async def test_pause_succeeds_if_postgres_goes_away(rig: Rig, redis_url: str):
    async with open_shop(redis_url, rig.database_url) as shop:
        await shop.create(campaign(10))
        await shop.pool.close()
        await shop.step("open")
        assert await shop.stock.head("state") == ["open"]


async def test_gauge_counts_conflicts_from_before_the_start(rig: Rig):
    book, other = Ledger(), Ledger("green-gift")
    entry = await book.append(rig.redis, created(0), sold(1))
    await apply_entries(rig.conn, CAMPAIGN, [entry])
    async with rig.writing() as writer:
        await until(lambda: sample(writer, "sale_ledger_conflict_rows", campaign=CAMPAIGN) == 1)
        await other.append(rig.redis, created(5, campaign_id="green-gift"))
        await until(lambda: sample(writer, "sale_ledger_conflict_rows", campaign="green-gift") == 0)


async def test_gap_stops_only_its_campaign(rig: Rig):
    broken, sound = Ledger(), Ledger("green-gift")
    await broken.append(rig.redis, created(10))
    lost = await broken.append(rig.redis, sold(1))
    await broken.append(rig.redis, sold(2))
    await rig.redis.xdel(STREAM, f"{lost.last}-0")
    async with rig.writing() as writer:
        await until(lambda: CAMPAIGN in writer.stuck)
        await sound.append(rig.redis, created(5, campaign_id="green-gift"))
        await until_equal(lambda: rig.applied("green-gift"), 1)
        assert sample(writer, "sale_ledger_stuck", campaign=CAMPAIGN) == 1
        assert "event 2 is missing" in writer.stuck[CAMPAIGN]
    assert await rig.applied() < 2


async def test_missing_entries_stop_the_campaign(rig: Rig):
    book = Ledger()
    await book.append(rig.redis, created(10))
    await rig.redis.delete(STREAM)
    async with rig.writing() as writer:
        await until(lambda: CAMPAIGN in writer.stuck)


async def test_redis_behind_postgres_stops_until_they_agree(rig: Rig):
    book = Ledger()
    entries = [await book.append(rig.redis, created(10)), await book.append(rig.redis, sold(1))]
    await apply_entries(rig.conn, CAMPAIGN, entries)
    await rig.redis.hset(campaign_keys(CAMPAIGN).head, "seq", 1)
    async with rig.writing() as writer:
        await until(lambda: CAMPAIGN in writer.stuck)
        await rig.redis.hset(campaign_keys(CAMPAIGN).head, "seq", 2)
        await until(lambda: not writer.stuck)
        assert sample(writer, "sale_ledger_stuck", campaign=CAMPAIGN) == 0


async def test_zero_retention_keeps_only_the_last_entry(rig: Rig):
    book = Ledger()
    await book.append(rig.redis, created(10))
    async with rig.writing(ledger_retention_events=0, ledger_retention_s=0):
        for n in range(5):
            await book.append(rig.redis, sold(n))
        await until_equal(lambda: rig.redis.xlen(STREAM), 1)
        assert (await rig.redis.xrange(STREAM))[0][0] == b"6-0"
        await book.append(rig.redis, sold(9))
        await until_equal(rig.applied, 7)


@pytest.mark.parametrize(
    ("events", "seconds"), [(1_000, 0), (0, 600), (3, 0)], ids=["events", "age", "three"]
)
async def test_entries_stay_until_both_retention_bounds_pass(rig: Rig, events: int, seconds: int):
    book = Ledger()
    await book.append(rig.redis, created(10))
    async with rig.writing(ledger_retention_events=events, ledger_retention_s=seconds):
        for n in range(6):
            await book.append(rig.redis, sold(n))
            await until_equal(rig.applied, book.seq)
        await asyncio.sleep(0.15)
    left = await rig.redis.xlen(STREAM)
    assert left == (4 if events == 3 else 7)


async def test_lag_grows_without_postgres_and_no_event_is_lost(rig: Rig):
    book = Ledger()
    await book.append(rig.redis, created(100))
    async with rig.writing() as writer:
        await until_equal(rig.applied, 1)
        locking = rig.conn.transaction()
        await locking.start()
        await rig.conn.execute("LOCK TABLE campaign IN ACCESS EXCLUSIVE MODE")
        await book.append(rig.redis, sold(1), sold(2))
        await asyncio.sleep(0.35)
        assert sample(writer, "sale_ledger_lag_events", campaign=CAMPAIGN) == 2
        assert (sample(writer, "sale_ledger_lag_seconds", campaign=CAMPAIGN) or 0) > 0.1
        await locking.rollback()
        await rig.conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'sale-writer%' AND datname = current_database()"
        )
        await book.append(rig.redis, sold(3))
        await until_equal(rig.applied, 4)
        await until(lambda: sample(writer, "sale_ledger_lag_events", campaign=CAMPAIGN) == 0)


async def test_writer_applies_entries_before_an_unreadable_one(rig: Rig) -> None:
    book, other = Ledger(), Ledger("green-gift")
    await book.append(rig.redis, created(10))
    for n in range(5):
        await book.append(rig.redis, sold(n))
    unreadable = await book.append(rig.redis, operation("moved"))
    await book.append(rig.redis, sold(6))
    await other.append(rig.redis, created(10, campaign_id="green-gift"))

    async with rig.writing() as writer:
        await until(lambda: CAMPAIGN in writer.stuck)
        assert f"entry {unreadable.last}: unknown kind 'moved'" in writer.stuck[CAMPAIGN]
        assert await rig.applied() == unreadable.last - 1
        await until_equal(lambda: rig.applied("green-gift"), 1)
        await until_equal(lambda: read_writer_troubles(rig), {CAMPAIGN})
        await until(lambda: sample(writer, "sale_ledger_lag_events", campaign=CAMPAIGN) == 2)


async def read_writer_troubles(rig: Rig) -> set[str]:
    return set((await read_troubles(rig.redis))["writer"])


@pytest.mark.parametrize(
    "at_ms", [10**18, -(10**18), 253_402_300_799_000], ids=["huge", "negative", "9999"]
)
async def test_moment_out_of_range_is_stored_as_the_nearest(rig: Rig, at_ms: int) -> None:
    book = Ledger()
    await book.append(rig.redis, created(10))
    await book.append(rig.redis, operation("scheduled", opens_at=at_ms))
    await book.append(rig.redis, operation("scheduled", opens_at=NOW_MS))
    async with rig.writing() as writer:
        await until_equal(rig.applied, 3)
        assert not writer.stuck
    kept = await rig.conn.fetch("SELECT data->>'opens_at' FROM event ORDER BY seq")
    assert [row[0] for row in kept] == [str(NOW_MS), str(at_ms), str(NOW_MS)]
    assert await rig.conn.fetchval("SELECT opens_at FROM campaign") == from_ms(NOW_MS)
    assert await rig.conn.fetchval("SELECT count(*) FROM conflict") == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[5]",
        b"[[]]",
        b"[[null]]",
        b'[["sold"]]',
        b'[["sold",110101000000001,0,1,"0000000000000001",500]]',
        b'[["sold","110101000000001",0,1,"0000000000000001",99999999999]]',
        b'[["sold","110101000000001",0,1,"0000000000000001",500,1]]',
        b'[["paused"]]',
        b'[["paused",[]]]',
        b'[["moved",{}]]',
        b'[["scheduled",{"opens_at":nan}]]',
        b'[["paused",{}],["paused",{}]]',
        b'[["paused",{"a":' + b"[" * 100_000,
        b'[["\xff"]]',
    ],
)
def test_entry_that_cannot_be_applied_is_corrupt(payload: bytes) -> None:
    entry = Entry(1, 1, NOW_MS, 1, "", payload)
    with pytest.raises(CorruptLedger):
        entry.events()


@pytest.mark.parametrize("moment", [b"x", b"", str(10**18).encode(), str(-(10**18)).encode()])
def test_entry_with_a_moment_that_cannot_be_stored_is_corrupt(moment: bytes) -> None:
    with pytest.raises(CorruptLedger):
        parse_entry(b"1-0", {b"n": b"1", b"t": moment, b"e": b"1", b"h": b"", b"d": b"[]"})
