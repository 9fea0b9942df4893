"""Many campaigns are read in few calls, and a damaged one does not affect the others."""

from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from stock_maker import open_stock

from sale.stock import survey
from sale.stock.catalogue import Unreadable, campaign_ids, read_campaign, read_campaigns
from sale.stock.head import ROSTER, SNAPSHOT, TRUST, read_heads
from sale.stock.keys import CAMPAIGNS, campaign_keys
from sale.stock.survey import KEYS_A_CALL

COUNT = 2 * KEYS_A_CALL + 7
IDS = [f"c{number}" for number in range(COUNT)]


@pytest.fixture
async def heads(redis: Redis) -> Redis:
    """Make heads whose seq is their number; the 5th is missing, the 70th is no hash."""
    for number, campaign_id in enumerate(IDS):
        key = campaign_keys(campaign_id).head
        if number == 70:
            await redis.set(key, "damaged")
        elif number != 5:
            await redis.hset(key, mapping={"seq": number, "state": "open"})
    return redis


async def test_many_heads_are_read_in_order(heads: Redis) -> None:
    told = await read_heads(heads, IDS, SNAPSHOT)
    for number, each in enumerate(told):
        if number == 70:
            assert isinstance(each, ResponseError)
            assert "WRONGTYPE" in str(each)
        elif number == 5:
            assert not isinstance(each, Exception)
            assert (each.seq, each.state, each.config) == (None, "", b"")
        else:
            assert not isinstance(each, Exception)
            assert (each.seq, each.state, each.config) == (number, "open", b"")
    assert len(told) == COUNT
    assert await read_heads(heads, [], TRUST) == []


async def test_head_with_a_damaged_number_is_an_error_of_its_own(heads: Redis) -> None:
    await heads.hset(campaign_keys(IDS[7]).head, "roster_rev", "many")
    told = await read_heads(heads, IDS[6:9], ROSTER)
    assert [isinstance(each, ValueError) for each in told] == [False, True, False]


async def test_survey_without_fields_gives_whole_hashes(heads: Redis) -> None:
    pipe = heads.pipeline(transaction=False)
    keys = [campaign_keys(each).head for each in IDS]
    survey.add_reads(pipe, keys)
    replies = await pipe.execute(raise_on_error=False)
    assert len(replies) == 3
    told = survey.replies_by_key(replies, COUNT)
    assert (told[5], sorted(told[6])) == ([], [b"6", b"open", b"seq", b"state"])
    assert isinstance(told[70], ResponseError)


def test_failed_survey_call_gives_each_key_its_error() -> None:
    lost = RedisConnectionError("lost")
    first = [[b"1"]] * KEYS_A_CALL
    assert survey.replies_by_key([first, lost], KEYS_A_CALL + 3) == [*first, lost, lost, lost]


async def test_stock_of_wrong_type_does_not_hide_other_campaigns(redis: Redis) -> None:
    for campaign_id in ("sound", "damaged"):
        await open_stock(redis, 5, campaign_id=campaign_id)
    await redis.set(campaign_keys("damaged").stock, "no hash")
    unreadable: list[Unreadable] = []
    found = await read_campaigns(redis, unreadable=unreadable)
    assert [now.campaign.id for now in found] == ["sound"]
    assert [each.campaign_id for each in unreadable] == ["damaged"]
    assert "WRONGTYPE" in unreadable[0].why


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", "{"),
        ("config", "{}"),
        ("state", "sleeping"),
        ("opens_at", "tomorrow"),
        ("seq", str(10**30)),
        ("epoch", "x"),
        ("clock", "x"),
    ],
)
async def test_unreadable_head_leaves_the_others_readable(
    redis: Redis, field: str, value: str
) -> None:
    for campaign_id in ("sound", "damaged"):
        await open_stock(redis, 5, campaign_id=campaign_id)
    await redis.hset(campaign_keys("damaged").head, field, value)
    unreadable: list[Unreadable] = []
    found = await read_campaigns(redis, unreadable=unreadable)
    assert [now.campaign.id for now in found] == ["sound"]
    assert [each.campaign_id for each in unreadable] == ["damaged"]
    with pytest.raises(Unreadable, match="recover it"):
        await read_campaign(redis, "damaged")


async def test_head_with_anothers_configuration_is_not_believed(redis: Redis) -> None:
    for campaign_id in ("sound", "damaged"):
        await open_stock(redis, 5, campaign_id=campaign_id)
    config: Any = await redis.hget(campaign_keys("sound").head, "config")
    await redis.hset(campaign_keys("damaged").head, "config", config)
    assert [now.campaign.id for now in await read_campaigns(redis)] == ["sound"]


async def test_members_that_are_no_ids_are_passed_over(redis: Redis) -> None:
    await open_stock(redis, 5, campaign_id="sound")
    await redis.sadd(CAMPAIGNS, b"\xff", "Not An ID", "")
    assert await campaign_ids(redis) == ["sound"]
