"""Campaigns and showings, and the reader of campaign files.

Plain data and the rules that need no store. Rules that decide a sale stand in
``stock/lua/purchase.lua`` and nowhere else; what is checked here is what can be wrong with input.
"""

import re
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

import msgspec

from sale.domain.clock import parse_moment, to_ms
from sale.domain.text import TITLE_MAX, shown_text
from sale.domain.unions import DISTRICT
from sale.files import brief, parse_toml

CAMPAIGN_ID: Final = re.compile(r"[a-z0-9-]{1,48}")
SHOWING_ID: Final = re.compile(r"[a-z0-9-]{1,48}")

STOCK_MAX: Final = 10_000_000
CARD_LIMIT_MAX: Final = 1_000
SHOWINGS_MAX: Final = 500
SHOWINGS_TOLD_MAX: Final = 10
PRICE_MAX_FEN: Final = 10_000_000
PROBLEMS_TOLD: Final = 20


class State(StrEnum):
    """States of a campaign. Sold out is not one: tickets come back."""

    DRAFT = "draft"
    SCHEDULED = "scheduled"
    OPEN = "open"
    PAUSED = "paused"
    CLOSED = "closed"
    RECOVERING = "recovering"
    DELETED = "deleted"


class Showing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One date, class, or simply "the tickets" of a campaign."""

    id: str
    title: str
    tickets: int
    starts_at: datetime | None = None


class Campaign(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A campaign as its file describes it. ``tickets`` of a showing is the stock at creation."""

    id: str
    title: str
    category: str
    price_fen: int
    payment: str
    card_limit: int
    order_max: int
    unions: tuple[str, ...]
    owner: str
    showings: tuple[Showing, ...]
    opens_at: datetime | None = None
    closes_at: datetime | None = None
    draft: bool = False
    rehearsal_of: str = ""
    """ID of the campaign that this one rehearses; '' for a real one. No file can set it."""

    @cached_property
    def showing_numbers(self) -> dict[str, int]:
        """Number of each showing, by its ID: what the stock and the ledger know it by."""
        return {showing.id: number for number, showing in enumerate(self.showings)}

    @property
    def showings_in_words(self) -> str:
        """IDs of its showings for a message: the first ones, and how many more there are."""
        ids = [showing.id for showing in self.showings]
        more = len(ids) - SHOWINGS_TOLD_MAX
        return ", ".join(ids[:SHOWINGS_TOLD_MAX]) + (f" and {more} more" if more > 0 else "")

    @property
    def opens_at_ms(self) -> int | None:
        """Opening moment, UTC milliseconds, or None where it is opened by hand."""
        return None if self.opens_at is None else to_ms(self.opens_at)

    @property
    def closes_at_ms(self) -> int | None:
        """Closing moment, UTC milliseconds, or None where it is closed by hand."""
        return None if self.closes_at is None else to_ms(self.closes_at)


class InvalidCampaign(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A campaign file or body is wrong; ``problems`` maps each field to what is wrong with it."""

    def __init__(self, problems: dict[str, str]) -> None:
        told = [f"{field}: {what}" for field, what in problems.items()]
        more = len(told) - PROBLEMS_TOLD
        if more > 0:
            told[PROBLEMS_TOLD:] = [f"and {more} more"]
        super().__init__("; ".join(told))
        self.problems = problems


def parse_campaign_toml(text: str, unions: frozenset[str]) -> Campaign:
    """Read a campaign file. Raises InvalidCampaign naming every wrong field in one go."""
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise InvalidCampaign({"file": str(error)}) from None
    return parse_campaign(table, unions)


def parse_campaign(table: object, unions: frozenset[str]) -> Campaign:
    """Check a campaign given as a table (TOML, or JSON with RFC 3339 strings for times).

    ``unions`` are the known union codes. Raises InvalidCampaign naming every wrong field at once.
    """
    reader = _Reader(table if isinstance(table, dict) else {"": None})
    if not isinstance(table, dict):
        raise InvalidCampaign({"campaign": "must be an object"})
    reader.no_others(
        [
            "id",
            "title",
            "category",
            "price_fen",
            "payment",
            "card_limit",
            "order_max",
            "opens_at",
            "closes_at",
            "unions",
            "owner",
            "draft",
            "showings",
        ]
    )
    identifier = reader.text("id", pattern=CAMPAIGN_ID, says="1 to 48 of a-z, 0-9 and -")
    title = reader.text("title")
    category = reader.choice("category", CATEGORIES)
    price_fen = reader.integer("price_fen", 0, PRICE_MAX_FEN)
    payment = reader.choice("payment", ("none", "counter", "online"))
    if payment == "online":
        reader.wrong("payment", "online is not built yet: use none or counter")
    if payment == "none" and price_fen > 0:
        reader.wrong("payment", "none needs price_fen = 0")
    card_limit = reader.integer("card_limit", 1, CARD_LIMIT_MAX)
    order_max = reader.integer("order_max", 1, card_limit or CARD_LIMIT_MAX, default=card_limit)
    opens_at = reader.moment("opens_at")
    closes_at = reader.moment("closes_at")
    if opens_at and closes_at and closes_at <= opens_at:
        reader.wrong("closes_at", "must be after opens_at")
    codes = reader.codes("unions", unions)
    owner = reader.text("owner", default=DISTRICT)
    if owner and owner not in unions:
        reader.wrong("owner", f"{owner!r} is not a known union")
    draft = reader.flag("draft")
    showings = _showings(reader)
    if reader.problems:
        raise InvalidCampaign(reader.problems)
    return Campaign(
        id=identifier,
        title=title,
        category=category,
        price_fen=price_fen,
        payment=payment,
        card_limit=card_limit,
        order_max=order_max,
        opens_at=opens_at,
        closes_at=closes_at,
        unions=codes,
        owner=owner,
        draft=draft,
        showings=showings,
    )


CATEGORIES: Final = ("education", "culture", "sport", "health", "living")
_MISSING: Final = object()


def _showings(reader: "_Reader") -> tuple[Showing, ...]:
    rows = reader.take("showings")
    if not isinstance(rows, list) or not 1 <= len(rows) <= SHOWINGS_MAX:
        reader.wrong("showings", f"must be a list of 1 to {SHOWINGS_MAX} showings")
        return ()
    showings: list[Showing] = []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        prefix = f"showings[{number}]"
        if not isinstance(row, dict):
            reader.wrong(prefix, "must be a table")
            continue
        inner = _Reader(row, f"{prefix}.")
        inner.no_others(["id", "title", "starts_at", "tickets"])
        identifier = inner.text("id", pattern=SHOWING_ID, says="1 to 48 of a-z, 0-9 and -")
        if identifier in seen:
            inner.wrong("id", f"{identifier!r} is there twice")
        seen.add(identifier)
        title = inner.text("title")
        starts_at = inner.moment("starts_at")
        tickets = inner.integer("tickets", 0, STOCK_MAX)
        reader.problems.update(inner.problems)
        showings.append(Showing(id=identifier, title=title, starts_at=starts_at, tickets=tickets))
    return tuple(showings)


class _Reader:
    """Reads a table field by field and gathers every complaint instead of stopping at one.

    A field that is wrong is read as a harmless value, so that the rest can still be checked; the
    caller raises when there are problems and never uses those values.
    """

    def __init__(self, table: dict[Any, Any], prefix: str = "") -> None:
        self.table = table
        self.prefix = prefix
        self.problems: dict[str, str] = {}

    def wrong(self, field: str, what: str) -> None:
        self.problems.setdefault(self.prefix + field, what)

    def take(self, field: str) -> object:
        return self.table.get(field, _MISSING)

    def no_others(self, known: list[str]) -> None:
        for field in self.table:
            if field not in known:
                self.wrong(brief(str(field))[1:-1], "is not a known field")

    def text(
        self,
        field: str,
        *,
        pattern: re.Pattern[str] | None = None,
        says: str = "",
        default: str | None = None,
    ) -> str:
        value = self.take(field)
        if value is _MISSING and default is not None:
            return default
        if value is _MISSING:
            self.wrong(field, "is missing")
        elif not isinstance(value, str):
            self.wrong(field, f"must be a text of 1 to {TITLE_MAX} characters")
        elif pattern and not pattern.fullmatch(value):
            self.wrong(field, f"must be {says}")
        else:
            try:
                return shown_text(value, TITLE_MAX)
            except ValueError as wrong:
                self.wrong(field, str(wrong))
        return ""

    def choice(self, field: str, choices: tuple[str, ...]) -> str:
        value = self.take(field)
        if value is _MISSING:
            self.wrong(field, "is missing")
        elif not isinstance(value, str) or value not in choices:
            self.wrong(field, f"must be one of {', '.join(choices)}")
        else:
            return value
        return ""

    def integer(self, field: str, low: int, high: int, default: int | None = None) -> int:
        value = self.take(field)
        if value is _MISSING and default is not None:
            return default
        if value is _MISSING:
            self.wrong(field, "is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.wrong(field, f"must be a whole number from {low} to {high}")
        else:
            return value
        return 0

    def flag(self, field: str) -> bool:
        value = self.take(field)
        if value is _MISSING:
            return False
        if not isinstance(value, bool):
            self.wrong(field, "must be true or false")
        return value is True

    def moment(self, field: str) -> datetime | None:
        value = self.take(field)
        if value is _MISSING or value is None:
            return None
        try:
            return parse_moment(value)
        except ValueError as error:
            self.wrong(field, str(error))
            return None

    def codes(self, field: str, known: frozenset[str]) -> tuple[str, ...]:
        value = self.take(field)
        if value is _MISSING:
            return ("*",)
        if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
            self.wrong(field, 'must be ["*"] or a list of union codes')
            return ()
        if value == ["*"]:
            return ("*",)
        unknown = sorted(set(value) - known)
        if unknown:
            self.wrong(field, f"unknown union: {brief(', '.join(unknown))[1:-1]}")
        return tuple(dict.fromkeys(value))
