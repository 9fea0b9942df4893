"""The roster: revoke, restore, replace and show a card, and members' tokens."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sale.db import operators as accounts
from sale.db import roster as table
from sale.db.roster import Card, LockedMember
from sale.domain.member import mask_card
from sale.domain.problem import Problem, Refused
from sale.identity import Member, SigningKey, issue_member_token
from sale.operators.steps import checked_reason

AfterChange = Callable[[], Awaitable[None]]
"""Called after the commit of a change: it takes the feed on to Redis (INV-9)."""


async def revoke(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    card_no: str,
    *,
    actor: str,
    reason: str,
    after_change: AfterChange | None = None,
) -> Card:
    """Cancel a card; its member buys nothing until it is restored (INV-9). May be repeated.

    The tokens that the member has end. No roster file takes a revocation back.

    Raises Refused: NOT_FOUND, WRONG_STATE for a card that was replaced, INVALID_REQUEST for a bad
    reason.
    """
    return await _set_status(pool, card_no, "cancelled", "card.revoke", actor, reason, after_change)


async def restore(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    card_no: str,
    *,
    actor: str,
    reason: str,
    after_change: AfterChange | None = None,
) -> Card:
    """Make a card active again, whatever it was. May be repeated. Raises as ``revoke`` does.

    The next roster file that names the card decides again. Tokens that a revocation ended stay
    ended: the member needs a new one.
    """
    return await _set_status(pool, card_no, "active", "card.restore", actor, reason, after_change)


async def replace(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    old: str,
    new: str,
    *,
    actor: str,
    reason: str,
    after_change: AfterChange | None = None,
) -> Card:
    """Give the member of card ``old`` the card ``new``; number, orders and limits stay.

    The tokens that the member has end. Not to be repeated: the second time ``old`` is replaced.

    Raises Refused: NOT_FOUND, WRONG_STATE where ``old`` was replaced before or the roster has
    ``new``, or INVALID_REQUEST for a bad reason.
    """
    reason = checked_reason(reason)
    async with pool.acquire() as connection, connection.transaction():
        await table.lock_roster(connection)
        member = await _locked(connection, old)
        if not await table.replace_card(connection, member, old, new):
            raise Refused(
                Problem.WRONG_STATE, f"card {mask_card(new)} is in the roster already: nothing done"
            )
        await accounts.write_audit(
            connection,
            actor=actor,
            action="card.replace",
            target=_target(member, new),
            reason=reason,
            data={"from": mask_card(old), "to": mask_card(new)},
        )
    if after_change is not None:
        await after_change()
    return await show(pool, new)


async def show(pool: Any, card_no: str) -> Card:  # noqa: ANN401 - an asyncpg pool
    """One card. Raises Refused (NOT_FOUND)."""
    async with pool.acquire() as connection:
        card = await table.find_card(connection, card_no)
    if card is None:
        raise Refused(Problem.NOT_FOUND, f"there is no card {mask_card(card_no)} in the roster")
    return card


async def tokens(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    key: SigningKey,
    count: int,
    status: str = "active",
    *,
    now_s: int,
) -> AsyncIterator[dict[str, str]]:
    """Tokens of the roster's first ``count`` cards of a status: ``card_no``, ``token``, ``union``.

    Streams; fewer where the roster has fewer.
    """
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        async for row in table.members_of_status(connection, status, count):
            member = Member(row.member_no, row.union_code, row.generation)
            token = issue_member_token(key, member, now_s=now_s)
            yield {"card_no": row.card_no, "token": token, "union": row.union_code}


async def _set_status(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    card_no: str,
    status: str,
    action: str,
    actor: str,
    reason: str,
    after_change: AfterChange | None,
) -> Card:
    reason = checked_reason(reason)
    async with pool.acquire() as connection, connection.transaction():
        member = await _locked(connection, card_no)
        await table.set_status(connection, member, status, revoked=status == "cancelled")
        await accounts.write_audit(
            connection,
            actor=actor,
            action=action,
            target=_target(member, card_no),
            reason=reason,
            data={"from": member.status, "to": status},
        )
    # Also where nothing changed: a repeat is how an operator mends a hand-over that failed.
    if after_change is not None:
        await after_change()
    return await show(pool, card_no)


async def _locked(connection: Any, card_no: str) -> LockedMember:  # noqa: ANN401
    """Hold the member of a card in use until the commit. Raises Refused."""
    member = await table.lock_member(connection, card_no)
    if member is None:
        raise Refused(Problem.NOT_FOUND, f"there is no card {mask_card(card_no)} in the roster")
    if member.replaced:
        card = await table.find_card(connection, card_no)
        by = mask_card((card.replaced_by if card else None) or "")
        raise Refused(
            Problem.WRONG_STATE,
            f"card {mask_card(card_no)} was replaced by card {by}: name that one",
        )
    return member


def _target(member: LockedMember, card_no: str) -> str:
    return f"member {member.member_no}, card {mask_card(card_no)}"
