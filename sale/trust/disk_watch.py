"""Stops sales before Redis' disk is full.

Under ``appendfsync always`` a Redis that cannot write its append-only file ends at once, and again
at every start. Then not even refusals and reads are answered. So an API process on Redis' host
checks the free space each second and halts its own purchases below a bound. It cannot see the disk
of another host: there ``sale_halted`` stays 0, and the operator has to watch the disk.
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
"""Sales resume this far above the bound, so that they do not halt and resume all the time."""

_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_MB: Final = 1024 * 1024

log = structlog.get_logger()


def free_mb(directory: Path) -> int:
    """Free space for ordinary users on the disk of ``directory``, in MiB. Raises OSError."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize // _MB


def may_be_here(redis_url: str) -> bool:
    """Whether a Redis of this URL can be on this host: a unix socket, or a loopback address."""
    parts = urlsplit(redis_url)
    return parts.scheme == "unix" or parts.hostname in _HERE


async def redis_directory(redis: Redis, redis_url: str) -> Path | None:
    """Give the directory of Redis' append-only file, or None if it is not on this host.

    A forwarded port may lead to another host, so the file itself must exist here. Raises redis-py's
    errors if Redis does not answer.
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
        self._halted_for = ""

    async def run(self) -> None:
        """Look each second until cancelled; return at once if there is nothing to watch."""
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
        """Halt the purchases, or end this watch's halt."""
        try:
            left_mb = free_mb(directory)
        except OSError as error:
            log.warning("disk.unread", error=str(error))
            return
        bound_mb = self._free_min_mb + (SPARE_MB if self._halted_for else 0)
        if left_mb >= bound_mb and self._halted_for:
            log.info("disk.enough", left_mb=left_mb)
            self._halt("")
        elif left_mb < bound_mb and not self._halted_for:
            log.error("disk.short", left_mb=left_mb, bound_mb=bound_mb, directory=str(directory))
            self._halt(f"redis: its disk has less than {bound_mb} MB left, nothing is sold")

    def _halt(self, why: str) -> None:
        self._batchers.halt("disk", why)
        self._halted_for = why

    async def _find(self) -> Path | None:
        while True:
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    return await redis_directory(self._redis, self._redis_url)
            except REDIS_ERRORS:
                await asyncio.sleep(INTERVAL_S)
