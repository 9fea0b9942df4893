"""Orders, and their public numbers."""

import re
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from sale.domain.campaign import CAMPAIGN_ID

IDEMPOTENCY_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
LOW_BITS: Final = 0xFFFFFF
ORDERS_MAX: Final = 50
"""Orders of a member in a campaign, ended ones too: a bot that holds and lets expire adds no more.

The same number stands in ``purchase.lua``.
"""
VALID: Final = "v"
COLLECTED: Final = "c"
GIVEN_BACK: Final = "x"
"""Letters of the tickets in an order's record."""
ORDER_NO: Final = re.compile(r"[A-Za-z0-9.-]{1,64}")
"""The form that clients may rely on; ``parse_order_number`` reads the engine's own numbers."""


# Answers are described, not checked, so their choices and formats stand in extra_json_schema.
Time = Annotated[
    str,
    Meta(extra_json_schema={"format": "date-time", "examples": ["2015-05-01T09:00:00.000+08:00"]}),
]


class OrderState(StrEnum):
    """States of an order in the ledger and in Redis."""

    HELD = "held"
    CONFIRMED = "confirmed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


OrderStateShown = Annotated[
    str, Meta(extra_json_schema={"enum": [*(state.value for state in OrderState), "collected"]})
]
Fen = Annotated[int, Meta(extra_json_schema={"minimum": 0})]
Count = Annotated[int, Meta(extra_json_schema={"minimum": 0})]


CURSOR_MOMENT_MAX_MS: Final = 2**43
CURSOR_SEQ_MAX: Final = 2**53
"""Beyond any real one, and within what PostgreSQL can be asked for: cursors come from outside."""


class OrderCursor(NamedTuple):
    """Where a page of orders ended: sold at (UTC ms), campaign, event number."""

    created_at_ms: Annotated[int, Meta(ge=0, le=CURSOR_MOMENT_MAX_MS)]
    campaign_id: Annotated[str, Meta(pattern=f"^{CAMPAIGN_ID.pattern}$")]
    seq: Annotated[int, Meta(ge=0, le=CURSOR_SEQ_MAX)]


class Ticket(msgspec.Struct, frozen=True):
    """One ticket of an order. The code is what is shown at the counter, and cannot be guessed."""

    no: int
    code: str
    state: Annotated[str, Meta(extra_json_schema={"enum": ["valid", "collected", "cancelled"]})] = (
        "valid"
    )


class PaymentState(StrEnum):
    """States of the money of an order: a life of its own beside that of the order."""

    NONE = "none"
    DUE = "due"
    PAID = "paid"
    REFUNDING = "refunding"
    REFUNDED = "refunded"


class Payment(msgspec.Struct, frozen=True):
    """The money of an order, in fen: what it costs, what came in, what has gone back."""

    state: Annotated[str, Meta(extra_json_schema={"enum": [each.value for each in PaymentState]})]
    amount_fen: Fen
    paid_fen: Fen
    refunded_fen: Fen


class Order(msgspec.Struct, frozen=True):
    """A card's order. ``card_remaining`` is what the card may still buy in the campaign.

    ``quantity`` and ``amount_fen`` stay as bought. ``pay_before`` is null unless it is held,
    ``cancel_until`` where members cannot give tickets back.
    """

    order_no: str
    campaign: str
    showing: str
    quantity: Count
    state: OrderStateShown
    amount_fen: Fen
    pay_before: Time | None
    created_at: Time
    tickets: list[Ticket]
    card_remaining: Count
    payment: Payment
    cancel_until: Time | None


def order_number(campaign_id: str, seq: int, at_ms: int) -> str:
    """Public number of an order, at most 64 characters.

    The event's number alone would be unique, but a Redis that went back in time could give the
    same number twice before it is caught; the moment of the sale tells such two apart.
    """
    return f"{campaign_id}.{seq:x}.{_moment(at_ms)}"


@lru_cache(maxsize=4_096)
def _moment(at_ms: int) -> str:
    """The moment of a sale in an order's number. A batch of sales shares one."""
    return f"{at_ms & LOW_BITS:06x}"


class OrderPlace(NamedTuple):
    """What an order number says: campaign, event number, last 24 bits of the moment (ms)."""

    campaign_id: str
    seq: int
    low_bits: int

    def is_of(self, seq: int, at_ms: int) -> bool:
        """Whether it means the order that event ``seq`` made at that moment."""
        return seq == self.seq and at_ms & LOW_BITS == self.low_bits


def parse_order_number(order_no: str) -> OrderPlace | None:
    """Read an order number, or give None."""
    match = _ORDER_NO.fullmatch(order_no)
    if match is None:
        return None
    return OrderPlace(match[1], int(match[2], 16), int(match[3], 16))


_ORDER_NO: Final = re.compile(r"([a-z0-9-]{1,48})\.([0-9a-f]{1,8})\.([0-9a-f]{6})")
