"""The API accepts and refuses requests as its description says, and answers as it says.

Each answer of ``Client.ask`` is compared with the description: status, headers, body.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from route_calls import DOCUMENT, PAY, order_of, prepared, resolved, sample_of
from service import ADMIN, Client, Service, new_key

from sale.operators.steps import STEPS

OPERATIONS = [
    (method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
VERBS = [name for name, step in STEPS.items() if not step.removes and name != "stock"]
HEALTH = {"/healthz", "/readyz"}


class Variant(NamedTuple):
    """A body, and whether the description allows it."""

    what: str
    body: dict[str, Any]
    allowed: bool


def takes_null(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type", "object")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return "null" in kinds or any(each.get("type") == "null" for each in schema.get("anyOf", ()))


def bounds(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Values at and beyond what a schema bounds."""
    for each in schema.get("anyOf", (schema,)):
        if "minimum" in each:
            yield from ((each["minimum"], True), (each["minimum"] - 1, False))
        if "maximum" in each:
            yield each["maximum"] + 1, False
        if each.get("type") == "string" and "maxLength" in each:
            most, pattern = each["maxLength"], each.get("pattern", "")
            first = "/" if pattern.startswith("^/") else "x"
            yield from ((first.ljust(most, "x"), True), (first.ljust(most + 1, "x"), False))
            yield from (("", False), (" ", False))
        if "enum" in each:
            yield from ((value, True) for value in each["enum"])
            yield "no such choice", False
        if "minItems" in each:
            yield [], False
            yield from (([value], allowed) for value, allowed in bounds(each["items"]))
        if each.get("format") == "date-time":
            yield "no moment", False


def variants(schema: dict[str, Any], sample: dict[str, Any]) -> Iterator[Variant]:
    """The sample, and each change of one field whose answer the description settles."""
    schema = resolved(schema)
    yield Variant("whole", sample, allowed=True)
    yield Variant("unknown field", {**sample, "colour": "red"}, allowed=False)
    for name, inner in schema["properties"].items():
        optional = name not in schema.get("required", ())
        left_out = {field: value for field, value in sample.items() if field != name}
        yield Variant(f"no {name}", left_out, allowed=optional)
        yield Variant(f"{name} null", {**sample, name: None}, allowed=takes_null(inner))
        yield Variant(f"{name} of another type", {**sample, name: {"a": 1}}, allowed=False)
        for value, allowed in bounds(inner):
            # The sample has a price, and is not paid online.
            if (name, value) == ("payment", "none") or name == "hold_s":
                continue
            yield Variant(f"{name} {str(value)[:20]!r}", {**sample, name: value}, allowed=allowed)
        items = resolved(inner.get("items", {}))
        if "properties" in items:
            for what, body, allowed in variants(items, sample[name][0]):
                yield Variant(f"{name}: {what}", {**sample, name: [body]}, allowed=allowed)


BODIES = [(path, operation) for method, path, operation in OPERATIONS if "requestBody" in operation]


@pytest.mark.parametrize(("path", "operation"), BODIES, ids=[path for path, _ in BODIES])
async def test_body_is_taken_as_described(
    service: Service, client: Client, path: str, operation: dict[str, Any]
) -> None:
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    buys, verb = path.endswith("/orders"), path.rpartition("/")[2]
    token, campaign, wrong, order = service.admin_token, "", [], ""
    if "{order_no}" in path:
        card, paid = service.card(), "online" if path == PAY else "counter"
        order = await order_of(client, card.token, payment=paid)
        token = token if path.startswith("/api/v1/admin") else card.token
    for variant in variants(schema, sample_of(schema)):
        body = dict(variant.body)
        if path == ADMIN:
            if body.get("id") == "placeholder":
                body["id"] = service.new_id()
        elif verb in VERBS or not campaign:
            campaign = await prepared(client, verb)
        if buys:
            token = service.card().token
        seen = await client.ask(
            "POST",
            path.replace("{id}", campaign).replace("{order_no}", order),
            token,
            json=body,
            headers={"Idempotency-Key": new_key()},
        )
        if (seen.status != 400) is not variant.allowed:
            wrong.append((variant.what, seen.status, seen.body.decode()))
    assert not wrong


@pytest.mark.parametrize("verb", VERBS)
async def test_body_may_be_left_out_as_described(
    service: Service, client: Client, verb: str
) -> None:
    campaign = await prepared(client, verb)
    described = DOCUMENT["paths"][f"{ADMIN}/{{id}}/{verb}"]["post"]["requestBody"]
    seen = await client.ask("POST", f"{ADMIN}/{campaign}/{verb}", service.admin_token)
    assert seen.status == (400 if described["required"] else 200)


async def test_parameters_are_taken_as_described(service: Service, client: Client) -> None:
    campaign, card = await client.campaign(), service.card()
    order = (await client.buy(campaign, card.token)).json()["order_no"]
    asked = 0
    for (method, path, operation), way in itertools.product(OPERATIONS, ("good", "bad")):
        token = card.token if operation["tags"] == ["member"] else service.admin_token
        for parameter in operation.get("parameters", ()):
            if parameter["in"] != "query" or method != "get":
                continue
            schema, name = parameter["schema"], parameter["name"]
            good: list[Any] = schema.get("enum") or [schema.get("minimum"), schema.get("maximum")]
            if name == "cursor":
                good = []
            elif name == "campaign":
                good = [campaign, "nobody-knows-it"]
            bad = ["", "AAA" if name != "campaign" else "A A", "0x1", "-1"]
            if name == "campaign":
                bad = ["", "A A", "x" * 49, "ä"]
            for value in good if way == "good" else bad:
                url = path.replace("{id}", campaign).replace("{order_no}", order)
                seen = await client.get(f"{url}?{name}={value}", token)
                assert seen.status == (200 if way == "good" else 400), (url, name, value)
                asked += 1
    assert asked >= 40


async def test_each_operation_describes_what_any_call_may_answer() -> None:
    for method, path, operation in OPERATIONS:
        if path in HEALTH:
            continue
        answers = operation["responses"]
        assert {"400", "429", "503"} <= set(answers), (method, path)
        limits = {"Retry-After", "RateLimit", "RateLimit-Policy", "X-Request-Id"}
        assert limits == set(answers["429"]["headers"])
        if operation.get("security"):
            assert "WWW-Authenticate" in answers["401"]["headers"]
            assert ("403" in answers) or operation["tags"] == ["member"]
        else:
            assert "401" not in answers


async def test_request_name_is_described_and_taken(client: Client) -> None:
    campaign = await client.campaign()
    for method, path, operation in OPERATIONS:
        (given,) = [each for each in operation["parameters"] if each["name"] == "X-Request-Id"]
        assert re.fullmatch(given["schema"]["pattern"], "trace-1/a")
        url = path.replace("{id}", campaign).replace("{order_no}", "x.1.000000")
        seen = await client.ask(method.upper(), url, headers={"X-Request-Id": "trace-1/a"})
        assert seen.headers["X-Request-Id"] == "trace-1/a", (method, path)
        for answer in operation["responses"].values():
            assert "X-Request-Id" in answer["headers"], (method, path)


async def test_each_route_is_described(service: Service, client: Client) -> None:
    """The description has every path and method that the application answers."""
    described = {(method.upper(), path) for method, path, _ in OPERATIONS}
    for method, path in described:
        for other in ("GET", "POST", "DELETE", "PUT", "PATCH", "PROPFIND"):
            if (other, path) in described:
                continue
            url = path.replace("{id}", "x").replace("{order_no}", "x.1.000000")
            seen = await client.ask(other, url, service.admin_token)
            assert (seen.status, seen.code) == (405, "method-not-allowed"), (other, path)
            allowed = {m for m, p in described if p == path}
            allowed |= {"HEAD"} if "GET" in allowed else set()
            assert set(seen.headers["Allow"].split(", ")) == allowed, (method, path)
