"""The peer that has no framework: httptools on uvloop, and a constant 201.

It parses each request and writes the same answer, all that one read completed in one write. No
routing, no header or body is looked at: it is about the most that Python can answer on one core.
"""

import asyncio
from email.utils import formatdate
from typing import cast

import httptools
import uvloop

from loadtest.peers import constant_body, options


def constant_answer(body_bytes: int) -> bytes:
    """Build the answer, with the headers that the constant peer on aiohttp sends too."""
    body = constant_body(body_bytes)
    head = (
        "HTTP/1.1 201 Created\r\nLocation: /api/v1/orders/five-yuan-films.1f4.0a1b2c\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Date: {formatdate(usegmt=True)}\r\nServer: bare\r\n\r\n"
    )
    return head.encode() + body


class Answering(asyncio.Protocol):
    """One connection: counts complete requests, and answers them after each read."""

    transport: asyncio.WriteTransport

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.complete = 0
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # uvloop's transports have the methods of the class, but do not derive from it.
        self.transport = cast("asyncio.WriteTransport", transport)

    def on_message_complete(self) -> None:
        """httptools has seen a request's end."""
        self.complete += 1

    def data_received(self, data: bytes) -> None:
        """Parse, and answer what became complete; a malformed request ends the connection."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()
            return
        if self.complete:
            self.transport.write(self.answer * self.complete)
            self.complete = 0


async def serve(port: int, answer: bytes) -> None:
    """Serve until the process ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(answer), "127.0.0.1", port, backlog=1_024)
    await server.serve_forever()


def main() -> None:
    """Serve until SIGTERM."""
    told = options(__doc__)
    uvloop.run(serve(told.port, constant_answer(told.body_bytes)))


if __name__ == "__main__":
    main()
