"""Is this Redis the one that knows what was sold? Asked anew at every incarnation (INV-8).

A Redis that restarted, was swapped or was promoted has another identity than the one in each
campaign's head, and the scripts sell nothing there until the head has been compared: number and
chain hash with PostgreSQL, along the chain of what the writer has not applied yet. What does not
fit is marked ``recovering`` and stays shut.
"""

from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import ledger
from sale.events import GENESIS, CorruptLedger, check_chain, parse_entry
from sale.stock.catalogue import campaign_ids
from sale.stock.keys import campaign_keys
from sale.stock.scripts import CallReply, Scripts

STREAM_CHUNK: Final = 200
TRIES: Final = 5

log = structlog.get_logger()


async def verify_all(redis: Redis, scripts: Scripts, pool: asyncpg.Pool) -> list[str]:
    """Verify every campaign whose head names another Redis; give those that do not fit."""
    server, replication = await redis.info("server"), await redis.info("replication")
    identity = (str(server["run_id"]), str(replication["master_replid"]))
    ids = await campaign_ids(redis)
    async with redis.pipeline(transaction=False) as pipe:
        for campaign_id in ids:
            pipe.hmget(
                campaign_keys(campaign_id).head,
                ["run_id", "replid", "nonce", "recovering", "seq"],
            )
        heads = await pipe.execute()
    unfit = []
    for campaign_id, (run_id, replid, nonce, recovering, seq) in zip(ids, heads, strict=True):
        if seq is None:
            continue
        known = tuple((value or b"").decode() for value in (run_id, replid))
        if known != identity or (nonce or b"").decode() != scripts.nonce:
            if await verify(redis, scripts, pool, campaign_id):
                continue
            unfit.append(campaign_id)
        elif recovering:
            unfit.append(campaign_id)
    return unfit


async def verify(redis: Redis, scripts: Scripts, pool: asyncpg.Pool, campaign_id: str) -> bool:
    """Compare one campaign with PostgreSQL and mark it. True where it fits."""
    for _ in range(TRIES):
        seq, chain = await _head(redis, campaign_id)
        async with pool.acquire() as connection:
            applied, applied_chain = await ledger.position(connection, campaign_id)
        why = await _misfit(redis, campaign_id, seq, chain, applied, applied_chain)
        reply = await scripts.verify(campaign_id, seq, chain, why)
        if reply.reply is CallReply.STALE:
            continue  # the head has moved meanwhile
        if why:
            log.error("campaign.recovering", campaign=campaign_id, why=why)
        else:
            log.info("campaign.verified", campaign=campaign_id, seq=seq)
        return not why
    return False


async def _misfit(  # noqa: PLR0913 - two positions to compare
    redis: Redis, campaign_id: str, seq: int, chain: str, applied: int, applied_chain: str
) -> str:
    """Say in words why the head does not fit PostgreSQL's position; '' where it does."""
    if seq < applied:
        return f"Redis knows {seq} events, PostgreSQL has applied {applied}"
    position, start = (applied, applied_chain or GENESIS), f"({applied}-0" if applied else "-"
    try:
        while rows := await redis.xrange(
            campaign_keys(campaign_id).stream, start, f"{seq}-0", count=STREAM_CHUNK
        ):
            position = check_chain((parse_entry(*row) for row in rows), *position)
            start = f"({rows[-1][0].decode()}"
    except CorruptLedger as error:
        return f"the ledger in Redis does not follow PostgreSQL's: {error}"
    if position != (seq, chain):
        return f"the ledger in Redis ends at event {position[0]}, the head says {seq}"
    return ""


async def _head(redis: Redis, campaign_id: str) -> tuple[int, str]:
    seq, chain = await redis.hmget(campaign_keys(campaign_id).head, ["seq", "chain"])
    return int(seq or 0), (chain or b"").decode()
