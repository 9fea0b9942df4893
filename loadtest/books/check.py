"""The check of the books: what clients were told, against what stands in PostgreSQL.

After a run, when the ledger has been written, ``check`` looks for every way in which the answers
and the books can disagree. It reads orders and showings by plain SQL and the answers from the wire,
and uses nothing of the engine, so a fault in the engine's own audit cannot hide from it.

An outcome that the client does not know (no answer, 5xx, a balancer's own answer) may or may not
have an order, but never two, and never one of other content.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Final

from loadtest.books.answers import Answer
from loadtest.books.ledger import Books, OrderRow
from loadtest.record import Finding

FINDINGS_MAX: Final = 1_000
"""A broken run would otherwise fill memory and terminal with the same finding."""

LIVE_STATES: Final = frozenset({"held", "confirmed", "collected"})

_Found = Iterator[tuple[str, str]]
_ByKey = dict[tuple[str, str], list[Answer]]


def key_hash(key: str) -> str:
    """How the books hold an idempotency key."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def check(
    answers: Iterable[Answer], books: Books, *, alone: bool = False, only_falls: bool = False
) -> list[Finding]:
    """Compare what clients were told with the books; clean books give an empty list.

    ``alone``: nobody else bought in this campaign, so an order that nobody asked for is a finding.
    ``only_falls``: no stock was added and no ticket came back, so a refusal as sold out is untrue
    where that many are left at the end.
    """
    by_key: _ByKey = defaultdict(list)
    for answer in answers:
        by_key[answer.member_no, key_hash(answer.key)].append(answer)
    found = chain(
        _check_books(books),
        _check_refusals(by_key, books) if only_falls else (),
        _check_orders(by_key, books, alone=alone),
        _check_answers(by_key, books),
        _check_codes(by_key),
    )
    return [Finding(kind, what) for kind, what in islice(found, FINDINGS_MAX)]


def so_many(findings: Sequence[Finding]) -> str:
    """How many findings there are, in words: beyond ``FINDINGS_MAX`` they are not counted."""
    count = len(findings)
    if count >= FINDINGS_MAX:
        return f"{FINDINGS_MAX:,} or more findings"
    return "1 finding" if count == 1 else f"{count} findings"


def _who(answer: Answer) -> str:
    return f"member {answer.member_no}, key {answer.key}"


def _remaining(books: Books) -> Counter[str]:
    left = Counter(books.stock)
    for order in books.orders:
        left[order.showing] -= order.quantity * (order.state in LIVE_STATES)
    return left


def _check_books(books: Books) -> _Found:
    """The books alone: stock, each member's limit, and the opening."""
    for showing, left in _remaining(books).items():
        if left < 0:
            stock = books.stock.get(showing, 0)
            yield "oversold", f"showing {showing}: {stock - left} sold of {stock}"
    live = Counter[str]()
    for order in books.orders:
        live[order.member_no] += order.quantity * (order.state in LIVE_STATES)
        if books.opens_at_ms is not None and order.created_at_ms < books.opens_at_ms:
            early_ms = books.opens_at_ms - order.created_at_ms
            yield "too-early", f"order {order.order_no}: {early_ms} ms before the opening"
    for member_no, tickets in live.items():
        if tickets > books.card_limit:
            what = f"member {member_no} has {tickets} tickets, the limit is {books.card_limit}"
            yield "limit-passed", what


def _check_refusals(by_key: _ByKey, books: Books) -> _Found:
    remaining = _remaining(books)
    for answer in chain.from_iterable(by_key.values()):
        left = remaining[answer.showing]
        if answer.code == "sold-out" and left >= answer.quantity:
            yield "untrue-sold-out", f"{_who(answer)} was refused {answer.quantity}, {left} left"


def _check_orders(by_key: _ByKey, books: Books, *, alone: bool) -> _Found:
    """Look from each order: was it asked for, once, with this content, and not refused?"""
    seen: dict[tuple[str, str], str] = {}
    numbers: set[str] = set()
    for order in books.orders:
        where, name = f"order {order.order_no}", (order.member_no, order.key_hash)
        if order.order_no in numbers:
            yield "number-twice", f"{where} is there twice"
        if name in seen:
            yield "doubled", f"{where} and {seen[name]} have one member and key"
        numbers.add(order.order_no)
        seen[name] = order.order_no
        told = by_key.get(name, [])
        content = (order.showing, order.quantity)
        if not told:
            if alone:
                yield "unasked", f"{where}: nobody asked for it"
        elif all(answer.refused for answer in told):
            yield "refused-but-sold", f"{where}: {_who(told[0])} was only ever refused"
        elif all(a.refused or (a.showing, a.quantity) != content for a in told):
            yield "wrong-content", f"{where}: {_who(told[0])} asked for something else"


def _check_answers(by_key: _ByKey, books: Books) -> _Found:
    """Look from each 201: does its order stand, just so, and is it always the same?"""
    orders = {order.order_no: order for order in books.orders}
    for name, told in by_key.items():
        sold = [answer for answer in told if answer.sold]
        for answer in sold:
            where = f"order {answer.order_no or '(no number)'} of {_who(answer)}"
            order = orders.get(answer.order_no)
            if order is None:
                yield "lost", f"{where}: not in the books"
            elif (order.member_no, order.key_hash) != name:
                yield "wrong-content", f"{where}: the books have another member or key"
            elif difference := _difference(answer, order):
                yield "wrong-content", f"{where}: {difference}"
        if len({answer.order_no for answer in sold}) > 1:
            yield "key-two-orders", f"{_who(sold[0])}: was told of several orders"
        if len({answer.tickets for answer in sold}) > 1:
            yield "tickets-changed", f"{_who(sold[0])}: was told of other ticket codes"
        if sum(not answer.replayed for answer in sold) > 1:
            yield "not-replayed", f"{_who(sold[0])}: was told twice of a new order"


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


def _check_codes(by_key: _ByKey) -> _Found:
    owner: dict[str, str] = {}
    for answer in chain.from_iterable(by_key.values()):
        if len(set(answer.tickets)) != len(answer.tickets):
            yield "code-twice", f"order {answer.order_no}: has a ticket code twice"
        for code in answer.tickets:
            if owner.setdefault(code, answer.order_no) != answer.order_no:
                yield "code-twice", f"orders {answer.order_no} and {owner[code]} share a code"
