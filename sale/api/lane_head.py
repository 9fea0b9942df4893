"""Reads the head of a request, and says whether it is of the plain shape that the lane serves.

llhttp parses it (by httptools), as it does for aiohttp; what it refuses is not judged here. A head
is plain if where its request ends is beyond doubt: HTTP/1.1, a host, a length or no body, no header
twice, and none that changes how the rest is read. Whoever sends something else is served too, by
aiohttp.

llhttp calls nothing of ours for a header but ``dict.__setitem__``: a method of ours for each of
them, with its checks, took as long as the rest of the reading (2 of 4 µs for five headers).
"""

from typing import Final, NamedTuple

import httptools

from sale.domain import CAMPAIGN_ID

PATH_PREFIX: Final = b"/api/v1/campaigns/"
PATH_SUFFIX: Final = b"/orders"
_PATHS_MAX: Final = 1_024
_KINDS_MAX: Final = 1_024
_NAMES_MAX_BYTES: Final = 512
"""What is remembered of clients is short: any stranger can choose it."""

HEAD_MAX: Final = 8_190
HEADERS_MAX: Final = 128
"""aiohttp's bounds of a line and of the headers: what is longer is its to refuse."""

_WANTED: Final = (
    b"content-length", b"connection", b"authorization", b"idempotency-key", b"content-type",
    b"x-forwarded-for",
)  # fmt: skip
_NEVER_PLAIN: Final = frozenset(
    {
        b"transfer-encoding", b"expect", b"upgrade", b"content-encoding", b"trailer", b"te",
        b"http2-settings", b"proxy-connection", b"keep-alive", b"sec-websocket-key",
        b"sec-websocket-key1",
    }
)  # fmt: skip


class Head(NamedTuple):
    """What the lane needs of a plain head. ``whole`` is the request's length in bytes, body
    included; ``campaign_id`` is '' where it is no purchase. Headers that were not sent are None.
    """

    whole: int
    campaign_id: str
    authorization: str | None
    key: str | None
    content_type: str | None
    forwarded_for: str | None


class HeadReader:
    """Reads one head after another; one for a whole process, because no head is read in parts."""

    def __init__(self) -> None:
        self._found: dict[bytes, bytes] = {}
        self.on_header = self._found.__setitem__  # httptools calls it with name and value
        self._parser = httptools.HttpRequestParser(self)
        self._wanted: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}
        self._paths: dict[bytes, str] = {}

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
            wanted = None
            if len(names) == data.count(b"\r", 0, end) - 2:
                wanted = self._wanted.get(names) or self._want(names)
            if wanted is None:
                self._begin_anew()
                return None
            length, connection, *others = [
                found[name].rstrip(b" \t").decode("ascii") if name else None for name in wanted
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
        campaign_id = self._campaign_id(data[5 : line_end - 9]) if data[:5] == b"POST " else ""
        return Head(whole, campaign_id, *others)

    def _want(self, names: tuple[bytes, ...]) -> tuple[bytes, ...] | None:
        """Choose what is read where these headers come; None if such a request is not plain.

        Clients are of few kinds, so the choice is kept by the names that come together.
        """
        lowered = [name.lower() for name in names]
        if len(set(lowered)) < len(names) or b"host" not in lowered or len(names) > HEADERS_MAX:
            return None
        if any(name in _NEVER_PLAIN for name in lowered):
            return None
        wanted = tuple(
            next((name for name in names if name.lower() == field), b"") for field in _WANTED
        )
        if len(self._wanted) < _KINDS_MAX and sum(map(len, names)) <= _NAMES_MAX_BYTES:
            self._wanted[names] = wanted
        return wanted

    def _begin_anew(self) -> None:
        """Begin the next head with nothing of this one."""
        self._parser = httptools.HttpRequestParser(self)

    def _campaign_id(self, target: bytes) -> str:
        """Give the campaign whose orders a target names, or ''."""
        campaign_id = self._paths.get(target)
        if campaign_id is None:
            campaign_id = ""
            if target.startswith(PATH_PREFIX) and target.endswith(PATH_SUFFIX):
                middle = target[len(PATH_PREFIX) : -len(PATH_SUFFIX)]
                if CAMPAIGN_ID.fullmatch(text := middle.decode("latin-1")):
                    campaign_id = text
            if campaign_id and len(self._paths) < _PATHS_MAX:
                self._paths[target] = campaign_id
        return campaign_id
