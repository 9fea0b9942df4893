"""How this process reaches Redis, and whether that Redis keeps what it acknowledges."""

from collections.abc import Iterator
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from sale.config import OLDEST_VERSIONS, Durability

REDIS_ERRORS: Final = (RedisError, OSError, TimeoutError)
"""What a call to Redis raises where Redis is away, slow, or refuses it."""

SOCKET_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0


def open_redis(url: str, *, max_connections: int = 16) -> Redis:
    """Open a client whose connections are bounded and waited for (``HOLES.md`` row 2).

    No retry inside the client: a call whose outcome is unknown is asked again by whoever knows its
    idempotency key, and by nobody else.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=CONNECT_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
    )
    # The pool is this client's own: closing the client closes its connections.
    return Redis.from_pool(pool)


def server_name(info: dict[str, Any]) -> str:
    """Give product and version of a server from its INFO: "Redis 7.0.15", "Valkey 9.1.2".

    Valkey says in ``redis_version`` which Redis it is compatible with.
    """
    valkey = info.get("valkey_version")
    return f"Valkey {valkey}" if valkey else f"Redis {info['redis_version']}"


def too_old(info: dict[str, Any]) -> str:
    """Say in words that this version is not supported, or '' where it is."""
    name = server_name(info)
    product, _, version = name.partition(" ")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers >= OLDEST_VERSIONS[product]:
        return ""
    oldest = ".".join(map(str, OLDEST_VERSIONS[product]))
    return f"{name} is too old: {oldest} is the oldest {product} that is supported"


async def make_the_file_whole(redis: Redis) -> str:
    """Have the append-only file written anew; why it is not, or ''. Raises what says it is away.

    A server that loaded a torn file goes on with it: a second crash would then meet its seam.
    """
    try:
        await redis.bgrewriteaof()
    except ResponseError as error:
        return str(error)[:100]  # one is under way, or it may not be asked for
    return ""


async def durability_faults(redis: Redis, level: Durability, replicas_min: int) -> list[str]:
    """Say in words what of this Redis is weaker than ``level`` promises (INV-3).

    ``replicas_min`` counts at level ``replicated`` only. One round trip, read anew at each call.
    Settings that Redis does not let us read are a fault. Raises redis-py's errors.
    """
    info, config = await _read_settings(redis)
    old = too_old(info)
    return [
        *([old] if old else []),
        *_disk_faults(info, config, level),
        *_memory_faults(info),
        *_replica_faults(info, config, level, replicas_min),
    ]


async def _read_settings(redis: Redis) -> tuple[dict[str, Any], dict[str, str]]:
    """All of INFO, and those settings that CONFIG tells (none where it is forbidden)."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.info()
        pipe.config_get(*_SETTINGS)
        info, config = await pipe.execute(raise_on_error=False)
    if isinstance(info, Exception):
        raise info
    if isinstance(config, ResponseError):
        return info, {}
    if isinstance(config, Exception):
        raise config
    return info, config


def _disk_faults(info: dict[str, Any], config: dict[str, str], level: Durability) -> Iterator[str]:
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
    "min-replicas-to-write",
    "min-replicas-max-lag",
)
