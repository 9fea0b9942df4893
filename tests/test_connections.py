"""Hundreds of idle connections take little memory and do not slow others down."""

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

IDLE = 500
CROWD = 150
WINDOWS = 5
LITTLE, MORE = 6 * 1024, 16 * 1024
"""Bytes per connection of the fast path, and after a request of aiohttp. Both are several times the
figures of OPERATIONS.md, because a few hundred connections take only a few pages."""


class _Idle(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.received = b""
        self.came = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.came.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.came.set()


async def _open(api: OwnApi, raws: list[bytes], *, answered: bool) -> list[_Idle]:
    """Open a connection for each request; wait for the answers if ``answered``."""
    loop, (host, _, port) = asyncio.get_running_loop(), api.address.rpartition(":")
    opened = []
    for raw in raws:
        _, each = await loop.create_connection(_Idle, host, int(port))
        each.transport.write(raw)
        opened.append(each)
    if answered:
        async with asyncio.timeout(20):
            for each in opened:
                await each.came.wait()
    return opened


async def _crowd_s(api: OwnApi, campaign: str) -> float:
    """Seconds that CROWD purchases take."""
    done = await closed(api.address, api.purchases(campaign, CROWD), CROWD, 50)
    assert done.outcomes() == {"sold": CROWD}
    return done.duration_s


@contextlib.asynccontextmanager
async def _idle(
    api: OwnApi, raws: list[bytes], *, bytes_most: int, answered: bool = True
) -> AsyncIterator[list[_Idle]]:
    """Keep a connection for each request open while the block runs; they take little memory."""
    before = api.rss
    opened = await _open(api, raws, answered=answered)
    try:
        assert (api.rss - before) / len(raws) < bytes_most
        yield opened
    finally:
        for each in opened:
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
            await apis[-1].ready()
            await _crowd_s(apis[-1], campaign)
        api = apis[-1]
        raws = api.purchases(campaign, 2 * IDLE)
        open_all = stack.enter_async_context
        idle = await open_all(_idle(api, raws[:IDLE], bytes_most=LITTLE))
        looked = await open_all(_idle(api, [look] * IDLE, bytes_most=MORE))
        cut = [raw[:-9] for raw in raws[IDLE:]]
        halves = await open_all(_idle(api, cut, bytes_most=LITTLE, answered=False))
        took_s = [[await _crowd_s(each, campaign) for each in apis] for _ in range(WINDOWS)]
        alone_s, beside_s = map(statistics.median, zip(*took_s, strict=True))
        assert all(each.received.startswith(b"HTTP/1.1 201 ") for each in idle)
        assert all(each.received.startswith(b"HTTP/1.1 200 ") for each in looked)
        assert not any(each.received for each in halves)
        assert not any(each.transport.is_closing() for each in (*idle, *looked, *halves))
        assert beside_s < 2 * alone_s
        for each in idle[:5]:  # they still work
            each.came.clear()
            each.transport.write(api.purchases(campaign, 1)[0])
            await asyncio.wait_for(each.came.wait(), 10)
            assert each.received.count(b"HTTP/1.1 201 ") == 2


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
