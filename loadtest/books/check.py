"""The check of the books: what clients were told, against what stands in PostgreSQL.

After a run, when the ledger has been written, ``check`` looks for every way in which the answers
and the books can disagree. It knows nothing of how the engine works: it reads orders and showings
by plain SQL and the answers from the wire, so a fault in the engine's own audit cannot hide from
it.

An outcome that the client does not know (no answer, 5xx, a balancer's own answer) may or may not
have an order, but never two, and never one of other content.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from loadtest.books.answers import Answer
from loadtest.books.ledger import Books, OrderRow
from loadtest.record import Finding

FINDINGS_MAX: Final = 1_000
"""A broken run would otherwise fill memory and terminal with the same finding."""

LIVE_STATES: Final = frozenset({"held", "confirmed", "collected"})


def key_hash(key: str) -> str:
    """How the books hold an idempotency key."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def check(
    answers: Iterable[Answer], books: Books, *, alone: bool = False, only_falls: bool = False
) -> list[Finding]:
    """Compare what clients were told with the books; an empty list is what one hopes for.

    ``alone``: nobody else bought in this campaign, so an order that nobody asked for is a finding.
    ``only_falls``: no stock was added and no ticket came back, so a refusal as sold out is untrue
    where that many are left at the end.
    """
    found = _Findings()
    _check_stock(books, found)
    _check_limit(books, found)
    _check_window(books, found)
    by_key: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    remaining = _remaining(books)
    for answer in answers:
        by_key[answer.card, key_hash(answer.key)].append(answer)
        left = remaining.get(answer.showing, 0)
        if only_falls and answer.code == "sold-out" and left >= answer.quantity:
            found.add(
                "untrue-sold-out", f"{_who(answer)} was refused {answer.quantity}, {left} left"
            )
    _check_orders(by_key, books, found, alone=alone)
    _check_answers(by_key, books, found)
    _check_codes(by_key, found)
    return found.list


def so_many(findings: Sequence[Finding]) -> str:
    """How many findings there are, in words: beyond ``FINDINGS_MAX`` they are not counted."""
    count = len(findings)
    if count >= FINDINGS_MAX:
        return f"{FINDINGS_MAX:,} or more findings"
    return "1 finding" if count == 1 else f"{count} findings"


class _Findings:
    def __init__(self) -> None:
        self.list: list[Finding] = []

    def add(self, kind: str, what: str) -> None:
        if len(self.list) < FINDINGS_MAX:
            self.list.append(Finding(kind, what))


def _who(answer: Answer) -> str:
    return f"member {answer.card}, key {answer.key}"


def _remaining(books: Books) -> dict[str, int]:
    left = dict(books.stock)
    for order in books.orders:
        if order.state in LIVE_STATES:
            left[order.showing] = left.get(order.showing, 0) - order.quantity
    return left


def _check_stock(books: Books, found: _Findings) -> None:
    for showing, left in _remaining(books).items():
        if left < 0:
            stock = books.stock.get(showing, 0)
            found.add("oversold", f"showing {showing}: {stock - left} sold of {stock}")


def _check_limit(books: Books, found: _Findings) -> None:
    live: dict[str, int] = defaultdict(int)
    for order in books.orders:
        if order.state in LIVE_STATES:
            live[order.card] += order.quantity
    for card, tickets in live.items():
        if tickets > books.card_limit:
            what = f"member {card} has {tickets} tickets, the limit is {books.card_limit}"
            found.add("limit-passed", what)


def _check_window(books: Books, found: _Findings) -> None:
    for order in books.orders:
        if books.opens_at_ms is not None and order.created_at_ms < books.opens_at_ms:
            early_ms = books.opens_at_ms - order.created_at_ms
            found.add("too-early", f"order {order.order_no}: {early_ms} ms before the opening")


def _check_orders(
    by_key: dict[tuple[str, str], list[Answer]], books: Books, found: _Findings, *, alone: bool
) -> None:
    """Look from each order: was it asked for, once, with this content, and not refused?"""
    seen: dict[tuple[str, str], str] = {}
    numbers: set[str] = set()
    for order in books.orders:
        where = f"order {order.order_no}"
        if order.order_no in numbers:
            found.add("number-twice", f"{where} is there twice")
        numbers.add(order.order_no)
        name = (order.card, order.key_hash)
        if name in seen:
            found.add("doubled", f"{where} and {seen[name]} have one card and key")
        seen[name] = order.order_no
        told = by_key.get(name)
        if told is None:
            if alone:
                found.add("unasked", f"{where}: nobody asked for it")
            continue
        if all(answer.refused for answer in told):
            found.add("refused-but-sold", f"{where}: {_who(told[0])} was only ever refused")
        elif not any(
            (a.showing, a.quantity) == (order.showing, order.quantity)
            for a in told
            if not a.refused
        ):
            found.add("wrong-content", f"{where}: {_who(told[0])} asked for something else")


def _check_answers(
    by_key: dict[tuple[str, str], list[Answer]], books: Books, found: _Findings
) -> None:
    """Look from each 201: does its order stand, just so, and is it always the same?"""
    orders = {order.order_no: order for order in books.orders}
    for (card, hashed), told in by_key.items():
        sold = [answer for answer in told if answer.sold]
        for answer in sold:
            where = f"order {answer.order_no or '(no number)'} of {_who(answer)}"
            order = orders.get(answer.order_no)
            if order is None:
                found.add("lost", f"{where}: not in the books")
            elif (order.card, order.key_hash) != (card, hashed):
                found.add("wrong-content", f"{where}: the books have another card or key")
            elif difference := _difference(answer, order):
                found.add("wrong-content", f"{where}: {difference}")
        if len({answer.order_no for answer in sold}) > 1:
            found.add("key-two-orders", f"{_who(sold[0])}: was told of several orders")
        if len({answer.tickets for answer in sold}) > 1:
            found.add("tickets-changed", f"{_who(sold[0])}: was told of other ticket codes")
        if sum(not answer.replayed for answer in sold) > 1:
            found.add("not-replayed", f"{_who(sold[0])}: was told twice of a new order")


def _difference(answer: Answer, order: OrderRow) -> str:
    """Say in what the asked, the told and the written differ, or nothing."""
    asked = (answer.showing or order.showing, answer.quantity)
    told = (answer.told_showing, answer.told_quantity)
    written = (order.showing, order.quantity)
    if not asked == told == written:
        return f"asked {asked}, told {told}, written {written}"
    if answer.amount_fen != order.quantity * order.price_fen:
        return f"told {answer.amount_fen} fen, written {order.quantity} × {order.price_fen}"
    if len(answer.tickets) != order.quantity:
        return f"told {len(answer.tickets)} ticket codes of {order.quantity}"
    return ""


def _check_codes(by_key: dict[tuple[str, str], list[Answer]], found: _Findings) -> None:
    owner: dict[str, str] = {}
    for told in by_key.values():
        for answer in told:
            if len(set(answer.tickets)) != len(answer.tickets):
                found.add("code-twice", f"order {answer.order_no}: has a ticket code twice")
            for code in answer.tickets:
                if owner.setdefault(code, answer.order_no) != answer.order_no:
                    other = owner[code]
                    found.add("code-twice", f"orders {answer.order_no} and {other} share a code")
