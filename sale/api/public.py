"""Public calls: the campaigns, what is left of them, the clock, and whether we serve."""

from typing import Any, Final

from sale.api import queries
from sale.api.calls import Call, Reply
from sale.api.charge import refuse_exhausted
from sale.api.schemas import AvailabilityView, HealthView, ListView, TimeView
from sale.api.views import availability_view
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.campaign_view import CampaignNow, CampaignView, campaign_view
from sale.domain.clock import rfc3339
from sale.domain.problem import Problem
from sale.http.routes import Load, Route

CAMPAIGNS: Final = "/api/v1/campaigns"
CAMPAIGN: Final = f"{CAMPAIGNS}/{{id}}"
CAMPAIGN_MAX_AGE_S: Final = 1


async def show_health(_: Call[None]) -> HealthView:
    """GET /healthz: the process runs."""
    return HealthView("ok")


async def show_readiness(call: Call[None]) -> Reply:
    """GET /readyz: it can sell, or the reasons why it cannot."""
    engine = call.engine
    reasons = await engine.readiness.reasons()
    if engine.batchers.halted:
        reasons = list(dict.fromkeys([engine.batchers.halted, *reasons]))
    view = HealthView("unavailable" if reasons else "ok", reasons, engine.readiness.campaigns)
    return Reply(view, {"Retry-After": "1"}, 503) if reasons else Reply(view)


async def show_time(call: Call[None]) -> TimeView:
    """GET /api/v1/time."""
    return TimeView(now=rfc3339(await call.engine.public_campaigns.now_ms()))


async def list_campaigns(call: Call[None]) -> ListView[CampaignView]:
    """GET /api/v1/campaigns."""
    return queries.page_of(call, await call.engine.public_campaigns.listed(), campaign_view)


async def show_campaign(call: Call[None]) -> CampaignView:
    """GET /api/v1/campaigns/{id}."""
    return campaign_view(await visible_campaign(call))


async def show_availability(call: Call[None]) -> AvailabilityView:
    """GET /api/v1/campaigns/{id}/availability."""
    return availability_view(await visible_campaign(call))


async def visible_campaign(call: Call[Any]) -> CampaignNow:
    """Give the campaign of the path, as members may see it. Raises Refused."""
    campaigns, campaign_id = call.engine.public_campaigns, call.path["id"]
    if CAMPAIGN_ID.fullmatch(campaign_id) and not campaigns.is_cached(campaign_id):
        refuse_exhausted(call.request)
    return await campaigns.one(campaign_id)


ROUTES: Final = (
    Route(
        method="GET",
        path="/healthz",
        handler=show_health,
        summary="Whether this process runs",
        load=Load.EXEMPT,
        answer=HealthView,
    ),
    Route(
        method="GET",
        path="/readyz",
        handler=show_readiness,
        summary="Whether this host can sell",
        load=Load.EXEMPT,
        answer=HealthView,
        also={503: "Not ready, with the reasons."},
    ),
    Route(
        method="GET",
        path="/api/v1/time",
        handler=show_time,
        summary="The clock that decides openings",
        answer=TimeView,
    ),
    Route(
        method="GET",
        path=CAMPAIGNS,
        handler=list_campaigns,
        summary="Campaigns, drafts left out",
        queries=(queries.LIMIT, queries.POSITION),
        answer=ListView[CampaignView],
        cached_s=CAMPAIGN_MAX_AGE_S,
    ),
    Route(
        method="GET",
        path=CAMPAIGN,
        handler=show_campaign,
        summary="One campaign",
        answer=CampaignView,
        cached_s=CAMPAIGN_MAX_AGE_S,
        problems=(Problem.NOT_FOUND,),
    ),
    Route(
        method="GET",
        path=f"{CAMPAIGN}/availability",
        handler=show_availability,
        summary="What remains, at most one second old",
        answer=AvailabilityView,
        problems=(Problem.NOT_FOUND,),
    ),
)
