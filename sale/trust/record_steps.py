"""The steps that a member's records in Redis still show, though the ledger lacks their events.

A record says what made its order and what changed it last. What it does not say (an earlier change,
who cancelled) is lost with the stream.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from sale.domain.order import GIVEN_BACK, VALID, OrderState
from sale.ledger.chain import Event
from sale.ledger.fold import CampaignState, OrderRecord, hold_name
from sale.ledger.kinds import CANCELLED, EXPIRED, HELD, MEMBER, PAID, SOLD, Outcome


def steps_beyond(
    member_no: int,
    records: Sequence[OrderRecord],
    holds: Mapping[str, int],
    books: CampaignState,
) -> Iterator[Event]:
    """Give the events after those of ``books`` that made or changed these orders last.

    ``holds`` are those in Redis. The moment of a change is not in a record: it is the earliest one
    that is possible.
    """
    known = {order.seq: order for order in books.members.get(member_no, ())}
    for record in records:
        before = known.get(record.seq)
        if record.seq > books.seq:
            made = _made(member_no, record, holds, books)
            yield made
            before = msgspec.structs.replace(
                record,
                live=record.quantity,
                state=OrderState.CONFIRMED if made.pay_before is None else OrderState.HELD,
                letters=VALID * record.quantity,
                paid=False,
                returned=False,
            )
        if before is not None and record.changed > books.seq:
            yield from _changed(member_no, record, before, books)


def _made(
    member_no: int, record: OrderRecord, holds: Mapping[str, int], books: CampaignState
) -> Event:
    pay_before = None
    if books.config.get("payment") == "online":
        lasts_ms = books.config.get("hold_s", 0) * 1000
        pay_before = holds.get(hold_name(record.seq, member_no), record.at_ms + lasts_ms)
    return Event(
        record.seq, record.at_ms, books.epoch, SOLD if pay_before is None else HELD, member_no,
        record.showing, record.quantity, record.key_hash, books.config.get("price_fen"), pay_before,
    )  # fmt: skip


def _changed(
    member_no: int, record: OrderRecord, before: OrderRecord, books: CampaignState
) -> Iterator[Event]:
    price_fen = books.config.get("price_fen", 0)
    names: dict[str, Any] = {"order": record.seq, "member_no": member_no}
    if record.paid and not before.paid:
        outcome = Outcome.KEPT if before.state is OrderState.HELD else Outcome.REVIVED
        names["outcome"] = Outcome.RETURNED if record.returned else outcome
        names["amount_fen"] = record.quantity * price_fen
        yield _event(PAID, record, books, names)
    elif record.state is OrderState.EXPIRED and before.state is OrderState.HELD:
        at_ms = books.holds.get(hold_name(record.seq, member_no), record.at_ms)
        yield Event(
            record.changed, at_ms, books.epoch, EXPIRED, member_no=member_no, order=record.seq
        )
    elif tickets := [
        no
        for no, (then, now) in enumerate(zip(before.letters, record.letters, strict=True), 1)
        if then == VALID and now == GIVEN_BACK
    ]:
        names["tickets"] = tickets
        names["refund_fen"] = len(tickets) * price_fen if record.paid else 0
        yield _event(CANCELLED, record, books, {**names, "actor": MEMBER})


def _event(kind: str, record: OrderRecord, books: CampaignState, data: dict[str, Any]) -> Event:
    return Event(
        record.changed, record.at_ms, books.epoch, kind, member_no=data["member_no"],
        order=data["order"], data=data,
    )  # fmt: skip
