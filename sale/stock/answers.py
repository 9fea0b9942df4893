"""A purchase on its way to the script, and the answer that it gets.

The answers are read from replies of ``purchase.lua`` and ``peek.lua``; ``batcher.py`` decides
which of the two is called.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from typing import Any, Final

import msgspec

from sale.domain.problem import Problem
from sale.ledger.chain import Event
from sale.ledger.fold import OrderRecord
from sale.stock.records import parse_records
from sale.stock.scripts import Decision, Peek


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a purchase.

    ``decision`` is None if the outcome is unknown or Redis cannot be trusted. ``value`` is
    the event number of an order, the tickets left, the tickets the member may still buy, or the
    opening moment (ms): see the header of ``purchase.lua``. ``pay_before_ms`` is when an order's
    hold ends, or the next hold of a campaign that is sold out, 0 where there is none; then
    ``held`` is how many tickets of the showing are in holds. ``record`` is that of a replayed order
    which is held or has changed.
    """

    decision: Decision | None
    value: int = 0
    card_remaining: int = 0
    sold_at_ms: int = 0
    now_ms: int = 0
    price_fen: int = 0
    pay_before_ms: int = 0
    held: int = 0
    record: OrderRecord | None = None


UNKNOWN: Final = Answer(None)


OUTCOMES: Final[dict[Decision | None, str]] = {
    Decision.SOLD: "sold",
    Decision.REPLAYED: "replayed",
    Decision.REPLAYED_CHANGED: "replayed",
    Decision.CARD_REVOKED: Problem.CARD_REVOKED,
    Decision.NOT_ELIGIBLE: Problem.NOT_ELIGIBLE,
    Decision.KEY_MISMATCH: Problem.IDEMPOTENCY_MISMATCH,
    Decision.NOT_OPEN: Problem.NOT_OPEN,
    Decision.PAUSED: Problem.PAUSED,
    Decision.CLOSED: Problem.CLOSED,
    Decision.RECOVERING: Problem.UNAVAILABLE,
    Decision.DRAFT: Problem.NOT_FOUND,
    Decision.LIMIT_EXCEEDED: Problem.LIMIT_EXCEEDED,
    Decision.SOLD_OUT: Problem.SOLD_OUT,
    Decision.BAD_QUANTITY: Problem.INVALID_REQUEST,
    Decision.BEHIND: Problem.UNAVAILABLE,
    Decision.TOO_MANY_ORDERS: Problem.TOO_MANY_ORDERS,
    None: Problem.UNAVAILABLE,
}
_DECISIONS: Final = {int(decision): decision for decision in Decision}


class Purchase(ABC):
    """One purchase on its way to the script; ``asked_at`` in seconds of the monotonic clock.

    A subclass implements ``settle`` to deliver the answer: to a future that a handler awaits
    (``AwaitedPurchase``), or as bytes on the wire for the fast path. A future and a wake-up per
    purchase make up a large part of the cost of aiohttp's handlers.
    """

    __slots__ = ("asked_at", "key_hash", "member_no", "quantity", "showing", "union")

    def __init__(
        self, member_no: int, union: str, showing: int, quantity: int, key_hash: str
    ) -> None:
        self.member_no = member_no
        self.union = union
        self.showing = showing
        self.quantity = quantity
        self.key_hash = key_hash
        self.asked_at = time.monotonic()

    @abstractmethod
    def settle(self, answer: Answer) -> None:
        """Deliver the answer, once. It must neither raise nor wait: the rest of the batch waits."""


class AwaitedPurchase(Purchase):
    """A purchase whose ``answer`` a handler awaits."""

    __slots__ = ("answer",)

    def __init__(
        self,
        member_no: int,
        union: str,
        showing: int,
        quantity: int,
        key_hash: str,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(member_no, union, showing, quantity, key_hash)
        self.answer: asyncio.Future[Answer] = loop.create_future()

    def settle(self, answer: Answer) -> None:
        """Wake the handler unless it was cancelled; the order is valid in either case."""
        if not self.answer.done():
            self.answer.set_result(answer)


def read_answer(told: list[Any], now_ms: int, price_fen: int) -> Answer:
    """Read code, a, b, c of a reply of ``purchase.lua``."""
    code, a, b, c = told
    decision = _DECISIONS[code]
    if decision is Decision.REPLAYED_CHANGED:
        (record,) = parse_records(a)
        return Answer(decision, record.seq, b, record.at_ms, now_ms, price_fen, c, record=record)
    if decision is Decision.SOLD_OUT:
        return Answer(decision, a, now_ms=now_ms, pay_before_ms=c, held=b)
    return Answer(decision, a, b, c or now_ms, now_ms, price_fen)


def sale_event(
    p: Purchase,
    seq: int,
    at_ms: int,
    epoch: int,
    kind: str,
    price_fen: int,
    pay_before: int | None,
) -> Event:
    """Give the event of a purchase that was sold, or held until ``pay_before`` (UTC ms)."""
    return Event(
        seq, at_ms, epoch, kind, p.member_no, p.showing, p.quantity, p.key_hash, price_fen,
        pay_before,
    )  # fmt: skip


def refusal_by_state(peek: Peek) -> Answer | None:
    """Give the refusal for all purchases by the campaign's state, or None if it sells."""
    if peek.state == "scheduled":
        return Answer(Decision.NOT_OPEN, peek.opens_at_ms, now_ms=peek.now_ms)
    decision = {
        "open": None,
        "paused": Decision.PAUSED,
        "closed": Decision.CLOSED,
        "recovering": Decision.RECOVERING,
    }.get(peek.state, Decision.DRAFT)
    return None if decision is None else Answer(decision, now_ms=peek.now_ms)
