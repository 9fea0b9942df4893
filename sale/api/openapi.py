"""The description of the API, ``GET /openapi.json``: OpenAPI 3.1, built once.

Schemas come from the very types that are decoded and encoded, so they cannot drift; the paths are
written by hand, one line of facts each. What later work adds is not described before it is there.
"""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from sale.api import schemas
from sale.api.problems import CONTENT_TYPE, WORDINGS
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.order import Order
from sale.domain.problem import Problem
from sale.http.request_ids import HEADER, PATTERN

_LIMIT: Final = {
    "name": "limit",
    "in": "query",
    "description": "Items on a page.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 200, "default": 50},
}
_CURSOR: Final = {
    "name": "cursor",
    "in": "query",
    "description": "The `next` of the page before.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200},
}
_REHEARSALS: Final = {
    "name": "rehearsals",
    "in": "query",
    "description": "`true`: list rehearsals too.",
    "schema": {"type": "string", "enum": ["true", "false"], "default": "false"},
}
_OF_CAMPAIGN: Final = {
    "name": "campaign",
    "in": "query",
    "description": "Only what concerns this campaign.",
    "schema": {"type": "string", "pattern": f"^{CAMPAIGN_ID.pattern}$"},
}
_KNOWN: Final = {
    "name": "If-None-Match",
    "in": "header",
    "description": "ETags of what the client has: 304 where it is still so.",
    "schema": {"type": "string"},
}


def _header(description: str, **schema: object) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string", **schema}}


_NAME: Final = {
    "name": str(HEADER),
    "in": "header",
    "description": "A name for the request. One of another form, or given twice, is replaced.",
    "schema": {"type": "string", "pattern": f"^{PATTERN.pattern}$"},
}
_NAMED: Final = {str(HEADER): _header("The request's name: the one that was given, or a new one.")}
_REPLAYED: Final = {
    "Idempotency-Replayed": _header("`true` where the same key was answered before.", const="true")
}
_ETAG: Final = {
    "ETag": _header("What the answer is known by."),
    "Cache-Control": _header("How long it may be kept."),
}
_RATE: Final = {
    "RateLimit-Policy": _header("The limit: its quota and window, in seconds."),
    "RateLimit": _header("What is left of it, and for how long."),
}
_RETRY: Final = {
    "Retry-After": {
        "description": "Seconds; where waiting helps.",
        "schema": {"type": "integer"},
    }
}
_OFFER: Final = {"WWW-Authenticate": _header("How to identify oneself.", const="Bearer")}


class _Call(NamedTuple):
    """The facts of one call, from which its operation object is made."""

    method: str
    path: str
    summary: str
    answer: Any
    problems: tuple[Problem, ...] = ()
    body: Any = None
    status: int = 200
    who: str = ""
    key: bool | None = None
    body_needed: bool = True
    listed: bool = False
    tagged: bool = False
    queries: tuple[dict[str, Any], ...] = ()
    located: str = ""


_ANY_CALL: Final = (
    Problem.INVALID_REQUEST,
    Problem.RATE_LIMITED,
    Problem.OVERLOADED,
    Problem.UNAVAILABLE,
)
"""What every call but the health checks may be answered: what is wrong with a request itself, a
limit that its sender is beyond, a host or a store at its end."""
_OPERATOR_PROBLEMS: Final = (Problem.UNAUTHENTICATED, Problem.FORBIDDEN)
_BODY_PROBLEMS: Final = (
    Problem.INVALID_REQUEST,
    Problem.PAYLOAD_TOO_LARGE,
    Problem.UNSUPPORTED_MEDIA_TYPE,
    Problem.IDEMPOTENCY_MISMATCH,
)
_PURCHASE_PROBLEMS: Final = (
    *_BODY_PROBLEMS,
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
)
_ADMIN: Final = "/api/v1/admin"
_CAMPAIGN: Final = "/api/v1/campaigns/{id}"

_PUBLIC_CALLS: Final = (
    _Call("get", "/healthz", "Whether this process runs", schemas.HealthView),
    _Call("get", "/readyz", "Whether this host can sell", schemas.HealthView),
    _Call("get", "/api/v1/time", "The clock that decides openings", schemas.TimeView),
    _Call(
        "get",
        "/api/v1/campaigns",
        "Campaigns, drafts left out",
        schemas.ListView[schemas.CampaignView],
        listed=True,
        tagged=True,
    ),
    _Call(
        "get",
        _CAMPAIGN,
        "One campaign",
        schemas.CampaignView,
        (Problem.NOT_FOUND,),
        tagged=True,
    ),
    _Call(
        "get",
        f"{_CAMPAIGN}/availability",
        "What remains, at most one second old",
        schemas.AvailabilityView,
        (Problem.NOT_FOUND,),
    ),
)
_MEMBER_CALLS: Final = (
    _Call(
        "get",
        f"{_CAMPAIGN}/allowance",
        "What the card may still buy",
        schemas.AllowanceView,
        (Problem.UNAUTHENTICATED, Problem.NOT_FOUND),
        who="member",
    ),
    _Call(
        "post",
        f"{_CAMPAIGN}/orders",
        "Buy tickets",
        Order,
        _PURCHASE_PROBLEMS,
        body=schemas.OrderRequest,
        status=201,
        who="member",
        key=True,
        located="Where the order is read.",
    ),
    _Call(
        "get",
        "/api/v1/orders",
        "The card's own orders, newest first",
        schemas.ListView[Order],
        (Problem.UNAUTHENTICATED,),
        who="member",
        listed=True,
    ),
    _Call(
        "get",
        "/api/v1/orders/{order_no}",
        "One of the card's own orders",
        Order,
        (Problem.UNAUTHENTICATED, Problem.NOT_FOUND),
        who="member",
    ),
)


def _operation_call(verb: str, summary: str, body: Any, *, body_needed: bool = True) -> _Call:  # noqa: ANN401 - a type form
    return _Call(
        "post",
        f"{_ADMIN}/campaigns/{{id}}/{verb}",
        summary,
        schemas.CampaignView,
        (*_OPERATOR_PROBLEMS, *_BODY_PROBLEMS, Problem.NOT_FOUND, Problem.WRONG_STATE),
        body=body,
        body_needed=body_needed,
        who="operator",
        key=False,
    )


_OPERATOR_CALLS: Final = (
    _Call(
        "get",
        f"{_ADMIN}/campaigns",
        "All campaigns that the account may see, its own drafts too",
        schemas.ListView[schemas.CampaignView],
        _OPERATOR_PROBLEMS,
        who="operator",
        listed=True,
        queries=(_REHEARSALS,),
    ),
    _Call(
        "post",
        f"{_ADMIN}/campaigns",
        "Create a campaign",
        schemas.CampaignView,
        (*_OPERATOR_PROBLEMS, *_BODY_PROBLEMS, Problem.WRONG_STATE),
        body=schemas.CampaignRequest,
        status=201,
        who="operator",
        key=False,
        located="Where the campaign is read.",
    ),
    _Call(
        "get",
        f"{_ADMIN}/campaigns/{{id}}",
        "One campaign, a draft too",
        schemas.CampaignView,
        (*_OPERATOR_PROBLEMS, Problem.NOT_FOUND),
        who="operator",
    ),
    _Call(
        "delete",
        f"{_ADMIN}/campaigns/{{id}}",
        "Delete a draft",
        None,
        (
            *_OPERATOR_PROBLEMS,
            Problem.NOT_FOUND,
            Problem.WRONG_STATE,
            Problem.IDEMPOTENCY_MISMATCH,
        ),
        status=204,
        who="operator",
        key=False,
    ),
    _operation_call(
        "schedule",
        "Schedule a draft, or move the opening",
        schemas.ScheduleRequest,
        body_needed=False,
    ),
    *(
        _operation_call(verb, summary, schemas.ReasonRequest, body_needed=False)
        for verb, summary in (
            ("open", "Open by hand, now"),
            ("resume", "Resume"),
            ("close", "Close"),
        )
    ),
    _operation_call("pause", "Pause", schemas.ReasonedRequest),
    _operation_call("reopen", "Reopen", schemas.ReasonedRequest),
    _operation_call("stock", "Add tickets to a showing", schemas.StockRequest),
    _Call(
        "get",
        f"{_ADMIN}/campaigns/{{id}}/live",
        "The campaign as the engine has it now",
        schemas.LiveView,
        (*_OPERATOR_PROBLEMS, Problem.NOT_FOUND),
        who="operator",
    ),
    _Call(
        "get",
        f"{_ADMIN}/audit-log",
        "Who did what, when and why, as far as the account may see it",
        schemas.ListView[schemas.AuditEntryView],
        _OPERATOR_PROBLEMS,
        who="operator",
        listed=True,
        queries=(_OF_CAMPAIGN,),
    ),
)
_CALLS: Final = (*_PUBLIC_CALLS, *_MEMBER_CALLS, *_OPERATOR_CALLS)


def build_document() -> bytes:
    """Build the OpenAPI 3.1 document, encoded as JSON."""
    forms: list[Any] = [schemas.ProblemView]
    for call in _CALLS:
        forms += [form for form in (call.answer, call.body) if form is not None]
    unique = list(dict.fromkeys(forms))
    refs, components = msgspec.json.schema_components(
        unique, ref_template="#/components/schemas/{name}"
    )
    ref_of = dict(zip(unique, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for call in _CALLS:
        paths.setdefault(call.path, {})[call.method] = _operation(call, ref_of)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "sale",
            "version": "1",
            "summary": "A flash-sale engine for union members' tickets.",
            "description": "Times are RFC 3339 with offset, money is fen (`*_fen`). Errors are "
            "RFC 9457 problem documents; `/problems/` lists them, `/problems/{code}` tells each "
            "in words.",
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": "public"}, {"name": "member"}, {"name": "operator"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "member": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "operator": {"type": "http", "scheme": "bearer"},
            },
        },
    }
    return msgspec.json.encode(document)


def _operation(call: _Call, ref_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(call),
        "summary": call.summary,
        "tags": [call.who or "public"],
        "parameters": _parameters(call),
        "responses": _responses(call, ref_of),
    }
    if call.body is not None:
        operation["requestBody"] = {
            "required": call.body_needed,
            "content": {"application/json": {"schema": ref_of[call.body]}},
        }
    if call.who:
        operation["security"] = [{call.who: []}]
    return operation


def _operation_id(call: _Call) -> str:
    path = call.path.removeprefix("/api/v1").replace("{", "by-").replace("}", "")
    return call.method + "-" + "-".join(part for part in path.split("/") if part)


def _parameters(call: _Call) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if "{id}" in call.path:
        parameters.append(_path_parameter("id", r"^[a-z0-9-]{1,48}$"))
    if "{order_no}" in call.path:
        parameters.append(_path_parameter("order_no", r"^[A-Za-z0-9.-]{1,64}$"))
    if call.listed:
        parameters += [_LIMIT, _CURSOR]
    parameters += call.queries
    if call.tagged:
        parameters.append(_KNOWN)
    if call.key is not None:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": call.key,
                "description": "New for each wish, the same for its retries: it is done once.",
                "schema": {"type": "string", "pattern": r"^[A-Za-z0-9_-]{1,64}$"},
            }
        )
    return [*parameters, _NAME]


def _path_parameter(name: str, pattern: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": pattern}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _responses(call: _Call, ref_of: dict[Any, Any]) -> dict[str, Any]:
    done: dict[str, Any] = {"description": "Done."}
    if call.answer is not None:
        done["content"] = {"application/json": {"schema": ref_of[call.answer]}}
    headers = dict(_ETAG) if call.tagged else {}
    if call.located:
        headers["Location"] = _header(call.located)
    if call.key:
        headers |= _REPLAYED
    if headers:
        done["headers"] = headers
    responses = {str(call.status): done}
    if call.tagged:
        responses["304"] = {"description": "As the client has it.", "headers": _ETAG}
    if call.path == "/readyz":
        responses["503"] = {
            **done,
            "description": "Not ready, with the reasons.",
            "headers": {**headers, **_RETRY},
        }
    elif call.path != "/healthz":
        problems = dict.fromkeys((*call.problems, *_ANY_CALL))
        responses |= _problem_responses(problems, ref_of[schemas.ProblemView])
    for response in responses.values():
        response["headers"] = {**response.get("headers", {}), **_NAMED}
    return responses


def _problem_responses(problems: Iterable[Problem], ref: object) -> dict[str, Any]:
    codes: dict[int, list[Problem]] = {}
    for problem in problems:
        codes.setdefault(WORDINGS[problem].status, []).append(problem)
    responses: dict[str, Any] = {}
    for status, several in sorted(codes.items()):
        told = "; ".join(f"`{problem}`: {WORDINGS[problem].title.en}" for problem in several)
        headers: dict[str, Any] = {}
        if any(WORDINGS[problem].retry_after_s for problem in several):
            headers |= _RETRY
        if Problem.RATE_LIMITED in several:
            headers |= _RATE
        if Problem.UNAUTHENTICATED in several:
            headers |= _OFFER
        responses[str(status)] = {"description": told, "content": {CONTENT_TYPE: {"schema": ref}}}
        if headers:
            responses[str(status)]["headers"] = headers
    return responses
