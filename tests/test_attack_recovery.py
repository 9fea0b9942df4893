"""Attacks on the recovery: slow and dead processes, damaged data, and early recoveries."""

import asyncio

import pytest
from shop import Shop
from stock_maker import CAMPAIGN, key, member
from test_witness import Api, finish, going_back, seqs
from test_witness import apis as the_apis
from test_witness import shop as the_shop
from waiting import until

from sale.db import claims, read
from sale.db.apply import apply_entries
from sale.ledger.chain import Event, parse_entry
from sale.ledger.kinds import SOLD
from sale.stock import process_reports
from sale.stock.batcher import Batcher
from sale.stock.keys import REPORTS
from sale.stock.mark import Found
from sale.stock.scripts import Decision
from sale.stock.stream import stream_rows
from sale.trust.auto_recovery import AutoRecovery
from sale.trust.stalled_ledgers import StalledLedgers
from sale.trust.verify import verify_all

shop, apis = the_shop, the_apis


@pytest.fixture
def slow_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each look-up of a mark slower than a process waits for it before it reports."""
    look_up = Batcher.look_up

    async def slow(self: Batcher) -> Found:
        if self.mark.seq:
            await asyncio.sleep(1.8)
        return await look_up(self)

    monkeypatch.setattr(Batcher, "look_up", slow)


@pytest.mark.usefixtures("slow_look")
async def test_old_copy_stays_shut_while_look_ups_are_slow(shop: Shop, apis: list[Api]):
    a, b = apis
    async with going_back(shop):
        told = seqs(await a.buy(*range(1, 21)))
    await a.check_acknowledged()
    await b.check_acknowledged()
    # The look-up takes longer than COLLECT_MAX_S: the old copy must not pass as a sound one.
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    auto_recovery = AutoRecovery(shop.redis, shop.scripts, shop.pool, allowed=True)

    async def healed() -> bool:
        unfit = await verify_all(shop.redis, shop.scripts, shop.pool)
        await auto_recovery.recover_unfit(unfit)
        return not unfit

    await until(healed, within_s=25)
    again = await b.buy(*range(1, 21))
    assert [answer.value for answer in again] == told
    assert (await finish(shop)).clean


@pytest.mark.usefixtures("slow_look")
async def test_process_sells_again_after_a_slow_check(shop: Shop, apis: list[Api]):
    a = apis[0]
    a.batcher._call_timeout_s = 2.5
    seqs(await a.buy(1, 2))
    a.batcher.mark = a.batcher.mark._replace(incarnation="0:0:1")
    await a.check_acknowledged()

    async def sells() -> bool:
        return (await a.buy(3))[0].decision is not None

    await until(sells)


async def test_order_replayed_many_times_is_kept_once(apis: list[Api]):
    a = apis[0]
    seqs(await a.buy(1))
    for _ in range(20):
        assert (await a.buy(1))[0].decision is Decision.REPLAYED
    assert len(a.batcher.unapplied) == 2
    a.batcher.unapplied.drop_applied(100)
    assert len(a.batcher.unapplied) == 0


async def test_process_reports_in_spite_of_a_damaged_head(shop: Shop, apis: list[Api]):
    a = apis[0]
    seqs(await a.buy(1))
    head = shop.stock.keys.head
    (seq,) = await shop.stock.head("seq")
    await a.check_acknowledged()
    await shop.redis.hset(head, mapping={"seq": "x"})
    a.batcher.mark = a.batcher.mark._replace(incarnation="0:0:1")
    await asyncio.sleep(0.6)
    await shop.redis.hset(head, "seq", seq)

    async def reports() -> bool:
        told = (await process_reports.read_reports(shop.redis)).get("a")
        return told is not None and a.batcher.mark.incarnation.startswith(told.identity)

    await until(reports)


async def test_report_of_a_long_dead_process_stops_no_sale(shop: Shop, apis: list[Api]):
    identity = await process_reports.read_identity(shop.redis)
    lacking = {CAMPAIGN: process_reports.CampaignReport(1, 2, lacks=True, handed=False)}
    old = process_reports.ProcessReport(identity.now_ms - 10_000, str(identity), lacking)
    await process_reports.report(shop.redis, "dead", old)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    seqs(await apis[0].buy(1))


async def test_manual_recovery_first_collects_reports(shop: Shop, apis: list[Api]):
    a = apis[0]
    async with going_back(shop):
        told = seqs(await a.buy(1, 2, 3))
    await shop.redis.delete(REPORTS)
    await a.check_acknowledged()
    done = await shop.recover()
    assert (done.filled, done.voided) == (3, [])
    assert [answer.value for answer in await a.buy(1, 2, 3)] == told
    assert (await finish(shop)).clean


async def test_recovery_epoch_is_above_that_of_lost_claims(shop: Shop):
    (seq,) = await shop.stock.head("seq")
    told = Event(int(seq) + 1, 4_000_000_000_000, 4, SOLD, member(1), 0, 1, key(1), 500)
    async with shop.pool.acquire() as connection:
        await claims.hand_in(connection, CAMPAIGN, "gone", [told])
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    assert (await shop.recover()).filled == 1
    assert await shop.stock.head("epoch") == ["5"]


async def test_late_writer_with_lost_events_stops_sales(shop: Shop, apis: list[Api]):
    # The writer was stopped while it applied a batch, and resumed after the recovery.
    a, b = apis
    async with shop.pool.acquire() as connection:
        position = await read.position(connection, CAMPAIGN)
        async with going_back(shop):
            seqs(await a.buy(1, 2, 3))
            seqs(await b.buy(4))
            after = f"({position.seq}-0"
            rows = [row async for some in stream_rows(shop.redis, CAMPAIGN, after) for row in some]
        await a.check_acknowledged()
        await verify_all(shop.redis, shop.scripts, shop.pool)
        await shop.recover()
        entries = [parse_entry(*row) for row in rows]
        await apply_entries(connection, CAMPAIGN, entries, after=position)
    await a.buy(50, 51)
    await shop.start_writer()
    stalls = StalledLedgers(0.3)

    async def shut() -> bool:
        unfit = await verify_all(shop.redis, shop.scripts, shop.pool, stalled_ledgers=stalls)
        return unfit == [CAMPAIGN]

    await until(shut)
    assert (await a.buy(52))[0].decision in {None, Decision.RECOVERING}
    done = await shop.recover()
    assert done.changed
    assert done.conflicts
    seqs(await a.buy(53))
    await shop.applied()


async def test_sound_ledger_without_progress_keeps_selling(shop: Shop, apis: list[Api]):
    seqs(await apis[0].buy(1))
    stalls = StalledLedgers(0.0)
    for _ in range(3):
        assert await verify_all(shop.redis, shop.scripts, shop.pool, stalled_ledgers=stalls) == []
    seqs(await apis[0].buy(2))
