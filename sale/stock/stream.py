"""Reads a campaign's stream, which may be long, in chunks that hold Redis up for no time."""

from collections.abc import AsyncIterator
from typing import Any, Final

from redis.asyncio import Redis

from sale.ledger.chain import Event, parse_entry
from sale.stock.keys import campaign_keys

STREAM_CHUNK: Final = 200


async def stream_rows(
    redis: Redis, campaign_id: str, start: str = "-", end: str = "+"
) -> AsyncIterator[list[Any]]:
    """Give the entries from ``start`` to ``end`` as redis-py returns them, in order, in chunks.

    For ``chain.parse_entry`` and ``chain.check_chain``: what a gap or a damaged entry means, each
    reader decides. The stream may grow or be trimmed between two chunks.
    """
    stream = campaign_keys(campaign_id).stream
    while rows := list(await redis.xrange(stream, start, end, count=STREAM_CHUNK) or ()):
        yield rows
        start = f"({rows[-1][0].decode()}"  # type: ignore[union-attr]


async def read_event(redis: Redis, campaign_id: str, seq: int) -> Event | None:
    """Give an event by its number; None where the stream does not hold it any more, or yet.

    Raises CorruptLedger, and redis-py's errors.
    """
    rows: Any = await redis.xrange(campaign_keys(campaign_id).stream, f"{seq}-0", count=1)
    if not rows:
        return None
    entry = parse_entry(*rows[0])
    return entry.events()[seq - entry.first] if entry.first <= seq else None
