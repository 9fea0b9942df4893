"""Serves a request by its entry in the table of routes.

All checks that an entry declares come before its handler, in the contract's order: the request's
parameters, the token and its role, the body. An error here or in the handler is answered as a
problem document. A middleware would do the same, with two more coroutines a request.
"""

from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any, Final, cast

import msgspec
import structlog
from aiohttp import web

from sale.api.authenticate import actor_of, member_of
from sale.api.calls import Call, MemberCall, OperatorCall, Reply
from sale.api.charge import admit, charged
from sale.api.problems import problem_response
from sale.api.request import ENCODER, ENGINE, LastAnswer, checked_key, read_body, tagged_response
from sale.bootstrap import STORE_ERRORS
from sale.domain.problem import Problem, Refused
from sale.http.request import KEY_HEADER, NO_STORE
from sale.http.request_ids import REQUEST_ID
from sale.http.routes import AllPaths, Found, Key, Load, Query, Route, RouteTable

MEMBER: Final = "member"
OPERATOR: Final = "operator"
"""The schemes of access."""

_TABLE: Final = web.AppKey("routes", RouteTable)

log = structlog.get_logger()


def add_routes(app: web.Application, routes: Iterable[Route]) -> None:
    """Serve these routes, and answer every other address with 404 or 405."""
    app[_TABLE] = RouteTable(routes)
    app.router.register_resource(AllPaths(dispatch))


async def dispatch(request: web.Request) -> web.StreamResponse:
    """Answer a request."""
    try:
        found = request.app[_TABLE].find(request.method, request.rel_url.path_safe)
        engine, route = request.app.get(ENGINE), found.route
        if engine is not None and (route is None or route.load is Load.ADMITTED):
            admit(engine)
        if route is None:
            raise _no_route(found)  # noqa: TRY301 - answered below like all other errors
        call = await _prepared(request, route, found)
        return _answered(call, await route.handler(call))
    except Exception as error:  # noqa: BLE001 - every error is answered
        return failed(request, error)


async def _prepared(request: web.Request, route: Route, found: Found) -> Call[Any]:
    """Make the checks that the entry declares. Raises Refused."""
    if route.load is Load.HANDLER:
        return Call(request, route, found.parameters)
    values = {query.name: _value(request, query) for query in route.queries}
    key = _key(request, route.key)
    call = await _identified(request, route, found)
    call.values = values
    call.key = key
    if route.body is not None:
        form = route.body if route.decoded is None else route.decoded
        call.body = await read_body(request, _decoder(cast("Hashable", form)), absent_is_empty=True)
    return call


async def _identified(request: web.Request, route: Route, found: Found) -> Call[Any]:
    """Make the call with the identity of its sender. Raises Refused."""
    match route.access.scheme:
        case "member":
            by_member: MemberCall[Any] = MemberCall(request, route, found.parameters)
            by_member.member = member_of(request)
            return by_member
        case "operator":
            by_operator: OperatorCall[Any] = OperatorCall(request, route, found.parameters)
            by_operator.actor = await actor_of(request, route.access)
            return by_operator
        case _:
            return Call(request, route, found.parameters)


def _answered(call: Call[Any], given: object) -> web.StreamResponse:
    """Make the response of what a handler has given."""
    if isinstance(given, web.StreamResponse):
        return given
    route, status, headers = call.route, call.route.status, NO_STORE
    if isinstance(given, Reply):
        status, headers = given.status or status, {**NO_STORE, **given.headers}
        given = given.body
    if given is None:
        return web.Response(status=status, headers=headers)
    if route.cached_s is not None:
        return tagged_response(call.request, given, max_age_s=route.cached_s)
    return web.Response(
        status=status,
        body=ENCODER.encode(given),
        content_type="application/json",
        headers=headers,
    )


def failed(request: web.Request, error: Exception) -> web.StreamResponse:
    """Answer an error of a handler. Raises aiohttp's redirections on."""
    if isinstance(error, web.HTTPException) and error.status < 400:
        raise error
    engine = request.app.get(ENGINE)
    refused = refused_by(error, request.path, request.get(REQUEST_ID, ""))
    response = problem_response(refused if engine is None else charged(engine, request, refused))
    if isinstance(error, LastAnswer):
        response.force_close()
    return response


def refused_by(error: Exception, path: str, request_id: str) -> Refused:
    """Give the refusal that answers an error; a fault of the engine is logged."""
    if isinstance(error, Refused):
        # Its traceback leads to the frame that keeps it: a cycle for each refusal, and for some
        # thousands of them a collection for which everybody waits.
        return error.with_traceback(None)
    if isinstance(error, web.HTTPException):
        return Refused(Problem.INVALID_REQUEST, error.reason)
    if isinstance(error, STORE_ERRORS):
        name = type(error).__name__
        log.warning("request.store_failed", path=path, request_id=request_id, error=name)
    else:
        log.error("request.failed", path=path, request_id=request_id, exc_info=error)
    return Refused(Problem.UNAVAILABLE)


def _no_route(found: Found) -> Refused:
    if found.methods:
        return Refused(Problem.METHOD_NOT_ALLOWED, allow=found.methods)
    return Refused(Problem.NOT_FOUND, "there is nothing at this address")


def _value(request: web.Request, query: Query[Any]) -> object:
    text = request.query.get(query.name)
    if text is None:
        return query.default
    try:
        return query.read(text)
    except ValueError as wrong:
        raise Refused(Problem.INVALID_REQUEST, f"{query.name}: {wrong}", field=query.name) from None


def _key(request: web.Request, key: Key) -> str | None:
    if key is Key.NONE:
        return None
    sent = request.headers.get(KEY_HEADER)
    return None if sent is None and key is Key.OPTIONAL else checked_key(sent)


@cache
def _decoder(form: Hashable) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cast("type[Any]", form))
