"""More is asked than can be done: what is sold meanwhile, and what the others are told."""

import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from own_api import OwnApi, own_api
from service import Client, Service

from loadtest.client import Client as LoadClient
from loadtest.rush import arrivals
from loadtest.rush.loop import OpenLoop
from loadtest.rush.tally import SOLD, Bounds, Tally

BATCH, LATE_MS, WAIT_MS, DEADLINE_S = 8, 20, 300, 2.0
SECONDS = 2.0
SETTLED_S = 0.5


@pytest.fixture
async def api(service: Service, tmp_path: Path) -> AsyncIterator[OwnApi]:
    """One whose capacity is small, because Redis answers late and a call holds few."""
    settings = {
        "SALE_BATCH_MAX": str(BATCH),
        "SALE_WAIT_MAX_MS": str(WAIT_MS),
        "SALE_PURCHASE_DEADLINE_MS": str(int(DEADLINE_S * 1_000)),
    }
    async with own_api(service, tmp_path, redis_late_ms=LATE_MS, **settings) as api:
        yield api


async def _closed_loop(api: OwnApi, campaign: str, count: int) -> float:
    """Sell in a closed loop, never more under way than the queue holds; give how many a second."""
    raws = api.purchases(campaign, count)
    async with LoadClient(api.address, 4 * BATCH) as client:
        began = time.monotonic()
        done = await client.run([(raw, None) for raw in raws], lambda *_: None)
        assert done.statuses == {201: count}
        return count / (time.monotonic() - began)


async def _open_loop(api: OwnApi, campaign: str, rate: float) -> Tally:
    offsets = arrivals.make("poisson", rate, SECONDS, seed=1)
    raws = api.purchases(campaign, len(offsets))
    bounds = Bounds(connections=1_000, warm=200, warm_s=0.5, retries=0, give_up_s=5)
    loop = OpenLoop(api.address, offsets, raws.__getitem__, lambda *_: None, bounds)
    return await loop.run(time.monotonic() + 0.6)


@pytest.mark.load
async def test_given_five_times_the_capacity_then_as_much_is_sold_and_all_others_are_told_to_wait(
    service: Service, client: Client, api: OwnApi
) -> None:
    campaign = await client.campaign(tickets=20_000)
    capacity = await _closed_loop(api, campaign, 250)
    tally = await _open_loop(api, campaign, 5 * capacity)
    outcomes = Counter(tally.codes[each] for each in tally.outcome)
    assert set(outcomes) == {SOLD, "overloaded"}, outcomes
    sold = [
        (done_at, done_at - sent_at)
        for done_at, sent_at, outcome in zip(
            tally.done_at, tally.sent_at, tally.outcome, strict=True
        )
        if tally.codes[outcome] == SOLD
    ]
    in_time = sum(SETTLED_S <= done_at < SECONDS for done_at, _ in sold)
    assert in_time / (SECONDS - SETTLED_S) > 0.6 * capacity
    assert sorted(took_s for _, took_s in sold)[int(len(sold) * 0.99)] < DEADLINE_S
    told = tally.told_to_wait
    assert told.total() == outcomes["overloaded"] > in_time
    assert min(told) >= 1
    assert max(told) <= 20
    assert len(told) >= 4
    assert max(told.values()) < 0.5 * told.total()
    assert (await client.remaining(campaign)) == [20_000 - 250 - outcomes[SOLD]]
