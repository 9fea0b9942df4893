"""Routes as a table: one entry has all that is known of an endpoint.

Dispatch, the checks before a handler, the OpenAPI document (``openapi.py``) and the tests of who
may call what read the same entries. Nothing here knows what the endpoints are about: roles and
problem codes are texts, bodies and answers are msgspec types.

``RouteTable`` finds an entry by the segments of a path. aiohttp's own dispatcher matches a regular
expression a route, and cannot tell which methods a path has without asking every route again.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec
from aiohttp import web

Value = TypeVar("Value")
Handler = Callable[[Any], Awaitable[object]]
"""Takes the call that the dispatcher has prepared; gives the answer, or raises a refusal."""

PUBLIC: Final = ""
"""The scheme of a route that asks for no token."""


class Access(msgspec.Struct, frozen=True):
    """The callers that a route admits.

    ``scheme`` is the kind of token, PUBLIC for none; ``roles`` are those that may (empty: the
    scheme has no roles). ``owner``: only an account of the union that owns what the path names.
    """

    scheme: str = PUBLIC
    roles: frozenset[str] = frozenset()
    owner: bool = False


class Load(Enum):
    """How a route is treated when the process is at its capacity."""

    ADMITTED = "refused before anything is done for it"
    EXEMPT = "answered under any load"
    HANDLER = "its handler decides, and does all checks itself"


class Key(Enum):
    """Whether a request carries an Idempotency-Key."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


class Query(msgspec.Struct, Generic[Value], frozen=True, kw_only=True):
    """A query parameter. ``read`` raises ValueError, in words, for what ``schema`` refuses."""

    name: str
    description: str
    schema: Mapping[str, object]
    read: Callable[[str], Value]
    default: Value


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint.

    A route without ``summary`` is for browsers and is left out of the OpenAPI document.
    ``problems`` are the codes that it may answer besides those that every route may. ``decoded`` is
    the type to decode a body into where its handler checks the fields by itself. ``cached_s``: the
    answer has an ETag, and may be kept that long. ``headers`` are those of its answer, with
    their descriptions; ``also`` describes further statuses that have the same body.
    """

    method: str
    path: str
    handler: Handler
    summary: str = ""
    description: str = ""
    access: Access = Access()
    load: Load = Load.ADMITTED
    queries: tuple[Query[Any], ...] = ()
    key: Key = Key.NONE
    body: type[Any] | None = None
    decoded: Any = None
    body_needed: bool = True
    answer: Any = None
    status: int = 200
    also: Mapping[int, str] = {}
    cached_s: int | None = None
    headers: Mapping[str, str] = {}
    problems: tuple[str, ...] = ()


class Found(NamedTuple):
    """The route of a path, None where there is none; ``methods`` are all that the path has."""

    route: Route | None
    parameters: Mapping[str, str]
    methods: frozenset[str]


class _Node:
    """A segment of the paths: those below it, and the routes that end here."""

    __slots__ = ("children", "methods", "parameter", "routes")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.parameter: tuple[str, _Node] | None = None
        self.routes: dict[str, Route] = {}
        self.methods: frozenset[str] = frozenset()


class RouteTable:
    """The routes of an application, by path. Raises ValueError where two entries are one route."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._root = _Node()
        for route in self.routes:
            self._add(route)

    def find(self, method: str, path: str) -> Found:
        """Find the route of a decoded path. HEAD is answered where GET is."""
        node, parameters = self._root, dict[str, str]()
        for segment in path.split("/"):
            below = node.children.get(segment)
            if below is None:
                if node.parameter is None or not segment:
                    return _NOTHING
                name, below = node.parameter
                parameters[name] = segment
            node = below
        return Found(node.routes.get(method), parameters, node.methods)

    def _add(self, route: Route) -> None:
        node = self._root
        for segment in route.path.split("/"):
            node = _below(node, segment)
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            if method in node.routes:
                raise ValueError(f"two routes are {method} {route.path}")
            node.routes[method] = route
        node.methods = frozenset(node.routes)


def _below(node: _Node, segment: str) -> _Node:
    """Give the node of a segment below this one, new where there is none."""
    if not segment.startswith("{"):
        return node.children.setdefault(segment, _Node())
    name = segment[1:-1]
    if node.parameter is None:
        node.parameter = (name, _Node())
    if node.parameter[0] != name:
        raise ValueError(f"{{{node.parameter[0]}}} and {{{name}}} are the same segment")
    return node.parameter[1]


class AllPaths(web.PlainResource):
    """Every path of an application, for one handler that finds the route by itself.

    A resource ``/{tail:.*}`` would match and unquote each path first, at 7 µs a request.
    """

    def __init__(self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        super().__init__("/")
        self._route = self.add_route("*", handler)

    async def resolve(
        self,
        request: web.Request,  # noqa: ARG002 - as aiohttp has it
    ) -> tuple[web.UrlMappingMatchInfo, set[str]]:
        """Match any request."""
        return web.UrlMappingMatchInfo({}, self._route), _ANY


_ANY: Final = {"*"}
_NOTHING: Final = Found(None, {}, frozenset())
