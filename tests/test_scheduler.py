"""The scheduler: steps that no request triggers, and a Redis that returns."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError
from shop import ME, Shop, open_shop
from stock_maker import CAMPAIGN, Bid, campaign, key, member
from waiting import until, until_equal

from sale.db import read
from sale.domain.campaign import State
from sale.domain.problem import Refused
from sale.host import embedded
from sale.jobs import scheduler as scheduler_module
from sale.jobs.scheduler import Scheduler
from sale.stock.keys import campaign_keys
from sale.stock.rebuild import freeze
from sale.stock.scripts import CallReply, Decision
from sale.trust import store_watch
from sale.trust.audit import AuditReport, CampaignAudit, Finding
from sale.trust.revocation import sync_all

SELLS_AGAIN_S = 2.0
FOLLOWS_S = 1.0
KEYS = campaign_keys(CAMPAIGN)


class OwnRedis:
    """A Redis for this module, on a data directory that can be restored."""

    def __init__(self, servers: embedded.EmbeddedServers, home: Path) -> None:
        self.servers, self.home = servers, home

    def copy_files(self) -> Path:
        copy = self.home.with_name("redis.copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.home, copy)
        return copy

    async def come_back(self, files: Path | None = None) -> None:
        """Kill it, then start it on its present files, on older ones, or on none."""
        os.kill(self.servers.pids["redis"], signal.SIGKILL)
        await until(self._gone)
        if files is not None:
            shutil.rmtree(self.home)
            shutil.copytree(files, self.home)
        await self.servers.restart("redis")

    async def _gone(self) -> bool:
        return "redis" not in self.servers.pids


@pytest.fixture(scope="module")
async def own_redis(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OwnRedis]:
    data_dir = tmp_path_factory.mktemp("own") / "data"
    async with embedded.running(data_dir, redis=True, postgres=False) as servers:
        yield OwnRedis(servers, data_dir / "redis")


@pytest.fixture
async def own_shop(own_redis: OwnRedis, database_url: str) -> AsyncIterator[Shop]:
    """An open campaign on that Redis, in which card 1 has bought."""
    assert own_redis.servers.endpoints.redis_url is not None
    async with open_shop(own_redis.servers.endpoints.redis_url, database_url) as shop:
        await shop.redis.flushall()
        await shop.start_writer()
        await shop.create(campaign(100))
        await shop.step("open")
        await shop.buy(1)
        await shop.applied()
        yield shop


async def events(shop: Shop, campaign_id: str = CAMPAIGN) -> list[tuple[str, str | None]]:
    rows = await shop.pool.fetch(
        "SELECT kind, actor FROM event WHERE campaign_id = $1 ORDER BY seq", campaign_id
    )
    return [(row["kind"], row["actor"]) for row in rows]


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


async def now_ms(shop: Shop) -> int:
    seconds, micros = await shop.redis.time()
    return int(seconds) * 1_000 + int(micros) // 1_000


async def test_opening_and_closing_are_recorded_without_requests(shop: Shop):
    now = await now_ms(shop)
    opens, closes = now + 300, now + 700
    await shop.create(campaign(10, opens_at_ms=opens, closes_at_ms=closes))
    async with shop.scheduling() as registry, shop.scheduling() as other:
        made = [("created", "cli:me"), ("scheduled", "cli:me")]
        recorded = [("opened", "clock"), ("closed", "clock")]
        await until_equal(lambda: events(shop), made + recorded)
        labels = {"campaign": CAMPAIGN, "showing": "s0"}
        told = [sample(each, "sale_stock_remaining", **labels) for each in (registry, other)]
        assert sorted(told, key=str) == [10, None]
        await asyncio.sleep(0.2)
    assert await events(shop) == made + recorded
    moments = await shop.pool.fetch(
        "SELECT (extract(epoch FROM at) * 1000)::bigint FROM event WHERE kind IN"
        " ('opened', 'closed') ORDER BY seq"
    )
    for (at_ms,), due_ms in zip(moments, (opens, closes), strict=True):
        assert due_ms <= at_ms < due_ms + 500
    assert (await shop.audit()).clean


async def test_returning_scheduler_records_missed_moments(shop: Shop):
    async with shop.scheduling():
        pass
    now = await now_ms(shop)
    await shop.create(campaign(10, opens_at_ms=now + 200, closes_at_ms=now + 400))
    await asyncio.sleep(0.5)
    assert [kind for kind, _ in await events(shop)] == ["created", "scheduled"]
    async with shop.scheduling():

        async def both() -> bool:
            return [kind for kind, _ in await events(shop)][2:] == ["opened", "closed"]

        await until(both, FOLLOWS_S)


@pytest.mark.parametrize("damage", ["values", "revision", "type"])
async def test_damaged_campaign_does_not_delay_another_opening(shop: Shop, damage: str):
    await shop.create(campaign(10, campaign_id="a-damaged-one"))
    await shop.add_cards(1)
    await shop.create(campaign(10, opens_at_ms=await now_ms(shop) + 100))
    damaged = campaign_keys("a-damaged-one").head
    if damage == "values":
        await shop.redis.hset(damaged, mapping={"config": "{", "clock": ""})
    elif damage == "revision":
        await shop.redis.hset(damaged, "roster_rev", "x")
    else:
        await shop.redis.set(damaged, "no hash")
    await shop.redis.hset(KEYS.head, "run_id", "0" * 40)
    async with shop.scheduling():

        async def opened() -> bool:
            return ("opened", "clock") in await events(shop)

        await until(opened)
        await shop.pool.execute("UPDATE member SET status = 'cancelled'")

        await until(lambda: shop.redis.sismember(KEYS.revoked, member(1)))


async def test_card_revoked_in_postgres_buys_nothing_a_second_later(shop: Shop):
    await shop.add_cards(1, 2)
    await shop.create(campaign(10))
    await shop.step("open")
    async with shop.scheduling(tick_interval_ms=250):
        await shop.buy(1)
        await shop.pool.execute(
            "UPDATE member SET status = 'suspended' WHERE member_no = $1", member(1)
        )
        await asyncio.sleep(FOLLOWS_S)
        told = await shop.stock.buy(Bid(member(1), key(2)), Bid(member(2), key(1)))
        assert [each.decision for each in told] == [Decision.CARD_REVOKED, Decision.SOLD]
        await shop.pool.execute(
            "UPDATE member SET status = 'active' WHERE member_no = $1", member(1)
        )
        await asyncio.sleep(FOLLOWS_S)
        await shop.buy(1, key_no=2)


async def test_recreated_draft_waits_for_revoked_cards(shop: Shop):
    await shop.add_cards(1)
    await shop.create(campaign(10))
    await shop.step("delete")
    await shop.pool.execute("UPDATE member SET status = 'cancelled'")
    await shop.stock.create(campaign(10))
    assert (await shop.stock.step("open")).reply is CallReply.OK
    assert await _call(shop, 1) == CallReply.UNVERIFIED
    await sync_all(shop.redis, shop.scripts, shop.pool)
    assert (await shop.stock.buy_one(member(1), key(1))).decision is Decision.CARD_REVOKED


async def test_deleted_recovering_draft_is_not_recreated(shop: Shop):
    await shop.create(campaign(10))
    await shop.step("delete")
    await freeze(shop.redis, CAMPAIGN, "damaged")
    with pytest.raises(Refused, match="recovering"):
        await shop.create(campaign(10))


async def test_card_restored_after_an_interrupted_load_may_buy(shop: Shop):
    await shop.add_cards(1, 2, status="suspended")
    await shop.stock.create(campaign(10))
    await shop.scripts.sync_revoked(CAMPAIGN, -1, -1, [(member(1), False)])
    await shop.pool.execute("UPDATE member SET status = 'active' WHERE member_no = $1", member(1))
    await asyncio.gather(*(sync_all(shop.redis, shop.scripts, shop.pool) for _ in range(4)))
    assert await shop.redis.smembers(KEYS.revoked) == {str(member(2)).encode()}
    assert await shop.stock.head("roster_rev") == ["3"]


async def test_overtaken_first_load_is_refused(shop: Shop):
    await shop.stock.create(campaign(10))
    for load in ("first", "second"):
        begun = await shop.scripts.sync_revoked(CAMPAIGN, -1, -1, [], load=load, begins=True)
        assert begun.reply is CallReply.OK
    late = await shop.scripts.sync_revoked(CAMPAIGN, -1, -1, [(member(1), False)], load="first")
    assert (late.reply, late.seq) == (CallReply.STALE, -1)
    assert not await shop.redis.exists(KEYS.revoked)


async def test_card_revoked_after_a_roster_restore_buys_nothing(shop: Shop):
    # Found by the soak (seed 7016, lossy): PostgreSQL was restored, so its next revisions had
    # numbers that the campaign had applied already.
    await shop.add_cards(1, 2)
    await shop.create(campaign(10))
    await shop.step("open")
    await shop.redis.hset(KEYS.head, "roster_rev", 9)
    await shop.redis.sadd(KEYS.revoked, member(1))
    await sync_all(shop.redis, shop.scripts, shop.pool)
    await shop.pool.execute(
        "UPDATE member SET status = 'suspended' WHERE member_no = $1", member(2)
    )
    await sync_all(shop.redis, shop.scripts, shop.pool)
    told = await shop.stock.buy(Bid(member(1), key(1)), Bid(member(2), key(1)))
    assert [each.decision for each in told] == [Decision.SOLD, Decision.CARD_REVOKED]
    await shop.applied()
    assert (await shop.audit()).clean


async def test_slow_stores_keep_the_gauges_at_one(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    asked = asyncio.Event()

    async def slowly(*_: object) -> bool:
        await asyncio.sleep(0.05)
        asked.set()
        return True

    monkeypatch.setattr(shop.redis, "ping", slowly)
    monkeypatch.setattr(store_watch, "INTERVAL_S", 0.01)
    async with shop.scheduling() as registry:
        await until_equal(lambda: sample(registry, "sale_redis_up"), 1)
        for _ in range(3):
            asked.clear()
            while not asked.is_set():
                assert sample(registry, "sale_redis_up") == 1
                await asyncio.sleep(0.005)


async def test_gauges_show_both_stores_away(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    async def gone(*_: object) -> bool:
        raise ConnectionRefusedError

    async with shop.scheduling() as registry:
        await until_equal(lambda: sample(registry, "sale_redis_up"), 1)
        await until_equal(lambda: sample(registry, "sale_postgres_up"), 1)
        monkeypatch.setattr(shop.redis, "ping", gone)
        await shop.pool.close()
        await until_equal(lambda: sample(registry, "sale_redis_up"), 0)
        await until_equal(lambda: sample(registry, "sale_postgres_up"), 0)


async def test_metric_shows_an_audit_finding(shop: Shop):
    await shop.create(campaign(10))
    async with shop.scheduling(audit_interval_s=1) as registry:

        async def told(count: float) -> bool:
            labels = {"campaign": CAMPAIGN, "invariant": "INV-1"}
            return sample(registry, "sale_audit_findings", **labels) == count

        await until(lambda: told(0))
        await shop.redis.hset(KEYS.stock, "r0", 11)
        await until(lambda: told(1))
        await shop.redis.hset(KEYS.stock, "r0", 10)
        await until(lambda: told(0))


async def test_sales_resume_two_seconds_after_a_redis_restart(own_shop: Shop, own_redis: OwnRedis):
    async with own_shop.scheduling(tick_interval_ms=250) as registry:
        await own_redis.come_back()
        back = time.monotonic()
        first = await _call(own_shop, 2)
        assert first == CallReply.UNVERIFIED  # no sale before the comparison (INV-8)

        async def sells() -> bool:
            return await _call(own_shop, 2) == CallReply.OK

        await until(sells, SELLS_AGAIN_S)
        print(f"sells again {time.monotonic() - back:.3f} s after Redis answers")
        replay, new = await own_shop.stock.buy(Bid(member(1), key(1)), Bid(member(3), key(1)))
        assert (replay.decision, new.decision) == (Decision.REPLAYED, Decision.SOLD)
        await until_equal(lambda: sample(registry, "sale_redis_up"), 1)
        assert sample(registry, "sale_campaigns_recovering") == 0
    await own_shop.applied()
    assert (await own_shop.audit()).clean


async def test_older_redis_files_sell_nothing_until_recovered(own_shop: Shop, own_redis: OwnRedis):
    files = own_redis.copy_files()
    await own_shop.buy(2, quantity=3)
    await own_shop.applied()
    async with own_shop.scheduling() as registry:
        await own_redis.come_back(files)
        await until_equal(lambda: sample(registry, "sale_campaigns_recovering"), 1)
        for _ in range(5):
            assert await _call(own_shop, 2) == CallReply.UNVERIFIED
            await asyncio.sleep(0.05)
        (why,) = await own_shop.stock.head("recovering")
        assert "PostgreSQL has applied" in why
        assert "INV-8" in str(await own_shop.audit())
        await own_shop.recover()
        await until_equal(lambda: sample(registry, "sale_campaigns_recovering"), 0)
        told = await own_shop.stock.buy(Bid(member(2), key(9)), Bid(member(3), key(1)))
        assert [each.decision for each in told] == [Decision.LIMIT_EXCEEDED, Decision.SOLD]
    await own_shop.applied()
    assert (await own_shop.audit()).clean


async def test_empty_redis_sells_nothing_until_recovered(
    own_shop: Shop, own_redis: OwnRedis, tmp_path: Path
):
    async with own_shop.scheduling() as registry:
        await own_redis.come_back(tmp_path)
        await until_equal(lambda: sample(registry, "sale_campaigns_recovering"), 1)
        assert await _call(own_shop, 2) == CallReply.MISSING
        with pytest.raises(Refused, match="recover it first"):
            await own_shop.desk.create(campaign(100), ME, None, None)
        await own_shop.recover()
        await until_equal(lambda: sample(registry, "sale_campaigns_recovering"), 0)
        replayed = await own_shop.stock.buy_one(member(1), key(1))
        assert replayed.decision is Decision.REPLAYED
    await own_shop.applied()
    assert (await own_shop.audit()).clean


async def test_redis_restart_before_the_writer_loses_no_order(own_shop: Shop, own_redis: OwnRedis):
    await own_shop.stop_writer()
    await own_shop.buy(2, 3, 4)
    async with own_shop.scheduling():
        await own_redis.come_back()

        await until_equal(lambda: _call(own_shop, 5), CallReply.OK, SELLS_AGAIN_S)
    await own_shop.start_writer()
    await own_shop.applied()
    assert (await own_shop.audit()).clean
    assert await own_shop.pool.fetchval("SELECT count(*) FROM orders") == 5


async def _call(shop: Shop, n: int) -> int | None:
    """The script's reply to a purchase; None if Redis does not answer yet."""
    try:
        return (await shop.stock.call(Bid(member(n), key(1))))[0]
    except (RedisError, OSError):
        return None


async def test_scheduler_that_lost_its_lock_publishes_no_findings(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    registry, stop, audited = CollectorRegistry(), asyncio.Event(), asyncio.Event()
    scheduler = Scheduler(shop.stores(audit_interval_s=0), shop.database_url, registry)
    finding = CampaignAudit(CAMPAIGN, clean=False, findings=[Finding("INV-1", "oversold")])

    async def lose_the_lock(*_: object, **__: object) -> AuditReport:
        if not audited.is_set():
            scheduler._set_active("")
        audited.set()
        return AuditReport(clean=False, checked_at="", campaigns=[finding])

    monkeypatch.setattr(scheduler_module, "audit", lose_the_lock)
    scheduler._set_active("it holds the lock")

    auditing = asyncio.create_task(scheduler._audit_repeatedly(stop))
    await audited.wait()
    await asyncio.sleep(0.05)
    stop.set()
    await auditing

    labels = {"campaign": CAMPAIGN, "invariant": "INV-1"}
    assert sample(registry, "sale_audit_findings", **labels) is None


async def test_step_is_done_where_postgres_dies_after_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    await shop.create(campaign(10))

    async def dies(*_: object) -> None:
        raise asyncpg.InternalClientError("got result for unknown protocol state 3")

    monkeypatch.setattr(read, "position", dies)
    done = await shop.take("open", CAMPAIGN)
    assert done is not None
    assert done.state is State.OPEN
