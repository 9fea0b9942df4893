"""``/healthz``: the process lives. ``/readyz``: it can sell, or the reasons why it cannot."""

import asyncio
import time
from typing import Final

from aiohttp import web

from sale.api.exchange import ENGINE, NO_STORE, json_response
from sale.api.routing import guarded
from sale.api.schemas import HealthView
from sale.bootstrap import Stores
from sale.db.migrate import MigrationError, pending
from sale.db.pool import POSTGRES_ERRORS
from sale.stock.connection import REDIS_ERRORS, durability_faults

CHECK_TIMEOUT_S: Final = 1.0
FRESH_S: Final = 0.5


def add_health_routes(app: web.Application) -> None:
    """Register ``/healthz`` and ``/readyz``."""
    kept: list[tuple[float, list[str]]] = []

    async def healthz(_: web.Request) -> web.Response:
        return json_response(HealthView("ok"), headers=NO_STORE)

    async def readyz(request: web.Request) -> web.Response:
        # A crowd of probes shares one look at the stores.
        if not kept or time.monotonic() - kept[0][0] > FRESH_S:
            kept[:] = [(time.monotonic(), await reasons(request.app[ENGINE].stores))]
        halted = request.app[ENGINE].batchers.halted
        why = [halted, *kept[0][1]] if halted else kept[0][1]
        response = json_response(HealthView("unavailable" if why else "ok", why), headers=NO_STORE)
        if why:
            response.set_status(503)
            response.headers["Retry-After"] = "1"
        return response

    app.router.add_get("/healthz", guarded(healthz, exempt=True))
    app.router.add_get("/readyz", guarded(readyz, exempt=True))


async def reasons(stores: Stores) -> list[str]:
    """Say why this host should get no traffic; empty where it should."""
    redis, postgres = await asyncio.gather(_redis_reasons(stores), _postgres_reasons(stores))
    return redis + postgres


async def _redis_reasons(stores: Stores) -> list[str]:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            faults = await durability_faults(
                stores.redis, stores.settings.durability, stores.settings.replicas_min
            )
    except REDIS_ERRORS as error:
        return [f"redis: not reached ({type(error).__name__})"]
    if stores.settings.durability_check == "warn":
        return []
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
