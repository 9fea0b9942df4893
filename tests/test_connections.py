"""Hundreds of connections that only stand there: little memory, and nobody else feels them."""

import asyncio
import contextlib
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from own_api import OwnApi, own_api
from service import Client, Service
from test_loadtest import run_program

from loadtest.bench.idle import BOUGHT, LOOKED, OPENED, Idle, shares
from loadtest.generator import closed
from loadtest.tables import CLEAN

STANDING = 500
CROWD = 150
WINDOWS = 5
LITTLE, MORE = 6 * 1024, 16 * 1024
"""Bytes a connection of the fast path's, and behind a request of aiohttp's: some times what they
take (OPERATIONS.md), because a few hundred are a few pages."""


class _Standing(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.told = b""
        self.came = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.told += data
        self.came.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.came.set()


async def _stand(api: OwnApi, raws: list[bytes], *, answered: bool) -> list[_Standing]:
    """Open a connection for each request, and wait for its answer where one is due."""
    loop, (host, _, port) = asyncio.get_running_loop(), api.address.rpartition(":")
    standing = []
    for raw in raws:
        _, each = await loop.create_connection(_Standing, host, int(port))
        each.transport.write(raw)
        standing.append(each)
    if answered:
        async with asyncio.timeout(20):
            for each in standing:
                await each.came.wait()
    return standing


async def _crowd_s(api: OwnApi, campaign: str) -> float:
    """How long a crowd of purchases takes."""
    done = await closed(api.address, api.purchases(campaign, CROWD), CROWD, 50)
    assert done.outcomes() == {"sold": CROWD}
    return done.duration_s


@contextlib.asynccontextmanager
async def _standing(
    api: OwnApi, raws: list[bytes], *, bytes_most: int, answered: bool = True
) -> AsyncIterator[list[_Standing]]:
    """Keep a connection for each request open while the block runs; they take little memory."""
    before = api.rss
    standing = await _stand(api, raws, answered=answered)
    try:
        assert (api.rss - before) / len(raws) < bytes_most
        yield standing
    finally:
        for each in standing:
            each.transport.abort()


@pytest.mark.load
async def test_idle_and_half_sent_requests_do_not_stop_sales(
    service: Service, client: Client, tmp_path: Path
) -> None:
    campaign = await client.campaign(tickets=10_000)
    look = f"GET /api/v1/time HTTP/1.1\r\nHost: {service.url[7:]}\r\n\r\n".encode()
    async with contextlib.AsyncExitStack() as stack:
        apis = []
        for name in ("alone", "beside"):
            (tmp_path / name).mkdir()
            apis.append(await stack.enter_async_context(own_api(service, tmp_path / name)))
            await _crowd_s(apis[-1], campaign)
        api = apis[-1]
        raws = api.purchases(campaign, 2 * STANDING)
        stand = stack.enter_async_context
        idle = await stand(_standing(api, raws[:STANDING], bytes_most=LITTLE))
        looked = await stand(_standing(api, [look] * STANDING, bytes_most=MORE))
        cut = [raw[:-9] for raw in raws[STANDING:]]
        halves = await stand(_standing(api, cut, bytes_most=LITTLE, answered=False))
        took_s = [[await _crowd_s(each, campaign) for each in apis] for _ in range(WINDOWS)]
        alone_s, beside_s = map(statistics.median, zip(*took_s, strict=True))
        assert all(each.told.startswith(b"HTTP/1.1 201 ") for each in idle)
        assert all(each.told.startswith(b"HTTP/1.1 200 ") for each in looked)
        assert not any(each.told for each in halves)
        assert not any(each.transport.is_closing() for each in (*idle, *looked, *halves))
        assert beside_s < 2 * alone_s
        for each in idle[:5]:  # still good
            each.came.clear()
            each.transport.write(api.purchases(campaign, 1)[0])
            await asyncio.wait_for(each.came.wait(), 10)
            assert each.told.count(b"HTTP/1.1 201 ") == 2


@pytest.mark.load
async def test_probe_reports_each_kind_of_idle_connection() -> None:
    words = ("loadtest", "overload", "--idle", "101", "--seconds", "1", "--json")
    status, out = await run_program(*words, within_s=60)
    assert status == 0, out
    told = msgspec.json.decode(out.splitlines()[-1], type=Idle)
    assert {kind.kind: kind.connections for kind in told.kinds} == shares(101)
    assert shares(101) == {BOUGHT: 45, LOOKED: 46, OPENED: 10}
    assert [(window.when, window.idle) for window in told.windows] == [
        ("before", 0), ("beside", 101), ("after", 0),
    ]  # fmt: skip
    assert all(window.p99_ms >= window.p50_ms > 0 for window in told.windows)
    assert told.compared - 45 == pytest.approx(3 * told.rate, rel=0.15)
    assert told.audit == CLEAN
