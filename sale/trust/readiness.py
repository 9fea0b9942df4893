"""Tells whether this host can sell, or the reasons why it cannot."""

import asyncio
import time
from typing import Final, Protocol

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.config import Settings
from sale.db.errors import POSTGRES_ERRORS
from sale.db.migrate import MigrationError, pending
from sale.stock.durability import durability_faults
from sale.stock.errors import REDIS_ERRORS
from sale.stock.troubles import REPORTERS, read_troubles
from sale.trust.verify import unverified

CHECK_TIMEOUT_S: Final = 1.0
FRESH_S: Final = 0.5
"""How long others get the result of a look, from its end: a look may itself take longer."""
UNREADY_FRESH_S: Final = 0.1
"""The same for a host that is not ready, so that a probe which waits for it learns soon."""

log = structlog.get_logger()


class Stores(Protocol):
    """The stores and settings to look at."""

    @property
    def redis(self) -> Redis: ...  # noqa: D102

    @property
    def pool(self) -> asyncpg.Pool: ...  # noqa: D102

    @property
    def settings(self) -> Settings: ...  # noqa: D102

    @property
    def nonce(self) -> str: ...  # noqa: D102


class Readiness:
    """Looks at the stores, one look at a time, for any number of requests.

    Each request gets the latest result, or waits for the look that is under way. Otherwise a
    thousand probes would be a thousand looks at once.
    """

    def __init__(self, stores: Stores) -> None:
        self.campaigns: list[str] = []
        """Campaigns in trouble at the last look, each with a short reason."""
        self._stores = stores
        self._found: list[str] = []
        self._fresh_until = 0.0
        self._look: asyncio.Task[list[str]] | None = None

    async def reasons(self) -> list[str]:
        """Give the reasons of the module's ``reasons``, at most ``FRESH_S`` old."""
        if time.monotonic() < self._fresh_until:
            return self._found
        if self._look is None:
            self._look = asyncio.create_task(self._look_at(self._stores))
        return await asyncio.shield(self._look)

    async def _look_at(self, stores: Stores) -> list[str]:
        try:
            self._found, self.campaigns = await asyncio.gather(reasons(stores), troubled(stores))
        except Exception as error:
            # Logged once here, and not by each waiting request.
            log.exception("readiness.not_looked")
            self._found = [f"the stores could not be looked at ({type(error).__name__})"]
        self._fresh_until = time.monotonic() + (UNREADY_FRESH_S if self._found else FRESH_S)
        self._look = None
        return self._found


async def reasons(stores: Stores) -> list[str]:
    """Say why this host should get no traffic; empty if it should."""
    redis, postgres = await asyncio.gather(_redis_reasons(stores), _postgres_reasons(stores))
    return redis + postgres


async def troubled(stores: Stores) -> list[str]:
    """Name the campaigns in trouble. ``sale doctor`` gives details; this answer is public."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            found = await read_troubles(stores.redis)
    except REDIS_ERRORS:
        return []  # ``unready`` names it
    return sorted(
        f"{campaign_id}: {REPORTERS[reporter]}; see sale doctor"
        for reporter, campaigns in found.items()
        for campaign_id in campaigns
    )


async def _redis_reasons(stores: Stores) -> list[str]:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            faults = await durability_faults(
                stores.redis, stores.settings.durability, stores.settings.replicas_min
            )
            waiting = await unverified(stores.redis, stores.nonce)
    except REDIS_ERRORS as error:
        return [f"redis: not reached ({type(error).__name__})"]
    if stores.settings.durability_check == "warn":
        faults = []
    if waiting:
        faults.append(f"{waiting} campaigns are not verified yet since it started")
    return [f"redis: {fault}" for fault in faults]


async def _postgres_reasons(stores: Stores) -> list[str]:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            missing = await pending(stores.pool)
    except MigrationError as error:
        # A schema of another version cannot be trusted, for whatever reason it is there.
        return [f"postgres: {error}"]
    except POSTGRES_ERRORS as error:
        return [f"postgres: not reached ({type(error).__name__})"]
    return [f"postgres: migrations are missing: {', '.join(missing)}"] if missing else []
