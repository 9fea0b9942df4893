"""Statements on the roster. Each takes a connection, so that the caller sets the transaction."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

import msgspec

from sale.db.queries import load

IMPORT_TIMEOUT_S: Final = 3_600.0
"""Bound of each statement of an import, which may be of any size."""

INCOMING_COLUMNS: Final = (
    *("line", "card_no", "name", "union_code", "phone", "pin_mac", "status", "looks"),
)
CURSOR_ROWS: Final = 2_000


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A card as the roster holds it, with its member's particulars but the PIN.

    ``revoked``: a person has cancelled it, and no roster file changes that. ``replaced_by``: the
    member's card in use, where this one was replaced.
    """

    member_no: int
    card_no: str
    name: str
    union_code: str
    phone: str
    has_pin: bool
    status: str
    revoked: bool
    generation: int
    replaced_by: str | None
    updated_at: datetime


class LockedMember(NamedTuple):
    """The member of a card, and whether another card has taken that card's place."""

    member_no: int
    status: str
    revoked: bool
    replaced: bool


class MemberChange(NamedTuple):
    """One revision of the feed, and whether the member may buy from there on."""

    rev: int
    member_no: int
    active: bool


class Raised(NamedTuple):
    """One revision of the feed that raised a member's generation."""

    rev: int
    member_no: int
    generation: int


class TokenRow(NamedTuple):
    """The member's part of a token, and the card in use."""

    card_no: str
    member_no: int
    union_code: str
    generation: int


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
    """Lines whose card is on an earlier line: all of them counted, the first ones listed."""

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
    """Lines of the incoming table whose card is on an earlier one, as (line, earlier line)."""
    rows = await connection.fetch(_SQL["twice"], limit, timeout=IMPORT_TIMEOUT_S)
    total = rows[0]["total"] if rows else 0
    return Duplicates(total, [(row["line"], row["first_line"]) for row in rows])


async def new_numbers(connection: Any) -> list[NewNumbers]:  # noqa: ANN401
    """Cards that the roster lacks, with 16 digits or more, by digits and looks."""
    rows = await connection.fetch(_SQL["new_numbers"], timeout=IMPORT_TIMEOUT_S)
    return [NewNumbers(**row) for row in rows]


async def incoming(
    connection: Any,  # noqa: ANN401
    statement: Literal["new_of_look", "zeros_lost", "kept_revoked", "replaced"],
    *values: int,
) -> Incoming:
    """Give the lines that a statement of ``sql/roster.sql`` finds; the last value is the limit."""
    rows = await connection.fetch(_SQL[statement], *values, timeout=IMPORT_TIMEOUT_S)
    lines = [IncomingLine(row["line"], row["card_no"], row.get("status", "")) for row in rows]
    return Incoming(rows[0]["total"] if rows else 0, lines)


async def lock_roster(connection: Any) -> None:  # noqa: ANN401
    """Wait for the right to add cards, and hold it to the commit."""
    await connection.execute(_SQL["lock_import"], timeout=IMPORT_TIMEOUT_S)


async def count_incoming(connection: Any) -> tuple[int, int]:  # noqa: ANN401
    """How many incoming cards are new, and how many members read differently from the roster."""
    row = await connection.fetchrow(_SQL["count_incoming"], timeout=IMPORT_TIMEOUT_S)
    return row["added"], row["changed"]


async def apply_incoming(connection: Any) -> None:  # noqa: ANN401
    """Write what differs. The feed of changes is kept by triggers."""
    await connection.execute(_SQL["change_members"], timeout=IMPORT_TIMEOUT_S)
    await connection.execute(_SQL["add_members"], timeout=IMPORT_TIMEOUT_S)


async def find_card(connection: Any, card_no: str) -> Card | None:  # noqa: ANN401
    """One card, or None."""
    row = await connection.fetchrow(_SQL["find_card"], card_no)
    return None if row is None else Card(**dict(row))


async def lock_member(connection: Any, card_no: str) -> LockedMember | None:  # noqa: ANN401
    """The member of a card, held until the commit; None: no such card."""
    row = await connection.fetchrow(_SQL["lock_member"], card_no)
    return None if row is None else LockedMember(*row)


async def set_status(
    connection: Any,  # noqa: ANN401
    member: LockedMember,
    status: str,
    *,
    revoked: bool,
) -> None:
    """Set a member's status by a person's word. A revocation raises the generation."""
    if (member.status, member.revoked) != (status, revoked):
        await connection.execute(_SQL["set_status"], member.member_no, status, revoked)


async def replace_card(connection: Any, member: LockedMember, old: str, new: str) -> bool:  # noqa: ANN401
    """Give a member another card, and end the tokens of before; False where the roster has it."""
    await connection.execute(_SQL["replace_card"], old)
    if await connection.fetchval(_SQL["add_card"], new, member.member_no) is None:
        return False
    await connection.execute(_SQL["end_tokens"], member.member_no)
    return True


async def changes_since(connection: Any, rev: int, limit: int) -> list[MemberChange]:  # noqa: ANN401
    """The feed after ``rev``, oldest first. Revisions come in the order of commits."""
    return [MemberChange(*row) for row in await connection.fetch(_SQL["changes_since"], rev, limit)]


async def current_rev(connection: Any) -> int:  # noqa: ANN401
    """The feed's last revision, 0 where it is empty.

    ``inactive_members`` at this revision gives the same members at any later moment.
    """
    rev: int = await connection.fetchval(_SQL["current_rev"])
    return rev


async def generations_from(connection: Any, rev: int, limit: int) -> list[Raised]:  # noqa: ANN401
    """Rises of members' generations from revision ``rev`` on, oldest first."""
    rows = await connection.fetch(_SQL["generations_from"], rev, limit)
    return [Raised(*row) for row in rows]


async def inactive_members(
    connection: Any,  # noqa: ANN401
    after_member_no: int,
    limit: int | None,
    rev: int | None = None,
    timeout_s: float | None = None,
) -> list[int]:
    """Members who may not buy, in order, after ``after_member_no`` (0 for the first ones).

    As the feed says it up to ``rev`` (None: up to now).
    """
    rows = await connection.fetch(
        _SQL["inactive_members"], after_member_no, limit, rev, timeout=timeout_s
    )
    return [row["member_no"] for row in rows]


async def members_of_status(
    connection: Any,  # noqa: ANN401
    status: str,
    limit: int,
) -> AsyncIterator[TokenRow]:
    """Stream the roster's first members of a status. Needs a transaction."""
    async for row in connection.cursor(
        _SQL["members_of_status"], status, limit, prefetch=CURSOR_ROWS
    ):
        yield TokenRow(*row)


_SQL: Final = load("roster")
