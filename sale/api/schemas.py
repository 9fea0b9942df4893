"""Bodies that come in and go out, with the field names of the contract.

What comes in refuses unknown fields and wrong types (``true`` is not a number, nor is ``"2"``);
ranges that depend on a campaign are checked by the use cases. What goes out is encoded as it
stands. The same types describe the API in ``/openapi.json``. Times are RFC 3339 texts with offset,
money is fen.
"""

from typing import Annotated, Final, Generic, TypeVar

import msgspec
from msgspec import Meta

from sale.domain.campaign import CARD_LIMIT_MAX, CATEGORIES, PRICE_MAX_FEN, SHOWINGS_MAX, STOCK_MAX
from sale.domain.order import Count, Fen, Time
from sale.domain.text import TITLE_MAX
from sale.operators.steps import Identifier

Item = TypeVar("Item")

State = Annotated[
    str,
    Meta(
        extra_json_schema={
            "enum": ["draft", "scheduled", "open", "paused", "closed", "recovering", "deleted"],
            "description": "`deleted`: told to an operator alone, who repeats what made or filled "
            "a draft that is gone since.",
        }
    ),
]
# What comes in.
_SHOWN: Final = (
    "Something that is seen, and no character that is invisible or turns the direction of writing; "
    "spaces around it are taken off."
)
Title = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=TITLE_MAX,
        extra_json_schema={"pattern": r"\S", "description": _SHOWN},
    ),
]


class OrderRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A purchase. ``showing`` may be left out where the campaign has one."""

    # What no campaign allows is refused before the token is looked at; its own bound comes later.
    quantity: Annotated[int, Meta(ge=1, le=CARD_LIMIT_MAX)]
    showing: str | None = None


class ShowingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A date, class, or simply the tickets of a new campaign."""

    id: Identifier
    title: Title
    tickets: Annotated[int, Meta(ge=0, le=STOCK_MAX)]
    starts_at: Time | None = None


class CampaignRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new campaign: the fields of the campaign file.

    It describes the body; ``sale.domain.parse_campaign`` reads it, because that names every wrong
    field in one go.
    """

    id: Identifier
    title: Title
    category: Annotated[str, Meta(extra_json_schema={"enum": list(CATEGORIES)})]
    price_fen: Annotated[int, Meta(ge=0, le=PRICE_MAX_FEN)]
    payment: Annotated[str, Meta(extra_json_schema={"enum": ["none", "counter"]})]
    card_limit: Annotated[int, Meta(ge=1, le=CARD_LIMIT_MAX)]
    showings: Annotated[list[ShowingRequest], Meta(min_length=1, max_length=SHOWINGS_MAX)]
    order_max: Annotated[int, Meta(ge=1, le=CARD_LIMIT_MAX)] | msgspec.UnsetType = msgspec.UNSET
    opens_at: Time | None = None
    closes_at: Time | None = None
    unions: Annotated[list[str], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["*"])
    owner: str = "district"
    draft: bool = False


class ShowingView(msgspec.Struct, frozen=True, kw_only=True):
    """A showing with its stock; what remains of it is told by the availability."""

    id: str
    title: str
    starts_at: Time | None = None
    tickets: Count


class CampaignView(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign as everyone may see it. ``unions`` is ``["*"]`` or the codes that may buy."""

    id: str
    title: str
    category: str
    price_fen: Fen
    payment: str
    card_limit: Count
    order_max: Count
    state: State
    opens_at: Time | None = None
    closes_at: Time | None = None
    unions: list[str]
    owner: str
    showings: list[ShowingView]


class RemainingView(msgspec.Struct, frozen=True):
    """Stock of a showing, and what is left of it."""

    id: str
    tickets: Count
    remaining: Count


class AvailabilityView(msgspec.Struct, frozen=True):
    """What remains, at most one second old."""

    showings: list[RemainingView]
    as_of: Time


class LiveView(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign as its operators watch it, straight from the engine.

    ``trouble`` says why a recovering campaign does not sell.
    """

    id: str
    state: State
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
    """RFC 9457 problem document. Some codes carry further members (``remaining`` …)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    title_en: str
    detail_en: str
