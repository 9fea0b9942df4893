"""The fast path answers a campaign and its remaining tickets from memory."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import msgspec
import pytest
from fast_path_client import Answer
from fast_path_fixtures import campaigns, revoked, world_fixture  # noqa: F401 - fixtures
from fast_path_rig import Side, World
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisAway
from waiting import until

from sale.api.fast_routes import FAST
from sale.api.routes import ROUTES
from sale.domain.campaign import State
from sale.http.overload import TURN, Overload
from sale.stock import catalogue
from sale.stock.catalogue import FRESH_S, REFRESH_S, CampaignNow, Catalogue, read_campaign

TAILS = ("", "/availability")


def get(world: World, campaign: str, tail: str, *lines: bytes) -> bytes:
    start = f"GET /api/v1/campaigns/{world.campaigns[campaign]}{tail} HTTP/1.1".encode()
    return b"\r\n".join([start, b"Host: sale", *lines, b"", b""])


async def reload(side: Side, *requests: bytes) -> tuple[list[Answer], bool]:
    """The answers on one connection, and whether aiohttp served any of them."""
    async with side.wire() as wire:
        for number, request in enumerate(requests, 1):
            await wire.send(request)
            told = await wire.answers(number)
        return told.answers, side.name == "aiohttp" or side.connection._delegation is not None


@pytest.mark.parametrize("tail", TAILS)
def test_reload_is_answered_without_aiohttp_and_alike(world: World, tail: str) -> None:
    asked = get(world, "open", tail)

    async def judge() -> None:
        async with world.both() as (ours, theirs):
            seen = await read_campaign(ours.engine.stores.redis, world.campaigns["open"])
            with mock.patch.object(catalogue, "read_campaign", mock.AsyncMock(return_value=seen)):
                for side in (ours, theirs):
                    await side.engine.catalogue.read(world.campaigns["open"])
                mine, delegated = await reload(ours, asked, asked)
                other, _ = await reload(theirs, asked, asked)
            assert not delegated
            for one, two in zip(mine, other, strict=True):
                assert one.told == two.told
                assert one.raw.partition(b"\r\n\r\n")[2] == two.raw.partition(b"\r\n\r\n")[2]

    world.run(judge())


def test_known_tag_gets_304_until_the_campaign_changes(world: World) -> None:
    async def judge() -> None:
        async with world.both() as sides:
            for side in sides:
                campaign_id = world.campaigns["open"]
                (first,), _ = await reload(side, get(world, "open", ""))
                tag = dict(first.headers)["ETag"].encode()
                for known in (tag, b"W/" + tag, b'"a", ' + tag):
                    asked = get(world, "open", "", b"If-None-Match: " + known)
                    (same,), _ = await reload(side, asked)
                    assert same.status == "HTTP/1.1 304 Not Modified", side.name
                    assert same.raw.endswith(b"\r\n\r\n")
                    assert dict(same.headers)["ETag"] == tag.decode()
                kept = side.engine.catalogue._now
                read_at, now = kept[campaign_id]
                kept[campaign_id] = (read_at, changed(now, state=State.PAUSED))
                (other,), _ = await reload(side, asked)
                assert (other.status, other.body["state"]) == ("HTTP/1.1 200 OK", "paused")
                del kept[campaign_id]

    world.run(judge())


def changed(now: CampaignNow | None, **changes: Any) -> CampaignNow:
    assert now is not None
    return msgspec.structs.replace(now, **changes)


@pytest.mark.parametrize("tail", TAILS)
def test_reload_past_the_turn_is_refused_and_counted_alike(world: World, tail: str) -> None:
    async def judge() -> list[Any]:
        async with world.both() as sides:
            told = []
            for side in sides:
                await reload(side, get(world, "open", tail))
                with mock.patch.object(Overload, "turn_is_over", return_value=TURN):
                    (refused,), _ = await reload(side, get(world, "open", tail))
                headers = [header for header in refused.headers if header[0] != "Retry-After"]
                outcomes = dict(side.engine.metrics.outcomes)
                told.append((refused.status, headers, refused.body, outcomes))
                assert side.engine.overload.shed[TURN] == 1
            return told

    ours, theirs = world.run(judge())

    assert ours == theirs
    assert ours[2]["code"] == "overloaded"


def test_fault_in_wording_is_answered_by_aiohttp(world: World) -> None:
    async def judge() -> None:
        async with world.side(fast_path=True) as side, side.wire() as wire:
            seen = await side.engine.catalogue.read(world.campaigns["open"])
            now = changed(seen, tickets=None)
            with mock.patch.object(catalogue, "read_campaign", mock.AsyncMock(return_value=now)):
                await side.engine.catalogue.read(now.campaign.id)
                await wire.send(get(world, "open", ""))
                told = await wire.answers(1)
            assert (told.statuses, told.answers[0].body["code"]) == ([503], "unavailable")

    world.run(judge())


def test_draining_process_says_that_its_answer_is_the_last(world: World) -> None:
    async def judge() -> None:
        async with world.side(fast_path=True) as side, side.wire() as wire:
            await wire.send(get(world, "open", ""))
            await wire.answers(1)
            side.fast_path.drain()
            await wire.send(get(world, "open", ""))
            told = await wire.until_closed()
            assert dict(told.answers[1].headers)["Connection"] == "close"

    world.run(judge())


def test_fast_routes_are_entries_of_the_table_of_routes() -> None:
    assert FAST.keys() <= {route.handler for route in ROUTES}


# The catalogue's memory.


@pytest.fixture
async def memory(redis_url: str) -> AsyncIterator[Catalogue]:
    redis = Redis.from_url(redis_url)
    kept = Catalogue(redis)
    yield kept
    await kept.close()
    await redis.aclose()


def aged(age_s: float, now: CampaignNow) -> tuple[float, CampaignNow]:
    return time.monotonic() - age_s, now


async def test_memory_is_read_again_before_it_is_too_old(memory: Catalogue) -> None:
    now = mock.Mock(visible=True)
    read = mock.AsyncMock(return_value=None)
    with mock.patch.object(catalogue, "read_campaign", read):
        assert memory.fresh("films") is None

        memory._now["films"] = aged(REFRESH_S / 2, now)
        assert memory.fresh("films") is now
        assert not memory._reading

        memory._now["films"] = aged((REFRESH_S + FRESH_S) / 2, now)
        assert [memory.fresh("films") for _ in range(3)] == [now] * 3
        await until(lambda: not memory._reading)
        assert read.await_count == 1

        for old in (aged(FRESH_S, now), aged(0, mock.Mock(visible=False))):
            memory._now["films"] = old
            assert memory.fresh("films") is None


async def test_failed_refresh_is_nobodys_error(memory: Catalogue) -> None:
    now = mock.Mock(visible=True)
    troubles: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, trouble: troubles.append(trouble))
    try:
        with mock.patch.object(catalogue, "read_campaign", mock.AsyncMock(side_effect=RedisAway)):
            memory._now["films"] = aged((REFRESH_S + FRESH_S) / 2, now)
            assert memory.fresh("films") is now
            await until(lambda: not memory._reading)
            memory._now.clear()
            with pytest.raises(RedisAway):
                await memory.now("films")
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert not troubles
