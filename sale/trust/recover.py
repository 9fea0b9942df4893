"""Recovery: build a campaign's state in Redis again, from the ledger.

What is looked at first: does the head fit PostgreSQL's ledger, is the stream one chain, does what
Redis holds equal the fold of the events, and do the API processes know of more. Where all is well,
nothing is done. Otherwise the campaign is marked as recovering, so that nothing can sell; the API
processes hand in what they acknowledged and PostgreSQL lacks; all is looked at once more, and built
anew beside: PostgreSQL's ledger, what the stream soundly adds to it, and every number that was
given out beyond, filled again or voided (``refill.py``). One script puts it in its place
under the next epoch, with a ``recovered`` event. Before that nothing has changed but the mark, so a
recovery that dies is begun again from the start.

PostgreSQL's ledger is the truth of what it holds. Where a stream tells another story of the same
numbers, both were perhaps told to members: what the ledger does not have goes to ``conflict``.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import asyncpg
import msgspec
import structlog
from redis.asyncio import Redis

from sale.db import claims, read, rehearsals
from sale.db.locks import RECOVERY_CLASS
from sale.db.pool import Connection
from sale.domain.problem import Problem, Refused
from sale.stock.head import TRUST
from sale.stock.keys import CAMPAIGNS, campaign_keys
from sale.stock.process_reports import Reports, collect_report, collect_reports
from sale.stock.rebuild import freeze, rebuild
from sale.stock.removal import NotRemoved, remove_rehearsal
from sale.stock.scripts import CallReply, Scripts
from sale.trust.examination import DIFFERENCES_MAX, NO_HEAD, Examination, Progress, examine
from sale.trust.revocation import sync_campaign
from sale.trust.verify import verify, what_lacks

TRIES: Final = 8
PATIENT_TRIES: Final = 2
RETRY_PAUSE_S: Final = 0.1
HAND_IN_TRIES: Final = 10
LOCK_PATIENCE_S: Final = 10.0

log = structlog.get_logger()


class Recovery(msgspec.Struct, frozen=True):
    """A recovery's effect, real or dry: the event numbers found in both stores, and one line.

    ``filled`` sales were found again; ``voided`` are ranges of numbers that nobody can account for;
    ``conflicts`` counts what was told and does not stand; ``silent`` are API processes that were
    waited for in vain.
    """

    campaign: str
    changed: bool
    redis_seq: int
    applied: int
    differences: list[str]
    says: str
    filled: int = 0
    voided: list[tuple[int, int]] = []
    conflicts: int = 0
    silent: list[str] = []


class Unsafe(Refused):
    """A recovery would void numbers or set conflicts down: somebody must decide that."""


async def recover(  # noqa: C901 - one branch a thing that is found
    redis: Redis,
    scripts: Scripts,
    pool: asyncpg.Pool,
    campaign_id: str,
    *,
    actor: str,
    dry_run: bool,
    lossless_only: bool = False,
    without_silent: bool = True,
    progress: Progress | None = None,
) -> Recovery:
    """Recover one campaign.

    Raises Refused for an unknown one, a damaged ledger, and where a process that was heard cannot
    hand in what it knows; Unsafe where ``lossless_only`` and something that was told cannot be
    found again, or, unless ``without_silent``, an API process was waited for in vain.
    """
    # The engine's own try is made again anyway; an operator waits for it to end.
    patience_s = 0.0 if lossless_only else LOCK_PATIENCE_S
    async with alone(pool, campaign_id, patience_s) as connection:
        if await rehearsals.is_purged(connection, campaign_id):
            return await _leave_purged(redis, campaign_id, dry_run=dry_run)
        # Looking takes long: where nothing can sell already, all are heard before the first look.
        called = not dry_run and await _shut(redis, campaign_id)
        reports = await (_collect_all(redis, campaign_id) if called else collect_report(redis))
        for attempt in range(TRIES):
            case = await examine(redis, scripts, connection, campaign_id, reports, progress)
            if dry_run:
                return _report(case, changed=False)
            if not case.differences:
                if not case.trusted and not called:
                    # An old copy may fit perfectly: who answered members is heard first.
                    reports = await collect_reports(redis)
                if not what_lacks(reports, campaign_id, case.old_epoch, case.seq):
                    return await _trust(redis, scripts, pool, case, reports)
                continue
            if not case.frozen and case.old != NO_HEAD:
                if case.unsteady and attempt < PATIENT_TRIES:
                    # A stream that is trimmed or grows meanwhile looks broken for a moment.
                    await asyncio.sleep(RETRY_PAUSE_S)
                    continue
                await freeze(redis, campaign_id, case.differences[0])
            if not called:
                # They see that it is recovering, and hand in what they know.
                reports, called = await _collect_all(redis, campaign_id), True
                continue
            _check_safe(case, lossless_only=lossless_only, without_silent=without_silent)
            if await _put_in_place(scripts, connection, case, actor):
                await sync_campaign(redis, scripts, pool, campaign_id)
                _tell(case)
                return _report(case, changed=True)
    raise Refused(Problem.UNAVAILABLE, f"{campaign_id}: its state keeps changing; try again")


async def _leave_purged(redis: Redis, campaign_id: str, *, dry_run: bool) -> Recovery:
    """A purged rehearsal that older files of Redis have brought back goes away again."""
    there = bool(await redis.exists(campaign_keys(campaign_id).head))
    if not there:
        raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
    if not dry_run:
        try:
            await remove_rehearsal(redis, campaign_id)
        except NotRemoved as error:
            raise Refused(Problem.UNAVAILABLE, str(error)) from None
    does = "is removed" if not dry_run else "would be removed"
    says = f"{campaign_id}: it was a rehearsal and was purged; what Redis still held {does}"
    return Recovery(campaign_id, not dry_run, 0, 0, ["PostgreSQL has purged it"], says)


def _check_safe(case: Examination, *, lossless_only: bool, without_silent: bool) -> None:
    if case.silent and not without_silent:
        raise Unsafe(Problem.UNAVAILABLE, f"{case.campaign_id}: {_silent(case.silent)}")
    if lossless_only and not case.lossless:
        raise Unsafe(Problem.UNAVAILABLE, _report(case, changed=False).says)


async def _put_in_place(
    scripts: Scripts, connection: Connection, case: Examination, actor: str
) -> bool:
    """Build it anew; False where somebody has changed something meanwhile."""
    if not case.covers(await read.position(connection, case.campaign_id)):
        return False  # the writer has applied what was not seen
    await claims.record_forked(connection, case.campaign_id, case.strays)
    await scripts.redis.sadd(CAMPAIGNS, case.campaign_id)
    return await rebuild(scripts, case.plan(actor)) is CallReply.OK


async def _shut(redis: Redis, campaign_id: str) -> bool:
    """Whether a campaign sells nothing already: no head, or one that is marked."""
    head = await TRUST.read(redis, campaign_id)
    return head.seq is None or bool(head.recovering)


async def _collect_all(redis: Redis, campaign_id: str) -> Reports:
    """Call the roll until everybody heard has handed in what it knows. Raises Refused."""
    for _ in range(HAND_IN_TRIES):
        reports = await collect_reports(redis)
        keeping = [name for name, told in reports.reports(campaign_id).items() if not told.handed]
        if not keeping:
            return reports
    raise Refused(
        Problem.UNAVAILABLE,
        f"{campaign_id}: API process {keeping[0]} has acknowledged orders that it cannot report; "
        "try again, or stop it",
    )


def _silent(processes: list[str]) -> str:
    return f"{len(processes)} API processes did not answer"


def _tell(case: Examination) -> None:
    log.warning(
        "campaign.recovered",
        campaign=case.campaign_id,
        why=case.differences[0],
        filled=case.refilled.filled,
        voided=case.refilled.voided[:DIFFERENCES_MAX],
        conflicts=case.conflicts,
    )


async def _trust(
    redis: Redis, scripts: Scripts, pool: asyncpg.Pool, case: Examination, reports: Reports
) -> Recovery:
    """Mark as verified what is sound."""
    await redis.sadd(CAMPAIGNS, case.campaign_id)
    if not case.trusted and not await verify(
        redis, scripts, pool, case.campaign_id, reports, whole=True
    ):
        raise Refused(Problem.UNAVAILABLE, f"{case.campaign_id}: it could not be verified")
    return _report(case, changed=not (case.trusted and case.registered))


def _report(case: Examination, *, changed: bool) -> Recovery:
    """Word it."""
    if case.differences:
        says = f"rebuilt to event {case.seq}" if changed else "would be rebuilt"
        says += _losses(case)
    elif not case.trusted:
        says = (
            "it matches the ledger; verified"
            if changed
            else "it matches the ledger; would be verified"
        )
    elif not case.registered:
        says = "registered again" if changed else "would be registered again"
    else:
        says = "nothing is wrong"
    return Recovery(
        case.campaign_id,
        changed,
        case.redis_seq,
        case.applied,
        case.differences,
        f"{case.campaign_id}: {says}",
        case.refilled.filled,
        case.refilled.voided,
        case.conflicts,
        case.silent,
    )


def _losses(case: Examination) -> str:
    """Word what was found again, and what was not."""
    lost = sum(last - first + 1 for first, last in case.refilled.voided)
    told = []
    if case.refilled.filled:
        told.append(f"{case.refilled.filled} orders found again")
    if lost:
        told.append(f"{lost} numbers voided")
    if case.conflicts:
        told.append(f"{case.conflicts} conflicts")
    if case.silent:
        told.append(_silent(case.silent))
    return "".join(f", {each}" for each in told)


@asynccontextmanager
async def alone(
    pool: asyncpg.Pool, campaign_id: str, patience_s: float
) -> AsyncIterator[Connection]:
    """Hold a connection and the right to recover this campaign. Raises Refused."""
    deadline = time.monotonic() + patience_s
    async with pool.acquire() as connection:
        while not await connection.fetchval(
            "SELECT pg_try_advisory_lock($1, hashtext($2))", RECOVERY_CLASS, campaign_id
        ):
            if time.monotonic() >= deadline:
                raise Refused(Problem.UNAVAILABLE, f"{campaign_id}: it is being recovered already")
            await asyncio.sleep(RETRY_PAUSE_S)
        try:
            yield connection
        finally:
            await connection.execute(
                "SELECT pg_advisory_unlock($1, hashtext($2))", RECOVERY_CLASS, campaign_id
            )
