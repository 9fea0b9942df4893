"""Lists a campaign's final losses, with everything that is known of them."""

from typing import Any, Final

import asyncpg
import msgspec

from sale.db import claims, read
from sale.domain.clock import rfc3339, to_ms
from sale.domain.problem import Problem, Refused
from sale.ledger.chain import parse_row

LISTED_MAX: Final = 1_000


class Conflict(msgspec.Struct, frozen=True):
    """An event that a member was told, or that is in the ledger, and is no order."""

    seq: int
    at: str
    source: str
    why: str
    kind: str
    member: int | None
    showing: int | None
    quantity: int | None
    found_at: str


class Losses(msgspec.Struct, frozen=True):
    """Ranges of numbers that were voided (first, last), and conflicts, newest first."""

    campaign: str
    voided: list[tuple[int, int]]
    conflicts: list[Conflict]


async def losses(pool: asyncpg.Pool, campaign_id: str) -> Losses:
    """List them, at most a thousand of each. Raises Refused for an unknown campaign."""
    async with pool.acquire() as connection:
        if await read.state(connection, campaign_id) is None:
            raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
        voided = await claims.voided(connection, campaign_id, LISTED_MAX)
        rows = await claims.conflicts(connection, campaign_id, LISTED_MAX)
    return Losses(campaign_id, voided, [_conflict(row) for row in rows])


def _conflict(row: dict[str, Any]) -> Conflict:
    event = msgspec.json.decode(row["event"])
    if (handed_in := event.get("row")) is not None:
        step = parse_row(row["seq"], 0, event["epoch"], msgspec.json.encode(handed_in))
        event = msgspec.to_builtins(step)
    return Conflict(
        seq=row["seq"],
        at=rfc3339(to_ms(row["at"])),
        source=row["source"],
        why=row["why"],
        kind=event.get("kind", ""),
        member=event.get("member_no"),
        showing=event.get("showing"),
        quantity=event.get("quantity"),
        found_at=rfc3339(to_ms(row["found_at"])),
    )
