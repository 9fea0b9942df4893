"""The request ID ``X-Request-Id``, in each response and in each log line about the request.

A client or load balancer may send one. An ID that does not match PATTERN is replaced, not refused,
because it goes into headers and logs. An ID made here is a prefix of this process and a count: a
random one would cost some µs for each purchase.
"""

import itertools
import re
import secrets
from typing import Final

from aiohttp import web
from multidict import istr

HEADER: Final = istr("X-Request-Id")
PATTERN: Final = re.compile(r"[A-Za-z0-9._:=+/@-]{1,128}")
REQUEST_ID: Final = web.RequestKey("request_id", str)

_PREFIX: Final = secrets.token_hex(5)
_count: Final = itertools.count(1)
_GIVEN: Final = f"\r\n{HEADER}: %b\r\n".encode()
_MADE: Final = f"\r\n{HEADER}: {_PREFIX}-%d\r\n".encode()


def request_id(given: str | None) -> str:
    """Give the client's ID if it is valid, else a new one."""
    if given is not None and PATTERN.fullmatch(given):
        return given
    return f"{_PREFIX}-{next(_count)}"


def name_request(request: web.BaseRequest) -> str:
    """Set the ID of an aiohttp request; a request with two headers gets a new ID."""
    given = request.headers.getall(HEADER, ())
    name = request[REQUEST_ID] = request_id(given[0] if len(given) == 1 else None)
    return name


def named(wire: bytes, given: str | None) -> bytes:
    """Insert the request ID into the bytes of a response, after the status line.

    Many requests share the bytes of one response, so the ID is added last. This takes 0.3 µs;
    joining slices took twice as long.
    """
    line = _MADE % next(_count) if given is None else _GIVEN % request_id(given).encode()
    return wire.replace(b"\r\n", line, 1)
