"""Faults that an attack on the fast path, the waiting line, the batcher and rehearsals found."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
from fast_path_fixtures import BOTH_LOOPS, campaigns, revoked, world_fixture  # noqa: F401 - fixtures
from fast_path_rig import Side, World
from redis.asyncio import Redis
from stock_maker import BEHIND_MAX, CAMPAIGN, NONCE, Stock, campaign, key, member
from test_rehearsal import CARDS, Play, play  # noqa: F401 - a fixture
from waiting import until

from sale.db import read
from sale.domain.campaign import State
from sale.domain.problem import Refused
from sale.http.overload import LATE, Overload
from sale.metrics import PurchaseMetrics
from sale.operators import campaigns as campaigns_module
from sale.operators import rehearsal
from sale.stock.answers import Answer, AwaitedPurchase, Purchase
from sale.stock.batcher import Batcher
from sale.stock.batchers import Batchers
from sale.stock.catalogue import read_campaign
from sale.stock.connection import open_redis
from sale.stock.keys import campaign_keys
from sale.stock.script_connection import ScriptConnection, pack
from sale.stock.scripts import Decision, Scripts

DEADLINE_S = 0.5


@contextmanager
def no_room() -> Iterator[None]:
    """Every purchase waits, and no waiter is called."""
    with ExitStack() as stack:
        for name, says in (("overloaded", LATE), ("has_room", False), ("may_refuse", False)):
            answer = mock.Mock(return_value=says)
            stack.enter_context(mock.patch.object(Overload, name, answer))
        yield


def test_last_waiter_that_leaves_makes_no_refusal(world: World) -> None:
    async def judge() -> None:
        async with world.side(fast_path=True) as side:
            with no_room():
                async with side.wire() as wire:
                    await wire.send(world.member().buy())
                    await until(lambda: len(side.fast_path.waiting_line) == 1)
                await until(lambda: not side.fast_path.connections)
            await until(lambda: not side.fast_path.waiting_line)
            by_aiohttp = world.member().buy("open", b'{"quantity":1}', b"Connection: close")
            assert (await side.ask(by_aiohttp)).statuses == [201]
            assert side.engine.overload.waiters == 0

    world.run(judge())


@BOTH_LOOPS
@pytest.mark.parametrize("chunked", [False, True])
def test_connection_survives_long_body_answered_early(world: World, chunked: bool) -> None:
    async def again(side: Side) -> list[int]:
        member, rest = world.member(), b" " * 200_000
        if chunked:
            asked = member.buy("open", b"", b"Transfer-Encoding: chunked", drop=["Content-Length"])
            rest = b"%x\r\n" % len(rest) + rest + b"\r\n0\r\n\r\n"
        else:
            asked = member.buy("open", rest)[: -len(rest)]
        async with side.wire() as wire:
            await wire.send(asked + rest[:40_000])
            await wire.answers(1)
            for at in range(40_000, len(rest), 20_000):
                await wire.send(rest[at : at + 20_000], b"")
            await wire.send(member.buy("sold-out"))
            return (await wire.answers(2)).statuses

    async def judge() -> None:
        async with world.both() as (fast_path, aiohttp):
            assert await again(fast_path) == await again(aiohttp) == [413, 409]

    world.run(judge())


def test_rate_limit_spares_stores_from_unknown_campaigns(world: World) -> None:
    async def judge() -> None:
        member = world.member()
        asked = mock.AsyncMock(side_effect=read.state)
        with mock.patch.object(read, "state", asked):
            async with world.side(fast_path=True, card_per_s=1, card_burst=5) as side:
                whole = b"".join(member.buy(f"none-{number}") for number in range(20))
                async with side.wire() as wire:
                    await wire.send(whole)
                    told = await wire.answers(20)
        assert told.statuses[:5] == [404] * 5
        assert told.statuses[7:] == [429] * 13
        assert 0 < asked.await_count <= 7

    world.run(judge())


async def test_script_connection_uses_redis_user_without_password(
    redis: Redis, redis_url: str
) -> None:
    await redis.execute_command("ACL", "SETUSER", "shop", "on", "nopass", "~*", "+@all")
    client = open_redis(redis_url.replace("unix://", "unix://shop@"))
    line = ScriptConnection.to(client)
    assert line is not None
    try:
        assert await line.call(pack("ACL", "WHOAMI")) == b"shop"
    finally:
        await line.close()
        await client.aclose()
        await redis.execute_command("ACL", "DELUSER", "shop")


async def _batcher(redis: Redis) -> tuple[Stock, Batchers, Batcher]:
    made, stock = campaign(5), Stock(redis)
    await stock.create(made)
    await stock.load_roster()
    await stock.step("open")
    batchers = Batchers(
        Scripts(redis, NONCE), "p1", PurchaseMetrics(), batch_max=256, queue_max=16,
        deadline_s=DEADLINE_S, behind_max=BEHIND_MAX,
    )  # fmt: skip
    return stock, batchers, batchers.of(made)


def _asked(number: int, ago_s: float) -> AwaitedPurchase:
    loop = asyncio.get_running_loop()
    purchase = AwaitedPurchase(member(number), "district", 0, 1, key(1), loop)
    purchase.asked_at -= ago_s
    return purchase


class _Counted(Purchase):
    """A purchase that counts its answers."""

    told = 0

    def settle(self, answer: Answer) -> None:
        self.told += 1


async def test_overdue_purchase_behind_a_fresh_one_is_not_bought(redis: Redis) -> None:
    stock, batchers, batcher = await _batcher(redis)
    fresh, overdue = _asked(1, 0.0), _asked(2, 2 * DEADLINE_S)
    assert batcher.submit(fresh)
    assert batcher.submit(overdue)
    answers = await asyncio.gather(fresh.answer, overdue.answer)
    assert [answer.decision for answer in answers] == [Decision.SOLD, None]
    assert await stock.left() == [4]
    await batchers.close()


async def test_slow_incarnation_check_past_deadline_buys_nothing(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, batchers, batcher = await _batcher(redis)
    look = batcher.check_acknowledged

    async def slow() -> bool:
        await asyncio.sleep(0.12)
        return await look()

    monkeypatch.setattr(batcher, "check_acknowledged", slow)
    late = _asked(1, DEADLINE_S - 0.06)
    assert batcher.submit(late)
    assert (await late.answer).decision is None
    assert await stock.left() == [5]
    await batchers.close()


async def test_failing_batcher_answers_each_purchase_once(redis: Redis) -> None:
    class Ours:
        calls = 0

        def __init__(self) -> None:
            self.redis = redis

        async def purchase(self, *_: object) -> list[int]:
            self.calls += 1
            await asyncio.sleep(0.1)
            raise OSError("lost") if self.calls == 1 else KeyError("a fault of ours")

    _, batchers, batcher = await _batcher(redis)
    older, newer = (_Counted(member(no), "district", 0, 1, key(1)) for no in (1, 2))
    older.asked_at -= DEADLINE_S - 0.06
    for each in (older, newer):
        assert batcher.submit(each)
    batcher._scripts = Ours()
    await until(lambda: batcher._task is None, 3)
    assert (older.told, newer.told) == (1, 1)
    await batchers.close()


async def test_reopened_rehearsal_can_be_purged_again(
    play: Play,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rehearsal, "APPLIED_WAIT_S", 0.3)
    monkeypatch.setattr(campaigns_module, "APPLIED_WAIT_S", 0.1)
    shop, made = play.shop, await play.begin()
    await play.buy(made, CARDS[:2])
    with monkeypatch.context() as dying:
        dying.setattr(rehearsal, "remove_rehearsal", mock.AsyncMock(side_effect=ConnectionError))
        with pytest.raises(ConnectionError):
            await play.purge(made.id)
    await shop.take("reopen", made.id, reason="by mistake")
    await play.purge(made.id)
    assert await play.rows(made.id) == {}
    assert await read_campaign(shop.redis, made.id) is None


async def test_real_campaign_called_a_rehearsal_by_redis_sells_on(
    play: Play,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rehearsal, "APPLIED_WAIT_S", 0.3)
    shop, head = play.shop, campaign_keys(CAMPAIGN).head
    config = json.loads(await shop.redis.hget(head, "config"))
    await shop.redis.hset(head, "config", json.dumps(config | {"rehearsal_of": "x"}))
    with pytest.raises(Refused):
        await play.purge(CAMPAIGN)
    now = await read_campaign(shop.redis, CAMPAIGN)
    assert now is not None
    assert now.state is State.OPEN
