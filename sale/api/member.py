"""What members call: buy, read their orders, see what there is. The purchase starts here."""

import base64
import binascii
import hashlib
import re
import time
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from sale.api.problems import problem_response
from sale.api.routing import Handler, PurchaseResource, failed, guarded
from sale.api.schemas import (
    AllowanceView,
    AvailabilityView,
    CampaignView,
    ListView,
    OrderRequest,
    RemainingView,
    ShowingView,
    TimeView,
)
from sale.bootstrap import Engine
from sale.db.ledger import OrderCursor
from sale.domain import IDEMPOTENCY_KEY, CampaignState, Order, Problem, Refused, rfc3339
from sale.identity import Member
from sale.stock.catalogue import CampaignNow, read_card, redis_now_ms
from sale.usecases.orders import live_tickets
from sale.usecases.purchase import PurchaseDesk

ENGINE: Final = web.AppKey("engine", Engine)
BODY_MAX: Final = 16 * 1024
LIMIT_DEFAULT, LIMIT_MAX = 50, 200
NO_STORE: Final = {"Cache-Control": "no-store"}
FIELD: Final = re.compile(r"\$\.([a-z_]+)")
UNKNOWN_FIELD: Final = re.compile(r"unknown field `([^`]{1,64})`")
Body = TypeVar("Body")


def add_member_routes(app: web.Application, desk: PurchaseDesk) -> None:
    """Register the members' part of ``/api/v1``."""
    app.router.register_resource(PurchaseResource(order_handler(desk)))
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


def order_handler(desk: PurchaseDesk) -> Handler:
    """Give the handler of POST /api/v1/campaigns/{id}/orders."""

    async def place_order(request: web.Request) -> web.StreamResponse:
        try:
            wish = await read_body(request, _ORDER_REQUEST)
            placed = await desk.purchase(
                request.match_info["id"],
                wish.quantity,
                wish.showing,
                idempotency_key(request),
                bearer(request),
            )
        except Exception as error:  # noqa: BLE001 - guarded here: a wrapper is a coroutine more
            problem = error.problem if isinstance(error, Refused) else Problem.UNAVAILABLE
            desk.count_refused(request.match_info["id"], problem)
            return failed(request, error)
        if isinstance(placed, Refused):
            return problem_response(placed)
        headers = {
            "Location": f"/api/v1/orders/{placed.order.order_no}",
            "Cache-Control": "no-store",
            "Content-Type": "application/json",
        }
        if placed.replayed:
            headers["Idempotency-Replayed"] = "true"
        return web.Response(status=201, body=_ENCODER.encode(placed.order), headers=headers)

    return place_order


async def tell_time(request: web.Request) -> web.Response:
    """GET /api/v1/time."""
    now_ms = await redis_now_ms(request.app[ENGINE].stores.redis)
    return json_response(TimeView(now=rfc3339(now_ms)), headers=NO_STORE)


async def list_campaigns(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns."""
    campaigns = [now for now in await request.app[ENGINE].catalogue.all() if now.visible]
    limit, start = page_limit(request), _offset_cursor(request)
    page = campaigns[start : start + limit]
    following = encode_cursor(start + limit) if len(campaigns) > start + limit else None
    return tagged_response(
        request, ListView([campaign_view(now) for now in page], following), max_age_s=1
    )


async def show_campaign(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns/{id}."""
    return tagged_response(request, campaign_view(await visible_campaign(request)), max_age_s=1)


async def show_availability(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns/{id}/availability."""
    now = await visible_campaign(request)
    return json_response(
        AvailabilityView(remaining_views(now), rfc3339(now.as_of_ms)), headers=NO_STORE
    )


async def show_allowance(request: web.Request) -> web.Response:
    """GET /api/v1/campaigns/{id}/allowance."""
    member = member_of(request)
    now = await visible_campaign(request)
    campaign = now.campaign
    redis = request.app[ENGINE].stores.redis
    records, revoked = await read_card(redis, campaign.id, member.card_no)
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
    before = _order_cursor(request)
    member = member_of(request)
    orders, following = await request.app[ENGINE].orders.page(member.card_no, before, limit)
    cursor = None if following is None else encode_cursor(following)
    return json_response(ListView[Order](orders, cursor), headers=NO_STORE)


async def show_order(request: web.Request) -> web.Response:
    """GET /api/v1/orders/{order_no}."""
    member = member_of(request)
    order = await request.app[ENGINE].orders.one(member.card_no, request.match_info["order_no"])
    return json_response(order, headers=NO_STORE)


async def visible_campaign(request: web.Request) -> CampaignNow:
    """Give the campaign of the path, as members may see it. Raises Refused."""
    now = await request.app[ENGINE].catalogue.now(request.match_info["id"])
    if now is None or not now.visible:
        raise Refused(Problem.NOT_FOUND, "no such campaign")
    return now


def bearer(request: web.Request) -> str | None:
    """Give the bearer token, or None."""
    header = request.headers.get("Authorization", "")
    return header[7:] if header[:7].lower() == "bearer " else None


def member_of(request: web.Request) -> Member:
    """Give whose token this is. Raises Refused (unauthenticated)."""
    return request.app[ENGINE].tokens.verify(bearer(request) or "", time.time())


def idempotency_key(request: web.Request) -> str:
    """Give the idempotency key. Raises Refused where it is missing or malformed."""
    key = request.headers.get("Idempotency-Key")
    if key is None:
        raise Refused(
            Problem.MISSING_IDEMPOTENCY_KEY, "send a header Idempotency-Key, new for each order"
        )
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise Refused(
            Problem.INVALID_REQUEST,
            "Idempotency-Key: must be 1 to 64 of A-Z, a-z, 0-9, _ and -",
            field="Idempotency-Key",
        )
    return key


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Read and check a JSON body. Raises Refused for its type, size, syntax and fields."""
    media_type = request.headers.get("Content-Type", "")
    if media_type != "application/json" and not _is_json(media_type):
        raise Refused(Problem.UNSUPPORTED_MEDIA_TYPE, "send application/json")
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Refused(Problem.PAYLOAD_TOO_LARGE, f"at most {BODY_MAX} bytes") from None
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        field = FIELD.search(message) or UNKNOWN_FIELD.search(message)
        name = field[1] if field else "body"
        what = message.split(" - at ", maxsplit=1)[0].replace("`", "'")
        raise Refused(Problem.INVALID_REQUEST, f"{name}: {what}", field=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refused(Problem.INVALID_REQUEST, "the body is not JSON", field="body") from None


def page_limit(request: web.Request) -> int:
    """Give ``?limit=``, 1 to 200, default 50. Raises Refused."""
    text = request.query.get("limit")
    if text is None:
        return LIMIT_DEFAULT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:4]) <= LIMIT_MAX:
        raise Refused(
            Problem.INVALID_REQUEST, f"limit: must be from 1 to {LIMIT_MAX}", field="limit"
        )
    return int(text)


def encode_cursor(value: object) -> str:
    """Word a cursor: opaque to clients."""
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")


def decode_cursor(request: web.Request, kind: type[Body]) -> Body | None:
    """Read ``?cursor=``. Raises Refused."""
    text = request.query.get("cursor")
    if text is None:
        return None
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, binascii.Error, ValueError):
        raise Refused(
            Problem.INVALID_REQUEST, "cursor: not one that was given out", field="cursor"
        ) from None


def json_response(body: object, *, headers: dict[str, str] | None = None) -> web.Response:
    """Answer 200 with JSON."""
    return web.Response(
        body=_ENCODER.encode(body), content_type="application/json", headers=headers
    )


def tagged_response(request: web.Request, body: object, *, max_age_s: int) -> web.Response:
    """Answer with an ETag, or 304 where the client has it already."""
    encoded = _ENCODER.encode(body)
    tag = f'"{hashlib.blake2b(encoded, digest_size=12).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": f"public, max-age={max_age_s}"}
    known = [part.strip() for part in request.headers.get("If-None-Match", "").split(",")]
    if "*" in known or tag in known or f"W/{tag}" in known:
        return web.Response(status=304, headers=headers)
    return web.Response(body=encoded, content_type="application/json", headers=headers)


def campaign_view(now: CampaignNow) -> CampaignView:
    """Word a campaign as the contract has it."""
    campaign = now.campaign
    return CampaignView(
        id=campaign.id,
        title=campaign.title,
        category=campaign.category,
        price_fen=campaign.price_fen,
        payment=campaign.payment,
        card_limit=campaign.card_limit,
        order_max=campaign.order_max,
        state=now.state.value,
        opens_at=None if now.opens_at_ms is None else rfc3339(now.opens_at_ms),
        closes_at=None if now.closes_at_ms is None else rfc3339(now.closes_at_ms),
        unions=list(campaign.unions),
        owner=campaign.owner,
        showings=[
            ShowingView(
                id=showing.id,
                title=showing.title,
                starts_at=None if showing.starts_at is None else showing.starts_at.isoformat(),
                tickets=tickets,
            )
            for showing, tickets in zip(campaign.showings, now.tickets, strict=True)
        ],
    )


def remaining_views(now: CampaignNow) -> list[RemainingView]:
    """Word what is left of each showing."""
    return [
        RemainingView(showing.id, tickets, remaining)
        for showing, tickets, remaining in zip(
            now.campaign.showings, now.tickets, now.remaining, strict=True
        )
    ]


def _why_not(
    now: CampaignNow, member: Member, *, revoked: bool, card_remaining: int
) -> Problem | None:
    """Give the first reason why this card may not buy now, in the contract's order."""
    by_state = {
        CampaignState.SCHEDULED: Problem.NOT_OPEN,
        CampaignState.PAUSED: Problem.PAUSED,
        CampaignState.CLOSED: Problem.CLOSED,
        CampaignState.RECOVERING: Problem.UNAVAILABLE,
    }
    if revoked:
        return Problem.CARD_REVOKED
    if "*" not in now.campaign.unions and member.union not in now.campaign.unions:
        return Problem.NOT_ELIGIBLE
    if now.state in by_state:
        return by_state[now.state]
    if card_remaining < 1:
        return Problem.LIMIT_EXCEEDED
    return Problem.SOLD_OUT if not any(now.remaining) else None


def _is_json(media_type: str) -> bool:
    kind, _, parameter = media_type.partition(";")
    return kind.strip().lower() == "application/json" and (
        not parameter or parameter.strip().lower() in {"charset=utf-8", 'charset="utf-8"'}
    )


def _offset_cursor(request: web.Request) -> int:
    start = decode_cursor(request, int)
    if start is not None and start < 0:
        raise Refused(Problem.INVALID_REQUEST, "cursor: not one that was given out", field="cursor")
    return start or 0


def _order_cursor(request: web.Request) -> OrderCursor | None:
    return decode_cursor(request, OrderCursor)


_ENCODER: Final = msgspec.json.Encoder()
_ORDER_REQUEST: Final = msgspec.json.Decoder(OrderRequest)
