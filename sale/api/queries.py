"""Query parameters that several routes take, and pages of lists."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from sale.api.calls import Call
from sale.api.schemas import ListView
from sale.domain.campaign import CAMPAIGN_ID
from sale.http.request import (
    LIMIT_DEFAULT,
    LIMIT_MAX,
    decode_cursor,
    encode_cursor,
    read_flag,
    read_limit,
)
from sale.http.routes import Query

Item = TypeVar("Item")
View = TypeVar("View")
Cursor = TypeVar("Cursor")


def cursor_query(kind: type[Cursor]) -> Query[Cursor | None]:
    """Declare ``?cursor=`` of a list whose cursors are of this type."""
    return Query(
        name="cursor",
        description="The `next` of the page before.",
        schema={"type": "string", "minLength": 1, "maxLength": 200},
        read=partial(decode_cursor, kind),
        default=None,
    )


def page_of(call: Call[Any], items: Sequence[Item], view: Callable[[Item], View]) -> ListView[View]:
    """Give the page of a list that goes by position, as ``LIMIT`` and ``POSITION`` say."""
    start, limit = call.value(POSITION) or 0, call.value(LIMIT)
    page = [view(item) for item in items[start : start + limit]]
    return ListView(page, encode_cursor(start + limit) if len(items) > start + limit else None)


def _campaign_id(text: str) -> str:
    if not CAMPAIGN_ID.fullmatch(text):
        raise ValueError("1 to 48 of a-z, 0-9 and -")
    return text


LIMIT: Final = Query(
    name="limit",
    description="Items on a page.",
    schema={"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT},
    read=read_limit,
    default=LIMIT_DEFAULT,
)
POSITION: Final = cursor_query(int)
REHEARSALS: Final = Query(
    name="rehearsals",
    description="`true`: list rehearsals too.",
    schema={"type": "string", "enum": ["true", "false"], "default": "false"},
    read=read_flag,
    default=False,
)
OF_CAMPAIGN: Final[Query[str | None]] = Query(
    name="campaign",
    description="Only what concerns this campaign.",
    schema={"type": "string", "pattern": f"^{CAMPAIGN_ID.pattern}$"},
    read=_campaign_id,
    default=None,
)
