"""The modes of the fault rig's proxy."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import pytest
from proxy import Proxy


@pytest.fixture(autouse=True)
def mended() -> None:
    """Replace the rig's fixture, which these tests do not need."""


@pytest.fixture(params=["tcp", "unix"])
async def proxy(request: pytest.FixtureRequest, short_path: Path) -> AsyncIterator[Proxy]:
    """A proxy to an echo server."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    listen = "127.0.0.1:0" if request.param == "tcp" else f"unix:{short_path}/p"
    async with Proxy(listen, f"{host}:{port}") as proxy:
        yield proxy
    server.close()
    await server.wait_closed()


class Line:
    """A connection through the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    async def __aenter__(self) -> Self:
        address = self.proxy.listen
        if address.startswith("unix:"):
            made = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            made = await asyncio.open_connection(host, int(port))
        self.reader, self.writer = made
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def hear(self, within_s: float = 2.0) -> bytes:
        """The next bytes; b"" if the connection was closed, "nothing" if none came."""
        try:
            async with asyncio.timeout(within_s):
                return await self.reader.read(65_536)
        except TimeoutError:
            return b"(nothing)"
        except ConnectionError:
            return b""


async def test_proxy_forwards_and_counts(proxy: Proxy) -> None:
    async with Line(proxy) as line:
        line.say(b"hello")
        assert await line.hear() == b"hello"
        assert proxy.bytes == {"up": 5, "down": 5}
        assert (proxy.accepted, proxy.connections) == (1, 1)


async def test_proxy_forwards_large_data_unchanged(proxy: Proxy) -> None:
    sent, heard = bytes(range(256)) * 20_000, b""
    async with Line(proxy) as line:
        line.say(sent)
        while len(heard) < len(sent) and (data := await line.hear()):
            heard += data
    assert heard == sent


async def test_cut_closes_and_refuses_until_healed(proxy: Proxy) -> None:
    async with Line(proxy) as line:
        line.say(b"a")
        assert await line.hear() == b"a"
        proxy.cut()
        assert await line.hear() == b""
        with pytest.raises(OSError):  # noqa: PT011 - refused, or no such file
            await Line(proxy).__aenter__()
        proxy.heal()
        async with Line(proxy) as other:
            other.say(b"b")
            assert await other.hear() == b"b"


async def test_delay_keeps_the_order(proxy: Proxy) -> None:
    async with Line(proxy) as line:
        proxy.delay(1.0)
        started = time.monotonic()
        line.say(b"a")
        await asyncio.sleep(0.05)
        line.say(b"b")
        heard = await line.hear(5)  # its own limit is as long as both delays together
        assert time.monotonic() - started > 1.95  # both ways
        while len(heard) < 2:
            heard += await line.hear(5)
        assert heard == b"ab"
        assert time.monotonic() - started < 2.8  # in parallel: one after the other they took 3 s


async def test_halve_forwards_some_bytes_then_closes_once(proxy: Proxy) -> None:
    async with Line(proxy) as line:
        proxy.halve(3, "down")
        line.say(b"hello")
        assert await line.hear() == b"hel"
        assert await line.hear() == b""
    async with Line(proxy) as line:
        line.say(b"hello")
        assert await line.hear() == b"hello"


async def test_hold_stops_bytes_until_release(proxy: Proxy) -> None:
    async with Line(proxy) as line:
        proxy.hold("down")
        arrival = asyncio.create_task(proxy.wait_bytes("down", 5))
        await asyncio.sleep(0)
        line.say(b"hello")
        await arrival
        assert await line.hear(0.1) == b"(nothing)"
        proxy.release()
        assert await line.hear() == b"hello"


async def test_heal_closes_connections_that_lost_bytes(proxy: Proxy) -> None:
    async with Line(proxy) as line, Line(proxy) as other:
        proxy.swallow("up")
        line.say(b"hello")
        assert await line.hear(0.1) == b"(nothing)"
        proxy.heal()
        assert await line.hear() == b""
        other.say(b"b")
        assert await other.hear() == b"b"


async def test_trap_holds_only_the_answer_to_its_word(proxy: Proxy) -> None:
    async with Line(proxy) as line:
        proxy.trap(b"COMMIT", holding="down")
        line.say(b"BEGIN")
        assert await line.hear() == b"BEGIN"
        line.say(b"COMMIT")
        await asyncio.wait_for(proxy.sprung.wait(), 2)
        assert await line.hear(0.1) == b"(nothing)"
        proxy.release()
        assert await line.hear() == b"COMMIT"


async def test_close_during_an_accept_leaves_nothing_open(proxy: Proxy) -> None:
    made = asyncio.ensure_future(Line(proxy).__aenter__())
    while not proxy._tasks:
        proxy._accept()
        if not proxy._tasks:
            await asyncio.sleep(0)
    (serving,) = proxy._tasks
    await proxy.close()
    assert serving.cancelled()
    line = await made
    assert await line.hear() == b""
    line.writer.transport.abort()
