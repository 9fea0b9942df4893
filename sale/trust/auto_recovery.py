"""Automatic recovery of campaigns that do not match, if nothing acknowledged is lost.

A recovery that would void a number or record a conflict is left to an operator (``sale recover``;
``--dry-run`` shows its effect). This module also settles the sales that API processes handed in.
"""

import time
from collections.abc import Sequence
from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import claims
from sale.db.errors import POSTGRES_ERRORS
from sale.domain.problem import Refused
from sale.stock.errors import REDIS_ERRORS
from sale.stock.process_reports import forget_dead_processes
from sale.stock.scripts import Scripts
from sale.trust.isolation import TROUBLES, in_words
from sale.trust.recover import recover

ACTOR: Final = "scheduler"
AGAIN_S: Final = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Waits between the tries of one campaign."""
SILENT_TRIES: Final = 3
"""Tries before it goes on without an API process that does not report and may know more."""
LOGGED_MAX: Final = 10
FORGET_S: Final = 60.0

log = structlog.get_logger()


class AutoRecovery:
    """Recovers campaigns without loss, each with growing waits between its tries."""

    def __init__(
        self, redis: Redis, scripts: Scripts, pool: asyncpg.Pool, *, allowed: bool
    ) -> None:
        self._redis = redis
        self._scripts = scripts
        self._pool = pool
        self._allowed = allowed
        self._tries: dict[str, tuple[int, float]] = {}
        self._logged: dict[str, str] = {}
        self._forgot_s = 0.0

    async def recover_unfit(self, unfit: Sequence[str]) -> None:
        """Try to recover the campaigns that are due. Raises the stores' errors."""
        for campaign_id in [each for each in self._tries if each not in unfit]:
            self._tries.pop(campaign_id)
            self._logged.pop(campaign_id, None)
        if not self._allowed:
            return
        for campaign_id in unfit:
            tried, due = self._tries.get(campaign_id, (0, 0.0))
            if time.monotonic() < due:
                continue
            pause_s = AGAIN_S[min(tried, len(AGAIN_S) - 1)]
            self._tries[campaign_id] = (tried + 1, time.monotonic() + pause_s)
            try:
                await self._recover(campaign_id, without_silent=tried >= SILENT_TRIES)
            except Refused as error:
                self._log(campaign_id, error.detail or error.problem.value)
            except (*REDIS_ERRORS, *POSTGRES_ERRORS, *TROUBLES) as error:
                self._log(campaign_id, in_words(error))

    async def _recover(self, campaign_id: str, *, without_silent: bool) -> None:
        done = await recover(
            self._redis, self._scripts, self._pool, campaign_id,
            actor=ACTOR, dry_run=False, lossless_only=True, without_silent=without_silent,
        )  # fmt: skip
        if done.changed:
            log.warning("campaign.healed", campaign=campaign_id, says=done.says)

    def _log(self, campaign_id: str, why: str) -> None:
        if self._logged.get(campaign_id) != why:
            log.error("campaign.needs_an_operator", campaign=campaign_id, why=why)
        self._logged[campaign_id] = why

    async def settle(self) -> None:
        """Compare the sales that were handed in with the ledger. Raises the stores' errors."""
        if time.monotonic() - self._forgot_s > FORGET_S:
            await forget_dead_processes(self._redis)
            self._forgot_s = time.monotonic()
        async with self._pool.acquire() as connection:
            settled = await claims.settle(connection)
        conflicts = [each for each in settled if each.settled == "conflict"]
        for each in conflicts[:LOGGED_MAX]:
            log.error("ledger.acknowledged_and_lost", campaign=each.campaign_id, seq=each.seq)
        if settled:
            log.info("ledger.settled", wait=len(settled) - len(conflicts), conflicts=len(conflicts))
