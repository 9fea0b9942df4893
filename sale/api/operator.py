"""Calls of operators. Each step is an entry of ``sale/operators/steps.py``."""

from functools import partial
from typing import Final

from sale.api import queries
from sale.api.calls import OperatorCall, Reply
from sale.api.dispatch import OPERATOR
from sale.api.schemas import CampaignRequest, ListView, LiveView, OrderCancelRequest
from sale.api.views import remaining_views
from sale.domain.campaign_file import InvalidCampaign, parse_campaign
from sale.domain.campaign_view import CampaignView, DeskView, campaign_view, desk_view
from sale.domain.clock import rfc3339
from sale.domain.order import Order
from sale.domain.problem import Problem, Refused
from sale.http.request import encode_cursor
from sale.http.routes import Access, Key, Route
from sale.operators.accounts import ROLES
from sale.operators.audit_log import AuditEntry, read_audit_log
from sale.operators.steps import RUNNERS, STEPS, Step, StepRequest

ADMIN: Final = "/api/v1/admin"
CAMPAIGNS: Final = f"{ADMIN}/campaigns"
CAMPAIGN: Final = f"{CAMPAIGNS}/{{id}}"
ORDER: Final = f"{ADMIN}/orders/{{order_no}}"
READERS: Final = Access(OPERATOR, frozenset(ROLES))
"""Every role reads campaigns: those of its union, and those that members see."""

AUDIT_READERS: Final = Access(OPERATOR, frozenset({"admin", "auditor", "operator"}))
_TOKEN: Final = (Problem.UNAUTHENTICATED, Problem.FORBIDDEN)
_BODY: Final = (
    Problem.INVALID_REQUEST,
    Problem.PAYLOAD_TOO_LARGE,
    Problem.UNSUPPORTED_MEDIA_TYPE,
)


async def list_campaigns(call: OperatorCall[None]) -> ListView[DeskView]:
    """GET /api/v1/admin/campaigns: drafts too, and rehearsals with ``?rehearsals=true``."""
    found = await call.engine.campaigns.all(call.actor, rehearsals=call.value(queries.REHEARSALS))
    return queries.page_of(call, found, desk_view)


async def create_campaign(call: OperatorCall[dict[str, object]]) -> Reply:
    """POST /api/v1/admin/campaigns: the fields of a campaign file as JSON."""
    try:
        campaign = parse_campaign(call.body, frozenset(call.engine.stores.unions))
    except InvalidCampaign as wrong:
        raise Refused(
            Problem.INVALID_REQUEST,
            wrong.text,
            field=next(iter(wrong.problems)),
            fields=wrong.problems,
        ) from None
    now = await call.engine.campaigns.create(campaign, call.actor, None, call.key)
    return Reply(campaign_view(now), {"Location": f"{CAMPAIGNS}/{campaign.id}"})


async def show_campaign(call: OperatorCall[None]) -> DeskView:
    """GET /api/v1/admin/campaigns/{id}."""
    return desk_view(await call.engine.campaigns.show(call.path["id"], call.actor))


async def show_live(call: OperatorCall[None]) -> LiveView:
    """GET /api/v1/admin/campaigns/{id}/live."""
    now, applied = await call.engine.campaigns.live(call.path["id"], call.actor)
    return LiveView(
        id=now.campaign.id,
        state=now.state.value,
        trouble=now.recovering or None,
        showings=remaining_views(now),
        ledger_seq=now.seq,
        ledger_applied=applied,
        as_of=rfc3339(now.as_of_ms),
    )


async def take_step(step: Step, call: OperatorCall[StepRequest]) -> CampaignView | None:
    """POST /api/v1/admin/campaigns/{id}/<step>, or DELETE for the step that removes it."""
    request = StepRequest() if step.removes else call.body
    now = await call.engine.campaigns.take(step, call.path["id"], request, call.actor, call.key)
    return None if now is None else campaign_view(now)


async def show_audit_log(call: OperatorCall[None]) -> ListView[AuditEntry]:
    """GET /api/v1/admin/audit-log, newest first; ``?campaign=`` narrows it."""
    page, following = await read_audit_log(
        call.engine.stores.pool,
        call.actor,
        campaign=call.value(queries.OF_CAMPAIGN),
        before_id=call.value(queries.POSITION),
        limit=call.value(queries.LIMIT),
    )
    return ListView(page, None if following is None else encode_cursor(following))


async def show_order(call: OperatorCall[None]) -> Order:
    """GET /api/v1/admin/orders/{order_no}."""
    return await call.engine.order_desk.show(call.path["order_no"], call.actor)


async def cancel_order(call: OperatorCall[OrderCancelRequest]) -> Order:
    """POST /api/v1/admin/orders/{order_no}/cancel."""
    return await call.engine.order_desk.cancel(
        call.path["order_no"], call.body.tickets, call.body.reason, call.actor
    )


def _route_of(step: Step) -> Route:
    problems = (*_TOKEN, Problem.NOT_FOUND, Problem.WRONG_STATE, Problem.IDEMPOTENCY_MISMATCH)
    access = Access(OPERATOR, step.roles, owner=True)
    if step.removes:
        return Route(
            method="DELETE",
            path=CAMPAIGN,
            handler=partial(take_step, step),
            summary=step.title.en,
            description=step.title.zh,
            access=access,
            key=Key.OPTIONAL,
            status=204,
            problems=problems,
        )
    return Route(
        method="POST",
        path=f"{CAMPAIGN}/{step.name}",
        handler=partial(take_step, step),
        summary=step.title.en,
        description=step.title.zh,
        access=access,
        key=Key.OPTIONAL,
        body=step.request,
        body_needed=step.needs_body,
        answer=CampaignView,
        problems=(*problems, *_BODY),
    )


ROUTES: Final = (
    Route(
        method="GET",
        path=CAMPAIGNS,
        handler=list_campaigns,
        summary="All campaigns that the account may see, its own drafts too",
        access=READERS,
        queries=(queries.LIMIT, queries.POSITION, queries.REHEARSALS),
        answer=ListView[DeskView],
        problems=_TOKEN,
    ),
    Route(
        method="POST",
        path=CAMPAIGNS,
        handler=create_campaign,
        summary="Create a campaign",
        access=Access(OPERATOR, RUNNERS, owner=True),
        key=Key.OPTIONAL,
        body=CampaignRequest,
        decoded=dict[str, object],
        answer=CampaignView,
        status=201,
        headers={"Location": "Where the campaign is read."},
        problems=(*_TOKEN, *_BODY, Problem.WRONG_STATE, Problem.IDEMPOTENCY_MISMATCH),
    ),
    Route(
        method="GET",
        path=CAMPAIGN,
        handler=show_campaign,
        summary="One campaign, a draft too",
        access=READERS,
        answer=DeskView,
        problems=(*_TOKEN, Problem.NOT_FOUND),
    ),
    *(_route_of(step) for step in STEPS.values()),
    Route(
        method="GET",
        path=f"{CAMPAIGN}/live",
        handler=show_live,
        summary="The campaign as the engine has it now",
        access=READERS,
        answer=LiveView,
        problems=(*_TOKEN, Problem.NOT_FOUND),
    ),
    Route(
        method="GET",
        path=ORDER,
        handler=show_order,
        summary="An order of the account's own campaigns, without the tickets' codes",
        access=READERS,
        answer=Order,
        problems=(*_TOKEN, Problem.NOT_FOUND),
    ),
    Route(
        method="POST",
        path=f"{ORDER}/cancel",
        handler=cancel_order,
        summary="Cancel tickets of an order, at any time",
        access=Access(OPERATOR, RUNNERS, owner=True),
        key=Key.OPTIONAL,
        body=OrderCancelRequest,
        answer=Order,
        problems=(*_TOKEN, *_BODY, Problem.NOT_FOUND, Problem.WRONG_STATE),
    ),
    Route(
        method="GET",
        path=f"{ADMIN}/audit-log",
        handler=show_audit_log,
        summary="Who did what, when and why, as far as the account may see it",
        access=AUDIT_READERS,
        queries=(queries.LIMIT, queries.POSITION, queries.OF_CAMPAIGN),
        answer=ListView[AuditEntry],
        problems=_TOKEN,
    ),
)
