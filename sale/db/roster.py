"""Statements on the roster. Each takes a connection, so that the caller sets the transaction."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec

from sale.db.queries import load

IMPORT_TIMEOUT_S: Final = 3_600.0
"""Bound of each statement of an import, which may be of any size."""

INCOMING_COLUMNS: Final = (
    *("line", "card_no", "name", "union_code", "phone", "pin_mac", "status", "looks"),
)
CURSOR_ROWS: Final = 2_000


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A card as the roster holds it, without its PIN.

    ``revoked``: a person has cancelled it, and no roster file changes that.
    """

    card_no: str
    name: str
    union_code: str
    phone: str
    has_pin: bool
    status: str
    revoked: bool
    updated_at: datetime


class CardChange(NamedTuple):
    """One revision of the feed: the card became active, or ceased to be."""

    rev: int
    card_no: str
    active: bool


class IncomingLine(NamedTuple):
    """A line of the incoming table, and the status that it gives."""

    line: int
    card_no: str
    status: str


class Incoming(NamedTuple):
    """Lines of the incoming table: all of them counted, the first ones listed."""

    total: int
    lines: list[IncomingLine]


class NewNumbers(NamedTuple):
    """How many new cards have numbers of so many digits that look so."""

    digits: int
    looks: int
    cards: int


class Duplicates(NamedTuple):
    """Lines whose card stands on an earlier line: all of them counted, the first ones listed."""

    total: int
    lines: list[tuple[int, int]]


async def copy_incoming(connection: Any, source: AsyncIterator[bytes]) -> None:  # noqa: ANN401
    """Fill a temporary table, dropped at the commit, from lines in COPY's text format."""
    await connection.execute(_SQL["create_incoming"])
    await connection.copy_to_table(
        "incoming_card", source=source, columns=INCOMING_COLUMNS, timeout=IMPORT_TIMEOUT_S
    )
    await connection.execute(_SQL["analyze_incoming"], timeout=IMPORT_TIMEOUT_S)


async def find_duplicates(connection: Any, limit: int) -> Duplicates:  # noqa: ANN401
    """Lines of the incoming table whose card stands on an earlier one, as (line, earlier line)."""
    rows = await connection.fetch(_SQL["twice"], limit, timeout=IMPORT_TIMEOUT_S)
    total = rows[0]["total"] if rows else 0
    return Duplicates(total, [(row["line"], row["first_line"]) for row in rows])


async def new_numbers(connection: Any) -> list[NewNumbers]:  # noqa: ANN401
    """Cards that the roster lacks, with 16 digits or more, by digits and looks."""
    rows = await connection.fetch(_SQL["new_numbers"], timeout=IMPORT_TIMEOUT_S)
    return [NewNumbers(**row) for row in rows]


async def new_of_look(connection: Any, digits: int, looks: int, limit: int) -> Incoming:  # noqa: ANN401
    """Lines of those among them that have so many digits and look so."""
    return await _incoming(connection, "new_of_look", digits, looks, limit)


async def zeros_lost(connection: Any, limit: int) -> Incoming:  # noqa: ANN401
    """Lines of new cards whose number is that of another card without its leading zeros."""
    return await _incoming(connection, "zeros_lost", limit)


async def kept_revoked(connection: Any, limit: int) -> Incoming:  # noqa: ANN401
    """Lines whose status is not taken, because a person has revoked the card."""
    return await _incoming(connection, "kept_revoked", limit)


async def _incoming(connection: Any, statement: str, *values: int) -> Incoming:  # noqa: ANN401
    rows = await connection.fetch(_SQL[statement], *values, timeout=IMPORT_TIMEOUT_S)
    lines = [IncomingLine(row["line"], row["card_no"], row.get("status", "")) for row in rows]
    return Incoming(rows[0]["total"] if rows else 0, lines)


async def count_incoming(connection: Any) -> tuple[int, int]:  # noqa: ANN401
    """How many incoming cards are new, and how many read differently from the roster."""
    await connection.execute(_SQL["lock_import"], timeout=IMPORT_TIMEOUT_S)
    row = await connection.fetchrow(_SQL["count_incoming"], timeout=IMPORT_TIMEOUT_S)
    return row["added"], row["changed"]


async def apply_incoming(connection: Any) -> None:  # noqa: ANN401
    """Write what differs. The feed of changes is kept by triggers."""
    await connection.execute(_SQL["upsert_incoming"], timeout=IMPORT_TIMEOUT_S)


async def find_card(connection: Any, card_no: str) -> Card | None:  # noqa: ANN401
    """One card, or None."""
    row = await connection.fetchrow(_SQL["find_card"], card_no)
    return None if row is None else Card(**dict(row))


async def set_status(
    connection: Any,  # noqa: ANN401
    card_no: str,
    status: str,
    *,
    revoked: bool,
) -> str | None:
    """Set a card's status by a person's word; return the one before, or None: no such card."""
    row = await connection.fetchrow(_SQL["lock_card"], card_no)
    if row is None:
        return None
    if (row["status"], row["revoked"]) != (status, revoked):
        await connection.execute(_SQL["set_status"], card_no, status, revoked)
    before: str = row["status"]
    return before


async def changes_since(connection: Any, rev: int, limit: int) -> list[CardChange]:  # noqa: ANN401
    """The feed after ``rev``, oldest first. Revisions come in the order of commits."""
    rows = await connection.fetch(_SQL["changes_since"], rev, limit)
    return [CardChange(row["rev"], row["card_no"], row["active"]) for row in rows]


async def current_rev(connection: Any) -> int:  # noqa: ANN401
    """The feed's last revision, 0 where it is empty.

    ``inactive_cards`` at this revision gives the same cards at any later moment.
    """
    rev: int = await connection.fetchval(_SQL["current_rev"])
    return rev


async def inactive_cards(
    connection: Any,  # noqa: ANN401
    after_card_no: str,
    limit: int | None,
    rev: int | None = None,
    timeout_s: float | None = None,
) -> list[str]:
    """Cards that may not buy, in order, after ``after_card_no`` ("" for the first ones).

    As the feed says it up to ``rev`` (None: up to now), so a card that a hand has removed counts.
    """
    rows = await connection.fetch(
        _SQL["inactive_cards"], after_card_no, limit, rev, timeout=timeout_s
    )
    return [row["card_no"] for row in rows]


async def cards_of_status(
    connection: Any,  # noqa: ANN401
    status: str,
    limit: int,
) -> AsyncIterator[tuple[str, str]]:
    """Stream (card number, union) of the roster's first cards. Needs a transaction."""
    async for row in connection.cursor(
        _SQL["cards_of_status"], status, limit, prefetch=CURSOR_ROWS
    ):
        yield row["card_no"], row["union_code"]


_SQL: Final = load("roster")
