"""The description of the API is valid OpenAPI and covers exactly the contract."""

from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import OpenAPIV31SpecValidator

from sale.api.openapi import build_document
from sale.api.routes import ROUTES
from sale.domain.order import Order, Payment, Ticket

ADMIN = "/api/v1/admin/campaigns"
CONTRACT = {
    "get /healthz",
    "get /readyz",
    "get /api/v1/time",
    "get /api/v1/campaigns",
    "get /api/v1/campaigns/{id}",
    "get /api/v1/campaigns/{id}/availability",
    "get /api/v1/campaigns/{id}/allowance",
    "post /api/v1/campaigns/{id}/orders",
    "get /api/v1/orders",
    "get /api/v1/orders/{order_no}",
    f"get {ADMIN}",
    f"post {ADMIN}",
    f"get {ADMIN}/{{id}}",
    f"delete {ADMIN}/{{id}}",
    *(
        f"post {ADMIN}/{{id}}/{verb}"
        for verb in ("schedule", "open", "pause", "resume", "close", "reopen", "stock")
    ),
    f"get {ADMIN}/{{id}}/live",
    "get /api/v1/admin/audit-log",
    "get /api/v1/admin/orders/{order_no}",
    "post /api/v1/admin/orders/{order_no}/cancel",
    "post /api/v1/orders/{order_no}/cancel",
    "post /api/v1/orders/{order_no}/pay",
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(build_document(ROUTES))
    return decoded


def test_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


def test_document_describes_exactly_the_contracts_calls(document: dict[str, Any]) -> None:
    described = {
        f"{method} {path}" for path, methods in document["paths"].items() for method in methods
    }

    assert described == CONTRACT


def test_document_has_every_answer_of_a_purchase(document: dict[str, Any]) -> None:
    purchase = document["paths"]["/api/v1/campaigns/{id}/orders"]["post"]

    answers = set(purchase["responses"])
    expected = (201, 400, 401, 403, 404, 409, 413, 415, 422, 429, 503)
    assert answers == {str(status) for status in expected}
    told = {"Location", "Idempotency-Replayed", "X-Request-Id"}
    assert told == set(purchase["responses"]["201"]["headers"])
    key = next(p for p in purchase["parameters"] if p["name"] == "Idempotency-Key")
    assert key["required"] is True
    assert purchase["security"] == [{"member": []}]


def test_encoded_order_fits_schema_and_contract(document: dict[str, Any]) -> None:
    order = Order(
        order_no="film.1.0a0b0c",
        campaign="film",
        showing="general",
        quantity=1,
        state="confirmed",
        pay_before=None,
        amount_fen=500,
        created_at="2015-05-01T09:00:00.000+08:00",
        tickets=[Ticket(1, "c" * 22)],
        card_remaining=2,
        payment=Payment("due", 500, 0, 0),
        cancel_until=None,
    )

    encoded = msgspec.json.decode(msgspec.json.encode(order))

    schema = {"$ref": "#/components/schemas/Order", "components": document["components"]}
    Draft202012Validator(schema).validate(encoded)
    assert list(encoded) == (
        [
            "order_no",
            "campaign",
            "showing",
            "quantity",
            "state",
            "amount_fen",
            "pay_before",
            "created_at",
            "tickets",
            "card_remaining",
            "payment",
            "cancel_until",
        ]
    )
    assert encoded["tickets"] == [{"no": 1, "code": "c" * 22, "state": "valid"}]
