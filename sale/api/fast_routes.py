"""The routes of the fast path: those that many members request again and again at an opening.

They are entries of the table of routes (``routes.py``), which has their methods and paths, and how
long an answer may be kept. This module says how each is answered without aiohttp.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from aiohttp import web

from sale.api.fast_purchase import FastPurchases
from sale.api.fast_reads import FastReads
from sale.api.member import place_order
from sale.api.public import show_availability, show_campaign
from sale.api.refusals import ProblemRefusals, overloaded_answer
from sale.api.routes import ROUTES
from sale.api.views import availability_view
from sale.bootstrap import Engine
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.campaign_view import campaign_view
from sale.http.aiohttp_handler import InnerHandler
from sale.http.fast_path import FastPath
from sale.http.fast_routes import FastHandler, FastRoute, FastRoutes
from sale.http.routes import Handler, Route
from sale.http.waiting_line import WaitingLine


def _purchases(engine: Engine, _: Route) -> FastHandler:
    return FastPurchases(engine)


def _campaign(engine: Engine, route: Route) -> FastHandler:
    return FastReads(engine.public_campaigns, campaign_view, max_age_s=route.cached_s)


def _availability(engine: Engine, route: Route) -> FastHandler:
    return FastReads(engine.public_campaigns, availability_view, max_age_s=route.cached_s)


FAST: Final[Mapping[Handler, Callable[[Engine, Route], FastHandler]]] = {
    place_order: _purchases,
    show_campaign: _campaign,
    show_availability: _availability,
}
"""Factories of the fast path's handlers, by the handler that aiohttp calls."""


def fast_routes(engine: Engine) -> FastRoutes:
    """Give the table of a process."""
    return FastRoutes(
        FastRoute(route.method, route.path, CAMPAIGN_ID, FAST[route.handler](engine, route))
        for route in ROUTES
        if route.handler in FAST
    )


def make_fast_path(engine: Engine, server: web.Server, waiting_line: WaitingLine) -> FastPath:
    """Put the fast path of a process together; ``server`` has the application."""
    return FastPath(
        fast_routes(engine),
        engine.overload,
        waiting_line,
        make_delegate=partial(InnerHandler, server, refusals=ProblemRefusals(engine)),
        overloaded=overloaded_answer,
    )
