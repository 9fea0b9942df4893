"""Bodies of requests and answers, with the field names of the contract.

Request bodies refuse unknown fields and wrong types (``true`` is not a number, nor is ``"2"``);
ranges that depend on a campaign are checked by the use cases. Answers are encoded without
checks. The same types describe the API in ``/openapi.json``. Times are RFC 3339 texts with offset,
money is fen.
"""

from typing import Annotated, Final, Generic, TypeVar

import msgspec
from msgspec import Meta

from sale.domain.campaign import CARD_LIMIT_MAX
from sale.domain.campaign_file import request_type
from sale.domain.campaign_view import StateShown
from sale.domain.order import Count, Time

Item = TypeVar("Item")


class OrderRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A purchase. ``showing`` may be left out where the campaign has one."""

    # A quantity that no campaign allows is refused before the token; the campaign's bound later.
    quantity: Annotated[int, Meta(ge=1, le=CARD_LIMIT_MAX)]
    showing: str | None = None


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
    """RFC 9457 problem document. Some codes carry further members (``remaining`` …)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    title_en: str
    detail_en: str
