"""Reports of API processes when Redis returns without orders that members were given."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from shop import Shop, open_shop
from stock_maker import BEHIND_MAX, CAMPAIGN, campaign, key, member
from waiting import until

from sale.db import claims
from sale.domain.campaign import Campaign
from sale.lifetime import cancel_and_wait
from sale.metrics import PurchaseMetrics
from sale.stock.answers import Answer, AwaitedPurchase
from sale.stock.batchers import Batchers
from sale.stock.connection import open_redis
from sale.stock.keys import REPORTS
from sale.stock.scripts import Decision
from sale.trust import witness
from sale.trust.auto_recovery import AutoRecovery
from sale.trust.verify import verify_all
from sale.trust.witness import Witness

MADE = campaign(200, card_limit=3)


class Api:
    """An API process without HTTP: its batchers and its witness."""

    def __init__(self, shop: Shop, name: str, made: Campaign = MADE) -> None:
        self.batchers = Batchers(
            shop.scripts, name, PurchaseMetrics(), batch_max=256, queue_max=4_096, deadline_s=5.0,
            behind_max=BEHIND_MAX,
        )  # fmt: skip
        self.batcher = self.batchers.of(made)
        self.witness = Witness(shop.redis, shop.pool, self.batchers)
        self._task: asyncio.Task[None] | None = None

    async def buy(self, *numbers: int, key_no: int = 1) -> list[Answer]:
        loop = asyncio.get_running_loop()
        bids = [AwaitedPurchase(member(n), "dongsi", 0, 1, key(key_no), loop) for n in numbers]
        for bid in bids:
            assert self.batcher.submit(bid)
        async with asyncio.timeout(10):
            return [await bid.answer for bid in bids]

    async def check_acknowledged(self) -> None:
        self._task = asyncio.create_task(self.witness.run())

    async def close(self) -> None:
        if self._task is not None:
            await cancel_and_wait([self._task])  # redis-py may swallow a cancellation
        await self.batchers.close()


@pytest.fixture
async def shop(redis: Redis, redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    """An open campaign with a stopped writer: PostgreSQL has only `created` and `opened`."""
    async with open_shop(redis_url, database_url) as shop:
        await shop.start_writer()
        await shop.create(MADE)
        await shop.step("open")
        await shop.applied()
        await shop.stop_writer()
        yield shop


@pytest.fixture
async def apis(shop: Shop) -> AsyncIterator[list[Api]]:
    """Two API processes, a and b."""
    apis = [Api(shop, "a"), Api(shop, "b")]
    yield apis
    for api in apis:
        await api.close()


@contextlib.asynccontextmanager
async def going_back(shop: Shop) -> AsyncIterator[None]:
    """Lose in Redis what happens in the block: it becomes another process with older files."""
    copy = {key_name: await shop.redis.dump(key_name) for key_name in shop.stock.keys}
    reports = await shop.redis.dump(REPORTS)
    yield
    for key_name, value in {**copy, REPORTS: reports}.items():
        await shop.redis.delete(key_name)
        if value is not None:
            await shop.redis.restore(key_name, 0, value)
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)


def earlier_incarnation(api: Api) -> None:
    """Let a process have checked another Redis than this one, in the same epoch."""
    api.batcher.mark = api.batcher.mark._replace(incarnation="0:0:1")


def seqs(answers: list[Answer]) -> list[int]:
    assert {answer.decision for answer in answers} == {Decision.SOLD}
    return [answer.value for answer in answers]


async def finish(shop: Shop) -> Any:
    await shop.start_writer()
    await shop.applied()
    return await shop.audit()


async def test_old_copy_that_matches_postgres_sells_nothing(shop: Shop, apis: list[Api]):
    async with going_back(shop):
        await apis[0].buy(1, 2, 3)
    await apis[0].check_acknowledged()
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    (why,) = await shop.stock.head("recovering")
    assert "API process a" in why
    refused = await apis[1].buy(9)
    assert refused[0].decision in {None, Decision.RECOVERING}


async def test_lost_orders_are_recovered_from_live_processes(shop: Shop, apis: list[Api]):
    a, b = apis
    async with going_back(shop):
        told = seqs(await a.buy(*range(1, 21)))
        told += seqs(await b.buy(*range(21, 31)))
        told += seqs(await a.buy(31))
    await a.check_acknowledged()
    await b.check_acknowledged()
    unfit = await verify_all(shop.redis, shop.scripts, shop.pool)
    auto_recovery = AutoRecovery(shop.redis, shop.scripts, shop.pool, allowed=True)
    await auto_recovery.recover_unfit(unfit)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    # Each key gives the same order as before, from either process, and no ticket is sold twice.
    again = await b.buy(*range(1, 32))
    assert {answer.decision for answer in again} == {Decision.REPLAYED}
    assert [answer.value for answer in again] == told
    assert await shop.stock.left() == [200 - 31]
    report = await finish(shop)
    assert report.clean, report
    await auto_recovery.settle()
    async with shop.pool.acquire() as connection:
        assert await claims.conflicts(connection, CAMPAIGN) == []
        assert await claims.voided(connection, CAMPAIGN) == []


async def test_orders_handed_in_by_a_dead_process_are_recovered(shop: Shop, apis: list[Api]):
    # Found by the soak (seed 203, lossy): all processes were killed in between, and Redis, which
    # matched PostgreSQL's ledger, sold the same numbers again.
    async with going_back(shop):
        told = seqs(await apis[0].buy(1, 2, 3))
    await apis[0].check_acknowledged()
    async with shop.pool.acquire() as connection:
        await until(lambda: _handed_in(connection, told[-1]))
    await apis[0].close()
    await shop.redis.delete(REPORTS)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    await AutoRecovery(shop.redis, shop.scripts, shop.pool, allowed=True).recover_unfit([CAMPAIGN])
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    again = await apis[1].buy(1, 2, 3)
    assert [answer.value for answer in again] == told
    assert (await finish(shop)).clean


async def _handed_in(connection: Any, seq: int) -> bool:
    return await claims.highest(connection, CAMPAIGN) == seq


async def test_numbers_of_a_dead_process_are_voided_for_ever(shop: Shop, apis: list[Api]):
    a, b = apis
    async with going_back(shop):
        lost = seqs(await b.buy(*range(1, 11)))
        kept = seqs(await a.buy(*range(11, 16)))
    await a.check_acknowledged()
    unfit = await verify_all(shop.redis, shop.scripts, shop.pool)
    await AutoRecovery(shop.redis, shop.scripts, shop.pool, allowed=True).recover_unfit(unfit)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    told = await shop.recover(dry_run=True)
    assert told.voided[0][0] == lost[0]
    done = await shop.recover()
    assert (done.filled, done.voided, done.conflicts) == (5, [(lost[0], lost[-1])], 0)
    new = seqs(await a.buy(1, 50))
    assert min(new) > max(kept) + 1
    assert await shop.stock.left() == [200 - 7]
    assert (await finish(shop)).clean


async def test_orders_of_a_resumed_process_become_conflicts(shop: Shop, apis: list[Api]):
    a, b = apis
    async with going_back(shop):
        lost = seqs(await a.buy(1, 2))
        seqs(await b.buy(3))
    await b.check_acknowledged()
    await verify_all(shop.redis, shop.scripts, shop.pool)
    assert (await shop.recover()).voided == [(lost[0], lost[-1])]
    seqs(await b.buy(1))
    assert len(a.batcher.unapplied) == 2
    # It sells only after it has handed in its orders that the ledger lacks.
    assert (await a.buy(60))[0].decision is None
    await a.check_acknowledged()
    await until(lambda: _empty(a))
    await shop.start_writer()
    await shop.applied()
    auto_recovery = AutoRecovery(shop.redis, shop.scripts, shop.pool, allowed=True)
    await auto_recovery.settle()
    async with shop.pool.acquire() as connection:
        conflicts = await claims.conflicts(connection, CAMPAIGN)
    assert sorted(row["seq"] for row in conflicts) == lost
    assert {row["source"] for row in conflicts} == {"handed_in"}
    # Card 1 has bought again with the same key: its conflict says so.
    assert [("same key" in row["why"]) for row in conflicts] == [False, True]
    seqs(await a.buy(61))
    await shop.applied()
    findings = [finding.what for finding in (await shop.audit()).campaigns[0].findings]
    assert len(findings) == 2


async def test_applied_orders_are_dropped_soon(shop: Shop, apis: list[Api]):
    await apis[0].check_acknowledged()
    await apis[0].buy(*range(1, 50))
    assert len(apis[0].batcher.unapplied) == 49
    await shop.start_writer()
    await until(lambda: _empty(apis[0]))


async def test_same_files_are_verified_without_postgres(shop: Shop, apis: list[Api]):
    await apis[0].check_acknowledged()
    await apis[1].check_acknowledged()
    await apis[0].buy(1, 2)
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    assert await verify_all(shop.redis, shop.scripts, _Away()) == []
    seqs(await apis[1].buy(3))


async def test_unknown_redis_stays_shut_without_postgres(shop: Shop, apis: list[Api]):
    async with going_back(shop):
        await apis[0].buy(1, 2)
    with pytest.raises(ConnectionRefusedError):
        await verify_all(shop.redis, shop.scripts, _Away())
    await apis[0].check_acknowledged()
    assert await verify_all(shop.redis, shop.scripts, _Away()) == [CAMPAIGN]
    assert "a has seen" in (await shop.stock.head("recovering"))[0]


class _Away:
    """A pool whose PostgreSQL is away."""

    def acquire(self) -> Any:
        raise ConnectionRefusedError


async def _empty(api: Api) -> bool:
    return not len(api.batcher.unapplied)


async def test_redis_lacking_handed_in_orders_is_not_trusted(shop: Shop, apis: list[Api]):
    # Given: a process handed in its orders and died, and all reports are lost.
    async with going_back(shop):
        told = seqs(await apis[0].buy(1, 2))
    await apis[0].witness.beat()
    await shop.redis.delete(REPORTS)
    # When and then: the files match PostgreSQL, and Redis is not trusted.
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    assert (await shop.recover()).filled == 2
    assert [answer.value for answer in await apis[1].buy(1, 2)] == told


async def test_redis_behind_the_report_of_the_dead_is_not_trusted(shop: Shop, apis: list[Api]):
    # Given: a process reported a number that Redis lost, could not hand in its orders, and died.
    async with going_back(shop):
        told = seqs(await apis[0].buy(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis[0].witness, "_pool", _Away())
        await apis[0].witness.beat()
    # When and then: its last report counts, although the process is dead.
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    assert (await shop.recover()).voided == [(told[0], told[-1])]


async def test_other_content_under_the_same_numbers_is_found(shop: Shop, apis: list[Api]):
    # Given: a process answered an operator's steps and no order, Redis lost them, and
    # another process sold under the same numbers before the first one reported.
    a, b = apis
    assert (await a.buy(1, key_no=9))[0].decision is Decision.SOLD
    await b.buy(2)
    async with going_back(shop):
        for action in ("pause", "resume"):
            step = await shop.stock.step(action)
            a.batchers.on_step(CAMPAIGN, step.seq, step.chain)
    await shop.redis.delete(REPORTS)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    assert seqs(await b.buy(3, 4)) == [step.seq - 1, step.seq]
    # When and then: Redis has each of its orders, and not the steps.
    earlier_incarnation(a)
    assert (await a.buy(5))[0].decision is None
    await a.witness.beat()
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    assert "API process a" in (await shop.stock.head("recovering"))[0]


async def test_process_hands_in_its_orders_if_its_mark_was_trimmed(shop: Shop, apis: list[Api]):
    # Given: a process was suspended until the stream was trimmed beyond what it had seen.
    a, b = apis
    told = seqs(await a.buy(1, 2))
    seqs(await b.buy(3))
    await shop.start_writer()
    await shop.applied()
    await shop.redis.xtrim(shop.stock.keys.stream, minid=f"{told[-1] + 1}-0", approximate=False)
    await shop.redis.hset(shop.stock.keys.head, "run_id", "0" * 40)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    # When
    earlier_incarnation(a)
    await a.witness.beat()
    # Then: PostgreSQL knows that its orders stand, and it sells without a recovery.
    async with shop.pool.acquire() as connection:
        assert [each.settled for each in await claims.settle(connection)] == ["stands"] * 2
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    assert await shop.stock.head("epoch") == ["1"]
    seqs(await a.buy(4))
    await shop.applied()
    assert (await shop.audit()).clean


async def test_orders_of_a_stopped_process_are_filled_in(shop: Shop, apis: list[Api]):
    # Given: Redis had everything when the process ended, and PostgreSQL had not seen it.
    async with going_back(shop):
        told = seqs(await apis[0].buy(1, 2))
        await apis[0].witness.sign_off()
    # When and then
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    recovered = await shop.recover()
    assert (recovered.filled, recovered.voided) == (2, [])
    assert [answer.value for answer in await apis[1].buy(1, 2)] == told


async def test_handed_in_orders_stay_valid_without_a_loss(shop: Shop, apis: list[Api]):
    await apis[0].buy(1, 2)
    await apis[0].witness.sign_off()
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    assert (await finish(shop)).clean
    async with shop.pool.acquire() as connection:
        assert [each.settled for each in await claims.settle(connection)] == ["stands"] * 2


async def test_stopping_process_hands_in_without_redis(shop: Shop, apis: list[Api]):
    async with going_back(shop):
        told = seqs(await apis[0].buy(1, 2, 3))
        away = open_redis("unix:///nowhere/redis.sock")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(apis[0].witness, "_redis", away)
            await apis[0].witness.sign_off()
        await away.aclose()
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    assert (await shop.recover()).filled == 3
    assert [answer.value for answer in await apis[1].buy(1, 2, 3)] == told


async def test_last_report_stays_if_postgres_is_away(
    shop: Shop, apis: list[Api], capsys: pytest.CaptureFixture[str]
):
    # Given: a stopped process could not hand in its orders; its last report is in Redis.
    async with going_back(shop):
        told = seqs(await apis[0].buy(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis[0].witness, "_pool", _Away())
        await apis[0].witness.sign_off()
    assert "report.kept_back" in capsys.readouterr().out
    # When and then: Redis is not trusted, although no process is left to report.
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == [CAMPAIGN]
    assert (await shop.recover()).voided == [(told[0], told[-1])]


async def test_process_ends_although_postgres_is_silent(shop: Shop, apis: list[Api]):
    async def silence(*_: object) -> None:
        await asyncio.sleep(60)

    await apis[0].buy(1)
    began, ended_pools = time.monotonic(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "hand_in", silence)
        patch.setattr(apis[0].witness, "_pool", _Ended(shop.pool, ended_pools))
        patch.setattr(witness, "HAND_IN_ALL_S", 0.2)
        await apis[0].witness.sign_off()
    assert time.monotonic() - began < 3
    assert ended_pools == ["terminated"]


class _Ended:
    """A pool that records its termination and works on."""

    def __init__(self, pool: Any, noted: list[str]) -> None:
        self._pool, self._noted = pool, noted

    def acquire(self) -> Any:
        return self._pool.acquire()

    def terminate(self) -> None:
        self._noted.append("terminated")
