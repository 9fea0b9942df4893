"""Bodies of requests and answers, with the field names of the contract.

Request bodies refuse unknown fields and wrong types (``true`` is not a number, nor is ``"2"``);
ranges that depend on a campaign are checked by the use cases. Answers are encoded without
checks. The same types describe the API in ``/openapi.json``. Times are RFC 3339 texts with offset,
money is fen.
"""

from typing import Annotated, Final, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sale.domain.campaign import CARD_LIMIT_MAX
from sale.domain.campaign_file import request_type
from sale.domain.campaign_view import StateShown
from sale.domain.order import Count, Time
from sale.members.cancel import CANCEL_REASONS
from sale.operators.steps import Reason

Item = TypeVar("Item")


class OrderRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A purchase. ``showing`` may be left out where the campaign has one."""

    # A quantity that no campaign allows is refused before the token; the campaign's bound later.
    quantity: Annotated[int, Meta(ge=1, le=CARD_LIMIT_MAX)]
    showing: str | None = None


ReturnPath = Annotated[
    str,
    Meta(
        max_length=200,
        pattern=r"^/([^/\\].*)?$",
        description="a path of this site",
        extra={"zh": "本站的路径"},
    ),
]


class PayRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``return_to``: to where the provider sends the payer back."""

    return_to: ReturnPath | None = None


class TestResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payer's choice at the test provider."""

    __test__ = False  # not a test, whatever its name says

    result: Literal["paid", "failed", "none"]


class TestPaymentView(msgspec.Struct, frozen=True):
    """A payment at the test provider."""

    __test__ = False

    payment_no: str
    amount_fen: int
    state: str


TicketNumbers = Annotated[
    list[Annotated[int, Meta(ge=1, le=CARD_LIMIT_MAX)]],
    Meta(
        min_length=1,
        max_length=CARD_LIMIT_MAX,
        extra={"zh": "票号的列表"},
        extra_json_schema={"description": "a list of ticket numbers"},
    ),
]


class CancelRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tickets to give back, by their numbers in the order; left out: all that can be."""

    tickets: TicketNumbers | None = None


class OrderCancelRequest(CancelRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same for operators, who say why."""

    reason: Reason


CampaignRequest: Final = request_type()
"""A new campaign. It describes the body; ``campaign_file.py`` reads it, naming every fault."""


class RemainingView(msgspec.Struct, frozen=True):
    """Stock of a showing, and what is left of it."""

    id: str
    tickets: Count
    remaining: Count


class AvailabilityView(msgspec.Struct, frozen=True):
    """Remaining tickets, at most one second old."""

    showings: list[RemainingView]
    as_of: Time


class LiveView(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign as its operators watch it, straight from the engine.

    ``trouble`` says why a recovering campaign does not sell.
    """

    id: str
    state: StateShown
    trouble: str | None
    showings: list[RemainingView]
    ledger_seq: Count
    ledger_applied: Count
    as_of: Time


class TimeView(msgspec.Struct, frozen=True):
    """The clock that decides openings."""

    now: Time


class HealthView(msgspec.Struct, frozen=True, omit_defaults=True):
    """``ok``, or what is not. A campaign in trouble is named, and makes no host unready."""

    status: str
    reasons: list[str] = []
    campaigns: list[str] = []


class ListView(msgspec.Struct, Generic[Item], frozen=True):
    """One page of a list; ``next`` is the cursor of the following one."""

    items: list[Item]
    next: str | None = None


class ProblemView(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457 problem document, with the members that its code carries."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    title_en: str
    detail_en: str
    field: Annotated[str, Meta(description="`invalid-request`: what is wrong.")] | UnsetType = UNSET
    fields: (
        Annotated[dict[str, str], Meta(description="`invalid-request`: all that is wrong.")]
        | UnsetType
    ) = UNSET
    remaining: (
        Annotated[Count, Meta(description="`sold-out`: tickets left, fewer than asked for.")]
        | UnsetType
    ) = UNSET
    held: (
        Annotated[
            Count, Meta(description="`sold-out`: tickets that wait for payment and may come back.")
        ]
        | UnsetType
    ) = UNSET
    pay_before: (
        Annotated[Time, Meta(description="`sold-out`: when the first of them may come back.")]
        | UnsetType
    ) = UNSET
    card_remaining: (
        Annotated[Count, Meta(description="`limit-exceeded`: what the card may still buy.")]
        | UnsetType
    ) = UNSET
    card_limit: (
        Annotated[Count, Meta(description="`limit-exceeded`: tickets a card may have.")] | UnsetType
    ) = UNSET
    opens_at: Annotated[Time, Meta(description="`not-open`: when it opens.")] | UnsetType = UNSET
    state: Annotated[str, Meta(description="`wrong-state`: of the campaign.")] | UnsetType = UNSET
    reason: (
        Annotated[
            str,
            Meta(
                description="`wrong-state`: why tickets are not given back, or an order not paid.",
                extra_json_schema={"enum": [*CANCEL_REASONS, "confirmed", "cancelled"]},
            ),
        ]
        | UnsetType
    ) = UNSET
