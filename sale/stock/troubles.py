"""Campaigns in trouble: told by the processes that meet it, read by whoever must name it.

The ledger writer and the scheduler pass over a campaign that they cannot handle and go on with the
others. Each writes what it met under a key of its own, which ``sale doctor`` and ``/readyz`` read.
The key is written again for as long as the trouble lasts, and expires by itself, so that nothing
stays of a process that has died.
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sale.stock.keys import troubles_key

TELLERS: Final = {
    "writer": "its ledger cannot be applied",
    "scheduler": "it needs an operator",
}
"""Who tells, and what its word means in short."""
TOLD_FOR_S: Final = 30
TELL_AGAIN_S: Final = 5.0


class Troubles:
    """What one teller has told."""

    def __init__(self, redis: Redis, teller: str) -> None:
        self._redis = redis
        self._key = troubles_key(teller)
        self._told: dict[str, str] | None = None
        self._again_s = 0.0

    async def tell(self, found: Mapping[str, str]) -> None:
        """Tell all campaigns that are in trouble now, each with why. Raises nothing of Redis'."""
        now_s = time.monotonic()
        if found == self._told and (not found or now_s < self._again_s):
            return
        with contextlib.suppress(RedisError, OSError):
            if found:
                await self._redis.set(self._key, msgspec.json.encode(found), ex=TOLD_FOR_S)
            else:
                await self._redis.delete(self._key)
            self._told, self._again_s = dict(found), now_s + TELL_AGAIN_S


async def read_troubles(redis: Redis) -> dict[str, dict[str, str]]:
    """Give what is told: teller to campaign to why. Raises redis-py's errors."""
    values = await redis.mget([troubles_key(teller) for teller in TELLERS])
    return {teller: _read(value) for teller, value in zip(TELLERS, values, strict=True)}


def _read(value: bytes | str | None) -> dict[str, str]:
    try:
        return msgspec.json.decode(value or b"{}", type=dict[str, str])
    except ValueError:
        return {}  # it is told again soon
