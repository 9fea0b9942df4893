"""Calls of payment providers, and the test provider's own pages."""

from typing import Any, Final

from aiohttp import web

from sale.api.calls import Call
from sale.api.pages import PAGES, filled_page
from sale.api.request import read_raw
from sale.api.schemas import TestPaymentView, TestResult
from sale.domain.problem import Problem, Refused
from sale.http.bounds import BODY_MAX
from sale.http.routes import Route
from sale.members.test_provider import NAME, PATH, TestProvider

NOTIFY: Final = "/api/v1/payments/notify/{provider}"
TEST_PAYMENT: Final = f"{PATH}/{{payment_no}}"


async def take_notice(call: Call[None]) -> web.Response:
    """POST /api/v1/payments/notify/{provider}: answered once what it says is durable."""
    body = await read_raw(call.request)
    if len(body) > BODY_MAX:
        raise Refused(Problem.PAYLOAD_TOO_LARGE, f"at most {BODY_MAX} bytes")
    await call.engine.payments.notify(call.path["provider"], call.request.headers, body)
    return web.json_response({"code": "SUCCESS"})


async def show_test_payment(call: Call[None]) -> web.StreamResponse:
    """GET /api/v1/test-provider/{payment_no}: the page on which the test provider is paid."""
    provider = _test_provider(call)
    found = await provider.one(call.path["payment_no"])
    if found is None:
        raise Refused(Problem.NOT_FOUND, "no such payment")
    return filled_page(
        "test-payment.html",
        call.request.app[PAGES].places,
        {
            "payment_no": found.payment_no,
            "amount": f"{found.amount_fen / 100:.2f}",
            "state": found.state,
            "return_to": found.return_to or "/",
        },
    )


async def act_on_test_payment(call: Call[TestResult]) -> TestPaymentView:
    """POST /api/v1/test-provider/{payment_no}: pay, fail, or let it lie."""
    provider = _test_provider(call)
    found, notice = await provider.act(call.path["payment_no"], call.body.result)
    if found is None:
        raise Refused(Problem.NOT_FOUND, "no such payment")
    if notice is not None:
        await call.engine.payments.notify(NAME, *notice)
    return TestPaymentView(found.payment_no, found.amount_fen, found.state)


def _test_provider(call: Call[Any]) -> TestProvider:
    provider = call.engine.test_provider
    if provider is None:
        raise Refused(Problem.NOT_FOUND, "there is nothing at this address")
    return provider


ROUTES: Final = (
    Route(method="POST", path=NOTIFY, handler=take_notice),
    Route(method="GET", path=TEST_PAYMENT, handler=show_test_payment),
    Route(
        method="POST",
        path=TEST_PAYMENT,
        handler=act_on_test_payment,
        body=TestResult,
    ),
)
