"""The description of the API, ``GET /openapi.json``: made from the table of routes."""

from collections.abc import Iterable
from typing import Any, Final

from sale.api.dispatch import MEMBER, OPERATOR
from sale.api.problems import CONTENT_TYPE, WORDINGS
from sale.api.schemas import ProblemView
from sale.domain.campaign import CAMPAIGN_ID
from sale.domain.order import IDEMPOTENCY_KEY, ORDER_NO
from sale.domain.problem import Problem
from sale.http import openapi
from sale.http.openapi import RETRY_AFTER, About, ProblemText, header
from sale.http.routes import Route

EVERY: Final = (
    Problem.INVALID_REQUEST,
    Problem.RATE_LIMITED,
    Problem.OVERLOADED,
    Problem.UNAVAILABLE,
)
"""Problems that any call except the health checks may answer: the request is wrong, its sender is
beyond a limit, or the host or a store is overloaded or away."""


def build_document(routes: Iterable[Route]) -> bytes:
    """Give the OpenAPI 3.1 document as JSON."""
    return openapi.build_document(routes, _ABOUT)


def _problem_text(code: str) -> ProblemText:
    problem = Problem(code)
    wording = WORDINGS[problem]
    headers: dict[str, dict[str, Any]] = {}
    if wording.retry_after_s:
        headers |= RETRY_AFTER
    if problem is Problem.RATE_LIMITED:
        headers |= _RATE
    if problem is Problem.UNAUTHENTICATED:
        headers |= _OFFER
    return ProblemText(wording.status, wording.title.en, headers)


_RATE: Final = {
    "RateLimit-Policy": header("The limit: its quota and window, in seconds."),
    "RateLimit": header("What is left of it, and for how long."),
}
_OFFER: Final = {"WWW-Authenticate": header("How to identify oneself.", const="Bearer")}
_ABOUT: Final = About(
    info={
        "title": "sale",
        "version": "1",
        "summary": "A flash-sale engine for union members' tickets.",
        "description": "Times are RFC 3339 with offset, money is fen (`*_fen`). Errors are RFC "
        "9457 problem documents; `/problems/` lists them, `/problems/{code}` explains each.",
    },
    schemes={
        MEMBER: {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
        OPERATOR: {"type": "http", "scheme": "bearer"},
    },
    path_patterns={"id": CAMPAIGN_ID.pattern, "order_no": ORDER_NO.pattern},
    key_pattern=IDEMPOTENCY_KEY.pattern,
    every=EVERY,
    problem=_problem_text,
    problem_form=ProblemView,
    problem_media_type=CONTENT_TYPE,
)
