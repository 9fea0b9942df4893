"""Checks that a Redis keeps what it acknowledges: its settings, its product, its files (INV-3).

Products differ in two ways that no setting shows. With several I/O threads, some answer before the
fsync. When they load an append-only file with a torn end, some cut it within a transaction; until
that file is rewritten, what they append to it is lost at the next start, or they do not start.
``tests/test_fsync.py`` and ``tests/test_torn_file.py`` show both on each product.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sale.config import Durability
from sale.stock.connection import Product, product_of, too_old
from sale.stock.keys import WHOLE


async def durability_faults(redis: Redis, level: Durability, replicas_min: int) -> list[str]:
    """List in words what makes this Redis weaker than ``level``.

    ``replicas_min`` matters at level ``replicated`` only. Each call makes one round trip. Settings
    that Redis does not let us read are a fault. Raises redis-py's errors.
    """
    server = await _read(redis)
    old = too_old(product_of(server.info))
    return [
        *([old] if old else []),
        *_disk_faults(server, level),
        *_memory_faults(server.info),
        *_replica_faults(server.info, server.config, level, replicas_min),
    ]


async def make_whole(redis: Redis) -> str:
    """Rewrite the append-only file if this Redis needs it; return why it is not whole, or ''.

    Starts a rewrite if none is under way, and does not wait for its end: a later call sees it.
    Raises redis-py's errors.
    """
    server = await _read(redis)
    if not server.info.get("aof_enabled"):
        # If the file is turned on again, its first rewrite must end before it is whole.
        await redis.set(WHOLE, f"{_OFF}{server.run_id}")
        return ""
    if server.whole:
        if server.needs_rewrite and server.noted != server.run_id:
            # Redis out of memory refuses this; then INFO gives the same result until a rewrite
            # fails.
            with contextlib.suppress(ResponseError):
                await redis.set(WHOLE, server.run_id)
        return ""
    if not server.rewriting:
        try:
            await redis.bgrewriteaof()
        except ResponseError as error:
            return f"{_NOT_WHOLE}: {str(error)[:100]}"
    return _not_whole(server)


async def rewrite_trouble(redis: Redis) -> str:
    """Say that the last rewrite of the append-only file failed, or ''.

    A failed rewrite loses no answered order, but the file grows until the disk is full.
    Raises redis-py's errors.
    """
    info = await redis.info("persistence")
    if not info.get("aof_enabled") or info.get("aof_last_bgrewrite_status") == "ok":
        return ""
    return "the last rewrite of the append-only file failed: Redis' log says why"


class _Server(NamedTuple):
    """INFO, the settings from CONFIG, and the value of the key ``WHOLE``."""

    info: dict[str, Any]
    config: dict[str, str]
    noted: str

    @property
    def run_id(self) -> str:
        return str(self.info["run_id"])

    @property
    def rewriting(self) -> bool:
        info = self.info
        return bool(info.get("aof_rewrite_in_progress") or info.get("aof_rewrite_scheduled"))

    @property
    def was_off(self) -> bool:
        """Whether this server process has run without an append-only file."""
        return self.noted == f"{_OFF}{self.run_id}"

    @property
    def needs_rewrite(self) -> bool:
        """Whether this Redis may lose what it appends to a file with a torn end."""
        return self.was_off or not _cuts_whole_transactions(product_of(self.info))

    @property
    def whole(self) -> bool:
        """Whether a restart can read its whole file, however this process loaded it."""
        if self.noted == self.run_id or not self.needs_rewrite:
            return True
        info = self.info
        if info.get("aof_last_bgrewrite_status") != "ok":
            return False
        if self.was_off:
            return not self.rewriting
        # -1: no rewrite has ended since its start. The status is that of the last one that ended.
        return int(info.get("aof_last_rewrite_time_sec", -1)) >= 0


async def _read(redis: Redis) -> _Server:
    async with redis.pipeline(transaction=False) as pipe:
        pipe.info()
        pipe.get(WHOLE)
        pipe.config_get(*_SETTINGS)
        info, noted, config = await pipe.execute(raise_on_error=False)
    if isinstance(config, ResponseError):
        config = {}
    for each in (info, noted, config):
        if isinstance(each, Exception):
            raise each
    return _Server(info, config, (noted or b"").decode(errors="replace"))


def _disk_faults(server: _Server, level: Durability) -> Iterator[str]:
    info, config = server.info, server.config
    if not info.get("aof_enabled"):
        yield "appendonly is off: a restart forgets everything"
        return
    unread = [name for name in _SYNC_SETTINGS if name not in config]
    if unread:
        yield f"cannot be read: {', '.join(unread)} (CONFIG is not allowed here)"
    sync = config.get("appendfsync")
    if level == "relaxed":
        if sync not in {"always", "everysec", None}:
            yield f"appendfsync is {sync}: a crash loses more than the last second's orders"
    elif sync not in {"always", None}:
        yield f"appendfsync is {sync}: a crash loses answered orders"
    if config.get("no-appendfsync-on-rewrite", "no") != "no":
        yield "no-appendfsync-on-rewrite is on: no fsync during a rewrite"
    if level != "relaxed":
        yield from _threads_faults(product_of(info), config)
    if info.get("aof_last_write_status", "ok") != "ok":
        yield "its append-only file could not be written: Redis' log says why"
    if not server.whole:
        yield _not_whole(server)


def _threads_faults(product: Product, config: dict[str, str]) -> Iterator[str]:
    threads = config.get("io-threads", "1")
    if threads != "1" and product.version[:1] not in _THREADS_WAIT.get(product.name, ()):
        yield (
            f"io-threads is {threads}: {product} may answer before the fsync; set io-threads 1 "
            "in its configuration and restart it, or use Valkey"
        )


def _cuts_whole_transactions(product: Product) -> bool:
    """Whether this product cuts a torn file before the incomplete transaction."""
    fixed_in = _FIXED_IN.get(product.version[:2])
    if product.name != "Valkey":
        return False
    return product.version > _FIXED_SINCE if fixed_in is None else product.version >= fixed_in


def _not_whole(server: _Server) -> str:
    if server.rewriting or server.info.get("aof_last_bgrewrite_status") == "ok":
        return f"{_NOT_WHOLE} yet: the scheduler has Redis rewrite it"
    return f"{_NOT_WHOLE}: its rewrite failed, Redis' log says why; it is tried again"


def _memory_faults(info: dict[str, Any]) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield f"maxmemory-policy is {policy}: keys may be dropped"
    if info.get("evicted_keys", 0):
        yield f"{info['evicted_keys']} keys were evicted: the stock may be incomplete"


def _replica_faults(
    info: dict[str, Any], config: dict[str, str], level: Durability, replicas_min: int
) -> Iterator[str]:
    if info.get("role") == "slave":
        yield f"this is a replica of {info.get('master_host')}: sales belong to its primary"
        return
    attached = int(info.get("connected_slaves", 0))
    if level == "fsync" and attached:
        yield (
            f"{attached} replica(s) attached: a promotion may lose answered orders; "
            "durability must be replicated"
        )
    if level != "replicated":
        return
    online = sum(_is_online(info.get(f"slave{n}")) for n in range(attached))
    if online < replicas_min:
        yield f"{online} replica(s) online, {replicas_min} needed: no order can be answered"
    to_write = config.get("min-replicas-to-write")
    if to_write is None:
        yield "cannot be read: min-replicas-to-write (CONFIG is not allowed here)"
    elif int(to_write) < replicas_min or config.get("min-replicas-max-lag") == "0":
        yield (
            f"min-replicas-to-write is {to_write}, not {replicas_min}, or its max-lag is 0: "
            "a primary that was cut off goes on taking orders that its successor lacks"
        )


def _is_online(replica: object) -> bool:
    return isinstance(replica, dict) and replica.get("state") == "online"


_SYNC_SETTINGS: Final = ("appendfsync", "no-appendfsync-on-rewrite")
_SETTINGS: Final = (
    *_SYNC_SETTINGS,
    "io-threads",
    "min-replicas-to-write",
    "min-replicas-max-lag",
)
_THREADS_WAIT: Final = {"Redis": ((7,),), "Valkey": ((7,), (8,), (9,))}
"""Major versions that answer after the fsync at any ``io-threads``. Redis 6 and 8 do not."""
_FIXED_IN: Final[dict[tuple[int, ...], tuple[int, ...]]] = {
    (7, 2): (7, 2, 15),
    (8, 0): (8, 0, 11),
    (8, 1): (8, 1, 10),
    (9, 0): (9, 0, 6),
    (9, 1): (9, 1, 2),
}
"""Valkey's first versions that cut a torn file before ``MULTI`` (its pull request 4342)."""
_FIXED_SINCE: Final = max(_FIXED_IN.values())
_OFF: Final = "off "
_NOT_WHOLE: Final = "its append-only file is not known to be whole"
