"""Routes with their guard: whatever goes wrong in a handler becomes a problem document.

A middleware would do the same for every route, and put two more coroutines around each purchase;
so a handler is guarded where it is registered, and what matches no route has a handler too. The
route of the purchase is found by comparing text: aiohttp's own way, a pattern and the unquoting of
what it matched, was 9 % of the samples of a profile under purchases.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from aiohttp import web

from sale.api.charge import admit, charged
from sale.api.problems import problem_response
from sale.api.request import ENGINE, BodyLate
from sale.bootstrap import STORE_ERRORS
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.problem import Problem, Refused
from sale.http.request_ids import REQUEST_ID

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger()


def guarded(handler: Handler, *, exempt: bool = False) -> Handler:
    """Turn everything that goes wrong into a problem document; never show how it went wrong.

    What is ``exempt`` (health checks) is answered under any load, and never limited.
    """

    async def guard(request: web.Request) -> web.StreamResponse:
        try:
            engine = request.app.get(ENGINE)
            if engine is not None and not exempt:
                admit(engine)
            return await handler(request)
        except Exception as error:  # noqa: BLE001 - told by what it is
            return failed(request, error)

    return guard


def failed(request: web.Request, error: Exception) -> web.StreamResponse:
    """Answer an error of a handler. Raises aiohttp's redirections on."""
    if isinstance(error, web.HTTPException) and error.status < 400:
        raise error
    engine = request.app.get(ENGINE)
    refused = refused_by(error, request.path, request.get(REQUEST_ID, ""))
    response = problem_response(refused if engine is None else charged(engine, request, refused))
    if isinstance(error, BodyLate):
        response.force_close()
    return response


def refused_by(error: Exception, path: str, request_id: str) -> Refused:
    """Give the refusal that an error is told as; what is a fault of ours is logged."""
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


def add_fallback(app: web.Application) -> None:
    """Answer what no route matches: 405 with Allow where another method would, else 404."""

    async def no_route(request: web.Request) -> web.StreamResponse:
        allowed: set[str] = set()
        for resource in app.router.resources():
            if resource is not fallback:
                allowed |= (await resource.resolve(request))[1]
        if allowed:
            raise Refused(Problem.METHOD_NOT_ALLOWED, allow=allowed)
        raise Refused(Problem.NOT_FOUND, "there is nothing at this address")

    fallback = app.router.add_resource("/{tail:.*}")
    fallback.add_route("*", guarded(no_route))


class PurchaseResource(web.DynamicResource):
    """``/api/v1/campaigns/{id}/orders``, found without a pattern when it is plain."""

    PREFIX: Final = "/api/v1/campaigns/"
    SUFFIX: Final = "/orders"

    def __init__(self, handler: Handler) -> None:
        super().__init__(f"{self.PREFIX}{{id}}{self.SUFFIX}")
        self._purchase = self.add_route("POST", handler)

    async def resolve(
        self, request: web.Request
    ) -> tuple[web.UrlMappingMatchInfo | None, set[str]]:
        """Match the request as aiohttp's resources do."""
        path = request.rel_url.raw_path
        if (
            request.method == "POST"
            and path.startswith(self.PREFIX)
            and path.endswith(self.SUFFIX)
            and CAMPAIGN_ID.fullmatch(path, len(self.PREFIX), len(path) - len(self.SUFFIX))
        ):
            campaign_id = path[len(self.PREFIX) : -len(self.SUFFIX)]
            return web.UrlMappingMatchInfo({"id": campaign_id}, self._purchase), _POST
        return await super().resolve(request)


_POST: Final = {"POST"}
