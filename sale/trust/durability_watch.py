"""Stops sales on a Redis that would lose acknowledged sales, also if it becomes one later.

The scheduler looks at each new Redis before it verifies the campaigns there. Settings change while
it runs, and a campaign may be made in a Redis that nobody has looked at yet. So each API process
checks by itself: each second, and before ``Batcher.check_acknowledged``.
"""

import asyncio
from typing import Final

import structlog
from redis.asyncio import Redis

from sale.config import Settings
from sale.stock.batchers import Batchers
from sale.stock.durability import durability_faults
from sale.stock.errors import REDIS_ERRORS

INTERVAL_S: Final = 1.0
HALTED_INTERVAL_S: Final = 0.2
ASK_TIMEOUT_S: Final = 1.0
HALT: Final = "durability"

log = structlog.get_logger()


class DurabilityWatch:
    """Halts the purchases of this process while Redis is weaker than the level that was set."""

    def __init__(self, redis: Redis, batchers: Batchers, settings: Settings) -> None:
        self._redis = redis
        self._batchers = batchers
        self._settings = settings
        self._logged: list[str] = []

    async def run(self) -> None:
        """Look until cancelled. On a Redis that does not answer nothing is sold in any case."""
        halted = False
        while True:
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    halted = bool(await self.look())
            except REDIS_ERRORS as error:
                log.debug("durability.unread", error=type(error).__name__)
            except Exception:
                log.exception("durability.unread")  # a bug of the engine must not end the watch
            await asyncio.sleep(HALTED_INTERVAL_S if halted else INTERVAL_S)

    async def look(self) -> str:
        """Halt, or end the halt; give the reason, or ''. Raises redis-py's errors."""
        settings = self._settings
        faults = await durability_faults(self._redis, settings.durability, settings.replicas_min)
        if faults and faults != self._logged:
            log.warning(
                "durability.weak",
                durability=settings.durability,
                check=settings.durability_check,
                faults=faults,
            )
        elif self._logged and not faults:
            log.info("durability.in_force", durability=settings.durability)
        self._logged = faults
        why = f"redis: {faults[0]}" if faults and settings.durability_check == "refuse" else ""
        self._batchers.halt(HALT, why)
        return why
