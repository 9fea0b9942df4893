"""Problems of single campaigns, written by the processes that find them.

The ledger writer and the scheduler skip a campaign that they cannot handle and go on with the
others. Each writes the problems it finds under a key of its own, which ``sale doctor`` and
``/readyz`` read. It rewrites the key while a problem lasts. The key expires by itself, so that the
report of a dead process does not stay.
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Final

import msgspec
from redis.asyncio import Redis

from sale.stock.errors import REDIS_ERRORS
from sale.stock.keys import troubles_key

REPORTERS: Final = {
    "writer": "its ledger cannot be applied",
    "scheduler": "it needs an operator",
}
"""The processes that report, and what a report means in short."""
EXPIRE_S: Final = 30
REPEAT_S: Final = 5.0


class Troubles:
    """Writes the problems that one reporter finds."""

    def __init__(self, redis: Redis, reporter: str) -> None:
        self._redis = redis
        self._key = troubles_key(reporter)
        self._reported: dict[str, str] | None = None
        self._again_s = 0.0

    async def report(self, found: Mapping[str, str]) -> None:
        """Write all campaigns that have a problem now, with the reason. Ignores Redis' errors."""
        now_s = time.monotonic()
        if found == self._reported and (not found or now_s < self._again_s):
            return
        with contextlib.suppress(*REDIS_ERRORS):
            if found:
                await self._redis.set(self._key, msgspec.json.encode(found), ex=EXPIRE_S)
            else:
                await self._redis.delete(self._key)
            self._reported, self._again_s = dict(found), now_s + REPEAT_S


async def read_troubles(redis: Redis) -> dict[str, dict[str, str]]:
    """Give the reason by reporter and campaign. Raises redis-py's errors."""
    values = await redis.mget([troubles_key(reporter) for reporter in REPORTERS])
    return {reporter: _read(value) for reporter, value in zip(REPORTERS, values, strict=True)}


def _read(value: bytes | str | None) -> dict[str, str]:
    try:
        return msgspec.json.decode(value or b"{}", type=dict[str, str])
    except ValueError:
        return {}  # the reporter writes it again soon
