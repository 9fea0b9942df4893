"""Rehearsals in PostgreSQL: which are left, and how one goes away.

A rehearsal is struck off first, in one transaction with its row of the audit log: from then on it
is not audited, recovered, or counted as missing. Then its rows are removed, some thousand at a
time, so that a purge that dies can continue. The schema's triggers decide which rows may be removed
(``migrations/0001_ledger.sql``), not this module. Its row in ``campaign`` stays.
"""

from typing import Final

import msgspec

from sale.db import queries
from sale.db.locks import REHEARSAL
from sale.db.pool import Connection

CHUNK_ROWS: Final = 20_000
CHUNKS_MAX: Final = 10_000
CHUNK_TIMEOUT_S: Final = 60.0


class LeftOver(msgspec.Struct, frozen=True):
    """A rehearsal that has anything left; ``struck_off``: only its rows are still to go."""

    id: str
    rehearsal_of: str
    state: str
    applied: int
    struck_off: bool


class Removed(msgspec.Struct, frozen=True):
    """Counts of the rows that were removed with a rehearsal."""

    orders: int
    tickets: int


async def left_over(conn: Connection) -> list[LeftOver]:
    """Rehearsals that have anything left, by ID."""
    return [LeftOver(*row.values()) for row in await conn.fetch(_SQL["left_over"])]


async def real(conn: Connection) -> set[str]:
    """Campaigns that are no rehearsals, as far as their ledger is applied."""
    return {row["campaign_id"] for row in await conn.fetch(_SQL["real"])}


async def is_purged(conn: Connection, campaign_id: str) -> bool:
    """Whether a campaign was a rehearsal that was struck off: it is to be nowhere any more."""
    return bool(await conn.fetchval(_SQL["purged"], campaign_id))


async def strike_off(
    conn: Connection, campaign_id: str, applied: int, *, actor: str, reason: str
) -> Removed | None:
    """Strike off a rehearsal whose last event is ``applied``, with a row in the audit log.

    None if it is not at that event, is struck off already, or is no rehearsal.
    """
    async with conn.transaction():
        sold = await conn.fetchrow(_SQL["sold"], campaign_id, timeout=CHUNK_TIMEOUT_S)
        row = await conn.fetchrow(_SQL["strike_off"], campaign_id, applied)
        if row is None:
            return None
        data = {**sold, "rehearsal_of": row["rehearsal_of"], "events": applied}
        details = msgspec.json.encode({**data, "chain": row["chain"]}).decode()
        await conn.execute(_SQL["log"], actor, campaign_id, reason, details)
        for table in ("conflict", "handed_in"):
            await conn.execute(_SQL[f"remove_{table}"], campaign_id, timeout=CHUNK_TIMEOUT_S)
    return Removed(**sold)


async def remove_rows(conn: Connection, campaign_id: str) -> None:
    """Remove what is left of a rehearsal that was struck off.

    Raises asyncpg.IntegrityConstraintViolationError for any other campaign.
    """
    for table in ("ticket", "orders", "member_use", "event"):
        for _ in range(CHUNKS_MAX):
            done = await conn.execute(
                _SQL[f"remove_{table}"], campaign_id, CHUNK_ROWS, timeout=CHUNK_TIMEOUT_S
            )
            if int(done.split()[-1]) < CHUNK_ROWS:
                break
    await conn.execute(_SQL["remove_showing"], campaign_id)


async def hold_play(conn: Connection) -> bool:
    """Take the right to play or remove rehearsals for as long as this connection is held."""
    return bool(await conn.fetchval("SELECT pg_try_advisory_lock($1)", REHEARSAL))


async def leave_play(conn: Connection) -> None:
    """Give it back."""
    await conn.execute("SELECT pg_advisory_unlock($1)", REHEARSAL)


_SQL: Final = queries.load("rehearsals")
