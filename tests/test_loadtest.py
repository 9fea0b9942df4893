"""The load tests' own tests: the client against a small server, the check of the books by hand."""

import asyncio
import contextlib
import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from answer_book import AnswerBook, Attempt, outcome

from loadtest.books import check as bookkeeping
from loadtest.books.answers import (
    Answer,
    read_answer,
    read_answers,
    write_answers,
)
from loadtest.books.check import check, key_hash
from loadtest.books.ledger import Books, OrderRow
from loadtest.client import Client
from loadtest.demo import fresh
from loadtest.engine import EngineError, environment
from loadtest.members import Member, Mint
from loadtest.wire import (
    UNKNOWN,
    ProtocolError,
    Response,
    ResponseParser,
    get_request,
    purchase_request,
)
from sale.identity import MemberTokens, SigningKey

ROOT = Path(__file__).parents[1]
MEMBER, OTHER = "182850", "182851"
ANSWERS = (
    b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nIdempotency-Replayed: true\r\n\r\n{}"
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\n\r\n'
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after:  3 \r\nCONTENT-LENGTH: 0\r\n\r\n"
)


# The wire ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(len(ANSWERS)))
def test_parser_gives_the_same_answers_wherever_they_are_split(cut: int) -> None:
    parser = ResponseParser()
    got = parser.feed(ANSWERS[:cut]) + parser.feed(ANSWERS[cut:])
    assert [(answer.status, answer.body) for answer in got] == [
        (201, b"{}"),
        (304, b""),
        (503, b""),
    ]
    assert got[0].header("idempotency-replayed") == "true"
    assert got[1].header("etag") == '"1"'
    assert got[2].header("Retry-After") == "3"
    assert got[2].header("location") is None
    assert parser.idle


def test_parser_reads_answers_byte_by_byte() -> None:
    parser = ResponseParser()
    assert sum(len(parser.feed(bytes([byte]))) for byte in ANSWERS) == 3


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
def test_parser_refuses_answers_it_does_not_read(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(raw)


def test_parser_refuses_an_answer_nobody_asked_for() -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(ANSWERS, most=1)


def test_purchase_request_is_that_of_the_contract() -> None:
    raw = purchase_request("h:1", "films", "t.o.k", "key-1", 2, "general")
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /api/v1/campaigns/films/orders HTTP/1.1\r\n")
    assert b"\r\nIdempotency-Key: key-1\r\n" in head
    assert body == b'{"quantity":2,"showing":"general"}'
    assert purchase_request("h:1", "films", "t", "k", 1, None).endswith(b'{"quantity":1}')


# The client --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def server_of(handler: Callable[[web.Request], object], folder: Path) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    path = folder / "s"
    try:
        await web.UnixSite(runner, str(path)).start()
        yield f"unix:{path}"
    finally:
        await runner.cleanup()


async def test_client_gives_each_request_its_own_answer(
    tmp_path: Path,
) -> None:
    most = busy = 0

    async def echo(request: web.Request) -> web.Response:
        nonlocal most, busy
        busy += 1
        most = max(most, busy)
        body = await request.read()
        await asyncio.sleep(0.001)
        busy -= 1
        return web.Response(status=201, body=body)

    raws = [purchase_request("h", "c", "t", "k", n, None) for n in range(100)]
    async with server_of(echo, tmp_path) as address, Client(address, 8) as client:
        answers = await asyncio.gather(*(client.request(raw) for raw in raws))
    assert [each.body for each in answers] == [b'{"quantity":%d}' % n for n in range(100)]
    assert most <= 8
    assert all(answer.received_at > answer.sent_at for answer in answers)


async def test_client_reports_unknown_without_an_answer_in_time(tmp_path: Path) -> None:
    async def sleep(request: web.Request) -> web.Response:
        await asyncio.sleep(0.8)
        return web.Response()

    async with server_of(sleep, tmp_path) as address, Client(address, timeout_s=0.2) as client:
        answer = await client.request(get_request("h", "/"))
    assert answer.status == UNKNOWN
    assert "in time" in answer.why


async def test_client_opens_a_new_connection_after_a_lost_one(
    tmp_path: Path,
) -> None:
    seen = 0

    async def refuse(request: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        if seen == 2 and request.transport is not None:
            request.transport.abort()
        return web.Response(status=413, headers={"Connection": "close"}, body=b"{}")

    async with server_of(refuse, tmp_path) as address, Client(address) as client:
        told = [(await client.request(get_request("h", "/"))).status for _ in range(3)]
    assert told == [413, UNKNOWN, 413]


async def test_client_refuses_a_chunked_answer(tmp_path: Path) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"x")
        return response

    async with server_of(stream, tmp_path) as address, Client(address) as client:
        with pytest.raises(ProtocolError, match="chunked"):
            await client.request(get_request("h", "/"))


async def test_client_without_a_server_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        async with Client(f"unix:{tmp_path}/nothing"):
            pass


# The crowd ---------------------------------------------------------------------------------------


def test_minted_tokens_are_accepted_by_the_engine() -> None:
    key = SigningKey(b"k" * 32)
    mint = Mint(key.secret)
    member = MemberTokens(key).verify(mint.token("10000042"), time.time())
    assert (member.no, member.union, member.generation) == (10_000_042, "district", 0)
    sizes = {len(raw) for raw in mint.requests("h", "c", "s", range(0, 10**6, 99_999))}
    assert len(sizes) == 1


# The books ---------------------------------------------------------------------------------------


def order(seq: int = 5, **changes: Any) -> OrderRow:
    row: dict[str, Any] = {
        "order_no": f"films.{seq:x}.000001",
        "member_no": MEMBER,
        "showing": "general",
        "quantity": 2,
        "price_fen": 500,
        "state": "confirmed",
        "key_hash": key_hash("k1"),
        "created_at_ms": 1,
    }
    return OrderRow(**(row | changes))


def told(seq: int = 5, **changes: Any) -> Answer:
    row: dict[str, Any] = {
        "member_no": MEMBER,
        "key": "k1",
        "showing": "general",
        "quantity": 2,
        "status": 201,
        "order_no": f"films.{seq:x}.000001",
        "told_showing": "general",
        "told_quantity": 2,
        "amount_fen": 1_000,
        "tickets": (f"a{seq}", f"b{seq}"),
    }
    return Answer(**(row | changes))


def refused(code: str, status: int = 409, **changes: Any) -> Answer:
    nothing: dict[str, Any] = {"order_no": "", "told_quantity": 0, "tickets": (), "amount_fen": 0}
    return told(**(nothing | {"status": status, "code": code} | changes))


def kinds(answers: list[Answer], *orders: OrderRow, stock: int = 10, limit: int = 3) -> list[str]:
    books = Books(orders, {"general": stock}, limit)
    return [finding.kind for finding in check(answers, books, alone=True, only_falls=True)]


def test_check_of_agreeing_books_is_clean() -> None:
    replay = told(replayed=True)
    unknown = refused("", 0, key="k2", member_no=OTHER)
    assert kinds([told(), replay, refused("", 0), unknown], order()) == []
    assert kinds([refused("sold-out"), told()], order()) == ["untrue-sold-out"]
    assert kinds([refused("sold-out")], stock=1) == []


def test_check_allows_a_sale_after_a_refusal() -> None:
    assert kinds([refused("not-open"), told()], order()) == []


def test_check_allows_an_order_behind_an_unknown_outcome() -> None:
    assert kinds([refused("unavailable", 503)], order()) == []


def test_balancers_answer_leaves_the_outcome_open() -> None:
    """A 4xx that is no problem document says nothing of the order, nor does any 5xx."""
    asked = Attempt(Member(MEMBER, "t", "u"), "k1", "general", 2)
    for status, body in (
        (502, b"<html>"),
        (504, b""),
        (500, b"{}"),
        (403, b"<html>"),
        (408, b"{}"),
    ):
        answer = read_answer(asked, status, body)
        assert answer.code == f"HTTP {status}"
        assert not answer.refused
        assert kinds([answer], order()) == []
    assert not read_answer(asked, 429, b'{"code":"rate-limited"}').refused
    assert read_answer(asked, 409, b'{"code":"sold-out"}').refused


BROKEN: dict[str, tuple[list[Answer], list[OrderRow]]] = {
    "lost": ([told()], []),
    "doubled": ([told()], [order(5), order(6)]),
    "number-twice": (
        [told(), told(5, key="k2")],
        [order(), order(5, key_hash=key_hash("k2"), quantity=1)],
    ),
    "wrong-content": ([told(told_quantity=1)], [order()]),
    "key-two-orders": ([told(5), told(6)], [order(5)]),
    "refused-but-sold": ([refused("sold-out", quantity=20)], [order()]),
    "unasked": ([], [order()]),
    "not-replayed": ([told(), told()], [order()]),
    "tickets-changed": ([told(), told(replayed=True, tickets=("x", "y"))], [order()]),
    "code-twice": ([told(tickets=("x", "x"))], [order()]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_check_finds_each_kind_of_broken_books(kind: str) -> None:
    answers, orders = BROKEN[kind]
    assert kind in kinds(answers, *orders)


def test_check_finds_a_ticket_code_in_two_orders() -> None:
    answers = [told(5), told(6, member_no=OTHER, tickets=("a5", "b6"))]
    assert kinds(answers, order(5), order(6, member_no=OTHER)) == ["code-twice"]


def test_check_finds_more_sold_than_there_was() -> None:
    assert kinds([told()], order(), stock=1) == ["oversold"]
    assert kinds([told()], order(), stock=2) == []


def test_check_finds_a_member_over_the_limit() -> None:
    second = order(6, key_hash=key_hash("k2"))
    assert kinds([told(), told(6, key="k2")], order(), second) == ["limit-passed"]
    assert kinds([told(), told(6, key="k2")], order(), second, limit=4) == []
    returned = order(6, key_hash=key_hash("k2"), state="cancelled")
    assert kinds([told(), told(6, key="k2")], order(), returned) == []


@pytest.mark.parametrize(
    "change",
    [
        {"showing": "other"},
        {"quantity": 1},
        {"price_fen": 400},
        {"member_no": OTHER},
        {"key_hash": key_hash("k2")},
    ],
)
def test_check_finds_other_content_in_the_books(
    change: dict[str, Any],
) -> None:
    assert "wrong-content" in kinds([told()], order(**change), stock=100)


def test_check_finds_other_content_behind_an_unknown_outcome() -> None:
    assert kinds([refused("", 0, quantity=1)], order()) == ["wrong-content"]


def test_check_finds_an_order_before_the_opening() -> None:
    books = Books((order(),), {"general": 10}, 3, opens_at_ms=2)
    assert [finding.kind for finding in check([told()], books)] == ["too-early"]


def test_findings_name_members_by_number() -> None:
    books = Books((), {"general": 10}, 3)
    (finding,) = check([told()], books)
    assert f"member {MEMBER}, key" in finding.what


def test_check_bounds_the_number_of_findings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bookkeeping, "FINDINGS_MAX", 3)
    assert len(kinds([told(n, key=f"k{n}") for n in range(10)])) == 3


def test_recorded_answers_are_read_and_counted(
    tmp_path: Path,
) -> None:
    book = AnswerBook()
    attempt = Attempt(Member(MEMBER, "t", "u"), "k1", "general", 2)
    body = (
        b'{"order_no":"films.5.000001","campaign":"films","showing":"general","quantity":2,'
        b'"state":"confirmed","amount_fen":1000,"pay_before":null,"card_remaining":1,'
        b'"tickets":[{"no":1,"code":"a5","state":"valid"},{"no":2,"code":"b5","state":"valid"}]}'
    )
    replayed = b"HTTP/1.1 201 Created\r\nIdempotency-Replayed: true"
    book.record(attempt, Response(201, b"HTTP/1.1 201 Created", body))
    book.record(attempt, Response(201, replayed, body))
    book.record(attempt, Response(409, b"", b'{"code":"sold-out","remaining":1}'))
    book.record(attempt, Response(UNKNOWN, b"", b""))
    book.record(attempt, Response(502, b"", b"<html>"))
    answers = list(book)
    assert answers[0] == told()
    assert answers[1].replayed
    assert answers[2].remaining == 1
    total = outcome(answers)
    assert (total.sold_orders, total.sold_tickets, total.replayed, total.unknown) == (1, 2, 1, 1)
    assert total.refused == {"sold-out": 1, "HTTP 502": 1}
    write_answers(answers, tmp_path / "answers")
    assert read_answers(tmp_path / "answers") == answers
    assert (tmp_path / "answers").stat().st_mode & 0o077 == 0


# The whole ---------------------------------------------------------------------------------------


async def run_program(*arguments: str, within_s: float = 110, **settings: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        cwd=ROOT,
        env=environment(**settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(within_s):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()
    return process.returncode or 0, out.decode()


def test_demo_leaves_data_of_others_alone(tmp_path: Path) -> None:
    real = tmp_path / ".sale"
    for name in ("run", "logs", "redis", "postgresql"):
        (real / name).mkdir(parents=True)
    (real / "sale.lock").touch()
    with pytest.raises(EngineError, match="was not made by the demo"):
        fresh(real)
    assert (real / "postgresql").is_dir()

    fresh(tmp_path / "demo")
    (tmp_path / "demo/logs").mkdir()
    fresh(tmp_path / "demo")
    assert not (tmp_path / "demo/logs").exists()
    with (tmp_path / "demo/sale.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(EngineError, match="in use"):
            fresh(tmp_path / "demo")


def test_demo_needs_no_more_than_its_extra() -> None:
    """`scripts/demo` installs neither Locust nor what the report needs."""
    away = "import sys; sys.modules.update(dict.fromkeys(('locust', 'plotly', 'jinja2')))"
    code = f"{away}; import loadtest.demo, loadtest.rush.worker"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.load
async def test_small_demo_ends_with_clean_books_and_audit(
    tmp_path: Path,
) -> None:
    size = ["--members", "4000", "--cards", "6000", "--data-dir", str(tmp_path / "d")]
    status, out = await run_program("loadtest.demo", "--exit", *size)
    assert status == 0, out
    assert out.count("clean") == 2
    assert "nothing is left running" in out


@pytest.mark.load
async def test_tiny_benchmark_prints_every_row() -> None:
    status, out = await run_program("loadtest.bench", "--tiny", "--json")
    assert status == 0, out
    for row in ("constant", "purchases", "replays", "sold_out", "not_open", "redis_bytes_an_order"):
        assert row in out, out
