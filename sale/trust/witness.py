"""An API process as witness, for the day on which Redis returns with less than was acknowledged.

It keeps what it acknowledged until PostgreSQL has it, reports some times a second what it has seen
and whether all it keeps is there, and hands in what it keeps when Redis lacks it, the campaign is
being recovered, or the process ends. See ``stock/process_reports.py`` for who listens.
"""

import asyncio
import time
from itertools import islice
from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import claims, rehearsals
from sale.db.claims import Claim
from sale.db.errors import POSTGRES_ERRORS
from sale.stock.batcher import Batcher, Mark
from sale.stock.batchers import Batchers
from sale.stock.head import Head
from sale.stock.keys import campaign_keys
from sale.stock.process_reports import (
    NOT_COUNTED,
    REPORT_EVERY_S,
    CampaignReport,
    Identity,
    ProcessReport,
    identity_and_heads,
    report,
    sign_off,
    this_process,
)
from sale.stock.unapplied import AcknowledgedSale

BEAT_TIMEOUT_S: Final = 2.0
HAND_IN_TIMEOUT_S: Final = 10.0
"""For one chunk: how long all of them take depends on how much is kept."""
HAND_IN_CHUNK: Final = 2_000
LOOK_PATIENCE_S: Final = 0.2
"""A look that takes longer goes on beside the beats, so that this process is heard meanwhile."""
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
        self._handed: dict[str, tuple[str, int, int]] = {}
        self._lacks: dict[str, tuple[tuple[str, int, int], int]] = {}
        self._looking: dict[str, asyncio.Task[CampaignReport]] = {}
        self._ailing = ""
        self._leaving = False

    async def run(self) -> None:
        """Beat for ever; what fails is tried again with the next beat."""
        try:
            while True:
                started = time.monotonic()
                try:
                    await self.beat()
                except Exception as error:  # noqa: BLE001 - a process that ends this is never heard
                    if not self._ailing:
                        log.warning("report.not_sent", error=type(error).__name__)
                    self._ailing = type(error).__name__
                else:
                    self._ailing = ""
                await asyncio.sleep(
                    max(REPORT_EVERY_S - (time.monotonic() - started), REPORT_EVERY_S / 10)
                )
        finally:
            await self._stop_looking()

    async def sign_off(self) -> None:
        """Say that nobody need wait for this process, once it has handed in what it still keeps.

        Also where Redis has all of it: should its files be lost before the writer has seen them,
        nobody else knows. Where not all could be handed in, its last report stays on the roll, and
        says how far it has seen.
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
        except Exception as error:  # noqa: BLE001 - whatever it was, the process ends
            log.info("report.not_removed", why=type(error).__name__)
        await self._stop_looking()

    async def _hand_in_all(self) -> int:
        """Hand in everything that is kept, bounded; give how much is kept back."""
        self._leaving = True
        handing = {
            asyncio.create_task(self._hand_in(batcher, ("", 0), due=True)): batcher
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
        tasks = list(self._looking.values())
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
        begun: dict[str, asyncio.Task[CampaignReport]] = {}
        failed: BaseException | None = None
        for batcher, head in zip(batchers, heads, strict=True):
            earlier = self._looking.get(batcher.campaign_id)
            if earlier is None or earlier.done():
                failed = failed or (None if earlier is None else _error(earlier))
                look = asyncio.create_task(self._look(batcher, identity, head))
                begun[batcher.campaign_id] = self._looking[batcher.campaign_id] = look
        if begun:
            await asyncio.wait(begun.values(), timeout=LOOK_PATIENCE_S)
        # Only of looks that began with this beat: what an earlier one has found is remembered.
        reports = {batcher.campaign_id: _told(batcher, begun) for batcher in batchers}
        attendance = ProcessReport(identity.now_ms, str(identity), reports, this_process())
        async with asyncio.timeout(BEAT_TIMEOUT_S):
            await report(self._redis, self._batchers.process, attendance)
        for look in begun.values():
            failed = failed or (_error(look) if look.done() else None)
        if failed is not None:
            raise failed

    async def _look(
        self, batcher: Batcher, identity: Identity, head: Head | None
    ) -> CampaignReport:
        mark, kept = batcher.mark, batcher.unapplied
        if head is not None:
            batcher.take_config(head.config_seq)
        if head is None and batcher.rehearsal and await self._purged(batcher.campaign_id):
            self._batchers.forget(batcher.campaign_id)
            self._lacks.pop(batcher.campaign_id, None)
            self._handed.pop(batcher.campaign_id, None)
            return CampaignReport(mark.epoch, mark.seq, 0, handed=True)
        epoch = 0 if head is None else head.epoch
        if head is not None and mark.incarnation == f"{identity}:{epoch}" == head.incarnation:
            kept.drop_applied(head.applied)
            seq = max(mark.seq, head.seq or 0)
            batcher.mark = mark = Mark(mark.incarnation, seq)
            lacks = 0
        elif (
            head is not None
            and head.incarnation == f"{identity}:{epoch}"
            and not self._known_to_lack(batcher, (str(identity), epoch, kept.total))
            and (await batcher.check_acknowledged())
        ):
            mark, lacks = batcher.mark, 0
        else:
            lacks = await self._lacking(batcher, (str(identity), epoch, kept.total))
        handed = await self._hand_in(
            batcher,
            (str(identity), epoch),
            due=lacks > 0 or head is None or head.recovering != "",
        )
        if handed and lacks and epoch > mark.epoch:
            # The recovery is over, and what it could not use is kept by PostgreSQL.
            kept.clear()
            self._lacks.pop(batcher.campaign_id, None)
        return CampaignReport(mark.epoch, mark.seq, lacks, handed)

    async def _purged(self, campaign_id: str) -> bool:
        """Whether a rehearsal has gone for good, and was not lost."""
        async with asyncio.timeout(BEAT_TIMEOUT_S), self._pool.acquire() as connection:
            return await rehearsals.is_purged(connection, campaign_id)

    def _known_to_lack(self, batcher: Batcher, here: tuple[str, int, int]) -> bool:
        known = self._lacks.get(batcher.campaign_id)
        return known is not None and known[0] == here and known[1] > 0

    async def _lacking(self, batcher: Batcher, here: tuple[str, int, int]) -> int:
        """Count what is kept and not there, once an incarnation."""
        known = self._lacks.get(batcher.campaign_id)
        if known is None or known[0] != here:
            lacks = await batcher.unapplied.count_missing(
                self._redis, campaign_keys(batcher.campaign_id)
            )
            known = self._lacks[batcher.campaign_id] = (here, lacks)
        return known[1]

    async def _hand_in(self, batcher: Batcher, to: tuple[str, int], *, due: bool) -> bool:
        """Hand in what is kept, once an incarnation; whether nothing is kept back."""
        campaign_id, kept = batcher.campaign_id, batcher.unapplied
        if not due:
            self._handed.pop(campaign_id, None)
            return not len(kept)
        told = (*to, kept.total)
        if self._handed.get(campaign_id) == told or not len(kept):
            return True
        sales, count = kept.sales(), 0
        try:
            while chunk := [_claim(sale) for sale in islice(sales, HAND_IN_CHUNK)]:
                async with asyncio.timeout(HAND_IN_TIMEOUT_S), self._pool.acquire() as connection:
                    await claims.hand_in(connection, campaign_id, self._batchers.process, chunk)
                count += len(chunk)
        except POSTGRES_ERRORS as error:
            log.warning("report.not_handed_in", campaign=campaign_id, why=type(error).__name__)
            return False
        if self._leaving:
            log.info("report.handed_in_at_end", campaign=campaign_id, sales=count)
        else:
            log.warning("report.handed_in", campaign=campaign_id, sales=count)
        self._handed[campaign_id] = told
        return kept.total == told[2]  # else it was told more meanwhile


def _told(batcher: Batcher, begun: dict[str, asyncio.Task[CampaignReport]]) -> CampaignReport:
    look = begun.get(batcher.campaign_id)
    if look is not None and look.done() and _error(look) is None and not look.cancelled():
        return look.result()
    return CampaignReport(batcher.mark.epoch, batcher.mark.seq, NOT_COUNTED, handed=False)


def _error(look: asyncio.Task[CampaignReport]) -> BaseException | None:
    return None if look.cancelled() else look.exception()


def _claim(sale: AcknowledgedSale) -> Claim:
    return Claim(
        sale.seq, sale.epoch, sale.at_ms, sale.member_no, sale.key_hash,
        sale.showing, sale.quantity, sale.price_fen,
    )  # fmt: skip
