"""Copies the members who may not buy from the roster to each campaign's set (INV-9).

The roster writes each change under the next revision, and a campaign's head holds the revision up
to which its set is complete. Each step is a compare-and-set on that revision, so several processes
may run it at once: the command that revoked a card, the scheduler four times a second, and the
creation of a campaign, which sells nothing before its first load is complete. A first load takes
many steps, so one process at a time runs it. It begins with an empty set and has its own name:
nothing of a load that died or was overtaken stays in the set.
"""

import secrets
from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import roster
from sale.db.locks import ROSTER_LOAD_CLASS
from sale.domain.campaign import State
from sale.stock.catalogue import campaign_ids
from sale.stock.head import ROSTER, read_heads
from sale.stock.scripts import CallReply, Scripts
from sale.trust.generations import copy_generations
from sale.trust.isolation import Isolation

CHUNK: Final = 1_000
LOAD_LOCK_TIMEOUT: Final = "10s"
ROUNDS_MAX: Final = 10_000

log = structlog.get_logger()


async def sync_all(
    redis: Redis, scripts: Scripts, pool: asyncpg.Pool, isolation: Isolation | None = None
) -> int:
    """Bring generations and every campaign up to the roster; give how many campaigns were behind.

    ``isolation`` records a campaign that fails, and the others go on.
    """
    isolation = isolation or Isolation()
    async with pool.acquire() as connection:
        await copy_generations(redis, connection)
        newest = await roster.current_rev(connection)
    ids = await campaign_ids(redis)
    heads = await read_heads(redis, ids, ROSTER)
    behind = 0
    for campaign_id, head in zip(ids, heads, strict=True):
        with isolation.of(campaign_id, "roster"):
            if isinstance(head, Exception):
                raise head
            rev = head.roster_rev
            if head.state in {"", State.DELETED}:
                continue
            if rev is not None and rev > newest:
                await _go_back(scripts, pool, campaign_id, rev)
            elif rev is None or rev < newest:
                behind += 1
                await sync_campaign(redis, scripts, pool, campaign_id)
    isolation.forget_others("roster", ids)
    return behind


async def sync_campaign(
    redis: Redis, scripts: Scripts, pool: asyncpg.Pool, campaign_id: str
) -> None:
    """Bring one campaign up to the roster, from any revision."""
    # Two fields and not the campaign, so that a damaged head fails only where it must.
    head = await ROSTER.read(redis, campaign_id)
    if head.state in {"", State.DELETED}:
        return
    rev = -1 if head.roster_rev is None else head.roster_rev
    for _ in range(ROUNDS_MAX):
        if rev < 0:
            loaded = await _load(scripts, pool, campaign_id)
            if loaded is None:
                return
            rev = loaded
            continue
        async with pool.acquire() as connection:
            changes = await roster.changes_since(connection, rev, CHUNK)
        if not changes:
            return
        last = changes[-1].rev
        reply = await scripts.sync_revoked(
            campaign_id, rev, last, [(each.member_no, each.active) for each in changes]
        )
        if reply.reply is CallReply.MISSING:
            return
        # STALE: another process was first. The reply holds the revision, -1 for a new set.
        rev = last if reply.reply is CallReply.OK else reply.seq


async def _go_back(scripts: Scripts, pool: asyncpg.Pool, campaign_id: str, rev: int) -> None:
    """Replace a set that is ahead of the roster, in one step.

    This happens after PostgreSQL was restored from an older copy: its next changes get revisions
    that the set has passed already, and would never reach it.
    """
    members: list[int] = []
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        newest = await roster.current_rev(connection)
        for _ in range(ROUNDS_MAX):
            after = members[-1] if members else 0
            chunk = await roster.inactive_members(connection, after, CHUNK)
            members += chunk
            if not chunk:
                break
    if newest < rev:  # otherwise the roster has caught up meanwhile
        log.warning("roster.went_back", campaign=campaign_id, roster_rev=newest, followed=rev)
        changes = [(member_no, False) for member_no in members]
        name = secrets.token_hex(8)
        await scripts.sync_revoked(campaign_id, rev, newest, changes, load=name, begins=True)


async def _load(scripts: Scripts, pool: asyncpg.Pool, campaign_id: str) -> int | None:
    """Put all members who are not active into an empty set, then state the revision.

    Gives the revision of the set, -1 if another process made it anew meanwhile, None if there is
    no campaign, or too many members. Raises asyncpg.LockNotAvailableError if another load is slow.
    """
    name, after = secrets.token_hex(8), 0
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        await connection.execute(f"SET LOCAL lock_timeout = '{LOAD_LOCK_TIMEOUT}'")
        await connection.execute(
            "SELECT pg_advisory_xact_lock($1, hashtext($2))", ROSTER_LOAD_CLASS, campaign_id
        )
        rev = await roster.current_rev(connection)
        for number in range(ROUNDS_MAX):
            members = await roster.inactive_members(connection, after, CHUNK, rev)
            reply = await scripts.sync_revoked(
                campaign_id,
                -1,
                -1 if members else rev,
                [(member_no, False) for member_no in members],
                load=name,
                begins=number == 0,
            )
            if reply.reply is CallReply.MISSING:
                return None
            if reply.reply is CallReply.STALE:
                return reply.seq
            if not members:
                return rev
            after = members[-1]
    return None
