"""What the engine talks about: campaigns, showings, orders, and why a purchase is refused.

Plain data and the rules that need no store. Rules that decide a sale stand in
``stock/lua/purchase.lua`` and nowhere else; what is checked here is what can be wrong with input.
"""

import re
import unicodedata
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from sale.files import UnreadableFile, brief, parse_toml, read_toml, shown

CAMPAIGN_ID: Final = re.compile(r"[a-z0-9-]{1,48}")
SHOWING_ID: Final = re.compile(r"[a-z0-9-]{1,48}")
CARD_NO: Final = re.compile(r"[0-9]{12,19}")
IDEMPOTENCY_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

STOCK_MAX: Final = 10_000_000
CARD_LIMIT_MAX: Final = 1_000
SHOWINGS_MAX: Final = 500
SHOWINGS_TOLD_MAX: Final = 10
PRICE_MAX_FEN: Final = 10_000_000
TITLE_MAX: Final = 200
ACCOUNT_NAME_MAX: Final = 64
PROBLEMS_TOLD: Final = 20
REASON_MAX: Final = 500
DISTRICT: Final = "district"
REHEARSAL_UNION: Final = "rehearsal"
"""Union of made-up cards, and the only one that a rehearsal admits; no unions file may hold it."""
REHEARSAL_CARDS: Final = "0000"
"""Card numbers that begin so are made up for rehearsals, and no roster takes them.

ISO/IEC 7812 gives a first digit 0 to no issuer of such cards, so no real one is shut out; and a
spreadsheet that drops leading zeros cannot turn a made-up number into one of the same length.
"""

MOMENT_MIN: Final = datetime(2000, 1, 1, tzinfo=UTC)
MOMENT_MAX: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""Bounds of every moment that is given to the engine, both included.

Wide enough for any sale, so a moment outside is a typing error. Inside, nothing that handles a
moment can fail: every conversion to another time zone, its wording, and PostgreSQL's columns.
"""
DAMAGED: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What Python raises for a stored value that is not what the engine writes there."""
LOCAL_ZONE: Final = timezone(timedelta(hours=8))
"""Beijing time: what members and operators read. Stored times are UTC milliseconds."""


class CampaignState(StrEnum):
    """States of a campaign. Sold out is not one: tickets come back."""

    DRAFT = "draft"
    SCHEDULED = "scheduled"
    OPEN = "open"
    PAUSED = "paused"
    CLOSED = "closed"
    RECOVERING = "recovering"
    DELETED = "deleted"


class Problem(StrEnum):
    """Why a request was not done: the ``code`` of the answer (RFC 9457)."""

    INVALID_REQUEST = "invalid-request"
    MISSING_IDEMPOTENCY_KEY = "missing-idempotency-key"
    UNAUTHENTICATED = "unauthenticated"
    NOT_ELIGIBLE = "not-eligible"
    CARD_REVOKED = "card-revoked"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    NOT_OPEN = "not-open"
    PAUSED = "paused"
    CLOSED = "closed"
    SOLD_OUT = "sold-out"
    LIMIT_EXCEEDED = "limit-exceeded"
    WRONG_STATE = "wrong-state"
    IDEMPOTENCY_MISMATCH = "idempotency-mismatch"
    PAYLOAD_TOO_LARGE = "payload-too-large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type"
    RATE_LIMITED = "rate-limited"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"


class Refused(Exception):  # noqa: N818 - the domain's word
    """A request that is not done, with the code and the members of the problem document.

    ``detail`` is one sentence for people; ``members`` are the extra fields of the contract
    (``remaining``, ``card_remaining``, ``opens_at``, ``field`` …); ``retry_after_s`` becomes the
    header.
    """

    def __init__(
        self,
        problem: Problem,
        detail: str = "",
        *,
        retry_after_s: int | None = None,
        **members: object,
    ) -> None:
        super().__init__(f"{problem.value}: {detail}" if detail else problem.value)
        self.problem = problem
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.members = members


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


# What goes out is described, not checked, so its choices and formats stand in extra_json_schema.
Time = Annotated[
    str,
    Meta(extra_json_schema={"format": "date-time", "examples": ["2015-05-01T09:00:00.000+08:00"]}),
]
OrderState = Annotated[
    str,
    Meta(
        extra_json_schema={
            "enum": ["held", "confirmed", "cancelled", "expired", "refunded", "collected"]
        }
    ),
]
Fen = Annotated[int, Meta(extra_json_schema={"minimum": 0})]
Count = Annotated[int, Meta(extra_json_schema={"minimum": 0})]


class Ticket(msgspec.Struct, frozen=True):
    """One ticket of an order. The code is what is shown at the counter, and cannot be guessed."""

    no: int
    code: str
    state: str = "valid"


class Order(msgspec.Struct, frozen=True):
    """A card's order. ``card_remaining`` is what the card may still buy in the campaign."""

    order_no: str
    campaign: str
    showing: str
    quantity: Count
    state: OrderState
    amount_fen: Fen
    pay_before: Time | None
    created_at: Time
    tickets: list[Ticket]
    card_remaining: Count


class InvalidCampaign(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A campaign file or body is wrong; ``problems`` maps each field to what is wrong with it."""

    def __init__(self, problems: dict[str, str]) -> None:
        told = [f"{field}: {what}" for field, what in problems.items()]
        more = len(told) - PROBLEMS_TOLD
        if more > 0:
            told[PROBLEMS_TOLD:] = [f"and {more} more"]
        super().__init__("; ".join(told))
        self.problems = problems


def to_ms(moment: datetime) -> int:
    """UTC milliseconds of an aware datetime, exactly (no float on the way)."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def from_ms(ms: int) -> datetime:
    """Aware datetime in Beijing time of UTC milliseconds."""
    return (_EPOCH + timedelta(milliseconds=ms)).astimezone(LOCAL_ZONE)


def nearest(ms: float) -> int:
    """Give the nearest moment (UTC ms) that a datetime of any zone, and PostgreSQL, can hold.

    The ledger keeps its moment unchanged, however far away; it is shown and stored as this.
    """
    return int(min(max(ms, _NEAREST_MIN_MS), _NEAREST_MAX_MS))


@lru_cache(maxsize=4_096)
def rfc3339(ms: int) -> str:
    """RFC 3339 with offset and milliseconds, in Beijing time. A batch of sales shares one.

    Every number has a wording (``nearest``): one campaign must not spoil a list of all.
    """
    return from_ms(nearest(ms)).isoformat(timespec="milliseconds")


def in_bounds(ms: int) -> bool:
    """Whether a moment (UTC ms) is one that the engine would take today."""
    return to_ms(MOMENT_MIN) <= ms <= to_ms(MOMENT_MAX)


def parse_moment(value: object) -> datetime:
    """Read a moment, cut to the millisecond: an RFC 3339 date-time, or a datetime of TOML's.

    The only reader of times from outside. It takes what RFC 3339 defines and nothing else of
    ISO 8601, in upper or lower case, with up to nine digits of a second. It refuses the leap second
    (``:60``): the clock that decides openings has none. Raises ValueError in words.
    """
    if isinstance(value, str):
        match = _RFC3339.fullmatch(value)
        try:
            moment = datetime.fromisoformat(_isoformat(match)) if match else None
        except ValueError:  # 30 February, hour 24
            moment = None
    else:
        moment = value if isinstance(value, datetime) else None
    if moment is None or moment.tzinfo is None:
        raise ValueError(
            "must be a date and time with an offset (RFC 3339), as 2015-05-01T09:00:00+08:00"
        )
    if not MOMENT_MIN <= moment <= MOMENT_MAX:
        raise ValueError(f"must be from {MOMENT_MIN:%Y-%m-%d} to {MOMENT_MAX:%Y-%m-%d} (UTC)")
    return moment.replace(microsecond=moment.microsecond // 1_000 * 1_000)


def _isoformat(match: re.Match[str]) -> str:
    """Word an RFC 3339 date-time as every Python from 3.11 reads it."""
    whole, fraction, offset = match.groups()
    return f"{whole.upper()}.{(fraction or '')[:3]:0<3}{offset.upper().replace('Z', '+00:00')}"


def shown_text(text: str, length_max: int) -> str:
    """Give a text that people will read as it is kept: composed (NFC), no spaces around it.

    It must look like what it is: refused are control characters, halves of characters, what turns
    the direction of writing, and what is there and cannot be seen, because two texts that look the
    same would differ, or one text would look like another. Spaces of every width may stand inside,
    rare Han may stand anywhere (``str.isprintable`` refuses both). Raises ValueError in words.
    """
    wrong_length = f"must be a text of 1 to {length_max} characters"
    if len(text) > 4 * length_max:  # bounds the work: composing makes one character of up to four
        raise ValueError(wrong_length)
    text = unicodedata.normalize("NFC", text)
    for number, character in enumerate(text, 1):
        if _is_hidden(character) and not _joins_emoji(text, number - 1):
            raise ValueError(
                "must not hold control characters or invisible ones: "
                f"character {number} is U+{ord(character):04X}"
            )
    text = text.strip()
    if not 1 <= len(text) <= length_max or not any(map(_is_seen, text)):
        raise ValueError(wrong_length)
    return text


def account_name(text: str) -> str:
    """Give the one way of writing an account's name: full width and half, é of one part or two.

    Names stand in the audit log, so no two may look alike that are not the same (NFKC). Raises
    ValueError in words.
    """
    try:
        name = shown_text(unicodedata.normalize("NFKC", text), ACCOUNT_NAME_MAX)
    except ValueError as wrong:
        raise ValueError(f"a name {wrong}") from None
    if any(character.isspace() or _IN_EMOJI.match(character) for character in name):
        raise ValueError(f"a name is 1 to {ACCOUNT_NAME_MAX} characters without spaces")
    return name


def is_made_up(card_no: str) -> bool:
    """Whether a card number is one of rehearsals: it stands in no roster."""
    return card_no.startswith(REHEARSAL_CARDS)


def may_meet(campaign: Campaign, card_no: str) -> bool:
    """Whether a card may have to do with a campaign at all.

    Made-up cards with rehearsals, real cards with real campaigns, and never otherwise.
    """
    return card_no.startswith(REHEARSAL_CARDS) is bool(campaign.rehearsal_of)


def mask_card(card_no: str) -> str:
    """A card number as it may be shown: only the last four digits."""
    return "*" * max(len(card_no) - 4, 0) + card_no[-4:]


def order_number(campaign_id: str, seq: int, at_ms: int) -> str:
    """Public number of an order, at most 64 characters.

    The event's number alone would be unique, but a Redis that went back in time could give the
    same number twice before it is caught; the moment of the sale tells such two apart.
    """
    return f"{campaign_id}.{seq:x}.{_moment(at_ms)}"


@lru_cache(maxsize=4_096)
def _moment(at_ms: int) -> str:
    """The moment of a sale in an order's number. A batch of sales shares one."""
    return f"{at_ms & 0xFFFFFF:06x}"


def parse_order_number(order_no: str) -> tuple[str, int, int] | None:
    """Campaign, event number and last 24 bits of the moment (ms) of an order number, or None."""
    match = _ORDER_NO.fullmatch(order_no)
    if match is None:
        return None
    return match[1], int(match[2], 16), int(match[3], 16)


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


def load_unions(path: Path) -> dict[str, str]:
    """Read ``config/unions.toml``: code to name. Raises ValueError in words."""
    try:
        rows = read_toml(path)["unions"]
        unions = {str(row["code"]): shown_text(str(row["name"]), TITLE_MAX) for row in rows}
    except UnreadableFile as error:
        raise ValueError(f"unions file {error}") from None
    except ValueError as error:
        raise ValueError(f"unions file {shown(path)}: {error}") from None
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"unions file {shown(path)}: {brief(error)}") from None
    if DISTRICT not in unions:
        raise ValueError(f"unions file {path}: no union with the code {DISTRICT!r}")
    if REHEARSAL_UNION in unions:
        raise ValueError(f"unions file {path}: the code {REHEARSAL_UNION!r} is kept for rehearsals")
    return unions


def default_unions_path() -> Path:
    """Where the union codes stand: ``./config``, else the source tree's, else the package's own.

    Raises ValueError in words where there is none.
    """
    package = Path(__file__).resolve().parent
    places = (
        Path("config/unions.toml"),
        package.parent / "config" / "unions.toml",
        package / "unions.toml",
    )
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"no unions file: looked for {', '.join(map(str, places))}")


CATEGORIES: Final = ("education", "culture", "sport", "health", "living")
_ORDER_NO: Final = re.compile(r"([a-z0-9-]{1,48})\.([0-9a-f]{1,8})\.([0-9a-f]{6})")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NEAREST_MIN_MS: Final = to_ms(datetime(1, 1, 3, tzinfo=UTC))
_NEAREST_MAX_MS: Final = to_ms(datetime(9999, 12, 29, tzinfo=UTC))
_RFC3339: Final = re.compile(
    r"(\d{4}-\d\d-\d\dT[012]\d:[0-5]\d:[0-5]\d)(?:\.(\d{1,9}))?"
    r"(Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII | re.IGNORECASE,
)
_MISSING: Final = object()
_HIDDEN: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0\ufdd0-\ufdef\ufff0-\ufff8\U0001d159"
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
)
"""Fillers, tags and non-characters: nothing is seen of them, whatever their category."""
_JOINER: Final = "\u200d"
_EMOJI: Final = frozenset({"So", "Sk", "Mn"})
"""Categories of an emoji's last character: itself, a colour of skin, a selector."""
_IN_EMOJI: Final = re.compile("[\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Joiner and selectors of a variant: they change the character before them, an emoji or a Han."""


def _is_hidden(character: str) -> bool:
    """Whether nothing is seen of a character, or it changes what is seen around it."""
    return (
        unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        or ord(character) & 0xFFFE == 0xFFFE
        or _HIDDEN.match(character) is not None
    )


def _joins_emoji(text: str, at: int) -> bool:
    """Whether this character makes one emoji of those beside it: only there it may be joined."""
    beside = [unicodedata.category(each) for each in text[max(at - 1, 0) : at + 2]]
    return text[at] == _JOINER and len(beside) == 3 and beside[0] in _EMOJI and beside[2] == "So"


def _is_seen(character: str) -> bool:
    """Whether a character shows something by itself: marks and spaces do not."""
    return unicodedata.category(character) not in {"Zs", "Mn", "Mc", "Me", "Cf"}


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
