"""Drafts, closed and deleted campaigns cost a job one command a turn, and are seen to change."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from shop import Shop
from stock_maker import CAMPAIGN, Stock, campaign, open_stock
from waiting import until_equal

from sale.jobs.writer_source import LedgerSource
from sale.stock import dormant
from sale.stock.dormant import Dormant
from sale.stock.head import WRITER, Head
from sale.stock.keys import campaign_keys

IDS = ["draft", "closed", "open"]
READ_ALL_S = 60.0


@pytest.fixture
async def stocks(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> dict[str, Stock]:
    """A draft, a closed campaign and an open one; dormant ones are not read again by time."""
    monkeypatch.setattr(dormant, "READ_ALL_S", READ_ALL_S)
    draft = Stock(redis, "draft")
    await draft.create(campaign(5, campaign_id="draft"))
    closed = await open_stock(redis, 5, campaign_id="closed")
    await closed.step("close")
    return {
        "draft": draft,
        "closed": closed,
        "open": await open_stock(redis, 5, campaign_id="open"),
    }


async def seqs(source: LedgerSource) -> list[int | None]:
    found = (await source.read_heads(IDS, WRITER)).heads
    assert all(isinstance(head, Head) for head in found)
    return [head.seq for head in found if isinstance(head, Head)]


async def commands(redis: Redis, name: str) -> int:
    told: dict[str, Any] = await redis.info("commandstats")
    return int(told.get(f"cmdstat_{name}", {"calls": 0})["calls"])


async def test_dormant_heads_are_read_once(redis: Redis, stocks: dict[str, Stock]) -> None:
    source = LedgerSource(redis)
    first = await seqs(source)
    heads, looks = await commands(redis, "hmget"), await commands(redis, "xread")
    for _ in range(3):
        assert await seqs(source) == first
    assert await commands(redis, "hmget") - heads == 3  # the open campaign, each time
    assert await commands(redis, "xread") - looks == 3


async def test_event_makes_a_dormant_campaign_due(redis: Redis, stocks: dict[str, Stock]) -> None:
    source = LedgerSource(redis)
    before = await seqs(source)
    reopened = await stocks["closed"].step("reopen")
    assert await seqs(source) == [before[0], reopened.seq, before[2]]
    assert reopened.seq > (before[1] or 0)


async def test_all_heads_are_read_after_some_seconds(
    redis: Redis, stocks: dict[str, Stock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dormant, "READ_ALL_S", 0.1)
    source = LedgerSource(redis)
    await seqs(source)
    await redis.hset(campaign_keys("draft").head, "seq", 77)  # damage leaves no event
    await asyncio.sleep(0.15)
    assert (await seqs(source))[0] == 77


async def test_stream_of_another_type_makes_all_due(redis: Redis, stocks: dict[str, Stock]) -> None:
    found = Dormant[str](redis)
    assert await found.due(IDS) == IDS
    found.keep("draft", 1, "kept")
    assert await found.due(IDS) == ["closed", "open"]
    assert found.kept("draft") == "kept"
    await redis.set(campaign_keys("draft").stream, "no stream")
    assert await found.due(IDS) == IDS


async def test_step_on_a_dormant_campaign_reaches_postgres_soon(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dormant, "READ_ALL_S", READ_ALL_S)
    await shop.create(campaign(5))
    await shop.applied()
    await asyncio.sleep(0.3)  # the writer has read the draft's head several times

    async def applied() -> object:
        return await shop.pool.fetchval(
            "SELECT applied FROM campaign WHERE campaign_id = $1", CAMPAIGN
        )

    reply = await shop.stock.step("open")
    await until_equal(applied, reply.seq, within_s=0.5)
