"""The routes of the fast path: those that a crowd asks again and again at an opening."""

from functools import partial

from aiohttp import web

from sale.api.fast_purchase import FastPurchases
from sale.api.fast_reads import FastReads
from sale.api.public import CAMPAIGN, CAMPAIGN_MAX_AGE_S
from sale.api.refusals import ProblemRefusals, overloaded_answer
from sale.api.views import availability_view
from sale.bootstrap import Engine
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.campaign_view import campaign_view
from sale.http.aiohttp_handler import InnerHandler
from sale.http.fast_path import FastPath
from sale.http.fast_routes import FastRoute, FastRoutes
from sale.http.waiting_line import WaitingLine


def fast_routes(engine: Engine) -> FastRoutes:
    """Give the table of a process."""
    campaign = FastReads(engine.public_campaigns, campaign_view, max_age_s=CAMPAIGN_MAX_AGE_S)
    availability = FastReads(engine.public_campaigns, availability_view)
    return FastRoutes(
        (
            FastRoute("POST", f"{CAMPAIGN}/orders", CAMPAIGN_ID, FastPurchases(engine)),
            FastRoute("GET", CAMPAIGN, CAMPAIGN_ID, campaign),
            FastRoute("GET", f"{CAMPAIGN}/availability", CAMPAIGN_ID, availability),
        )
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
