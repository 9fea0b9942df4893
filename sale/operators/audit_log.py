"""Reading the audit log: who did what, when and why (INV-10)."""

from typing import Any

import asyncpg
import msgspec

from sale.db import read
from sale.domain.clock import rfc3339
from sale.domain.order import Time
from sale.operators.campaigns import Actor


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One operator action: who, when, what, to what, why, and particulars.

    ``target`` names a member and an order by number, and a card by its last four digits.
    """

    id: int
    at: Time
    actor: str
    action: str
    target: str
    campaign: str | None = None
    reason: str | None = None
    data: dict[str, Any]


async def read_audit_log(
    pool: asyncpg.Pool, actor: Actor, *, campaign: str | None, before_id: int | None, limit: int
) -> tuple[list[AuditEntry], int | None]:
    """Give a page, newest first, and the ID to go on before; None at the end.

    A campaign that is hidden from this account has no entries, like one that does not exist.
    """
    async with pool.acquire() as connection:
        rows = await read.audit_log(
            connection,
            limit=limit + 1,
            before_id=before_id,
            campaign=campaign,
            union=None if actor.sees_all else actor.union,
        )
    page = [_entry(row) for row in rows[:limit]]
    return page, page[-1].id if len(rows) > limit else None


def _entry(row: read.AuditRow) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        at=rfc3339(row.at_ms),
        actor=row.actor,
        action=row.action,
        target=row.target,
        campaign=row.campaign_id,
        reason=row.reason,
        data=row.data,
    )
