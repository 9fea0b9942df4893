"""Overload: how much is sold meanwhile, and how the others are answered."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from own_api import OwnApi, own_api
from service import Client, Service

from loadtest.generator import Generator, closed
from loadtest.record import SOLD
from loadtest.rush import arrivals
from loadtest.tally import Bounds, Tally

BATCH, LATE_MS, WAIT_MS, DEADLINE_S = 8, 20, 300, 2.0
SECONDS = 2.0
SETTLED_S = 0.5
FAR = Bounds(connections=1_000, warm=200, warm_s=0.5, retries=0, give_up_s=5)
NEAR = Bounds(connections=6_000, warm=3_000, warm_s=1.5, retries=0, give_up_s=5)


@pytest.fixture(params=[True, False], ids=["fast path", "aiohttp"])
async def api(
    request: pytest.FixtureRequest, service: Service, tmp_path: Path
) -> AsyncIterator[OwnApi]:
    """An API process of small capacity: Redis answers late, and a call holds few purchases."""
    settings = {
        "SALE_BATCH_MAX": str(BATCH),
        "SALE_WAIT_MAX_MS": str(WAIT_MS),
        "SALE_PURCHASE_DEADLINE_MS": str(int(DEADLINE_S * 1_000)),
        "SALE_FAST_PATH": str(request.param).lower(),
    }
    async with own_api(service, tmp_path, redis_late_ms=LATE_MS, **settings) as api:
        await api.ready()
        yield api


async def _closed_loop(api: OwnApi, campaign: str, count: int, connections: int) -> float:
    """Sell in a closed loop, never more under way than the queue holds; give how many a second."""
    raws = api.purchases(campaign, count)
    done = await closed(api.address, raws, count, connections)
    assert done.outcomes() == {SOLD: count}
    return count / done.duration_s


async def _open_loop(api: OwnApi, campaign: str, rate: float, bounds: Bounds) -> Tally:
    offsets = arrivals.make("poisson", rate, SECONDS, seed=1)
    raws = api.purchases(campaign, len(offsets))
    loop = Generator(api.address, offsets, raws.__getitem__, lambda *_: None, bounds)
    return await loop.run(time.monotonic() + bounds.warm_s + 0.1)


def _sold(tally: Tally) -> list[tuple[float, float]]:
    """When each was sold, and how long that took since it was sent; seconds."""
    rows = zip(tally.done_at, tally.sent_at, tally.outcome, strict=True)
    return [(done, done - sent) for done, sent, each in rows if tally.codes[each] == SOLD]


def _rate(tally: Tally) -> float:
    """Sold a second, from when the load has settled to the end of the offer."""
    in_time = sum(SETTLED_S <= done_at < SECONDS for done_at, _ in _sold(tally))
    return in_time / (SECONDS - SETTLED_S)


@pytest.mark.load
@pytest.mark.parametrize("times", [2, 5])
async def test_overload_sells_at_capacity_and_delays_the_rest(
    service: Service, client: Client, api: OwnApi, times: int
) -> None:
    campaign = await client.campaign(tickets=20_000)
    capacity = await _closed_loop(api, campaign, 250, 4 * BATCH)
    windows: list[Tally] = []
    # Once more where it was too few: others use these cores too.
    while len(windows) < 2 and max(map(_rate, windows), default=0) < 0.8 * capacity:
        windows.append(await _open_loop(api, campaign, times * capacity, FAR))
    assert max(map(_rate, windows)) > 0.8 * capacity
    sold = 250
    for tally in windows:
        outcomes = tally.outcomes()
        assert set(outcomes) == {SOLD, "overloaded"}, outcomes
        took_s = sorted(took_s for _, took_s in _sold(tally))
        assert took_s[int(len(took_s) * 0.99)] < DEADLINE_S
        told = tally.told_to_wait
        assert told.total() == outcomes["overloaded"]
        assert times == 2 or outcomes["overloaded"] > outcomes[SOLD]
        assert min(told) >= 1
        assert max(told) <= 20
        assert len(told) >= 4
        assert max(told.values()) < 0.5 * told.total()
        sold += outcomes[SOLD]
    assert (await client.remaining(campaign)) == [20_000 - sold]


@pytest.mark.load
async def test_aiohttp_refusals_leave_time_for_sales(
    service: Service, client: Client, tmp_path: Path
) -> None:
    """Here reading alone takes half of the CPU; with all refused at once a fifth was sold."""
    campaign = await client.campaign(tickets=200_000)
    settings = {"SALE_WAIT_MAX_MS": "250", "SALE_FAST_PATH": "false"}
    async with own_api(service, tmp_path, **settings) as api:
        await api.ready()
        await _closed_loop(api, campaign, 1_000, 128)
        capacity, shares = await _closed_loop(api, campaign, 3_000, 128), [0.0]
        while len(shares) < 4 and shares[-1] < 1 / 3:
            shares.append(_rate(await _open_loop(api, campaign, 2 * capacity, NEAR)) / capacity)
        assert max(shares) > 1 / 3, shares
