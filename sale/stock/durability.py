"""Whether a Redis keeps what it acknowledges: its settings, its product, and its files (INV-3).

Products differ in two ways that no setting tells. Some answer before the fsync once several threads
write to clients. Some that load an append-only file with a torn end cut it within a transaction:
until that file was written anew, what they write behind it is lost at the next start, or they do
not start. ``tests/test_fsync.py`` and ``tests/test_torn_file.py`` show both on each product.
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
    """Say in words what of this Redis is weaker than ``level`` promises.

    ``replicas_min`` counts at level ``replicated`` only. One round trip, read anew at each call.
    Settings that Redis does not let us read are a fault. Raises redis-py's errors.
    """
    told = await _read(redis)
    old = too_old(product_of(told.info))
    return [
        *([old] if old else []),
        *_disk_faults(told, level),
        *_memory_faults(told.info),
        *_replica_faults(told.info, told.config, level, replicas_min),
    ]


async def make_whole(redis: Redis) -> str:
    """Have the append-only file written anew where this Redis needs it; why it is not whole, or ''.

    Begins a rewrite where none is under way and does not wait for its end: the next call sees it.
    Raises redis-py's errors.
    """
    told = await _read(redis)
    if not told.info.get("aof_enabled"):
        # A Redis that is told to keep one again has to write its first file to the end.
        await redis.set(WHOLE, f"{_OFF}{told.run_id}")
        return ""
    if told.whole:
        if told.needs_rewrite and told.noted != told.run_id:
            # Without memory it cannot be noted; INFO says the same until a rewrite fails.
            with contextlib.suppress(ResponseError):
                await redis.set(WHOLE, told.run_id)
        return ""
    if not told.rewriting:
        try:
            await redis.bgrewriteaof()
        except ResponseError as error:
            return f"{_NOT_WHOLE}: {str(error)[:100]}"
    return _not_whole(told)


async def rewrite_trouble(redis: Redis) -> str:
    """Say that the last rewrite of the append-only file failed; '' where it did not.

    Nothing that was answered is lost by that, but the file grows until the disk is full.
    Raises redis-py's errors.
    """
    info = await redis.info("persistence")
    if not info.get("aof_enabled") or info.get("aof_last_bgrewrite_status") == "ok":
        return ""
    return "the last rewrite of the append-only file failed: Redis' log says why"


class _Told(NamedTuple):
    """All of INFO, the settings that CONFIG tells, and what was noted of the file (``WHOLE``)."""

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
        """Whether this very process has once kept no append-only file at all."""
        return self.noted == f"{_OFF}{self.run_id}"

    @property
    def needs_rewrite(self) -> bool:
        """Whether what this Redis writes behind a file with a torn end may be lost."""
        return self.was_off or not _cuts_whole_transactions(product_of(self.info))

    @property
    def whole(self) -> bool:
        """Whether its file can be read again, to the end and beyond, however it was loaded."""
        if self.noted == self.run_id or not self.needs_rewrite:
            return True
        info = self.info
        if info.get("aof_last_bgrewrite_status") != "ok":
            return False
        if self.was_off:
            return not self.rewriting
        # -1: since its start none has ended. The status tells of the last one that has.
        return int(info.get("aof_last_rewrite_time_sec", -1)) >= 0


async def _read(redis: Redis) -> _Told:
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
    return _Told(info, config, (noted or b"").decode(errors="replace"))


def _disk_faults(told: _Told, level: Durability) -> Iterator[str]:
    info, config = told.info, told.config
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
    if not told.whole:
        yield _not_whole(told)


def _threads_faults(product: Product, config: dict[str, str]) -> Iterator[str]:
    threads = config.get("io-threads", "1")
    if threads != "1" and product.version[:1] not in _THREADS_WAIT.get(product.name, ()):
        yield (
            f"io-threads is {threads}: {product} may answer before the fsync; set io-threads 1 "
            "in its configuration and restart it, or use Valkey"
        )


def _cuts_whole_transactions(product: Product) -> bool:
    """Whether a torn file is cut before the transaction that has lost its end."""
    fixed_in = _FIXED_IN.get(product.version[:2])
    if product.name != "Valkey":
        return False
    return product.version > _FIXED_SINCE if fixed_in is None else product.version >= fixed_in


def _not_whole(told: _Told) -> str:
    if told.rewriting or told.info.get("aof_last_bgrewrite_status") == "ok":
        return f"{_NOT_WHOLE} yet: the scheduler has it written anew"
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
    online = sum(_in_step(info.get(f"slave{n}")) for n in range(attached))
    if online < replicas_min:
        yield f"{online} replica(s) in step, {replicas_min} wanted: no order can be answered"
    wanted = config.get("min-replicas-to-write")
    if wanted is None:
        yield "cannot be read: min-replicas-to-write (CONFIG is not allowed here)"
    elif int(wanted) < replicas_min or config.get("min-replicas-max-lag") == "0":
        yield (
            f"min-replicas-to-write is {wanted}, not {replicas_min}, or its max-lag is 0: "
            "a primary that was cut off goes on taking orders that its successor lacks"
        )


def _in_step(replica: object) -> bool:
    return isinstance(replica, dict) and replica.get("state") == "online"


_SYNC_SETTINGS: Final = ("appendfsync", "no-appendfsync-on-rewrite")
_SETTINGS: Final = (
    *_SYNC_SETTINGS,
    "io-threads",
    "min-replicas-to-write",
    "min-replicas-max-lag",
)
_THREADS_WAIT: Final = {"Redis": ((7,),), "Valkey": ((7,), (8,), (9,))}
"""Majors that answer after the fsync whatever their ``io-threads``. Redis 6 and 8 do not."""
_FIXED_IN: Final[dict[tuple[int, ...], tuple[int, ...]]] = {
    (7, 2): (7, 2, 15),
    (8, 0): (8, 0, 11),
    (8, 1): (8, 1, 10),
    (9, 0): (9, 0, 6),
    (9, 1): (9, 1, 2),
}
"""Valkey's versions from which a torn file is cut before ``MULTI`` (its pull request 4342)."""
_FIXED_SINCE: Final = max(_FIXED_IN.values())
_OFF: Final = "off "
_NOT_WHOLE: Final = "its append-only file is not known to be whole"
