"""Renders a response as aiohttp would: status line, headers in aiohttp's order, body."""

import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

SERVER: Final = "sale"
"""Value of the header Server, which names neither the library nor the language."""

_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus
}


class _Clock:
    """The last headers of every response, which change once a second."""

    def __init__(self) -> None:
        self.second = 0
        self.tail = ""


_clock: Final = _Clock()


def rendered(status: int, body: bytes, headers: dict[str, str], *, last: bool = False) -> bytes:
    """Give the bytes of a response. ``last``: the connection closes after it.

    ``headers`` must hold nothing that a client sent, because they are not escaped. A 304 has no
    body and no Content-Length.
    """
    # Joined, not formatted: formatting is slow for aiohttp's header names, a subclass of str.
    head = [_LINES[status]]
    for name, value in headers.items():
        head += (name, ": ", value, "\r\n")
    end = "Connection: close\r\n\r\n" if last else "\r\n"
    if status != HTTPStatus.NOT_MODIFIED:
        head += ("Content-Length: ", str(len(body)), "\r\n")
    head += (_date_and_server(), end)
    return "".join(head).encode("latin-1") + body


def second() -> int:
    """Give the second that answers are dated by: what was rendered before it is dated otherwise."""
    return int(time.time())


def _date_and_server() -> str:
    now = second()
    if now != _clock.second:
        _clock.second = now
        _clock.tail = f"Date: {formatdate(now, usegmt=True)}\r\nServer: {SERVER}\r\n"
    return _clock.tail
