"""A campaign and its showings: the one place where a setting of a campaign is declared.

A setting is one line of ``Terms`` (or of ``Showing``): its name, type and bounds. From that line
come the reader of campaign files and the API's bodies (``campaign_file.py``), the JSON schema, the
views of the API and of the command line (``campaign_view.py``), and, where the line has ``RULE``,
the name under which the scripts read it (``stock/head.py``). Rules that decide a sale stand in
``stock/lua/purchase.lua`` alone.
"""

import re
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from sale.domain.clock import rfc3339, to_ms
from sale.domain.text import TITLE_MAX, Text
from sale.domain.unions import DISTRICT

STOCK_MAX: Final = 10_000_000
CARD_LIMIT_MAX: Final = 1_000
SHOWINGS_MAX: Final = 500
SHOWINGS_SHOWN_MAX: Final = 10
PRICE_MAX_FEN: Final = 10_000_000
HOLD_S: Final = 300
"""How long an order waits for its payment, where the file of an online campaign says nothing."""

RULE: Final = Meta(extra={"rule": True})
"""The scripts decide by this setting: the packed ``rules`` in a campaign's head hold it."""
NOT_IN_FILES: Final = Meta(extra={"in_files": False})
"""The engine sets this one: a file or a body that names it is refused."""


def up_to(field: str) -> Meta:
    """Mark a number that is at most another setting, and equal to that one where it is left out."""
    return Meta(extra={"up_to": field}, extra_json_schema={"description": f"Default: {field}."})


SHOWN_TEXT: Final = (
    "Something that is seen, and no character that is invisible or turns the direction of writing; "
    "spaces around it are taken off."
)
Identifier = Annotated[
    str,
    Meta(
        pattern="^[a-z0-9-]{1,48}$",
        description="1 to 48 of a-z, 0-9 and -",
        extra={"zh": "1 到 48 个小写字母、数字或 -"},
    ),
]
Title = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=TITLE_MAX,
        extra_json_schema={"pattern": r"\S", "description": SHOWN_TEXT},
    ),
]
Moment = Annotated[
    datetime, Meta(tz=True, extra_json_schema={"examples": ["2015-05-01T09:00:00+08:00"]})
]
CardLimit = Annotated[int, Meta(ge=1, le=CARD_LIMIT_MAX)]
HoldTime = Annotated[int, Meta(ge=120, le=1_800)]
Tickets = Annotated[int, Meta(ge=0, le=STOCK_MAX)]

CAMPAIGN_ID: Final = re.compile(r"[a-z0-9-]{1,48}")


class State(StrEnum):
    """States of a campaign. Sold out is not one: tickets come back."""

    DRAFT = "draft"
    SCHEDULED = "scheduled"
    OPEN = "open"
    PAUSED = "paused"
    CLOSED = "closed"
    RECOVERING = "recovering"
    DELETED = "deleted"


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a campaign that its file, the API's bodies and every view have in common."""

    id: Identifier
    title: Title
    category: Literal["education", "culture", "sport", "health", "living"]
    price_fen: Annotated[int, Meta(ge=0, le=PRICE_MAX_FEN), RULE]
    payment: Annotated[Literal["none", "counter", "online"], RULE]
    card_limit: Annotated[CardLimit, RULE]
    order_max: Annotated[CardLimit, up_to("card_limit"), RULE]
    unions: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description='["*"] or a list of union codes',
            extra={"zh": '["*"] 或工会代码的列表'},
        ),
        RULE,
    ] = ("*",)
    owner: str = DISTRICT
    hold_s: Annotated[HoldTime | None, RULE] = None
    """How long an order waits for its payment; None unless ``payment`` is online."""
    cancel_until: Annotated[Moment | None, RULE] = None
    """Until when members may give tickets back; None: never."""


class ShowingTerms(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a showing that its file and every view have in common."""

    id: Identifier
    title: Title
    starts_at: Moment | None = None
    showing_limit: CardLimit | None = None
    """Tickets of this showing that a card may hold; None: as many as ``card_limit``."""


class Showing(ShowingTerms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One date, class, or simply "the tickets" of a campaign: ``tickets`` are those at creation."""

    tickets: Tickets


class Campaign(Terms, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A campaign's configuration, as its file and the ledger have it.

    ``opens_at``, ``closes_at`` and the showings' ``tickets`` are those at creation: operators move
    them, and the head and the stock in Redis hold what they are now.
    """

    opens_at: Moment | None = None
    closes_at: Moment | None = None
    draft: bool = False
    showings: Annotated[tuple[Showing, ...], Meta(min_length=1, max_length=SHOWINGS_MAX)]
    rehearsal_of: Annotated[str, NOT_IN_FILES] = ""
    """ID of the campaign that this one rehearses; '' for a real one."""

    @cached_property
    def showing_numbers(self) -> dict[str, int]:
        """Number of each showing, by its ID: what the stock and the ledger know it by."""
        return {showing.id: number for number, showing in enumerate(self.showings)}

    @cached_property
    def cancel_until_shown(self) -> str | None:
        """Until when members may give tickets back, as answers have it; None: never."""
        return None if self.cancel_until is None else rfc3339(to_ms(self.cancel_until))

    @property
    def showings_in_words(self) -> Text:
        """IDs of its showings for a message: the first ones, and how many more there are."""
        ids = [showing.id for showing in self.showings]
        listed, more = ", ".join(ids[:SHOWINGS_SHOWN_MAX]), len(ids) - SHOWINGS_SHOWN_MAX
        return (
            Text(f"{listed} 等 {len(ids)} 场", f"{listed} and {more} more")
            if more > 0
            else Text(listed, listed)
        )

    @property
    def opens_at_ms(self) -> int | None:
        """Opening moment, UTC milliseconds, or None where it is opened by hand."""
        return None if self.opens_at is None else to_ms(self.opens_at)

    @property
    def closes_at_ms(self) -> int | None:
        """Closing moment, UTC milliseconds, or None where it is closed by hand."""
        return None if self.closes_at is None else to_ms(self.closes_at)
