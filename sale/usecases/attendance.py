"""What an API process does for the day on which Redis comes back with less than members were told.

It keeps what it acknowledged until PostgreSQL has it, reports some times a second what it has seen
and whether all it keeps is there, and hands in what it keeps when Redis lacks it or the campaign is
being recovered. See ``stock/roll.py`` for who listens.
"""

import asyncio
import time
from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import claims
from sale.db.claims import Claim
from sale.db.pool import POSTGRES_ERRORS
from sale.stock.batcher import Batcher, Batchers, Mark
from sale.stock.connection import REDIS_ERRORS
from sale.stock.keys import campaign_keys
from sale.stock.roll import (
    BEAT_S,
    Attendance,
    Identity,
    Report,
    identity_and_heads,
    report,
    sign_off,
)

BEAT_TIMEOUT_S: Final = 2.0
HAND_IN_TIMEOUT_S: Final = 10.0
SIGN_OFF_TIMEOUT_S: Final = 1.0

log = structlog.get_logger()


class Attending:
    """Reports for the batchers of this process until it is cancelled."""

    def __init__(self, redis: Redis, pool: asyncpg.Pool, batchers: Batchers) -> None:
        self._redis = redis
        self._pool = pool
        self._batchers = batchers
        self._handed: dict[str, tuple[str, int, int]] = {}
        self._lacks: dict[str, tuple[tuple[str, int, int], int]] = {}
        self._ailing = ""

    async def run(self) -> None:
        """Beat for ever; what fails is tried again with the next beat."""
        while True:
            started = time.monotonic()
            try:
                await self.beat()
            except (*REDIS_ERRORS, *POSTGRES_ERRORS) as error:
                if not self._ailing:
                    log.warning("attendance.failed", error=type(error).__name__)
                self._ailing = type(error).__name__
            else:
                self._ailing = ""
            await asyncio.sleep(max(BEAT_S - (time.monotonic() - started), BEAT_S / 10))

    async def sign_off(self) -> None:
        """Say that nobody need wait for this process: what it kept is handed in or applied."""
        try:
            async with asyncio.timeout(SIGN_OFF_TIMEOUT_S):
                await sign_off(self._redis, self._batchers.process)
        except (*REDIS_ERRORS,):
            log.info("attendance.not_signed_off")

    async def beat(self) -> None:
        """Look at every campaign once, and report. Raises the stores' errors."""
        batchers = self._batchers.all()
        async with asyncio.timeout(BEAT_TIMEOUT_S):
            identity, heads = await identity_and_heads(
                self._redis, [campaign_keys(batcher.campaign_id) for batcher in batchers]
            )
        reports = {
            batcher.campaign_id: await self._look(batcher, identity, head)
            for batcher, head in zip(batchers, heads, strict=True)
        }
        attendance = Attendance(identity.now_ms, str(identity), reports)
        async with asyncio.timeout(BEAT_TIMEOUT_S):
            await report(self._redis, self._batchers.process, attendance)

    async def _look(
        self, batcher: Batcher, identity: Identity, head: dict[str, str] | None
    ) -> Report:
        mark, kept = batcher.mark, batcher.kept
        epoch = _number(head, "epoch")
        if head is not None and mark.incarnation == f"{identity}:{epoch}" == _incarnation(head):
            kept.drop_applied(_number(head, "applied"))
            seq = max(mark.seq, _number(head, "seq"))
            batcher.mark = mark = Mark(mark.incarnation, seq)
            lacks = 0
        elif (
            head is not None
            and _incarnation(head) == f"{identity}:{epoch}"
            and (await batcher.attend())
        ):
            mark, lacks = batcher.mark, 0
        else:
            lacks = await self._lacking(batcher, (str(identity), epoch, kept.total))
        handed = await self._hand_in(
            batcher,
            (str(identity), epoch),
            due=lacks > 0 or head is None or head["recovering"] != "",
        )
        if handed and lacks and epoch > mark.epoch:
            # The recovery is over, and what it could not use is kept by PostgreSQL.
            kept.clear()
            self._lacks.pop(batcher.campaign_id, None)
        return Report(mark.epoch, mark.seq, lacks, handed)

    async def _lacking(self, batcher: Batcher, here: tuple[str, int, int]) -> int:
        """Count what is kept and not there, once an incarnation."""
        known = self._lacks.get(batcher.campaign_id)
        if known is None or known[0] != here:
            lacks = await batcher.kept.lacking(self._redis, campaign_keys(batcher.campaign_id))
            known = self._lacks[batcher.campaign_id] = (here, lacks)
        return known[1]

    async def _hand_in(self, batcher: Batcher, to: tuple[str, int], *, due: bool) -> bool:
        """Hand in what is kept, once an incarnation; whether nothing is kept back."""
        campaign_id, kept = batcher.campaign_id, batcher.kept
        if not due:
            self._handed.pop(campaign_id, None)
            return not len(kept)
        told = (*to, kept.total)
        if self._handed.get(campaign_id) == told or not len(kept):
            return True
        sales = [
            Claim(
                sale.seq, sale.epoch, sale.at_ms, sale.card_no, sale.key_hash,
                sale.showing, sale.quantity, sale.price_fen,
            )
            for sale in kept.sales()
        ]  # fmt: skip
        try:
            async with asyncio.timeout(HAND_IN_TIMEOUT_S), self._pool.acquire() as connection:
                await claims.hand_in(connection, campaign_id, self._batchers.process, sales)
        except POSTGRES_ERRORS as error:
            log.warning("attendance.not_handed_in", campaign=campaign_id, why=type(error).__name__)
            return False
        log.warning("attendance.handed_in", campaign=campaign_id, sales=len(sales))
        self._handed[campaign_id] = told
        return True


def _incarnation(head: dict[str, str]) -> str:
    return f"{head['run_id']}:{head['replid']}:{head['epoch']}"


def _number(head: dict[str, str] | None, field: str) -> int:
    value = "" if head is None else head[field]
    return int(value) if value.isdecimal() else 0
