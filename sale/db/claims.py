"""Acknowledged steps that the ledger may lack: handed in, settled, or kept as a conflict.

No member waits for this. An API process hands in the sales that it acknowledged and Redis has lost,
and the recovery fills the lost numbers from them. A sale that was handed in is settled once the
ledger has been applied that far; if the ledger does not have it then, it goes to ``conflict``.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from sale.db import queries
from sale.db.pool import Connection
from sale.domain.clock import from_ms, to_ms
from sale.ledger.chain import Event, parse_row

ROWS_MAX: Final = 10_000
"""Rows of one statement."""


class Settled(NamedTuple):
    """The outcome of a step that was handed in; ``stands`` or ``conflict``."""

    campaign_id: str
    seq: int
    settled: str


async def hand_in(conn: Connection, campaign_id: str, process: str, steps: Sequence[Event]) -> None:
    """Note what a process acknowledged. Repeats are one row."""
    for at in range(0, len(steps), ROWS_MAX):
        chunk = steps[at : at + ROWS_MAX]
        await conn.execute(
            _SQL["hand_in"],
            campaign_id,
            process,
            [step.seq for step in chunk],
            [step.epoch for step in chunk],
            [from_ms(step.at_ms) for step in chunk],
            [msgspec.json.encode(step.row()).decode() for step in chunk],
        )


async def unsettled(conn: Connection, campaign_id: str, beyond: int) -> list[Event]:
    """Steps handed in and not settled beyond an event number, by number."""
    steps: list[Event] = []
    after = 0
    while rows := await conn.fetch(_SQL["unsettled"], campaign_id, beyond, after, ROWS_MAX):
        last = rows[-1]["seq"]
        if len(rows) == ROWS_MAX and rows[0]["seq"] != last:
            # The last number may go on beyond this chunk.
            rows = [row for row in rows if row["seq"] != last]
            last = rows[-1]["seq"]
        steps += [
            parse_row(row["seq"], to_ms(row["at"]), row["epoch"], row["step"]) for row in rows
        ]
        after = last
    return steps


async def highest(conn: Connection, campaign_id: str) -> int:
    """Highest number that was handed in and is not settled; 0 where there is none."""
    number: int = await conn.fetchval(_SQL["highest"], campaign_id)
    return number


async def settle(conn: Connection) -> list[Settled]:
    """Settle the sales up to the applied number, at most ROWS_MAX of them."""
    return [Settled(*row.values()) for row in await conn.fetch(_SQL["settle"], ROWS_MAX)]


async def record_forked(
    conn: Connection, campaign_id: str, strays: Sequence[tuple[Event, str]]
) -> None:
    """Keep events of a Redis that the ledger lacks, with the reasons. Repeats are one row."""
    for at in range(0, len(strays), ROWS_MAX):
        chunk = strays[at : at + ROWS_MAX]
        await conn.execute(
            _SQL["forked"],
            campaign_id,
            [event.seq for event, _ in chunk],
            [from_ms(event.at_ms) for event, _ in chunk],
            [why for _, why in chunk],
            [msgspec.json.encode(event).decode() for event, _ in chunk],
        )


async def voided(conn: Connection, campaign_id: str, limit: int = 100) -> list[tuple[int, int]]:
    """Ranges of numbers that were given out, are lost, and are never used again."""
    rows = await conn.fetch(_SQL["voided"], campaign_id, limit)
    return [(row["first"], row["last"]) for row in rows]


async def conflicts(conn: Connection, campaign_id: str, limit: int = 100) -> list[dict[str, Any]]:
    """A campaign's conflicts, newest first, as the table has them."""
    return [dict(row) for row in await conn.fetch(_SQL["conflicts"], campaign_id, limit)]


_SQL: Final = queries.load("claims")
