"""Calls of members: buy, read their orders, read their allowance.

The purchase starts here where the fast path does not serve it.
"""

import time
from typing import Final

import msgspec
from aiohttp import hdrs, web

from sale.api import queries
from sale.api.admit import WAITING
from sale.api.calls import Call, MemberCall
from sale.api.dispatch import MEMBER
from sale.api.problems import Worded, problem_answer
from sale.api.public import CAMPAIGN, visible_campaign
from sale.api.request import ENCODER, bearer, checked_key, read_body
from sale.api.schemas import CancelRequest, ListView, OrderRequest, PayRequest
from sale.domain.order import Order, OrderCursor
from sale.domain.problem import Problem, Refused
from sale.http.overload import MUST_WAIT
from sale.http.request import KEY_HEADER, encode_cursor
from sale.http.routes import Access, Key, Load, Route
from sale.members.campaigns import Allowance
from sale.members.pay import PaymentView
from sale.members.purchase import Placed

ORDER_REQUEST: Final = msgspec.json.Decoder(OrderRequest)
ORDERS: Final = "/api/v1/orders"
MEMBERS: Final = Access(MEMBER)
ORDER_CURSOR: Final = queries.cursor_query(OrderCursor)


async def place_order(call: Call[None]) -> web.StreamResponse:
    """POST /api/v1/campaigns/{id}/orders."""
    request, desk, campaign_id = call.request, call.engine.desk, call.path["id"]
    try:
        waited_s = await _let_in(request)
        wish = await read_body(request, ORDER_REQUEST)
        outcome = await desk.purchase(
            campaign_id,
            wish.quantity,
            wish.showing,
            checked_key(request.headers.get(KEY_HEADER)),
            bearer(request),
            waited_s=waited_s,
        )
    except Exception as error:
        problem = error.problem if isinstance(error, Refused) else Problem.UNAVAILABLE
        desk.count_refused(campaign_id, problem)
        raise
    status, body, headers = order_answer(outcome)
    return web.Response(status=status, body=body, headers=headers)


async def _let_in(request: web.Request) -> float:
    """Let a purchase in, or have it wait in the line; give how long it waited, in seconds.

    Raises Refused (overloaded).
    """
    admission, now = request.app[WAITING], time.monotonic()
    wait_s = admission.admit(now)
    if not wait_s:
        return 0.0
    if wait_s == MUST_WAIT:
        wait_s = await admission.wait(request, now)
    if wait_s:
        raise Refused(Problem.OVERLOADED, retry_after_s=wait_s)
    return time.monotonic() - now


def order_answer(outcome: Placed | Refused) -> Worded:
    """Word what became of a purchase: status, body, headers. Both paths send this."""
    if isinstance(outcome, Refused):
        return problem_answer(outcome)
    headers: dict[str, str] = {
        hdrs.LOCATION: f"{ORDERS}/{outcome.order.order_no}",
        hdrs.CACHE_CONTROL: "no-store",
        hdrs.CONTENT_TYPE: "application/json",
    }
    if outcome.replayed:
        headers["Idempotency-Replayed"] = "true"
    return 201, ENCODER.encode(outcome.order), headers


async def show_allowance(call: MemberCall[None]) -> Allowance:
    """GET /api/v1/campaigns/{id}/allowance."""
    now = await visible_campaign(call)
    return await call.engine.public_campaigns.allowance(now, call.member)


async def list_orders(call: MemberCall[None]) -> ListView[Order]:
    """GET /api/v1/orders."""
    orders, following = await call.engine.orders.page(
        call.member.no, call.value(ORDER_CURSOR), call.value(queries.LIMIT)
    )
    return ListView(orders, None if following is None else encode_cursor(following))


async def show_order(call: MemberCall[None]) -> Order:
    """GET /api/v1/orders/{order_no}."""
    return await call.engine.orders.one(call.member.no, call.path["order_no"])


async def cancel_order(call: MemberCall[CancelRequest]) -> Order:
    """POST /api/v1/orders/{order_no}/cancel."""
    return await call.engine.cancellations.cancel(
        call.member.no, call.path["order_no"], call.body.tickets
    )


async def pay_order(call: MemberCall[PayRequest]) -> PaymentView:
    """POST /api/v1/orders/{order_no}/pay."""
    return await call.engine.payments.pay(
        call.member.no, call.path["order_no"], call.body.return_to
    )


ROUTES: Final = (
    Route(
        method="POST",
        path=f"{CAMPAIGN}/orders",
        handler=place_order,
        summary="Buy tickets",
        access=MEMBERS,
        load=Load.HANDLER,
        key=Key.REQUIRED,
        body=OrderRequest,
        answer=Order,
        status=201,
        headers={
            "Location": "Where the order is read.",
            "Idempotency-Replayed": "`true` where the same key was answered before.",
        },
        problems=(
            Problem.INVALID_REQUEST,
            Problem.PAYLOAD_TOO_LARGE,
            Problem.UNSUPPORTED_MEDIA_TYPE,
            Problem.IDEMPOTENCY_MISMATCH,
            Problem.MISSING_IDEMPOTENCY_KEY,
            Problem.UNAUTHENTICATED,
            Problem.NOT_ELIGIBLE,
            Problem.CARD_REVOKED,
            Problem.NOT_FOUND,
            Problem.NOT_OPEN,
            Problem.PAUSED,
            Problem.CLOSED,
            Problem.SOLD_OUT,
            Problem.LIMIT_EXCEEDED,
            Problem.TOO_MANY_ORDERS,
        ),
    ),
    Route(
        method="GET",
        path=f"{CAMPAIGN}/allowance",
        handler=show_allowance,
        summary="What the card may still buy",
        access=MEMBERS,
        answer=Allowance,
        problems=(Problem.UNAUTHENTICATED, Problem.NOT_FOUND),
    ),
    Route(
        method="GET",
        path=ORDERS,
        handler=list_orders,
        summary="The card's own orders, newest first",
        access=MEMBERS,
        queries=(queries.LIMIT, ORDER_CURSOR),
        answer=ListView[Order],
        problems=(Problem.UNAUTHENTICATED,),
    ),
    Route(
        method="GET",
        path=f"{ORDERS}/{{order_no}}",
        handler=show_order,
        summary="One of the card's own orders",
        access=MEMBERS,
        answer=Order,
        problems=(Problem.UNAUTHENTICATED, Problem.NOT_FOUND),
    ),
    Route(
        method="POST",
        path=f"{ORDERS}/{{order_no}}/cancel",
        handler=cancel_order,
        summary="Give tickets back",
        description="The key is required and not remembered: the tickets' state decides, and a "
        "ticket that was given back before counts as done.",
        access=MEMBERS,
        key=Key.REQUIRED,
        body=CancelRequest,
        body_needed=False,
        answer=Order,
        problems=(
            Problem.INVALID_REQUEST,
            Problem.PAYLOAD_TOO_LARGE,
            Problem.UNSUPPORTED_MEDIA_TYPE,
            Problem.MISSING_IDEMPOTENCY_KEY,
            Problem.UNAUTHENTICATED,
            Problem.NOT_FOUND,
            Problem.WRONG_STATE,
        ),
    ),
    Route(
        method="POST",
        path=f"{ORDERS}/{{order_no}}/pay",
        handler=pay_order,
        summary="Begin to pay a held order",
        description="Again: the same payment. 503 where no provider is configured.",
        access=MEMBERS,
        body=PayRequest,
        body_needed=False,
        answer=PaymentView,
        problems=(
            Problem.INVALID_REQUEST,
            Problem.PAYLOAD_TOO_LARGE,
            Problem.UNSUPPORTED_MEDIA_TYPE,
            Problem.UNAUTHENTICATED,
            Problem.NOT_FOUND,
            Problem.WRONG_STATE,
        ),
    ),
)
