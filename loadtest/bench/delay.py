"""A store that is far away: forwards a unix socket, and holds every answer back for a moment.

``python -m loadtest.bench.delay LISTEN TARGET MILLISECONDS``. A process of its own, so that the
load's own business does not make the store slower still.
"""

import asyncio
import sys

import uvloop

CHUNK = 1 << 16


async def relay(listen: str, target: str, delay_s: float) -> None:
    """Forward until it is ended."""
    loop = asyncio.get_running_loop()

    async def serve(near: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            far, store = await asyncio.open_unix_connection(target)
        except OSError:
            client.transport.abort()
            return

        async def ask() -> None:
            while data := await near.read(CHUNK):
                store.write(data)
            store.close()

        asking = loop.create_task(ask())
        while data := await far.read(CHUNK):
            loop.call_later(delay_s, client.write, data)
        loop.call_later(delay_s, client.close)
        await asking

    server = await asyncio.start_unix_server(serve, listen)
    await server.serve_forever()


def main() -> None:
    """Command line."""
    listen, target, milliseconds = sys.argv[1:]
    uvloop.run(relay(listen, target, float(milliseconds) / 1e3))


if __name__ == "__main__":
    main()
