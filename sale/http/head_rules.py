"""Refuses requests for their head alone, whatever they ask for.

aiohttp takes some heads that two readers may understand differently, or that mean nothing here: a
proxy in front may use the first of two tokens, the engine the second. Each is one refusal, and its
connection is closed behind it. The fast path takes none of these heads (``http/request_head.py``).
"""

import re
from typing import Final, NamedTuple

from aiohttp import HttpVersion10, HttpVersion11, hdrs
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.http_parser import RawRequestMessage

METHODS: Final = ("DELETE", "GET", "HEAD", "POST")
"""All that any address here takes."""

ONCE: Final = frozenset(
    {
        *("Access-Control-Request-Method", "Authorization", "Content-Length", "Content-Location"),
        *("Content-Range", "Content-Type", "Date", "Expect", "From", "Host", "Idempotency-Key"),
        *("If-Modified-Since", "If-Range", "If-Unmodified-Since", "Max-Forwards", "Origin"),
        *("Proxy-Authorization", "Range", "Referer", "Transfer-Encoding", "User-Agent"),
    }
)
"""Headers that have one value and are no lists (RFC 9110); the parser knows some of them."""

_ONCE: Final = {name.lower(): name for name in ONCE}
_NAMED: Final = re.compile("|".join(sorted(ONCE)))


class HeadFault(NamedTuple):
    """A fault of a head: the field, and why.

    ``allow``: the method is refused, and these are taken.
    """

    field: str
    why: str
    allow: tuple[str, ...] = ()


def fault_of_head(message: RawRequestMessage) -> HeadFault | None:
    """Say why a head that could be read is refused all the same; None where it is not."""
    if message.version not in (HttpVersion10, HttpVersion11):
        return HeadFault("version", "send HTTP/1.1")
    if message.method == hdrs.METH_CONNECT or message.path == "*":
        return HeadFault("method", "no address here takes it", METHODS)
    scheme, absolute, _ = message.path.partition("://")
    if absolute and message.path[0] != "/" and scheme.lower() not in ("http", "https"):
        return HeadFault("target", "there is only http here")
    headers = message.headers
    names = [name.lower() for name, _ in headers.items()]
    if len(set(names)) < len(names):
        for name in _ONCE.keys() & set(names):
            if names.count(name) > 1:
                return HeadFault(_ONCE[name], "this header may come once")
    coding = headers.get(hdrs.TRANSFER_ENCODING, "")
    if coding and coding.lower() != "chunked":
        return HeadFault("Transfer-Encoding", "only chunked is understood")
    expected = headers.get(hdrs.EXPECT, "")
    if expected and expected.lower() != "100-continue":
        return HeadFault("Expect", "only 100-continue is understood")
    return None


def fault_of_unreadable(error: BaseException | None) -> HeadFault | None:
    """Say which header the parser refused, None where it names none; nothing of what was sent."""
    if type(error) is BadHttpMessage:  # what its kinds say may quote the client
        named = _NAMED.search(error.message.partition("\n")[0])
        if named is not None:
            return HeadFault(named[0], "it is missing, comes twice, or cannot be understood")
    return None
