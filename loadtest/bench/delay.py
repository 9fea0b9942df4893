"""A store that is far away: forwards a unix socket, and holds every answer back for a moment.

``python -m loadtest.bench.delay LISTEN TARGET MILLISECONDS``. A process of its own, so that the
load's own business does not make the store slower still.
"""

import asyncio
import sys
from typing import cast

import uvloop


class _Near(asyncio.Protocol):
    """The client's side of a connection."""

    def __init__(self, target: str, delay_s: float) -> None:
        self._target = target
        self._delay_s = delay_s
        self._far: asyncio.Transport | None = None
        self._kept: list[bytes] = []
        self._opening: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._opening = asyncio.get_running_loop().create_task(self._open())

    def data_received(self, data: bytes) -> None:
        if self._far is None:
            self._kept.append(data)
        else:
            self._far.write(data)

    def connection_lost(self, _: Exception | None) -> None:
        if self._far is not None:
            self._far.close()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._far, _ = await loop.create_unix_connection(
                lambda: _Far(self.transport, self._delay_s), self._target
            )
        except OSError:
            self.transport.abort()
            return
        for data in self._kept:
            self._far.write(data)


class _Far(asyncio.Protocol):
    """The store's side."""

    def __init__(self, near: asyncio.Transport, delay_s: float) -> None:
        self._near = near
        self._delay_s = delay_s

    def data_received(self, data: bytes) -> None:
        asyncio.get_running_loop().call_later(self._delay_s, self._near.write, data)

    def connection_lost(self, _: Exception | None) -> None:
        self._near.close()


async def _relay(listen: str, target: str, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: _Near(target, delay_s), listen)
    await server.serve_forever()


def main() -> None:
    """Forward until it is ended."""
    listen, target, milliseconds = sys.argv[1:]
    uvloop.run(_relay(listen, target, float(milliseconds) / 1e3))


if __name__ == "__main__":
    main()
