"""Hundreds of connections that only stand there: little memory, and nobody else feels them."""

import asyncio
import time
from pathlib import Path

from own_api import OwnApi, own_api
from service import Client, Service

from loadtest.client import Client as LoadClient

STANDING = 500
CROWD = 150
BYTES_MOST = 48 * 1024
"""Far above what they take (OPERATIONS.md), and below one buffer of 64 KiB for each."""


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
    raws, began = api.purchases(campaign, CROWD), time.monotonic()
    async with LoadClient(api.address, 50) as client:
        done = await client.run([(raw, None) for raw in raws], lambda *_: None)
    assert done.statuses == {201: CROWD}
    return time.monotonic() - began


async def test_given_hundreds_that_idle_or_stop_midway_then_they_cost_little_and_sales_go_on(
    service: Service, client: Client, tmp_path: Path
) -> None:
    campaign = await client.campaign(tickets=5_000)
    async with own_api(service, tmp_path) as api:
        alone_s = min([await _crowd_s(api, campaign) for _ in range(2)])
        before = api.rss
        raws = api.purchases(campaign, 2 * STANDING)
        idle = await _stand(api, raws[:STANDING], answered=True)
        looked = await _stand(
            api,
            [f"GET /api/v1/time HTTP/1.1\r\nHost: {api.address}\r\n\r\n".encode()] * STANDING,
            answered=True,
        )
        halves = await _stand(api, [raw[:-9] for raw in raws[STANDING:]], answered=False)
        beside_s = min([await _crowd_s(api, campaign) for _ in range(2)])
        grown = api.rss - before
        assert all(each.told.startswith(b"HTTP/1.1 201 ") for each in idle)
        assert all(each.told.startswith(b"HTTP/1.1 200 ") for each in looked)
        assert not any(each.told for each in halves)
        assert grown / (3 * STANDING) < BYTES_MOST
        assert beside_s < 5 * alone_s
        for each in idle[:5]:  # still good
            each.came.clear()
            each.transport.write(api.purchases(campaign, 1)[0])
            await asyncio.wait_for(each.came.wait(), 10)
            assert each.told.count(b"HTTP/1.1 201 ") == 2
        for each in (*idle, *looked, *halves):
            each.transport.abort()
