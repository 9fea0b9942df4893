"""Is this Redis the one that knows what was sold? Asked anew at every incarnation (INV-8).

A Redis that restarted, was swapped or was promoted has another identity than the one in each
campaign's head, and the scripts sell nothing there until the head has been compared: number and
chain hash with PostgreSQL, along the chain of what the writer has not applied yet. What does not
fit is marked ``recovering`` and stays shut.
"""

from typing import Any, Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import ledger
from sale.events import GENESIS, CorruptLedger, check_chain, parse_entry
from sale.stock.catalogue import campaign_ids
from sale.stock.keys import campaign_keys
from sale.stock.scripts import CallReply, Scripts
from sale.stock.stream import stream_rows
from sale.usecases.isolation import Isolation

TRIES: Final = 5

log = structlog.get_logger()


async def verify_all(
    redis: Redis, scripts: Scripts, pool: asyncpg.Pool, isolation: Isolation | None = None
) -> list[str]:
    """Verify every campaign whose head names another Redis; give those that do not sell for it.

    These are: those that do not fit, those that cannot be read (told by ``isolation``, they keep
    none of the others shut), and those that PostgreSQL knows and this Redis has lost.
    """
    isolation = isolation or Isolation()
    server, replication = await redis.info("server"), await redis.info("replication")
    identity = (str(server["run_id"]), str(replication["master_replid"]), scripts.nonce)
    ids = await campaign_ids(redis)
    async with redis.pipeline(transaction=False) as pipe:
        for campaign_id in ids:
            pipe.hmget(
                campaign_keys(campaign_id).head,
                ["run_id", "replid", "nonce", "recovering", "seq"],
            )
        heads = await pipe.execute(raise_on_error=False)
    fit, held = set(), set()
    for campaign_id, head in zip(ids, heads, strict=True):
        held.add(campaign_id)
        with isolation.of(campaign_id, "verify"):
            if isinstance(head, Exception):
                raise head
            *marks, recovering, seq = head
            if seq is None:
                held.discard(campaign_id)
            elif tuple((mark or b"").decode() for mark in marks) == identity:
                if not recovering:
                    fit.add(campaign_id)
            elif await verify(redis, scripts, pool, campaign_id):
                fit.add(campaign_id)
    async with pool.acquire() as connection:
        lost = [each for each in await ledger.living(connection) if each not in held]
    return sorted([*(held - fit), *lost])


async def verify(
    redis: Redis, scripts: Scripts, pool: asyncpg.Pool, campaign_id: str, *, whole: bool = False
) -> bool:
    """Compare one campaign's chain with PostgreSQL and mark it. True where it fits and may sell.

    Lifts a recovering mark that this function has set, and where stock and cards were compared too
    (``whole``) any other.
    """
    for _ in range(TRIES):
        seq, chain, before, others = await _head(redis, campaign_id)
        async with pool.acquire() as connection:
            applied, applied_chain = await ledger.position(connection, campaign_id)
        why = await _misfit(redis, campaign_id, seq, chain, applied, applied_chain)
        if why and (others or why == before):
            return False  # it is marked, and somebody was told
        reply = await scripts.verify(campaign_id, seq, chain, why, whole=whole)
        if reply.reply is CallReply.STALE:
            continue  # the head has moved meanwhile
        if why:
            log.error("campaign.recovering", campaign=campaign_id, why=why)
        else:
            log.info("campaign.verified", campaign=campaign_id, seq=seq)
        return not why and reply.state != "recovering"
    return False


async def _misfit(
    redis: Redis, campaign_id: str, seq: int, chain: str, applied: int, applied_chain: str
) -> str:
    """Say in words why the head does not fit PostgreSQL's position; '' where it does."""
    if seq < applied:
        return f"Redis knows {seq} events, PostgreSQL has applied {applied}"
    keys = campaign_keys(campaign_id)
    last: Any = await redis.xrevrange(keys.stream, count=1)
    if not last or int(last[0][0].split(b"-")[0]) < seq:
        return f"the stream in Redis has lost event {seq}"
    position, start = (applied, applied_chain or GENESIS), f"({applied}-0" if applied else "-"
    try:
        async for rows in stream_rows(redis, campaign_id, start, f"{seq}-0"):
            position = check_chain((parse_entry(*row) for row in rows), *position)
    except CorruptLedger as error:
        return f"the ledger in Redis does not follow PostgreSQL's: {error}"
    if position != (seq, chain):
        return f"the ledger in Redis ends at event {position[0]}, the head says {seq}"
    return ""


async def _head(redis: Redis, campaign_id: str) -> tuple[int, str, str, bool]:
    """Number, chain hash, why it is recovering ('' where not), whether others have said so."""
    values: list[Any] = await redis.hmget(
        campaign_keys(campaign_id).head, ["seq", "chain", "recovering", "recovering_by"]
    )
    seq, chain, recovering, by = ((value or b"").decode() for value in values)
    return int(seq or 0), chain, recovering, recovering != "" and by != "verify"
