"""Requests to the routes of the table, made from what their entries and the description say."""

import copy
from typing import Any

import msgspec
from service import ADMIN, PAST, Client, campaign_table, in_s

from sale.api.openapi import build_document
from sale.api.payments import TEST_PAYMENT
from sale.api.routes import ROUTES
from sale.http.routes import Route
from sale.operators.steps import STEPS

DOCUMENT: dict[str, Any] = msgspec.json.decode(build_document(ROUTES))
SAMPLE: dict[str, Any] = {
    "quantity": 1,
    "showing": "general",
    "reason": "because",
    "add": 1,
    **campaign_table("placeholder", opens_at=None),
    "order_max": 1,
    "opens_at": in_s(3_600),
    "closes_at": in_s(7_200),
    "starts_at": in_s(9_000),
    "at": in_s(1_800),
    "draft": False,
    "unions": ["dongsi"],
    "hold_s": None,
    "cancel_until": in_s(7_200),
    "showing_limit": 1,
    "tickets": [1],
    "return_to": "/tickets",
}
"""A good value of each field that a body has."""

PAY = "/api/v1/orders/{order_no}/pay"
STATE_BEFORE = {
    "schedule": "draft",
    "open": "draft",
    "delete": "draft",
    "resume": "pause",
    "reopen": "close",
}
"""The state, or the step, that a campaign needs before a step; by default it sells."""


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return DOCUMENT["components"]["schemas"][name] if name else schema


def sample_of(schema: dict[str, Any]) -> dict[str, Any]:
    """Give a good body of a schema."""
    return {name: copy.deepcopy(SAMPLE[name]) for name in resolved(schema)["properties"]}


def body_of(route: Route) -> dict[str, Any] | None:
    """Give a good body for a route; None where it takes none, or is not described."""
    if route.path == TEST_PAYMENT and route.method == "POST":
        return {"result": "none"}
    told = DOCUMENT["paths"].get(route.path, {}).get(route.method.lower(), {})
    if "requestBody" not in told:
        return None
    return sample_of(told["requestBody"]["content"]["application/json"]["schema"])


def step_of(route: Route) -> str:
    """Give the name of the step that a route takes; '' where it takes none."""
    if route.method == "DELETE":
        return "delete"
    name = route.path.rpartition("/")[2]
    return name if route.method == "POST" and name in STEPS else ""


def name_of(route: Route) -> str:
    """Give a name for a test of a route."""
    return f"{route.method} {route.path}"


async def prepared(client: Client, step: str, **changes: Any) -> str:
    """A campaign on which a step may be taken, or which sells where there is none."""
    before = STATE_BEFORE.get(step, "")
    if before == "draft":
        window = {"opens_at": in_s(3_600), "closes_at": in_s(7_200)}
        return await client.campaign(draft=True, **window, **changes)
    changes = {"opens_at": PAST, "cancel_until": in_s(3_600), **changes}
    campaign = await client.campaign(tickets=2_000, **changes)
    if before:
        assert (await client.step(campaign, before)).status == 200
    return campaign


async def order_of(client: Client, token: str, **changes: Any) -> str:
    """Give the number of a member's order that may be cancelled or, paid online, waits for that."""
    bought = await client.buy(await prepared(client, "", **changes), token)
    assert bought.status == 201, bought
    return str(bought.json()["order_no"])


async def all_of(
    client: Client, route: Route, member: str = "", **changes: Any
) -> tuple[str, dict[str, Any] | None]:
    """Give address and body of a good request; ``changes`` are those of the campaign.

    ``member``: the token of the member whose order it is about.
    """
    url, body = route.path, body_of(route)
    if "{id}" in url:
        url = url.replace("{id}", await prepared(client, step_of(route), **changes))
    if "{order_no}" in url:
        if url == PAY:
            changes["payment"] = "online"
        member = member or client.service.card().token
        url = url.replace("{order_no}", await order_of(client, member, **changes))
    if "{payment_no}" in url:
        member = member or client.service.card().token
        order = await order_of(client, member, payment="online", **changes)
        begun = await client.ask("POST", PAY.replace("{order_no}", order), member)
        url = url.replace("{payment_no}", begun.json()["payment_no"])
    if url == ADMIN and body is not None:
        body |= {"id": client.service.new_id(), **changes}
    for name, value in (("name", "page.css"), ("code", "sold-out"), ("provider", "test")):
        url = url.replace(f"{{{name}}}", value)
    return url, body
