"""``/healthz``: the process lives. ``/readyz``: it can sell, or the reasons why it cannot."""

import asyncio
import time
from typing import Final

import structlog
from aiohttp import web

from sale.api.request import ENGINE, NO_STORE, json_response
from sale.api.routing import guarded
from sale.api.schemas import HealthView
from sale.bootstrap import Stores
from sale.db.errors import POSTGRES_ERRORS
from sale.db.migrate import MigrationError, pending
from sale.stock.connection import REDIS_ERRORS
from sale.stock.durability import durability_faults
from sale.stock.troubles import REPORTERS, read_troubles
from sale.trust.verify import unverified

CHECK_TIMEOUT_S: Final = 1.0
FRESH_S: Final = 0.5
"""How long what a look found is told to others, from its end: a look may itself take longer."""
UNREADY_FRESH_S: Final = 0.1
"""The same for a host that is not ready: whoever waits for it is told soon."""

log = structlog.get_logger()


def add_health_routes(app: web.Application) -> None:
    """Register ``/healthz`` and ``/readyz``."""
    looks = SharedLooks()

    async def healthz(_: web.Request) -> web.Response:
        return json_response(HealthView("ok"), headers=NO_STORE)

    async def readyz(request: web.Request) -> web.Response:
        engine = request.app[ENGINE]
        why = await looks.reasons(engine.stores)
        if engine.batchers.halted:
            why = list(dict.fromkeys([engine.batchers.halted, *why]))
        view = HealthView("unavailable" if why else "ok", why, looks.campaigns)
        response = json_response(view, headers=NO_STORE)
        if why:
            response.set_status(503)
            response.headers["Retry-After"] = "1"
        return response

    app.router.add_get("/healthz", guarded(healthz, exempt=True))
    app.router.add_get("/readyz", guarded(readyz, exempt=True))


class SharedLooks:
    """Looks at the stores, one at a time, however many ask: each asker gets the latest, or waits
    for the one that is under way. Without that, a thousand probes were a thousand looks at once.
    """

    def __init__(self) -> None:
        self.campaigns: list[str] = []
        """Campaigns in trouble at the last look, each with what it is, in short."""
        self._found: list[str] = []
        self._fresh_until = 0.0
        self._look: asyncio.Task[list[str]] | None = None

    async def reasons(self, stores: Stores) -> list[str]:
        """Give the reasons of the module's ``reasons``, at most ``FRESH_S`` old."""
        if time.monotonic() < self._fresh_until:
            return self._found
        if self._look is None:
            self._look = asyncio.create_task(self._look_at(stores))
        return await asyncio.shield(self._look)

    async def _look_at(self, stores: Stores) -> list[str]:
        try:
            self._found, self.campaigns = await asyncio.gather(reasons(stores), troubled(stores))
        except Exception as error:
            # Logged here, once: everybody who waits would log it.
            log.exception("readiness.not_looked")
            self._found = [f"the stores could not be looked at ({type(error).__name__})"]
        self._fresh_until = time.monotonic() + (UNREADY_FRESH_S if self._found else FRESH_S)
        self._look = None
        return self._found


async def reasons(stores: Stores) -> list[str]:
    """Say why this host should get no traffic; empty where it should."""
    redis, postgres = await asyncio.gather(_redis_reasons(stores), _postgres_reasons(stores))
    return redis + postgres


async def troubled(stores: Stores) -> list[str]:
    """Name the campaigns in trouble. Particulars are for ``sale doctor``: anybody may ask here."""
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
        # A schema that is not this version's is not one to be trusted, however it came about.
        return [f"postgres: {error}"]
    except POSTGRES_ERRORS as error:
        return [f"postgres: not reached ({type(error).__name__})"]
    return [f"postgres: migrations are missing: {', '.join(missing)}"] if missing else []
