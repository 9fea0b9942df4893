"""Cards that may not buy: the roster decides, every campaign's set follows (INV-9).

The roster writes each change under the next revision; a campaign's head says up to which revision
its set is complete. Following is a compare-and-set on that revision, so any number of processes
may do it at once: the command that revoked a card, the scheduler four times a second, and the
making of a campaign, which sells nothing before its first load is complete.
"""

from typing import Any, Final

import asyncpg
from redis.asyncio import Redis

from sale.db import roster
from sale.domain import CampaignState
from sale.stock.catalogue import campaign_ids
from sale.stock.keys import campaign_keys
from sale.stock.scripts import CallReply, Scripts

CHUNK: Final = 1_000
ROUNDS_MAX: Final = 10_000


async def sync_all(redis: Redis, scripts: Scripts, pool: asyncpg.Pool) -> int:
    """Let every campaign follow the roster; give how many were behind."""
    async with pool.acquire() as connection:
        newest = await roster.current_rev(connection)
    ids = await campaign_ids(redis)
    async with redis.pipeline(transaction=False) as pipe:
        for campaign_id in ids:
            pipe.hmget(campaign_keys(campaign_id).head, ["roster_rev", "state"])
        heads = await pipe.execute()
    behind = [
        campaign_id
        for campaign_id, (rev, state) in zip(ids, heads, strict=True)
        if state not in {None, b"deleted"} and (rev is None or int(rev) < newest)
    ]
    for campaign_id in behind:
        await sync_campaign(redis, scripts, pool, campaign_id)
    return len(behind)


async def sync_campaign(
    redis: Redis, scripts: Scripts, pool: asyncpg.Pool, campaign_id: str
) -> None:
    """Let one campaign follow the roster, from wherever it stands."""
    # Two fields and not the campaign: a damaged head must not keep the others from following.
    head: list[Any] = await redis.hmget(campaign_keys(campaign_id).head, ["state", "roster_rev"])
    if head[0] is None or head[0].decode() == CampaignState.DELETED:
        return
    rev = await _load(scripts, pool, campaign_id) if head[1] is None else int(head[1])
    for _ in range(ROUNDS_MAX):
        async with pool.acquire() as connection:
            changes = await roster.changes_since(connection, rev, CHUNK)
        if not changes:
            return
        last = changes[-1][0]
        reply = await scripts.sync_cards(
            campaign_id, rev, last, [(card, active) for _, card, active in changes]
        )
        if reply.reply is CallReply.MISSING:
            return
        # STALE: somebody else got there first, and says how far.
        rev = last if reply.reply is CallReply.OK else reply.seq


async def _load(scripts: Scripts, pool: asyncpg.Pool, campaign_id: str) -> int:
    """Put all cards that are not active now into the set, then state the revision."""
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        rev = await roster.current_rev(connection)
        after = ""
        for _ in range(ROUNDS_MAX):
            cards = await roster.inactive_cards(connection, after, CHUNK)
            reply = await scripts.sync_cards(
                campaign_id, -1, -1 if cards else rev, [(card, False) for card in cards]
            )
            if reply.reply is CallReply.STALE:
                return reply.seq
            if not cards or reply.reply is CallReply.MISSING:
                return rev
            after = cards[-1]
    return rev
