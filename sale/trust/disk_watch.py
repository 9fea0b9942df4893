"""Stop selling before Redis' disk is full.

Under ``appendfsync always`` a Redis that cannot write its append-only file ends at once, and at
every start again: then nothing is answered any more, refusals and readings neither. So an API
process on Redis' host looks at the free space each second and halts its own purchases below a
bound. It cannot see another host's disk; there ``sale_halted`` stays 0 and that disk has to be
watched by whoever runs it.
"""

import asyncio
import os
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sale.stock.batchers import Batchers
from sale.stock.errors import REDIS_ERRORS

INTERVAL_S: Final = 1.0
ASK_TIMEOUT_S: Final = 1.0
SPARE_MB: Final = 64
"""Sales go on this far above the bound, so that they do not stop and go with each purchase."""

_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_MB: Final = 1024 * 1024

log = structlog.get_logger()


def free_mb(directory: Path) -> int:
    """Space that is left for ordinary users where ``directory`` lies, in MiB. Raises OSError."""
    told = os.statvfs(directory)
    return told.f_bavail * told.f_frsize // _MB


def may_be_here(redis_url: str) -> bool:
    """Whether a Redis of this URL can be on this host: a unix socket, or a loopback address."""
    parts = urlsplit(redis_url)
    return parts.scheme == "unix" or parts.hostname in _HERE


async def redis_directory(redis: Redis, redis_url: str) -> Path | None:
    """Give the directory of Redis' append-only file, or None where it is not on this host.

    A forwarded port leads to another host too, so the file itself must be there. Raises redis-py's
    errors where Redis does not answer.
    """
    if not may_be_here(redis_url):
        return None
    try:
        config = await redis.config_get("dir", "appenddirname")
    except ResponseError:
        return None
    directory = Path(config.get("dir") or "/nowhere")
    files = directory / (config.get("appenddirname") or "?")
    return directory if os.path.lexists(files) else None  # noqa: ASYNC240 - a local file, at a start


class DiskWatch:
    """Halts the purchases of this process while Redis' disk has less than ``free_min_mb`` left."""

    def __init__(
        self,
        redis: Redis,
        redis_url: str,
        batchers: Batchers,
        *,
        free_min_mb: int,
    ) -> None:
        self._redis = redis
        self._redis_url = redis_url
        self._batchers = batchers
        self._free_min_mb = free_min_mb
        self._said = ""

    async def run(self) -> None:
        """Look each second until cancelled; returns at once where there is nothing to watch."""
        if not self._free_min_mb or not may_be_here(self._redis_url):
            return
        directory = await self._find()
        if directory is None:
            log.info("disk.unwatched", why="Redis' files are not on this host")
            return
        while True:
            self.look(directory)
            await asyncio.sleep(INTERVAL_S)

    def look(self, directory: Path) -> None:
        """Halt, or let go again what this watch had halted."""
        try:
            left_mb = free_mb(directory)
        except OSError as error:
            log.warning("disk.unread", error=str(error))
            return
        bound_mb = self._free_min_mb + (SPARE_MB if self._said else 0)
        if left_mb >= bound_mb and self._said:
            log.info("disk.enough", left_mb=left_mb)
            self._say("")
        elif left_mb < bound_mb and not self._said:
            log.error("disk.short", left_mb=left_mb, bound_mb=bound_mb, directory=str(directory))
            self._say(f"redis: its disk has less than {bound_mb} MB left, nothing is sold")

    def _say(self, why: str) -> None:
        self._batchers.halt("disk", why)
        self._said = why

    async def _find(self) -> Path | None:
        while True:
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    return await redis_directory(self._redis, self._redis_url)
            except REDIS_ERRORS:
                await asyncio.sleep(INTERVAL_S)
