"""Which requests are refused for their head alone, whatever they ask for.

aiohttp takes some heads that two readers may understand differently, or that mean nothing here: a
proxy in front may use the first of two tokens, the engine the second. Each is one refusal, and its
connection is closed behind it. The fast path takes none of these heads (``http/request_head.py``).
"""

import re
from typing import Final

from aiohttp import HttpVersion10, HttpVersion11, hdrs
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.http_parser import RawRequestMessage

from sale.domain.problem import Problem, Refused

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


def refusal_of_head(message: RawRequestMessage) -> Refused | None:
    """Say why a head that could be read is refused all the same; None where it is not."""
    if message.version not in (HttpVersion10, HttpVersion11):
        return _wrong("version", "send HTTP/1.1")
    if message.method == hdrs.METH_CONNECT or message.path == "*":
        return Refused(Problem.METHOD_NOT_ALLOWED, allow=METHODS)
    scheme, absolute, _ = message.path.partition("://")
    if absolute and message.path[0] != "/" and scheme.lower() not in ("http", "https"):
        return _wrong("target", "there is only http here")
    headers = message.headers
    names = [name.lower() for name, _ in headers.items()]
    if len(set(names)) < len(names):
        for name in _ONCE.keys() & set(names):
            if names.count(name) > 1:
                return _wrong(_ONCE[name], "this header may come once")
    coding = headers.get(hdrs.TRANSFER_ENCODING, "")
    if coding and coding.lower() != "chunked":
        return _wrong("Transfer-Encoding", "only chunked is understood")
    expected = headers.get(hdrs.EXPECT, "")
    if expected and expected.lower() != "100-continue":
        return _wrong("Expect", "only 100-continue is understood")
    return None


def refusal_of_unreadable(error: BaseException | None) -> Refused:
    """Word what the parser refused, by the header that it names; nothing of what was sent."""
    if type(error) is BadHttpMessage:  # what its kinds say may quote the client
        named = _NAMED.search(error.message.partition("\n")[0])
        if named is not None:
            return _wrong(named[0], "it is missing, comes twice, or cannot be understood")
    return Refused(Problem.INVALID_REQUEST, "this is not a request that can be read")


def _wrong(field: str, why: str) -> Refused:
    return Refused(Problem.INVALID_REQUEST, f"{field}: {why}", field=field)
