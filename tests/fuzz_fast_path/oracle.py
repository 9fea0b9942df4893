"""The requests that aiohttp reads from bytes."""

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import EMPTY_PAYLOAD

from sale.http.head_rules import fault_of_head


class Request(NamedTuple):
    """A request as a parser read it."""

    method: str
    path: str
    body: bytes
    key: str | None


class _Nowhere:
    """The methods of a connection that a parser calls."""

    transport = None
    _reading_paused = False

    def pause_reading(self) -> None:
        """Never needed: examples are small."""

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Never needed."""


def parsed(
    loop: asyncio.AbstractEventLoop, pieces: Iterator[bytes] | list[bytes]
) -> tuple[list[tuple[Any, Any]], bool]:
    """The messages that aiohttp's parser reads until it stops, and whether it refused to go on."""
    parser = HttpRequestParser(
        _Nowhere(), loop, 2**16, max_line_size=8_190, max_field_size=8_190, max_headers=128,
        auto_decompress=False,
    )  # fmt: skip
    found: list[tuple[Any, Any]] = []
    for piece in pieces:
        try:
            messages, upgraded, tail = parser.feed_data(piece)
            found += messages
            if upgraded:  # nobody takes it, so what follows are requests again
                parser.set_upgraded(False)
                found += parser.feed_data(tail)[0]
        except HttpProcessingError:
            return found, True
    return found, False


def oracle(loop: asyncio.AbstractEventLoop, data: bytes) -> tuple[list[Request], bool]:
    """The whole requests in ``data`` that are served, and whether it ends in one that is not."""
    found, refused = parsed(loop, [data[at : at + 1] for at in range(len(data))])
    requests = []
    for message, payload in found:
        if not payload.is_eof() or payload.exception() is not None:
            break
        body = b"" if payload is EMPTY_PAYLOAD else payload.read_nowait()
        if fault_of_head(message) is not None:
            return requests, True
        key = message.headers.get("Idempotency-Key")
        requests.append(Request(message.method, message.path, body, key))
    return requests, refused
