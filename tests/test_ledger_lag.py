"""The writer stores the applied number in Redis: seldom, and only while it holds the lock."""

import asyncio

import pytest
from redis.exceptions import OutOfMemoryError
from shop import Shop
from stock_maker import CAMPAIGN, campaign
from structlog.testing import capture_logs
from waiting import until, until_equal

from sale.jobs.leadership import LOCK_TIMEOUT_S, Leadership
from sale.stock.keys import campaign_keys
from sale.stock.scripts import OperationReply, Scripts

HEAD = campaign_keys(CAMPAIGN).head
SOON_S = 2.0


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    await shop.create(campaign(1_000))
    await shop.step("open")
    return shop


async def stored(shop: Shop) -> list[bytes | None]:
    return list(await shop.redis.hmget(HEAD, ["applied", "behind_since"]))


async def test_head_in_redis_follows_the_applied_number(shop: Shop):
    async def up_to_date() -> bool:
        (seq,) = await shop.stock.head("seq")
        return await stored(shop) == [seq.encode(), b""]

    await until(up_to_date, SOON_S)
    for n in range(3):
        await shop.buy(n)
        await until(up_to_date, SOON_S)
    async with shop.pool.acquire() as conn, conn.transaction():
        await conn.execute("LOCK TABLE campaign IN ACCESS EXCLUSIVE MODE")
        await shop.buy(7)
        await asyncio.sleep(0.3)
        await shop.buy(8)
        *_, oldest, _ = await shop.redis.xrange(campaign_keys(CAMPAIGN).stream)
        assert await stored(shop) == [b"5", oldest[1][b"t"]]
    await until(up_to_date, SOON_S)


async def test_stale_head_is_corrected(shop: Shop):
    await until_equal(lambda: stored(shop), [b"2", b""], SOON_S)
    await shop.redis.hset(HEAD, mapping={"applied": "0", "behind_since": "1"})
    await until_equal(lambda: stored(shop), [b"2", b""], SOON_S)
    await shop.redis.hset(HEAD, mapping={"applied": "x", "behind_since": "y"})
    await until_equal(lambda: stored(shop), [b"2", b""], SOON_S)


async def test_head_is_updated_at_most_ten_times_a_second(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    told: list[int] = []

    async def counted(
        self: Scripts, campaign_id: str, applied: int, behind_since_ms: int | None
    ) -> OperationReply:
        told.append(applied)
        return await tell(self, campaign_id, applied, behind_since_ms)

    tell = Scripts.set_applied
    monkeypatch.setattr(Scripts, "set_applied", counted)
    loop = asyncio.get_running_loop()
    begun, n = loop.time(), 0
    while loop.time() < begun + 1.0:
        n += 1
        await shop.buy(n)
    await until_equal(lambda: stored(shop), [str(n + 2).encode(), b""], SOON_S)
    assert 2 <= len(told) <= 10 * (loop.time() - begun) + 1
    assert told == sorted(told)
    count = len(told)
    await asyncio.sleep(0.5)
    assert len(told) == count  # nothing changes, so nothing is stored


async def test_writer_goes_on_if_redis_refuses_the_update(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    async def refused(*_: object) -> None:
        raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")

    await until_equal(lambda: stored(shop), [b"2", b""], SOON_S)
    with capture_logs() as said, monkeypatch.context() as patched:
        patched.setattr(Scripts, "set_applied", refused)
        await shop.buy(1)
        await shop.applied()
        await asyncio.sleep(0.3)
        troubles = [entry for entry in said if entry["event"] == "ledger.applied_not_stored"]
        assert [entry["campaign"] for entry in troubles] == [CAMPAIGN]
        assert (await stored(shop))[0] == b"2"
    await until_equal(lambda: stored(shop), [b"3", b""], SOON_S)


async def test_writer_unsure_of_its_lock_updates_no_head(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    async def still(*_: object) -> None:
        await asyncio.sleep(60)

    await shop.stop_writer()
    monkeypatch.setattr(Leadership, "_beat", still)
    await shop.start_writer()
    await until_equal(lambda: stored(shop), [b"2", b""], SOON_S)
    await asyncio.sleep(LOCK_TIMEOUT_S)
    await shop.buy(1)
    await shop.applied()
    await asyncio.sleep(0.3)
    assert (await stored(shop))[0] == b"2"
