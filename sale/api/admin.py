"""What operators call. Every step asks who, and most ask why; a key makes a repeat harmless."""

import time
from typing import Final

import msgspec
from aiohttp import web

from sale.api.charge import refuse_guessers
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
)
from sale.api.routing import Handler, guarded
from sale.api.schemas import (
    AuditEntryView,
    CampaignView,
    ListView,
    LiveView,
    ReasonRequest,
    ScheduleRequest,
    StockRequest,
)
from sale.api.views import campaign_view, remaining_views
from sale.db import read
from sale.domain.campaign import CAMPAIGN_ID, InvalidCampaign, parse_campaign
from sale.domain.clock import rfc3339
from sale.domain.problem import Problem, Refused
from sale.identity import operator_token_hash
from sale.operators.accounts import authenticate_operator
from sale.operators.campaigns import ACTIONS, Actor, moment_ms
from sale.stock.catalogue import CampaignNow

AUDIT_READERS: Final = frozenset({"admin", "auditor", "operator"})


def add_admin_routes(app: web.Application) -> None:
    """Register ``/api/v1/admin``."""
    base, one = "/api/v1/admin/campaigns", "/api/v1/admin/campaigns/{id}"
    app.router.add_get(base, guarded(list_campaigns))
    app.router.add_post(base, guarded(create_campaign))
    app.router.add_get(one, guarded(show_campaign))
    app.router.add_delete(one, guarded(delete_campaign))
    app.router.add_get(f"{one}/live", guarded(show_live))
    app.router.add_post(f"{one}/stock", guarded(add_stock))
    for action in ACTIONS:
        app.router.add_post(f"{one}/{action}", guarded(_step_handler(action)))
    app.router.add_get("/api/v1/admin/audit-log", guarded(show_audit_log))


async def list_campaigns(request: web.Request) -> web.Response:
    """GET /api/v1/admin/campaigns: drafts too, and rehearsals with ``?rehearsals=true``."""
    actor = await actor_of(request)
    rehearsals = _flag(request, "rehearsals")
    limit, start = page_limit(request), offset_cursor(request)
    campaigns = [
        now
        for now in await request.app[ENGINE].catalogue.read_all()
        if actor.may_see(now) and (rehearsals or not now.campaign.rehearsal_of)
    ]
    page = campaigns[start : start + limit]
    following = encode_cursor(start + limit) if len(campaigns) > start + limit else None
    return json_response(
        ListView[CampaignView]([campaign_view(now) for now in page], following), headers=NO_STORE
    )


async def create_campaign(request: web.Request) -> web.Response:
    """POST /api/v1/admin/campaigns: the fields of a campaign file as JSON."""
    actor = await actor_of(request)
    engine = request.app[ENGINE]
    table = await read_body(request, _TABLE)
    try:
        campaign = parse_campaign(table, frozenset(engine.stores.unions))
    except InvalidCampaign as wrong:
        raise Refused(
            Problem.INVALID_REQUEST,
            str(wrong),
            field=next(iter(wrong.problems)),
            fields=wrong.problems,
        ) from None
    now = await engine.campaigns.create(campaign, actor, None, _key(request))
    return web.Response(
        status=201,
        body=ENCODER.encode(campaign_view(now)),
        content_type="application/json",
        headers={"Location": f"/api/v1/admin/campaigns/{campaign.id}", **NO_STORE},
    )


async def show_campaign(request: web.Request) -> web.Response:
    """GET /api/v1/admin/campaigns/{id}."""
    return json_response(campaign_view(await _now(request)), headers=NO_STORE)


async def delete_campaign(request: web.Request) -> web.Response:
    """DELETE /api/v1/admin/campaigns/{id}: drafts only."""
    actor = await actor_of(request)
    campaign_id = request.match_info["id"]
    await request.app[ENGINE].campaigns.delete(campaign_id, actor, None, _key(request))
    return web.Response(status=204)


async def show_live(request: web.Request) -> web.Response:
    """GET /api/v1/admin/campaigns/{id}/live."""
    now = await _now(request)
    async with request.app[ENGINE].stores.pool.acquire() as connection:
        applied, _ = await read.position(connection, now.campaign.id)
    return json_response(
        LiveView(
            id=now.campaign.id,
            state=now.state.value,
            trouble=now.recovering or None,
            showings=remaining_views(now),
            ledger_seq=now.seq,
            ledger_applied=applied,
            as_of=rfc3339(now.as_of_ms),
        ),
        headers=NO_STORE,
    )


async def add_stock(request: web.Request) -> web.Response:
    """POST /api/v1/admin/campaigns/{id}/stock."""
    actor = await actor_of(request)
    wish = await read_body(request, _STOCK)
    now = await request.app[ENGINE].campaigns.add_stock(
        request.match_info["id"], wish.showing, wish.add, actor, wish.reason, _key(request)
    )
    return json_response(campaign_view(now), headers=NO_STORE)


async def show_audit_log(request: web.Request) -> web.Response:
    """GET /api/v1/admin/audit-log, newest first; ``?campaign=`` narrows it.

    One that is hidden from this account has no rows, like one that does not exist.
    """
    actor = await actor_of(request)
    if actor.role not in AUDIT_READERS:
        raise Refused(Problem.FORBIDDEN, f"the role {actor.role!r} may not read the audit log")
    limit = page_limit(request)
    campaign = request.query.get("campaign")
    if campaign is not None and not CAMPAIGN_ID.fullmatch(campaign):
        raise Refused(
            Problem.INVALID_REQUEST, "campaign: 1 to 48 of a-z, 0-9 and -", field="campaign"
        )
    async with request.app[ENGINE].stores.pool.acquire() as connection:
        rows = await read.audit_log(
            connection,
            limit=limit + 1,
            before_id=decode_cursor(request, int),
            campaign=campaign,
            union=None if actor.sees_all else actor.union,
        )
    page = rows[:limit]
    following = encode_cursor(page[-1].id) if len(rows) > limit else None
    return json_response(ListView([_audit_view(row) for row in page], following), headers=NO_STORE)


async def actor_of(request: web.Request) -> Actor:
    """Give who this operator is. Raises Refused: 401 for nobody, 403 for a member."""
    engine = request.app[ENGINE]
    token = bearer(request) or ""
    if _is_member(request, token):  # told without a look at PostgreSQL
        raise Refused(Problem.FORBIDDEN, "a member's token does not open this")
    refuse_guessers(request, token)
    try:
        operator = await authenticate_operator(engine.stores.pool, token)
    except Refused:
        engine.limits.forget(operator_token_hash(token))
        raise
    engine.limits.remember(operator_token_hash(token), time.monotonic())
    # An account may be called "clock" or "cli:root": the log tells where a name is from (INV-10).
    return Actor(f"operator:{operator.name}", operator.role, operator.union_code)


def _is_member(request: web.Request, token: str) -> bool:
    try:
        request.app[ENGINE].tokens.verify(token, time.time())
    except Refused:
        return False
    return True


def _step_handler(action: str) -> Handler:
    async def take_step(request: web.Request) -> web.Response:
        actor = await actor_of(request)
        opens_at_ms = None
        reason: str | None = None
        if action == "schedule":
            wish = ScheduleRequest()
            if request.can_read_body:
                wish = await read_body(request, _SCHEDULE)
            reason = wish.reason
            opens_at_ms = None if wish.at is None else moment_ms(wish.at)
        elif request.can_read_body:
            reason = (await read_body(request, _REASON)).reason
        now = await request.app[ENGINE].campaigns.step(
            request.match_info["id"], action, actor, reason, _key(request), opens_at_ms
        )
        return json_response(campaign_view(now), headers=NO_STORE)

    return take_step


async def _now(request: web.Request) -> CampaignNow:
    actor = await actor_of(request)
    return await request.app[ENGINE].campaigns.show(request.match_info["id"], actor)


def _flag(request: web.Request, name: str) -> bool:
    """Read a query parameter that is ``true`` or ``false``, default false. Raises Refused."""
    text = request.query.get(name, "false")
    if text not in {"true", "false"}:
        raise Refused(Problem.INVALID_REQUEST, f"{name}: must be true or false", field=name)
    return text == "true"


def _key(request: web.Request) -> str | None:
    key = request.headers.get(KEY_HEADER)
    return None if key is None else checked_key(key)


def _audit_view(row: read.AuditRow) -> AuditEntryView:
    return AuditEntryView(
        id=row.id,
        at=rfc3339(row.at_ms),
        actor=row.actor,
        action=row.action,
        target=row.target,
        campaign=row.campaign_id,
        reason=row.reason,
        data=row.data,
    )


_TABLE: Final = msgspec.json.Decoder(dict[str, object])
_REASON: Final = msgspec.json.Decoder(ReasonRequest)
_SCHEDULE: Final = msgspec.json.Decoder(ScheduleRequest)
_STOCK: Final = msgspec.json.Decoder(StockRequest)
