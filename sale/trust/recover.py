"""Recovery: builds a campaign's state in Redis again, from the ledger.

It first examines the campaign (``examination.py``): whether the head matches PostgreSQL's ledger,
whether the stream is one chain, whether Redis holds exactly the fold of the events, and whether API
processes know of more. If nothing is wrong, it changes nothing. Otherwise it marks the campaign as
recovering, so that nothing is sold. The API processes hand in the sales that they acknowledged and
PostgreSQL lacks. It examines the campaign once more and builds the new state beside the old one:
PostgreSQL's ledger, the sound part of the stream behind it, and each further number that was given
out, filled in or voided (``refill.py``). One script exchanges the states, under the next epoch and
with a ``recovered`` event. Until then only the mark has changed, so a recovery that dies is
repeated from the start.

PostgreSQL's ledger is the truth for the numbers that it holds. If a stream has other events under
these numbers, members may have been told both: events that the ledger lacks go to ``conflict``.
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

    ``filled`` counts sales that were filled in; ``voided`` are ranges of numbers whose events no
    process knows; ``conflicts`` counts events that members were told and the ledger does not
    accept; ``silent`` are API processes that did not report in time.
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
    """A recovery would void numbers or record conflicts, which an operator has to decide."""


async def recover(  # noqa: C901 - one branch for each finding
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

    Raises Refused for an unknown campaign, for a damaged ledger, and if a process that reports
    cannot hand in its sales; Unsafe if ``lossless_only`` and an acknowledged event cannot be
    restored, or, unless ``without_silent``, if an API process did not report.
    """
    # The scheduler tries again later; an operator waits until another recovery has ended.
    patience_s = 0.0 if lossless_only else LOCK_PATIENCE_S
    async with alone(pool, campaign_id, patience_s) as connection:
        if await rehearsals.is_purged(connection, campaign_id):
            return await _leave_purged(redis, campaign_id, dry_run=dry_run)
        # An examination takes long. If nothing is sold already, collect the reports before it.
        called = not dry_run and await _shut(redis, campaign_id)
        reports = await (_collect_all(redis, campaign_id) if called else collect_report(redis))
        for attempt in range(TRIES):
            examination = await examine(redis, scripts, connection, campaign_id, reports, progress)
            if dry_run:
                return _report(examination, changed=False)
            if not examination.differences:
                if not examination.trusted and not called:
                    # An old copy may match PostgreSQL, so wait for the reports first.
                    reports = await collect_reports(redis)
                if not what_lacks(reports, campaign_id, examination.old_epoch, examination.seq):
                    return await _trust(redis, scripts, pool, examination, reports)
                continue
            if not examination.frozen and examination.old != NO_HEAD:
                if examination.unsteady and attempt < PATIENT_TRIES:
                    # A stream that is trimmed or grows during the examination looks broken.
                    await asyncio.sleep(RETRY_PAUSE_S)
                    continue
                await freeze(redis, campaign_id, examination.differences[0])
            if not called:
                # The processes see the mark and hand in their sales.
                reports, called = await _collect_all(redis, campaign_id), True
                continue
            _check_safe(examination, lossless_only=lossless_only, without_silent=without_silent)
            if await _put_in_place(scripts, connection, examination, actor):
                await sync_campaign(redis, scripts, pool, campaign_id)
                _tell(examination)
                return _report(examination, changed=True)
    raise Refused(Problem.UNAVAILABLE, f"{campaign_id}: its state keeps changing; try again")


async def _leave_purged(redis: Redis, campaign_id: str, *, dry_run: bool) -> Recovery:
    """Remove a purged rehearsal that has returned with older files of Redis."""
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


def _check_safe(examination: Examination, *, lossless_only: bool, without_silent: bool) -> None:
    if examination.silent and not without_silent:
        raise Unsafe(
            Problem.UNAVAILABLE, f"{examination.campaign_id}: {_silent(examination.silent)}"
        )
    if lossless_only and not examination.lossless:
        raise Unsafe(Problem.UNAVAILABLE, _report(examination, changed=False).says)


async def _put_in_place(
    scripts: Scripts, connection: Connection, examination: Examination, actor: str
) -> bool:
    """Build the new state and exchange it; False if something has changed meanwhile."""
    if not examination.covers(await read.position(connection, examination.campaign_id)):
        return False  # the writer has applied events that the examination has not seen
    await claims.record_forked(connection, examination.campaign_id, examination.strays)
    await scripts.redis.sadd(CAMPAIGNS, examination.campaign_id)
    return await rebuild(scripts, examination.plan(actor)) is CallReply.OK


async def _shut(redis: Redis, campaign_id: str) -> bool:
    """Whether a campaign sells nothing already: it has no head, or one marked as recovering."""
    head = await TRUST.read(redis, campaign_id)
    return head.seq is None or bool(head.recovering)


async def _collect_all(redis: Redis, campaign_id: str) -> Reports:
    """Collect reports until each reporting process has handed in its sales. Raises Refused."""
    for _ in range(HAND_IN_TRIES):
        reports = await collect_reports(redis)
        keeping = [name for name, each in reports.reports(campaign_id).items() if not each.handed]
        if not keeping:
            return reports
    raise Refused(
        Problem.UNAVAILABLE,
        f"{campaign_id}: API process {keeping[0]} has acknowledged orders that it cannot report; "
        "try again, or stop it",
    )


def _silent(processes: list[str]) -> str:
    return f"{len(processes)} API processes did not answer"


def _tell(examination: Examination) -> None:
    log.warning(
        "campaign.recovered",
        campaign=examination.campaign_id,
        why=examination.differences[0],
        filled=examination.refilled.filled,
        voided=examination.refilled.voided[:DIFFERENCES_MAX],
        conflicts=examination.conflicts,
    )


async def _trust(
    redis: Redis, scripts: Scripts, pool: asyncpg.Pool, examination: Examination, reports: Reports
) -> Recovery:
    """Mark a sound campaign as verified."""
    await redis.sadd(CAMPAIGNS, examination.campaign_id)
    if not examination.trusted and not await verify(
        redis, scripts, pool, examination.campaign_id, reports, whole=True
    ):
        raise Refused(Problem.UNAVAILABLE, f"{examination.campaign_id}: it could not be verified")
    return _report(examination, changed=not (examination.trusted and examination.registered))


def _report(examination: Examination, *, changed: bool) -> Recovery:
    """Give the recovery's effect."""
    if examination.differences:
        says = f"rebuilt to event {examination.seq}" if changed else "would be rebuilt"
        says += _losses(examination)
    elif not examination.trusted:
        says = (
            "it matches the ledger; verified"
            if changed
            else "it matches the ledger; would be verified"
        )
    elif not examination.registered:
        says = "registered again" if changed else "would be registered again"
    else:
        says = "nothing is wrong"
    return Recovery(
        examination.campaign_id,
        changed,
        examination.redis_seq,
        examination.applied,
        examination.differences,
        f"{examination.campaign_id}: {says}",
        examination.refilled.filled,
        examination.refilled.voided,
        examination.conflicts,
        examination.silent,
    )


def _losses(examination: Examination) -> str:
    """Say how many events were restored, voided or in conflict."""
    lost = sum(last - first + 1 for first, last in examination.refilled.voided)
    parts = []
    if examination.refilled.filled:
        parts.append(f"{examination.refilled.filled} orders found again")
    if lost:
        parts.append(f"{lost} numbers voided")
    if examination.conflicts:
        parts.append(f"{examination.conflicts} conflicts")
    if examination.silent:
        parts.append(_silent(examination.silent))
    return "".join(f", {each}" for each in parts)


@asynccontextmanager
async def alone(
    pool: asyncpg.Pool, campaign_id: str, patience_s: float
) -> AsyncIterator[Connection]:
    """Hold a connection and the lock for the recovery of this campaign. Raises Refused."""
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
