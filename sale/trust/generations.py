"""Members' generations, by which each API process learns within a second of ended tokens (INV-9).

Replacing or revoking a card raises its member's generation in the roster, and a token carries the
generation of its issue. The scheduler, four times a second, and the command that raised it copy
the rises from the roster's feed to a sorted set in Redis, scored by revision. Each API process
reads the newest entry four times a second, and then all new entries. It reads Redis and not
PostgreSQL, because a process that sells has a connection to Redis, and may have lost PostgreSQL for
minutes.

A process reads PostgreSQL at its start, so it needs no earlier entries in Redis. A set that Redis
has lost is built again, and until then the process uses what it knows. The copy is idempotent and
in the order of the feed, so several processes may make it at once. If PostgreSQL was restored from
an older copy, the set no longer matches the feed and is replaced in one step.
"""

import asyncio
import secrets
from typing import Any, Final, NamedTuple

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import roster
from sale.db.roster import Raised
from sale.stock.keys import GENERATIONS

LOOK_EVERY_S: Final = 0.25
LOOK_TIMEOUT_S: Final = 2.0
CHUNK: Final = 1_000
CHUNKS_MAX: Final = 200_000
"""More than one rise for each of as many members as there can be."""

BUILD_WITHIN_S: Final = 600
"""A set whose builder has died expires after that."""

log = structlog.get_logger()


class _Entry(NamedTuple):
    """One entry of the sorted set: revision, and ``member number:generation``."""

    rev: int
    name: bytes


_NOTHING: Final = _Entry(0, b"0:0")
"""First entry of the set, so that a set without a rise exists too."""


class Generations:
    """Generations above 0 as this process knows them, by member number: ``raised``.

    Its size is bounded by the number of cards that were ever replaced or revoked.
    """

    def __init__(self, redis: Redis, pool: asyncpg.Pool) -> None:
        self._redis = redis
        self._pool = pool
        self._at = _NOTHING
        self._error = ""
        self.raised: dict[int, int] = {}

    async def load(self) -> None:
        """Read all rises from PostgreSQL. Raises its errors."""
        raised: dict[int, int] = {}
        at = _NOTHING
        async with self._pool.acquire() as connection:
            for _ in range(CHUNKS_MAX):
                rows = await roster.generations_from(connection, at.rev + 1, CHUNK)
                raised.update((row.member_no, row.generation) for row in rows)
                if not rows:
                    break
                at = _entry(rows[-1])
        self._take(raised, at)

    async def run(self) -> None:
        """Follow the set until cancelled; the next look repeats what failed."""
        while True:
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    await self.look()
            except Exception as error:  # noqa: BLE001 - without this task nothing is learned
                why = type(error).__name__
                if why != self._error:
                    log.warning("generations.not_read", error=why)
                self._error = why
            else:
                self._error = ""
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Read new entries. Raises the stores' errors."""
        newest = await _newest(self._redis)
        if newest is None or newest == self._at:
            return  # the set is lost and will be built again, or has nothing new
        if await self._redis.zscore(GENERATIONS, self._at.name) == self._at.rev:
            raised, at = await _read_on(self._redis, self._at)
            self._take(self.raised | raised, at)
            return
        # The set is behind what this process read in PostgreSQL, or PostgreSQL is an older copy.
        async with self._pool.acquire() as connection:
            known = await _is_of_feed(connection, self._at)
        if not known:
            await self.load()

    def _take(self, raised: dict[int, int], at: _Entry) -> None:
        """Replace the known generations, in the same dictionary, because others refer to it."""
        self.raised.clear()
        self.raised.update(raised)
        self._at = at


async def _read_on(redis: Redis, at: _Entry) -> tuple[dict[int, int], _Entry]:
    """Read the entries after one: generations by member, and the last entry."""
    raised: dict[int, int] = {}
    for _ in range(CHUNKS_MAX):
        rows: Any = await redis.zrange(
            GENERATIONS, f"({at.rev}", "+inf", byscore=True, offset=0, num=CHUNK, withscores=True
        )
        if not rows:
            break
        for name, _ in rows:
            member_no, _, generation = name.partition(b":")
            raised[int(member_no)] = int(generation)
        at = _Entry(int(rows[-1][1]), rows[-1][0])
    return raised, at


async def copy_generations(redis: Redis, connection: Any) -> None:  # noqa: ANN401 - asyncpg's proxy
    """Copy the rises that Redis lacks; build the set anew if it does not match the feed."""
    at = await _newest(redis)
    if at is None or not await _is_of_feed(connection, at):
        await _build(redis, connection)
        return
    for _ in range(CHUNKS_MAX):
        rows = await roster.generations_from(connection, at.rev + 1, CHUNK)
        if not rows:
            return
        await redis.zadd(GENERATIONS, _scores(rows))
        at = _entry(rows[-1])


async def _is_of_feed(connection: Any, at: _Entry) -> bool:  # noqa: ANN401 - asyncpg's proxy
    if at == _NOTHING:
        return True
    rows = await roster.generations_from(connection, at.rev, 1)
    return bool(rows) and _entry(rows[0]) == at


async def _build(redis: Redis, connection: Any) -> None:  # noqa: ANN401 - asyncpg's proxy
    """Build the set beside the old one and exchange them in one step."""
    beside, at = f"{GENERATIONS}:{secrets.token_hex(8)}", _NOTHING
    await redis.zadd(beside, {_NOTHING.name: 0})
    await redis.expire(beside, BUILD_WITHIN_S)
    for _ in range(CHUNKS_MAX):
        rows = await roster.generations_from(connection, at.rev + 1, CHUNK)
        if not rows:
            break
        await redis.zadd(beside, _scores(rows))
        at = _entry(rows[-1])
    async with redis.pipeline(transaction=True) as pipe:
        pipe.persist(beside)
        pipe.rename(beside, GENERATIONS)
        await pipe.execute()


async def _newest(redis: Redis) -> _Entry | None:
    rows: Any = await redis.zrange(GENERATIONS, 0, 0, desc=True, withscores=True)
    return _Entry(int(rows[0][1]), rows[0][0]) if rows else None


def _entry(row: Raised) -> _Entry:
    return _Entry(row.rev, f"{row.member_no}:{row.generation}".encode())


def _scores(rows: list[Raised]) -> dict[bytes, int]:
    return {entry.name: entry.rev for entry in map(_entry, rows)}
