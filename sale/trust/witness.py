"""Reports of this API process, for a Redis that returns with less than was acknowledged.

The process keeps each sale that it acknowledged until PostgreSQL has it. Several times a second it
reports how far it has seen each campaign, and whether this Redis holds that. It hands in its
unapplied sales to PostgreSQL if Redis lacks something, the campaign is being recovered, or the
process ends. The verification and the recovery collect the reports (``stock/process_reports.py``).
"""

import asyncio
import time
from itertools import islice
from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import claims, rehearsals
from sale.db.errors import POSTGRES_ERRORS
from sale.stock.batcher import Batcher
from sale.stock.batchers import Batchers
from sale.stock.head import Head
from sale.stock.keys import campaign_keys
from sale.stock.mark import Found
from sale.stock.process_reports import (
    REPORT_EVERY_S,
    CampaignReport,
    Identity,
    ProcessReport,
    identity_and_heads,
    report,
    sign_off,
    this_process,
)

BEAT_TIMEOUT_S: Final = 2.0
HAND_IN_TIMEOUT_S: Final = 10.0
"""For one chunk; the time for all of them depends on the number of unapplied sales."""
HAND_IN_CHUNK: Final = 2_000
LOOK_PATIENCE_S: Final = 0.2
"""A look that takes longer goes on beside the beats, so that the process reports meanwhile."""
HAND_IN_ALL_S: Final = 2.0
STOP_S: Final = 0.3
SIGN_OFF_TIMEOUT_S: Final = 1.0

log = structlog.get_logger()


class Witness:
    """Reports for the batchers of this process until it is cancelled."""

    def __init__(self, redis: Redis, pool: asyncpg.Pool, batchers: Batchers) -> None:
        self._redis = redis
        self._pool = pool
        self._batchers = batchers
        self._handed_in: dict[str, tuple[str, int]] = {}
        self._looking: dict[str, tuple[str, asyncio.Task[CampaignReport]]] = {}
        """For each campaign, the Redis that a look was begun on, and the look, until reported."""
        self._error = ""
        self._ending = False

    async def run(self) -> None:
        """Beat until cancelled; the next beat repeats what failed."""
        try:
            while True:
                started = time.monotonic()
                try:
                    await self.beat()
                except Exception as error:  # noqa: BLE001 - without this task nobody gets a report
                    if not self._error:
                        log.warning("report.not_sent", error=type(error).__name__)
                    self._error = type(error).__name__
                else:
                    self._error = ""
                await asyncio.sleep(
                    max(REPORT_EVERY_S - (time.monotonic() - started), REPORT_EVERY_S / 10)
                )
        finally:
            await self._stop_looking()

    async def sign_off(self) -> None:
        """Hand in the unapplied steps and remove the report, so that nobody waits for this process.

        It hands them in even if Redis has all of them: if Redis loses its files before the writer
        has read them, no other process knows them. If not all could be handed in, the last report
        stays, with the number that the process has seen.
        """
        await self._stop_looking()
        kept_back = await self._hand_in_all()
        try:
            async with asyncio.timeout(SIGN_OFF_TIMEOUT_S):
                if kept_back:
                    log.warning("report.kept_back", sales=kept_back)
                    await self.beat()
                else:
                    await sign_off(self._redis, self._batchers.process)
        except Exception as error:  # noqa: BLE001 - the process ends in any case
            log.info("report.not_removed", why=type(error).__name__)
        await self._stop_looking()

    async def _hand_in_all(self) -> int:
        """Hand in all unapplied sales within a bounded time; give how many were not."""
        self._ending = True
        handing = {
            asyncio.create_task(self._hand_in(batcher, "", due=True)): batcher
            for batcher in self._batchers.all()
            if len(batcher.unapplied)
        }
        if not handing:
            return 0
        done, late = await asyncio.wait(handing, timeout=HAND_IN_ALL_S)
        if late:
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=STOP_S)
            # asyncpg waits for a silent PostgreSQL even when it is cancelled.
            self._pool.terminate()
        return sum(
            len(batcher.unapplied)
            for task, batcher in handing.items()
            if task not in done or task.cancelled() or task.exception() or not task.result()
        )

    async def _stop_looking(self) -> None:
        tasks = [look for _, look in self._looking.values()]
        self._looking.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)

    async def beat(self) -> None:
        """Look at every campaign once, and report. Raises the stores' errors."""
        batchers = self._batchers.all()
        async with asyncio.timeout(BEAT_TIMEOUT_S):
            identity, heads = await identity_and_heads(
                self._redis, [campaign_keys(batcher.campaign_id) for batcher in batchers]
            )
        here = str(identity)
        for batcher, head in zip(batchers, heads, strict=True):
            if batcher.campaign_id not in self._looking:
                look = asyncio.create_task(self._look(batcher, identity, head))
                self._looking[batcher.campaign_id] = here, look
        if looks := [look for _, look in self._looking.values()]:
            await asyncio.wait(looks, timeout=LOOK_PATIENCE_S)
        errors: list[BaseException] = []
        reports = {each.campaign_id: self._report_of(each, here, errors) for each in batchers}
        async with asyncio.timeout(BEAT_TIMEOUT_S):
            sent = ProcessReport(identity.now_ms, here, reports, this_process())
            await report(self._redis, self._batchers.process, sent)
        if errors:
            raise errors[0]

    def _report_of(
        self, batcher: Batcher, here: str, errors: list[BaseException]
    ) -> CampaignReport:
        """Give what a look at this Redis has found, once. Until then something may be lacking."""
        asked, look = self._looking[batcher.campaign_id]
        if look.done():
            del self._looking[batcher.campaign_id]
            if (error := look.exception()) is not None:
                errors.append(error)
            elif asked == here:
                return look.result()
        return CampaignReport(batcher.mark.epoch, batcher.mark.seq, lacks=True, handed=False)

    async def _look(
        self, batcher: Batcher, identity: Identity, head: Head | None
    ) -> CampaignReport:
        if head is not None:
            batcher.take_config(head.config_seq)
        elif batcher.rehearsal and await self._purged(batcher.campaign_id):
            mark = batcher.mark
            self._batchers.forget(batcher.campaign_id)
            self._handed_in.pop(batcher.campaign_id, None)
            return CampaignReport(mark.epoch, mark.seq, lacks=False, handed=True)
        epoch = 0 if head is None else head.epoch
        here = f"{identity}:{epoch}"
        verified = head is not None and head.incarnation == here
        if head is not None and verified and batcher.mark.incarnation == here:
            batcher.unapplied.drop_applied(head.applied)
            batcher.advance(head.seq or 0, head.chain)
            found = Found.HELD
        else:
            async with asyncio.timeout(BEAT_TIMEOUT_S):
                found = await batcher.look_up()
        lacks = found is not Found.HELD
        handed = await self._hand_in(
            batcher, str(identity), due=lacks or head is None or head.recovering != ""
        )
        if lacks and handed and (found is Found.TRIMMED or epoch > batcher.mark.epoch):
            # PostgreSQL has passed the mark, or a recovery has: the rest is settled there.
            batcher.begin_anew()
            lacks = False
        if verified and not lacks and batcher.mark.incarnation != here:
            await batcher.check_acknowledged()
        return CampaignReport(batcher.mark.epoch, batcher.mark.seq, lacks, handed)

    async def _purged(self, campaign_id: str) -> bool:
        """Whether a rehearsal was purged, and not lost."""
        async with asyncio.timeout(BEAT_TIMEOUT_S), self._pool.acquire() as connection:
            return await rehearsals.is_purged(connection, campaign_id)

    async def _hand_in(self, batcher: Batcher, identity: str, *, due: bool) -> bool:
        """Hand in the unapplied steps, once per Redis; whether PostgreSQL has all of them."""
        campaign_id, unapplied = batcher.campaign_id, batcher.unapplied
        if not due:
            self._handed_in.pop(campaign_id, None)
            return not len(unapplied)
        handing = (identity, unapplied.total)
        if self._handed_in.get(campaign_id) == handing or not len(unapplied):
            return True
        steps, count = unapplied.events(), 0
        try:
            while chunk := list(islice(steps, HAND_IN_CHUNK)):
                async with asyncio.timeout(HAND_IN_TIMEOUT_S), self._pool.acquire() as connection:
                    await claims.hand_in(connection, campaign_id, self._batchers.process, chunk)
                count += len(chunk)
        except POSTGRES_ERRORS as error:
            log.warning("report.not_handed_in", campaign=campaign_id, why=type(error).__name__)
            return False
        if self._ending:
            log.info("report.handed_in_at_end", campaign=campaign_id, steps=count)
        else:
            log.warning("report.handed_in", campaign=campaign_id, steps=count)
        self._handed_in[campaign_id] = handing
        return unapplied.total == handing[1]  # False if it acknowledged more meanwhile
