"""Verification: checks at each incarnation of Redis that it knows everything that was sold (INV-8).

A Redis that restarted, was replaced or was promoted has another identity than the one in each
campaign's head. The scripts sell nothing there until this module has compared the head. It compares
number and chain hash with PostgreSQL, along the chain of the events that the writer has not applied
yet. It also compares the number with the API processes' reports (``stock/process_reports.py``) and
with the sales that they have handed in, because an old copy may match PostgreSQL's ledger and still
lack sales that members were told. A campaign that does not match is marked ``recovering`` and sells
nothing.

While PostgreSQL is away, the reports alone suffice if no process is silent, one of them knows the
campaign, and none lacks anything: then Redis has the same files. An unknown Redis sells nothing.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sale.db import claims, read
from sale.db.errors import POSTGRES_ERRORS
from sale.ledger.chain import START, Position
from sale.stock.catalogue import campaign_ids
from sale.stock.head import MARK, TRUST, Head, read_heads
from sale.stock.keys import VERIFIED
from sale.stock.process_reports import (
    Identity,
    Reports,
    collect_report,
    collect_reports,
    read_identity,
)
from sale.stock.scripts import CallReply, Scripts
from sale.trust.history import History, stream_ends
from sale.trust.isolation import Isolation
from sale.trust.stalled_ledgers import StalledLedgers

TRIES: Final = 5
POSTGRES_PATIENCE_S: Final = 1.0

log = structlog.get_logger()


class NotDurable(ValueError):  # noqa: N818 - the name states the condition
    """This Redis would lose acknowledged sales, so nothing is sold there."""


async def verify_all(  # noqa: C901 - one branch for each condition of a head
    redis: Redis,
    scripts: Scripts,
    pool: asyncpg.Pool,
    isolation: Isolation | None = None,
    *,
    meet: Callable[[str], Awaitable[Sequence[str]]] | None = None,
    stalled_ledgers: StalledLedgers | None = None,
) -> list[str]:
    """Verify every campaign whose head names another Redis; give those that do not match.

    Among them are campaigns that cannot be read, which ``isolation`` reports and which do not
    affect the others, and campaigns that PostgreSQL knows and this Redis has lost.

    ``meet(run_id)`` gives, at each incarnation, the settings by which this Redis would lose
    acknowledged sales; if there are any, nothing is verified. ``stalled_ledgers`` tells which
    campaigns to compare once more, because PostgreSQL does not follow their ledger.
    """
    isolation = isolation or Isolation()
    reports = await collect_report(redis)
    identity = _marks(reports.identity, scripts.nonce)
    ids = await campaign_ids(redis)
    heads = await read_heads(redis, ids, TRUST)
    fit, held = set(), set()
    away = False
    if any(_knows_another(head, identity) for head in heads):
        # Outside the isolation of one campaign, because a weak Redis concerns all of them.
        if meet is not None and (weak := await meet(reports.identity.run_id)):
            raise NotDurable("; ".join(weak))
        # Once for all campaigns, and only now, because it waits for each process to report.
        reports = await collect_reports(redis)
    for campaign_id, head in zip(ids, heads, strict=True):
        held.add(campaign_id)
        with isolation.of(campaign_id, "verify"):
            if isinstance(head, Exception):
                raise head
            stalled = False
            if head.seq is None:
                held.discard(campaign_id)
                continue
            if not _knows_another(head, identity):
                doubted = what_lacks(reports, campaign_id, head.epoch, head.seq) != ""
                if stalled_ledgers is not None:
                    stalled = stalled_ledgers.due(campaign_id, head.seq, head.applied)
                if not head.recovering and not doubted:
                    fit.add(campaign_id)
                if head.recovering or not (doubted or stalled):
                    continue
                fit.discard(campaign_id)
            try:
                if await verify(redis, scripts, pool, campaign_id, reports):
                    fit.add(campaign_id)
            except POSTGRES_ERRORS:
                if not stalled:
                    away = True
                    raise
                fit.add(campaign_id)  # PostgreSQL is away, and the reports show no fault
    isolation.forget_others("verify", ids)
    # The identity of the Redis that was read first: another may have taken its place since.
    looked_at = ":".join(identity).encode()
    if not away and await redis.get(VERIFIED) != looked_at:
        with contextlib.suppress(ResponseError):  # out of memory: the next round tries again
            await redis.set(VERIFIED, looked_at)
    return sorted([*(held - fit), *await _lost(pool, held)])


async def unverified(redis: Redis, nonce: str) -> int:
    """Count the campaigns that were not compared in this Redis yet.

    A campaign that does not match, or cannot be compared, does not count. Raises redis-py's errors.
    """
    identity = _marks(await read_identity(redis), nonce)
    if await redis.get(VERIFIED) == ":".join(identity).encode():
        return 0
    ids = await campaign_ids(redis)
    heads = await read_heads(redis, ids, TRUST)
    return sum(
        _knows_another(head, identity) and not head.recovering
        for head in heads
        if isinstance(head, Head)
    )


def _marks(identity: Identity, nonce: str) -> tuple[str, str, str]:
    """Give the marks that a campaign's head has after its verification in this Redis."""
    return identity.run_id, identity.replid, nonce


def _knows_another(head: Head | Exception, identity: tuple[str, str, str]) -> bool:
    """Whether a head names another Redis than this one, or another deployment."""
    if isinstance(head, Exception) or head.seq is None:
        return False
    return (head.run_id, head.replid, head.nonce) != identity


async def _lost(pool: asyncpg.Pool, held: set[str]) -> list[str]:
    try:
        async with asyncio.timeout(POSTGRES_PATIENCE_S), pool.acquire() as connection:
            return [each for each in await read.living(connection) if each not in held]
    except POSTGRES_ERRORS:
        return []


async def verify(
    redis: Redis,
    scripts: Scripts,
    pool: asyncpg.Pool,
    campaign_id: str,
    reports: Reports,
    *,
    whole: bool = False,
) -> bool:
    """Compare one campaign's chain with PostgreSQL and with the reports, and mark it.

    True if it matches and may sell. Removes a recovering mark that this function has set, and any
    other if stock and members were compared too (``whole``). Raises PostgreSQL's errors if that is
    away and the reports do not suffice.
    """
    for _ in range(TRIES):
        seq, chain, epoch, before, others = await _head(redis, campaign_id)
        handed_in = 0
        why = what_lacks(reports, campaign_id, epoch, seq)
        try:
            async with asyncio.timeout(POSTGRES_PATIENCE_S), pool.acquire() as connection:
                position = await read.position(connection, campaign_id)
                handed_in = await claims.highest(connection, campaign_id)
        except POSTGRES_ERRORS:
            if not why and not _witnessed(reports, campaign_id, epoch):
                raise
            position = None
        if not why and handed_in > seq:
            # The process that handed it in may have ended since, and left no report.
            why = f"event {handed_in} was acknowledged and reported, Redis is at {seq}"
        why = why or await _misfit(redis, campaign_id, seq, chain, position)
        if why and (others or why == before):
            return False  # it was marked and logged before
        reply = await scripts.verify(campaign_id, seq, chain, why, whole=whole)
        if reply.reply is CallReply.STALE:
            continue  # the head has moved meanwhile
        if why:
            log.error("campaign.recovering", campaign=campaign_id, why=why)
        else:
            log.info("campaign.verified", campaign=campaign_id, seq=seq, witnessed=position is None)
        return not why and reply.state != "recovering"
    return False


def what_lacks(reports: Reports, campaign_id: str, epoch: int, seq: int) -> str:
    """Say what an API process knows and this Redis lacks; '' if nothing."""
    for process, each in sorted(reports.reports(campaign_id).items()):
        if each.epoch > epoch:
            return f"API process {process} has seen epoch {each.epoch}, Redis is at {epoch}"
        if each.epoch == epoch and each.seq > seq:
            return f"API process {process} has seen event {each.seq}, Redis is at {seq}"
        if each.epoch == epoch and each.lacks:
            return f"API process {process} has not found in Redis what it acknowledged"
    if (seen := reports.highest(campaign_id, epoch)) > seq:
        return f"API processes that no longer answer had seen event {seen}, Redis is at {seq}"
    return ""


def _witnessed(reports: Reports, campaign_id: str, epoch: int) -> bool:
    """Whether the reports alone prove that this Redis holds everything that was acknowledged."""
    known = reports.reports(campaign_id).values()
    return not reports.silent and any(each.epoch == epoch and each.seq > 0 for each in known)


async def _misfit(
    redis: Redis, campaign_id: str, seq: int, chain: str, position: Position | None
) -> str:
    """Say why the head does not match PostgreSQL's position; '' if it does.

    ``position`` is None if PostgreSQL is away; then the stream is compared with the head alone.
    """
    if position is not None and seq < position.seq:
        return f"Redis knows {seq} events, PostgreSQL has applied {position.seq}"
    ends = await stream_ends(redis, campaign_id)
    if ends != seq:
        return f"the stream in Redis ends at event {ends}, the head says {seq}"
    history = History(redis, campaign_id, position, decode=False)
    await history.read(after=0 if position is None else position.seq, to=seq)
    if history.wrong:
        return f"the ledger in Redis does not follow PostgreSQL's: {history.wrong}"
    at = history.at or position or START
    if at != (seq, chain):
        return f"the ledger in Redis ends at event {at.seq}, the head says {seq}"
    return ""


async def _head(redis: Redis, campaign_id: str) -> tuple[int, str, int, str, bool]:
    """Read number, chain hash, epoch, why it is recovering or '', and whether another set that."""
    head = await MARK.read(redis, campaign_id)
    others = head.recovering != "" and head.recovering_by != "verify"
    return head.seq or 0, head.chain, head.epoch, head.recovering, others
