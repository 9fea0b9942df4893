"""The fast path's table: routes that a connection answers by itself, without aiohttp.

An entry is a method, a path with one parameter, and a handler. The connection (``connection.py``)
reads the bytes, finds the handler by the first line, and writes what the handler answers; it knows
nothing of what a route is about. A handler gets a head and a body that have come whole, and knows
nothing of bytes. A request that no handler takes is aiohttp's, so a handler may take only the
requests that it answers exactly as aiohttp would.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Protocol

import msgspec

STARTS_MAX: Final = 1_024
"""First lines that are remembered. A client can choose them, so all are forgotten beyond that."""


class Head(msgspec.Struct, frozen=True, gc=False):
    """The parts of a plain head that the fast path uses. A named tuple takes 0.5 µs more to make.

    ``end`` is where the body begins and ``whole`` the request's length in bytes, body included.
    ``handler`` is None where the route is aiohttp's; ``name`` is the value of the path's parameter.
    Headers that were not sent are None.
    """

    end: int
    whole: int
    handler: "FastHandler | None"
    name: str
    authorization: str | None
    key: str | None
    content_type: str | None
    forwarded_for: str | None
    request_id: str | None
    if_none_match: str | None


class Exchange(Protocol):
    """A connection, as the handler of its request sees it."""

    pending: object
    """The work that answers the request later, or None. ``post`` ends it."""

    @property
    def request_id(self) -> str: ...  # noqa: D102

    @property
    def peer(self) -> str: ...  # noqa: D102

    @property
    def last(self) -> bool:
        """Whether the answer must be the connection's last, and say so."""

    def post(self, wire: bytes) -> None:
        """Answer the request that is pending, soon."""


class FastHandler(ABC):
    """Answers the requests of one route. Each of its methods but ``find`` gets what that found."""

    takes_body = False
    """Whether requests have a body. Where not, a request with a length is aiohttp's."""

    waits = False
    """Whether requests are queued, and may stand in the waiting line while the process is busy."""

    @abstractmethod
    def find(self, name: str) -> Any | None:  # noqa: ANN401 - what it is, is the handler's
        """Find what a path names; None where only aiohttp can answer."""

    @abstractmethod
    def serve(
        self,
        exchange: Exchange,
        found: Any,  # noqa: ANN401
        head: Head,
        body: bytes,
        asked_at: float,
        now: float,
    ) -> bytes | None:
        """Answer, or set ``exchange.pending`` and give None. Must not raise.

        ``asked_at`` and ``now`` are seconds of the monotonic clock; they differ by the time that
        the request stood in the waiting line.
        """

    def count_overloaded(self, found: Any) -> None:  # noqa: ANN401, B027 - most count nothing
        """Count a request that the connection refused because the process is overloaded."""


class FastBodyHandler(FastHandler):
    """Answers the requests of one route whose requests have a body."""

    takes_body = True

    @abstractmethod
    def refuse_late_body(self, exchange: Exchange, found: Any, head: Head) -> bytes:  # noqa: ANN401
        """Give the answer to a request whose body did not come in time; it says it is the last."""


class FastRoute(NamedTuple):
    """One entry. ``path`` has one parameter, in braces, whose values ``name`` matches."""

    method: str
    path: str
    name: re.Pattern[str]
    handler: FastHandler


class FastRoutes:
    """The table of a process."""

    def __init__(self, routes: Iterable[FastRoute]) -> None:
        self._routes = []
        prefixes: dict[bytes, bool] = {}
        for route in routes:
            before, _, after = re.split(r"(\{\w+\})", route.path)
            start = f"{route.method} {before}"
            line = f"{re.escape(start)}({route.name.pattern}){re.escape(after)}"
            self._routes.append((re.compile(line).fullmatch, route.handler))
            prefixes[start.encode()] = prefixes.get(start.encode(), False) or route.handler.waits
        self.prefixes = tuple(prefixes)
        """The bytes that a request of one of these routes may begin with."""
        self.waiting_prefixes = tuple(prefix for prefix, waits in prefixes.items() if waits)
        """The same, of routes whose requests may stand in the waiting line."""
        self._known: dict[str, tuple[FastHandler, str]] = {}

    def resolve(self, start: str) -> tuple[FastHandler, str] | None:
        """Find the handler and the parameter of ``METHOD TARGET``."""
        found = self._known.get(start)
        if found is not None:
            return found
        for match, handler in self._routes:
            if (matched := match(start)) is not None:
                if len(self._known) >= STARTS_MAX:
                    self._known.clear()
                found = self._known[start] = handler, matched[1]
                return found
        return None
