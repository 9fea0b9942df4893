"""Requests of members and operators: one connection per request, and every answer recorded."""

import asyncio
import json
import time
from dataclasses import dataclass, field

from answer_book import AnswerBook

from loadtest.client import Client
from loadtest.members import Ask, Member
from loadtest.wire import UNKNOWN, ProtocolError, Response, purchase_request

ASK_S = 3.0
UNCERTAIN = frozenset({UNKNOWN, 429, 503})


@dataclass
class Stall:
    """A campaign of the seed: its ID, its showings and the book of its answers."""

    campaign: str
    showings: tuple[str, ...]
    book: AnswerBook = field(default_factory=AnswerBook)


async def ask(address: str, raw: bytes, within_s: float = ASK_S) -> Response:
    """Send one request; status 0 means that no answer came. Raises ProtocolError."""
    sent_at = time.perf_counter()
    try:
        async with asyncio.timeout(within_s), Client(address, 1, timeout_s=within_s) as client:
            return await client.request(raw)
    except ProtocolError:
        raise
    except (OSError, TimeoutError) as error:
        lost = Response(UNKNOWN, b"", b"", type(error).__name__)
        lost.sent_at, lost.received_at = sent_at, time.perf_counter()
        return lost


async def buy(address: str, stall: Stall, member: Member, asked: Ask) -> Response:
    """Send a purchase and record its answer, even if the caller was cancelled."""
    raw = purchase_request(
        address, stall.campaign, member.token, asked.key, asked.quantity, asked.showing
    )
    response = Response(UNKNOWN, b"", b"", "given up")
    response.sent_at = time.perf_counter()
    try:
        response = await ask(address, raw)
    finally:
        response.received_at = response.received_at or time.perf_counter()
        stall.book.record(asked, response)
    return response


def outcome(response: Response) -> str:
    """Describe an answer in one word."""
    if response.status == UNKNOWN:
        return "no answer"
    if response.status < 300:
        replayed = response.header("idempotency-replayed") == "true"
        return "replayed" if replayed else "sold" if response.status == 201 else "done"
    try:
        return str(response.json()["code"])
    except (ValueError, KeyError):
        return f"HTTP {response.status}"


async def post(address: str, path: str, token: str, body: dict[str, object], key: str) -> Response:
    """Send an operator's step."""
    content = json.dumps(body)
    raw = (
        f"POST {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n"
        f"Idempotency-Key: {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n{content}"
    ).encode()
    return await ask(address, raw, 2 * ASK_S)
