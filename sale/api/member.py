"""What members call: buy, read their orders, see what there is. The purchase starts here."""

import time
from typing import Final

import msgspec
from aiohttp import hdrs, web

from sale.api.admit import Admission, LineFull
from sale.api.charge import refuse_exhausted
from sale.api.problems import Worded, problem_answer
from sale.api.request import (
    ENCODER,
    ENGINE,
    KEY_HEADER,
    NO_STORE,
    bearer,
    checked_key,
    decode_cursor,
    encode_cursor,
    json_response,
    offset_cursor,
    page_limit,
    read_body,
    tagged_response,
)
from sale.api.routing import Handler, PurchaseResource, failed, guarded
from sale.api.schemas import AllowanceView, ListView, OrderRequest, TimeView
from sale.api.views import availability_view, campaign_view
from sale.db.read import OrderCursor
from sale.domain.campaign import CAMPAIGN_ID, State
from sale.domain.clock import rfc3339
from sale.domain.member import may_meet
from sale.domain.order import Order
from sale.domain.problem import Problem, Refused
from sale.http.overload import MUST_WAIT
from sale.identity import Member
from sale.members.orders import live_tickets
from sale.members.purchase import Placed, PurchaseDesk
from sale.members.rate import TooFast
from sale.stock.catalogue import CampaignNow
from sale.stock.records import read_member

CAMPAIGN_MAX_AGE_S: Final = 1
ORDER_REQUEST: Final = msgspec.json.Decoder(OrderRequest)


def add_member_routes(app: web.Application, desk: PurchaseDesk, admission: Admission) -> None:
    """Register the members' part of ``/api/v1``."""
    app.router.register_resource(PurchaseResource(order_handler(desk, admission)))
    for path, handler in (
        ("time", tell_time),
        ("campaigns", list_campaigns),
        ("campaigns/{id}", show_campaign),
        ("campaigns/{id}/availability", show_availability),
        ("campaigns/{id}/allowance", show_allowance),
        ("orders", list_orders),
        ("orders/{order_no}", show_order),
    ):
        app.router.add_get(f"/api/v1/{path}", guarded(handler))


def order_handler(desk: PurchaseDesk, admission: Admission) -> Handler:
    """Give the handler of POST /api/v1/campaigns/{id}/orders."""

    async def place_order(request: web.Request) -> web.StreamResponse:
        try:
            now, waited_s = time.monotonic(), 0.0
            if wait_s := admission.admit(now):
                if wait_s == MUST_WAIT:
                    wait_s = await admission.wait(request, now)
                    waited_s = time.monotonic() - now
                if wait_s:
                    raise Refused(Problem.OVERLOADED, retry_after_s=wait_s)  # noqa: TRY301
            wish = await read_body(request, ORDER_REQUEST)
            placed = await desk.purchase(
                request.match_info["id"],
                wish.quantity,
                wish.showing,
                checked_key(request.headers.get(KEY_HEADER)),
                bearer(request),
                waited_s=waited_s,
            )
        except Exception as error:  # noqa: BLE001 - guarded here: a wrapper is a coroutine more
            problem = error.problem if isinstance(error, Refused) else Problem.UNAVAILABLE
            desk.count_refused(request.match_info["id"], problem)
            response = failed(request, error)
            if isinstance(error, LineFull):
                response.force_close()
            return response
        status, body, headers = order_answer(placed)
        return web.Response(status=status, body=body, headers=headers)

    return place_order


def order_answer(told: Placed | Refused) -> Worded:
    """Word what became of a purchase: status, body, headers. Both lanes send this."""
    if isinstance(told, Refused):
        return problem_answer(told)
    headers: dict[str, str] = {
        hdrs.LOCATION: f"/api/v1/orders/{told.order.order_no}",
        hdrs.CACHE_CONTROL: "no-store",
        hdrs.CONTENT_TYPE: "application/json",
    }
    if told.replayed:
        headers["Idempotency-Replayed"] = "true"
    return 201, ENCODER.encode(told.order), headers


async def tell_time(request: web.Request) -> web.Response:
    """GET /api/v1/time."""
    now_ms = await request.app[ENGINE].catalogue.clock_ms()
    return json_response(TimeView(now=rfc3339(now_ms)), headers=NO_STORE)


async def list_campaigns(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns."""
    campaigns = [now for now in await request.app[ENGINE].catalogue.all() if now.listed]
    limit, start = page_limit(request), offset_cursor(request)
    page = campaigns[start : start + limit]
    following = encode_cursor(start + limit) if len(campaigns) > start + limit else None
    return tagged_response(
        request,
        ListView([campaign_view(now) for now in page], following),
        max_age_s=CAMPAIGN_MAX_AGE_S,
    )


async def show_campaign(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns/{id}."""
    return tagged_response(
        request, campaign_view(await visible_campaign(request)), max_age_s=CAMPAIGN_MAX_AGE_S
    )


async def show_availability(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns/{id}/availability."""
    now = await visible_campaign(request)
    return json_response(availability_view(now), headers=NO_STORE)


async def show_allowance(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns/{id}/allowance."""
    member = member_of(request)
    now = await visible_campaign(request)
    campaign = now.campaign
    redis = request.app[ENGINE].stores.redis
    records, revoked = await read_member(redis, campaign.id, member.no)
    card_remaining = campaign.card_limit - live_tickets(records)
    reason = _why_not(now, member, revoked=revoked, card_remaining=card_remaining)
    return json_response(
        AllowanceView(
            eligible=reason is None,
            reason=reason,
            card_limit=campaign.card_limit,
            card_remaining=card_remaining,
        ),
        headers=NO_STORE,
    )


async def list_orders(request: web.Request) -> web.Response:
    """GET /api/v1/orders."""
    limit = page_limit(request)
    before = decode_cursor(request, OrderCursor)
    member = member_of(request)
    orders, following = await request.app[ENGINE].orders.page(member.no, before, limit)
    cursor = None if following is None else encode_cursor(following)
    return json_response(ListView[Order](orders, cursor), headers=NO_STORE)


async def show_order(request: web.Request) -> web.Response:
    """GET /api/v1/orders/{order_no}."""
    member = member_of(request)
    order = await request.app[ENGINE].orders.one(member.no, request.match_info["order_no"])
    return json_response(order, headers=NO_STORE)


async def visible_campaign(request: web.Request) -> CampaignNow:
    """Give the campaign of the path, as members may see it. Raises Refused."""
    catalogue, campaign_id = request.app[ENGINE].catalogue, request.match_info["id"]
    if catalogue.known(campaign_id) is None:
        if not CAMPAIGN_ID.fullmatch(campaign_id):
            raise Refused(Problem.NOT_FOUND, "no such campaign")
        refuse_exhausted(request)
    now = await catalogue.now(campaign_id)
    if now is None or not now.visible:
        raise Refused(Problem.NOT_FOUND, "no such campaign")
    return now


def member_of(request: web.Request) -> Member:
    """Give the member whose token this is, and charge the member.

    Raises Refused (unauthenticated), TooFast.
    """
    engine = request.app[ENGINE]
    member = engine.tokens.verify(bearer(request) or "", time.time())
    limited = engine.limits.spend_card(member.no, time.monotonic())
    if limited is not None:
        raise TooFast(limited)
    return member


def _why_not(
    now: CampaignNow, member: Member, *, revoked: bool, card_remaining: int
) -> Problem | None:
    """Give the first reason why this member may not buy now, in the contract's order."""
    by_state = {
        State.SCHEDULED: Problem.NOT_OPEN,
        State.PAUSED: Problem.PAUSED,
        State.CLOSED: Problem.CLOSED,
        State.RECOVERING: Problem.UNAVAILABLE,
    }
    if revoked:
        return Problem.CARD_REVOKED
    if not may_meet(now.campaign, member.no) or (
        "*" not in now.campaign.unions and member.union not in now.campaign.unions
    ):
        return Problem.NOT_ELIGIBLE
    if now.state in by_state:
        return by_state[now.state]
    if card_remaining < 1:
        return Problem.LIMIT_EXCEEDED
    return Problem.SOLD_OUT if not any(now.remaining) else None
