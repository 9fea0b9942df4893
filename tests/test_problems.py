"""Wordings of refusals, and their pages."""

import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from html import escape
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from page_app import with_pages

from sale.api.problems import WORDINGS, problem_body, problem_headers, problem_response
from sale.domain.clock import LOCAL_ZONE
from sale.domain.problem import Problem, Refused
from sale.domain.text import Text

STATUS = {
    "invalid-request": 400,
    "missing-idempotency-key": 400,
    "unauthenticated": 401,
    "not-eligible": 403,
    "card-revoked": 403,
    "forbidden": 403,
    "not-found": 404,
    "method-not-allowed": 405,
    "not-open": 409,
    "paused": 409,
    "closed": 409,
    "sold-out": 409,
    "limit-exceeded": 409,
    "too-many-orders": 409,
    "wrong-state": 409,
    "idempotency-mismatch": 422,
    "payload-too-large": 413,
    "unsupported-media-type": 415,
    "rate-limited": 429,
    "overloaded": 503,
    "unavailable": 503,
}


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[TestClient[Any, Any]]:
    app = with_pages(web.Application())
    async with TestClient(TestServer(app)) as running:
        yield running


def document(problem: Problem, detail: str = "", **members: object) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(problem_body(problem, detail, **members))
    return decoded


def test_every_code_has_the_status_of_the_contract() -> None:
    assert {problem.value: wording.status for problem, wording in WORDINGS.items()} == STATUS


@pytest.mark.parametrize("problem", Problem)
def test_every_code_gives_a_complete_problem_document(problem: Problem) -> None:
    response = problem_response(Refused(problem))

    assert response.status == STATUS[problem.value]
    assert response.content_type == "application/problem+json"
    told = msgspec.json.decode(response.body)  # type: ignore[arg-type]
    assert told["type"] == f"/problems/{problem.value}"
    assert told["code"] == problem.value
    assert told["status"] == response.status
    assert all(told[field] for field in ("title", "detail", "title_en", "detail_en"))


def test_sold_out_says_how_many_are_left() -> None:
    told = document(Problem.SOLD_OUT, remaining=1)

    assert told["remaining"] == 1
    assert told["detail"].startswith("仅剩 1 张")
    assert told["detail_en"].startswith("Only 1 left")
    assert document(Problem.SOLD_OUT, remaining=0)["detail"].startswith("已售完")


def test_sold_out_says_when_held_tickets_may_come_back() -> None:
    told = document(
        Problem.SOLD_OUT, remaining=0, held=7, pay_before="2015-05-01T09:05:03.250+08:00"
    )

    assert (told["held"], told["pay_before"]) == (7, "2015-05-01T09:05:03.250+08:00")
    assert "7 张等待付款，最早 09:05:03 可能放出" in told["detail"]
    assert "7 are waiting for payment" in told["detail_en"]
    assert "09:05:03" in told["detail_en"]
    some_left = document(Problem.SOLD_OUT, remaining=1, held=7, pay_before=told["pay_before"])
    assert some_left["detail"].startswith("仅剩 1 张")


def test_detail_that_is_a_chinese_sentence_stands_alone() -> None:
    refused = Refused(Problem.WRONG_STATE, Text("票已经领取。", "They are collected."))

    told = msgspec.json.decode(problem_response(refused).body)  # type: ignore[arg-type]

    assert (told["detail"], told["detail_en"]) == ("票已经领取。", "They are collected.")


def test_limit_exceeded_says_the_limit() -> None:
    full = document(Problem.LIMIT_EXCEEDED, card_remaining=0, card_limit=3)
    partly = document(Problem.LIMIT_EXCEEDED, card_remaining=2, card_limit=3)

    assert full["detail"].startswith("您的卡已买满 3 张")
    assert partly["detail"].startswith("您的卡还可以买 2 张")
    assert partly["card_remaining"] == 2


@pytest.mark.parametrize(
    ("opens_at", "says"),
    [
        ("2015-05-01T09:00:00.000+08:00", "尚未开始，5月1日 09:00 开抢"),
        ("2015-05-01T01:00:05Z", "尚未开始，5月1日 09:00:05 开抢"),
        (None, "尚未开始。"),
        ("soon", "尚未开始。"),
    ],
)
def test_not_open_says_the_opening(opens_at: str | None, says: str) -> None:
    assert document(Problem.NOT_OPEN, opens_at=opens_at)["detail"].startswith(says)


def test_detail_for_developers_is_shown() -> None:
    detail = "quantity: must be a whole number from 1 to 3"

    told = document(Problem.INVALID_REQUEST, detail, field="quantity")

    assert told["detail_en"] == detail
    assert told["detail"].endswith(f"（{detail}）")
    assert told["field"] == "quantity"


def test_detail_does_not_replace_a_text_for_members() -> None:
    assert "NOSCRIPT" not in str(document(Problem.UNAVAILABLE, "NOSCRIPT No matching script"))


def test_malformed_detail_still_gives_json() -> None:
    assert document(Problem.NOT_FOUND, "no \udcff here")["detail_en"] == "no ? here"


def test_extension_does_not_replace_a_standard_field() -> None:
    assert document(Problem.NOT_FOUND, status=200)["status"] == 404


def test_equal_refusals_share_their_bytes() -> None:
    first = problem_body(Problem.SOLD_OUT, remaining=0)

    assert problem_body(Problem.SOLD_OUT, remaining=0) is first
    assert b'"remaining":false' in problem_body(Problem.SOLD_OUT, remaining=False)


def test_encoding_a_refusal_takes_microseconds() -> None:
    began = time.perf_counter()
    for _ in range(10_000):
        problem_body(Problem.SOLD_OUT, remaining=0)

    assert time.perf_counter() - began < 0.1  # 10 us each; 0.5 us measured


@pytest.mark.parametrize(
    "problem",
    [
        Problem.NOT_OPEN,
        Problem.PAUSED,
        Problem.RATE_LIMITED,
        Problem.OVERLOADED,
        Problem.UNAVAILABLE,
    ],
)
def test_temporary_refusal_has_retry_after(problem: Problem) -> None:
    assert int(problem_headers(Refused(problem))["Retry-After"]) >= 1
    assert problem_headers(Refused(problem, retry_after_s=7))["Retry-After"] == "7"


def test_final_refusal_has_no_retry_after() -> None:
    for problem in (Problem.SOLD_OUT, Problem.LIMIT_EXCEEDED, Problem.CLOSED, Problem.NOT_FOUND):
        assert "Retry-After" not in problem_headers(Refused(problem))


def test_not_open_has_retry_after_until_the_opening() -> None:
    def wait_s(**delta: float) -> int:
        opens_at = datetime.now(LOCAL_ZONE) + timedelta(**delta)
        refused = Refused(Problem.NOT_OPEN, opens_at=opens_at.isoformat())
        return int(problem_headers(refused)["Retry-After"])

    assert 29 <= wait_s(seconds=30) <= 30
    assert wait_s(seconds=-30) == 1
    assert wait_s(days=300) == 86_400


def test_wrong_method_sends_allow_as_a_header_only() -> None:
    response = problem_response(Refused(Problem.METHOD_NOT_ALLOWED, allow={"POST", "GET"}))

    assert response.headers["Allow"] == "GET, POST"
    assert b'"allow"' not in response.body  # type: ignore[operator]


def test_missing_token_names_the_scheme() -> None:
    assert problem_headers(Refused(Problem.UNAUTHENTICATED))["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("problem", Problem)
async def test_page_of_a_code_explains_it_in_both_languages(
    client: TestClient[Any, Any], problem: Problem
) -> None:
    response = await client.get(f"/problems/{problem.value}")

    text = await response.text()
    assert response.status == 200
    assert response.content_type == "text/html"
    assert WORDINGS[problem].title.zh in text
    assert WORDINGS[problem].title.en in text
    assert "$" not in text


@pytest.mark.parametrize("path", ["/problems/", "/problems"])
async def test_index_lists_every_problem_in_both_languages(
    client: TestClient[Any, Any], path: str
) -> None:
    response = await client.get(path)

    text = await response.text()
    assert (response.status, response.content_type) == (200, "text/html")
    for problem in Problem:
        assert f'href="/problems/{problem.value}"' in text
        wording = WORDINGS[problem]
        for told in (wording.title, wording.happened):
            assert escape(told.zh) in text
            assert escape(told.en) in text
    assert "$" not in text
    assert "Sold out." not in text  # a title is shown once
    assert 'href="/problems/"' in await (await client.get("/problems/closed")).text()


async def test_page_of_an_unknown_code_is_a_404_problem(client: TestClient[Any, Any]) -> None:
    response = await client.get("/problems/nonsense")

    assert response.status == 404
    assert response.content_type == "application/problem+json"


async def test_unchanged_page_is_not_sent_again(client: TestClient[Any, Any]) -> None:
    first = await client.get("/")
    again = await client.get("/", headers={"If-None-Match": first.headers["ETag"]})

    assert first.status == 200
    assert first.headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert "unsafe" not in first.headers["Content-Security-Policy"]
    assert again.status == 304
    assert await again.read() == b""


async def test_page_loads_only_own_cacheable_files(client: TestClient[Any, Any]) -> None:
    text = await (await client.get("/")).text()
    places = [part.split('"')[0] for part in text.replace("src=", "href=").split('href="')[1:]]

    assert len(places) >= 3
    assert "style=" not in text
    assert "<script>" not in text
    for place in places:
        assert place.startswith("/assets/")
        response = await client.get(place)
        assert response.status == 200
        assert "immutable" in response.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("accepts", "packed"),
    [
        *(("gzip", True), ("GZIP", True), ("br, gzip;q=0.5", True), ("x-gzip", True), ("*", True)),
        *(
            ("gzip;q=0", False),
            ("gzip; q=0.000, *", False),
            ("*;q=0", False),
            ("*;q=0, gzip", True),
        ),
        *(("gzipped", False), ("br", False), ("identity", False), ("gzip;q=x", False)),
        *(("gzip;q=1.000", True), ("gzip;level=9", False), ("deflate,,gzip", True), ("", False)),
    ],
)
async def test_accept_encoding_decides_about_gzip(
    client: TestClient[Any, Any], accepts: str, packed: bool
) -> None:
    response = await client.get("/", headers={"Accept-Encoding": accepts})
    assert response.headers.get("Content-Encoding") == ("gzip" if packed else None)
    assert response.headers["Vary"] == "Accept-Encoding"
    assert b"<html" in await response.read()


async def test_old_file_address_is_not_cached(client: TestClient[Any, Any]) -> None:
    response = await client.get("/assets/page.css?v=old")
    plain = await client.get("/assets/page.css", headers={"Accept-Encoding": "identity"})
    missing = await client.get("/assets/page.py")

    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["Content-Encoding"] == "gzip"
    assert "Content-Encoding" not in plain.headers
    assert await plain.read() == await response.read()
    assert missing.status == 404
    assert (await client.get("/favicon.ico")).content_type == "image/svg+xml"
