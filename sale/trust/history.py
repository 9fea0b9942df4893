"""A campaign's history: its stream, followed along the chain, and its ledger in PostgreSQL.

Audit, verification and recovery follow the stream from PostgreSQL's position on. They differ in how
much of it they read, and in how they treat a fault.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import asyncpg
from redis.asyncio import Redis

from sale.db import read
from sale.db.pool import Connection
from sale.ledger.chain import START, CorruptLedger, Entry, Event, Position, check_chain, parse_entry
from sale.stock.keys import campaign_keys
from sale.stock.stream import stream_rows

EVENTS_CHUNK: Final = 2_000
QUERY_TIMEOUT_S: Final = 300.0
A_STEP: Final = 5_000
"""Members, or event numbers, between two rests."""
REST_S: Final = 0.01
"""Rest between two steps, each of which blocks the loop for tens of milliseconds. A round of the
scheduler's calls fits into one rest; a bare yield would let through one call a step (INV-9)."""
APPLIED_WITHIN_S: Final = 600.0
APPLIED_PAUSE_S: Final = 0.05


class Steps:
    """Counts the work of a long task, and rests regularly so that other tasks run."""

    def __init__(self) -> None:
        self._done = 0

    async def done(self, count: int = 1) -> None:
        """Record work that is done."""
        self._done += count
        if self._done >= A_STEP:
            self._done = 0
            await asyncio.sleep(REST_S)


class History:
    """A stream that is compared with PostgreSQL's position, or with itself if that is None.

    ``applied_now`` gives PostgreSQL's current number. With it, entries that the writer trims while
    the stream is read are no gap. After ``follow``, ``at`` is the end of the sound chain, ``ends``
    the number of the last entry that was read, ``met`` whether the chain passes through
    PostgreSQL's position, and ``wrong`` the first fault in words.
    """

    def __init__(
        self,
        redis: Redis,
        campaign_id: str,
        position: Position | None,
        *,
        applied_now: Callable[[], Awaitable[int]] | None = None,
        decode: bool = True,
    ) -> None:
        """With ``decode``, an unreadable event that PostgreSQL lacks is a fault."""
        self._redis = redis
        self._id = campaign_id
        self._position = position
        self._applied_now = applied_now
        self._decode = decode
        self.at: Position | None = None
        self.ends = 0
        self.met = False
        self.wrong = ""

    async def follow(self, *, after: int = 0, to: int | None = None) -> AsyncIterator[Entry]:
        """Give the sound entries beyond the position, up to the first that is wrong.

        Reads the stream after event ``after`` (0: all of it) up to ``to``. A fault before the
        position ends nothing: PostgreSQL has those events.
        """
        applied = 0 if self._position is None else self._position.seq
        start = f"({after}-0" if after else "-"
        end = "+" if to is None else f"{to}-0"
        async for rows in stream_rows(self._redis, self._id, start, end):
            for row in rows:
                self.ends = _number(row)
                try:
                    entry = parse_entry(*row)
                    if self._decode and entry.last > applied:
                        entry.events()
                    await self._pass(entry)
                except CorruptLedger as error:
                    self.wrong, self.at = self.wrong or str(error), None
                    if self.ends > applied:
                        return
                    continue
                if entry.last > applied:
                    yield entry

    async def read(self, *, after: int = 0, to: int | None = None) -> "History":
        """Follow the stream without using its entries; give itself."""
        async for _ in self.follow(after=after, to=to):
            pass
        return self

    async def passes(self) -> bool:
        """Whether the chain passes through the position, also if that was trimmed meanwhile."""
        return self.met or (
            self._position is not None and await self._trimmed(self._position.seq + 1)
        )

    async def _pass(self, entry: Entry) -> None:
        """Go on by one entry. Raises CorruptLedger."""
        before = self.at
        if before is not None and entry.first > before.seq + 1 and await self._trimmed(entry.first):
            before = None
        if before is None:
            before = await self._anchor(entry)
        if before is None:
            self.at = Position(entry.last, entry.chain)
        else:
            self.at = check_chain([entry], before)
        position = self._position
        if position is None or entry.last < position.seq:
            return
        if entry.first <= position.seq and self.at != position:
            raise CorruptLedger("the chain in Redis does not pass through PostgreSQL's")
        self.met = True

    async def _anchor(self, entry: Entry) -> Position | None:
        """Give the position that a first entry must follow; None if it is not known.

        Raises CorruptLedger for a gap.
        """
        position = self._position
        if position is None or entry.first <= position.seq:
            return START if entry.first == 1 else None
        if entry.first > position.seq + 1 and not await self._trimmed(entry.first):
            raise CorruptLedger(f"event {position.seq + 1} is missing: next is {entry.first}")
        return position if entry.first == position.seq + 1 else None

    async def _trimmed(self, first: int) -> bool:
        """Whether all before event ``first`` was trimmed, and PostgreSQL has it."""
        if self._applied_now is None:
            return False
        rows: Any = await self._redis.xrange(campaign_keys(self._id).stream, count=1)
        begins = parse_entry(*rows[0]).first if rows else 0
        return first <= begins <= await self._applied_now() + 1


async def stream_ends(redis: Redis, campaign_id: str) -> int:
    """Number of the last event in a stream; 0 if there is none."""
    last: Any = await redis.xrevrange(campaign_keys(campaign_id).stream, count=1)
    return _number(last[0]) if last else 0


async def ledger_events(connection: Connection, campaign_id: str) -> AsyncIterator[list[Event]]:
    """Give PostgreSQL's ledger of a campaign, in order and in chunks, from its first event."""
    after = 0
    while events := await read.events(
        connection, campaign_id, after, EVENTS_CHUNK, timeout_s=QUERY_TIMEOUT_S
    ):
        yield events
        after = events[-1].seq
        if len(events) == EVENTS_CHUNK:
            await asyncio.sleep(REST_S)


async def applied_number(pool: asyncpg.Pool, campaign_id: str) -> int:
    """Number up to which PostgreSQL has a campaign's events."""
    async with pool.acquire() as connection:
        return (await read.position(connection, campaign_id)).seq


async def wait_applied(
    applied_now: Callable[[], Awaitable[int]],
    seq: int,
    *,
    patience_s: float,
    within_s: float = APPLIED_WITHIN_S,
    pause_s: float = APPLIED_PAUSE_S,
) -> int:
    """Wait until the writer has applied event ``seq``; give the number that it has applied.

    That number is lower than ``seq`` if the writer made no progress for ``patience_s``, or did not
    get there within ``within_s``. Raises the errors of ``applied_now``.
    """
    clock = asyncio.get_running_loop().time
    end, patience_until, before = clock() + within_s, clock(), -1
    while (applied := await applied_now()) < seq:
        if applied > before:
            before, patience_until = applied, clock() + patience_s
        if clock() > min(patience_until, end):
            break
        await asyncio.sleep(pause_s)
    return applied


def _number(row: Any) -> int:  # noqa: ANN401 - Redis' reply
    return int(row[0].split(b"-")[0])
