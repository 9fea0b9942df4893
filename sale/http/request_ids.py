"""The name of a request: ``X-Request-Id``, in its answer and in each line of the log about it.

A client or balancer may give one. One that is not of the plain form is replaced, not refused: it
stands in headers and logs. One made here is this process' prefix and a count, because purchases are
named too: a random one for each would cost some µs.
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
    """Give the name that a client has given, or a new one."""
    if given is not None and PATTERN.fullmatch(given):
        return given
    return f"{_PREFIX}-{next(_count)}"


def name_request(request: web.BaseRequest) -> str:
    """Give a request of aiohttp's its name; two of them are none."""
    given = request.headers.getall(HEADER, ())
    name = request[REQUEST_ID] = request_id(given[0] if len(given) == 1 else None)
    return name


def named(wire: bytes, given: str | None) -> bytes:
    """Put the name of its request into the bytes of an answer, behind the status line.

    Many requests share an answer's bytes, so no name is in them from the beginning. 0.3 µs; slices
    that are joined again took twice that.
    """
    line = _MADE % next(_count) if given is None else _GIVEN % request_id(given).encode()
    return wire.replace(b"\r\n", line, 1)
