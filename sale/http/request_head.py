"""Reads the head of a request, and says whether it is plain, so that the fast path may serve it.

llhttp parses it (by httptools), as it does for aiohttp; what llhttp refuses is not judged here. A
head is plain if the end of its request is beyond doubt: HTTP/1.1, a host, a length or no body, no
header twice, and none that changes how the rest is read. aiohttp serves all other requests.

Clients are of few kinds, and each sends the same headers in the same order. So the headers that
llhttp has found ``LEARNED_AFTER`` times in plain heads of fast routes become a ``Shape``: a regular
expression of exactly these lines, which admits less than llhttp does (visible ASCII, one blank
behind a colon) and finds all that is wanted in one step. A head that is not of the connection's
shape is read by llhttp as before: 4.6 µs (a ``dict.__setitem__`` a header, called from C; a method
of ours for each had been slower still) against 2.1 by the shape (``tests/measure_fast_path.py``).
"""

import re
import time
from typing import Final

import httptools

from sale.http.fast_routes import FastRoutes, Head

_KINDS_MAX: Final = 256
_NAMES_MAX_BYTES: Final = 512
"""What is remembered of clients is short, and all of it is forgotten when it becomes too much: any
stranger can choose it."""

LEARNED_AFTER: Final = 8
LEARN_EVERY_S: Final = 0.25
SHAPE_NAMES_MAX: Final = 32
"""Making a shape takes about a millisecond and some kilobytes: a client that invents header after
header must not get many, nor large ones. A connection keeps the one it had last."""

HEAD_MAX: Final = 8_190
HEADERS_MAX: Final = 128
"""aiohttp's bounds of a line and of the headers: what is longer is its to refuse."""

_WANTED: Final = (
    b"content-length", b"connection", b"authorization", b"idempotency-key", b"content-type",
    b"x-forwarded-for", b"x-request-id", b"if-none-match",
)  # fmt: skip
_NEVER_PLAIN: Final = frozenset(
    {
        b"transfer-encoding", b"expect", b"upgrade", b"content-encoding", b"trailer", b"te",
        b"http2-settings", b"proxy-connection", b"keep-alive", b"sec-websocket-key",
        b"sec-websocket-key1",
    }
)  # fmt: skip


class Shape:
    """The heads of fast routes' requests that have just these headers, in this order and spelling.

    ``wanted``: for each of ``_WANTED``, its name as it comes, or b''. No ``names``: no head at all.
    """

    __slots__ = ("_groups", "_match", "_resolve")

    def __init__(
        self, routes: FastRoutes, names: tuple[bytes, ...], wanted: tuple[bytes, ...]
    ) -> None:
        length, connection, *others = wanted
        lines, groups, number = [], {}, 1
        for name in names:
            value = _ANY_VALUE
            if name == connection:
                value = _KEEP_ALIVE
            elif name in wanted:
                value = _LENGTH if name == length else _VALUE
                number += 1
                groups[name] = number
            lines.append(f"{re.escape(name.decode('ascii'))}: {value}\r\n")
        # The last group never takes part: what did not come is None.
        never = number + 1
        self._groups = (1, *(groups.get(name, never) for name in (length, *others)))
        self._match = re.compile(f"{_LINE}{''.join(lines)}\r\n(.){{0}}" if names else "(?!)").match
        self._resolve = routes.resolve

    def read(self, held: bytes) -> Head | None:
        """Read the head at the beginning of ``held``.

        None where it is not of this shape, or not whole, or longer than ``HEAD_MAX``, or of no fast
        route.
        """
        match = self._match(held[:HEAD_MAX].decode("latin-1"))
        if match is None:
            return None
        start, length, authorization, key, content_type, forwarded_for, request_id, known = (
            match.group(*self._groups)
        )
        found = self._resolve(start)
        if found is None:
            return None
        handler, name = found
        whole = end = match.end()
        if length is not None:
            if not handler.takes_body:
                return None
            whole += int(length)
        return Head(
            end, whole, handler, name, authorization, key, content_type, forwarded_for,
            request_id, known,
        )  # fmt: skip


# Possessive (+), so that no head is tried in more than one way.
_ANY_VALUE: Final = "[ -~]*+"
_VALUE: Final = "([!-~][ -~]*+)(?<! )"
_LENGTH: Final = "([0-9]{1,9}+)"
_KEEP_ALIVE: Final = "[Kk][Ee][Ee][Pp]-[Aa][Ll][Ii][Vv][Ee]"
_LINE: Final = "((?:POST|GET) /[0-9A-Za-z/_-]{1,200}+) HTTP/1\\.1\r\n"
UNKNOWN: Final = Shape(FastRoutes(()), (), (b"",) * len(_WANTED))
"""The shape of a client that is not known yet: no head is of it."""


class _Kind:
    """Headers that come together: which of them are read, how often they came, their shape."""

    __slots__ = ("seen", "shape", "wanted")

    def __init__(self, wanted: tuple[bytes, ...]) -> None:
        self.wanted = wanted
        self.seen = 0
        self.shape = UNKNOWN


class HeadReader:
    """Reads one head after another; one for a whole process, because no head is read in parts."""

    def __init__(self, routes: FastRoutes, *, learned_after: int = LEARNED_AFTER) -> None:
        self._routes = routes
        self._found: dict[bytes, bytes] = {}
        self.on_header = self._found.__setitem__  # httptools calls it with name and value
        self._parser = httptools.HttpRequestParser(self)
        self._kinds: dict[tuple[bytes, ...], _Kind] = {}
        self._learned_after = learned_after
        self._learn_at = 0.0
        self.shape = UNKNOWN
        """That of the fast route's request that was read last: a new connection likely has it."""

    def read(self, data: bytes, end: int) -> Head | None:
        """Read the head in ``data[:end]``; None where it is not plain, or not HTTP at all."""
        line_end = data.find(b"\r\n")
        if data[line_end - 9 : line_end] != b" HTTP/1.1" or end > HEAD_MAX:
            return None
        found = self._found
        found.clear()
        try:
            self._parser.feed_data(data[:end])
            # llhttp has seen to it that each CR ends a line: fewer headers means one came twice.
            names = tuple(found)
            kind = None
            if len(names) == data.count(b"\r", 0, end) - 2:
                kind = self._kinds.get(names) or self._kind(names)
            if kind is None:
                self._begin_anew()
                return None
            length, connection, *others = [
                found[name].rstrip(b" \t").decode("ascii") if name else None for name in kind.wanted
            ]
            if connection is not None and connection.lower() != "keep-alive":
                self._begin_anew()
                return None
            whole = end + int(length or 0)
            if whole > len(data):
                self._begin_anew()  # the next head may be another connection's
            elif whole > end:
                self._parser.feed_data(data[end:whole])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError):
            self._begin_anew()
            return None
        found_route = None
        if data.startswith(self._routes.prefixes):
            found_route = self._routes.resolve(data[: line_end - 9].decode("latin-1"))
        if found_route is None or not (length is None or found_route[0].takes_body):
            return Head(end, whole, None, "", *others)
        self.shape = kind.shape if kind.shape is not UNKNOWN else self._learn(names, kind)
        return Head(end, whole, *found_route, *others)

    def _kind(self, names: tuple[bytes, ...]) -> _Kind | None:
        """Choose what is read where these headers come; None if such a request is not plain."""
        lowered = [name.lower() for name in names]
        if len(set(lowered)) < len(names) or b"host" not in lowered or len(names) > HEADERS_MAX:
            return None
        if any(name in _NEVER_PLAIN for name in lowered):
            return None
        kind = _Kind(
            tuple(next((name for name in names if name.lower() == field), b"") for field in _WANTED)
        )
        if sum(map(len, names)) <= _NAMES_MAX_BYTES:
            if len(self._kinds) >= _KINDS_MAX:
                self._kinds.clear()
            self._kinds[names] = kind
        return kind

    def _learn(self, names: tuple[bytes, ...], kind: _Kind) -> Shape:
        """Make the shape of headers that come again and again."""
        kind.seen += 1
        if len(names) > SHAPE_NAMES_MAX:
            return UNKNOWN
        if kind.seen >= self._learned_after and (now := time.monotonic()) >= self._learn_at:
            self._learn_at = now + LEARN_EVERY_S
            kind.shape = Shape(self._routes, names, kind.wanted)
        return kind.shape

    def _begin_anew(self) -> None:
        """Begin the next head with nothing of this one."""
        self._parser = httptools.HttpRequestParser(self)


def may_become_a_head(held: bytes) -> bool:
    """Whether what has come so far is worth waiting for; aiohttp refuses the rest at once."""
    return len(held) <= HEAD_MAX and held[:1].isupper() and b"\n\n" not in held
