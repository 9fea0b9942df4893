"""The argument of a handler: the request, its checked parts, and its sender."""

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

from aiohttp import web

from sale.api.request import ENGINE
from sale.bootstrap import Engine
from sale.http.routes import Query, Route
from sale.identity import Member
from sale.operators.campaigns import Actor

Body = TypeVar("Body")
Value = TypeVar("Value")


class Call(Generic[Body]):
    """One request to a route. ``path`` has the path parameters by name.

    ``body`` is set where the route has one, ``key`` where an Idempotency-Key was sent to a route
    that takes one.
    """

    __slots__ = ("body", "key", "path", "request", "route", "values")
    body: Body

    def __init__(self, request: web.Request, route: Route, path: Mapping[str, str]) -> None:
        self.request = request
        self.route = route
        self.path = path
        self.key: str | None = None
        self.values: dict[str, object] = {}
        """The query parameters by name, as they were read."""

    @property
    def engine(self) -> Engine:
        """The engine of this process."""
        return self.request.app[ENGINE]

    def value(self, query: Query[Value]) -> Value:
        """Give a query parameter that the route declares."""
        return cast("Value", self.values[query.name])


class MemberCall(Call[Body]):
    """A request of a member."""

    __slots__ = ("member",)
    member: Member


class OperatorCall(Call[Body]):
    """A request of an operator."""

    __slots__ = ("actor",)
    actor: Actor


class Reply(NamedTuple):
    """An answer with a status or headers of its own; None for the route's."""

    body: Any
    headers: Mapping[str, str] = {}
    status: int | None = None
