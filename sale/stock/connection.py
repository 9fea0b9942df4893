"""How this process reaches Redis, and whether that Redis keeps what it acknowledges."""

from typing import Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

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


async def durability_faults(redis: Redis) -> list[str]:
    """Say in words which settings of this Redis let an acknowledged order be lost (INV-3).

    Returns an empty list where an answer leaves only after its fsync. Raises redis-py's errors.
    """
    persistence = await redis.info("persistence")
    memory = await redis.info("memory")
    stats = await redis.info("stats")
    server = await redis.info("server")
    config: dict[str | None, str | None] = {}
    # One name a call: Redis 6.2 takes no more.
    for name in ("appendfsync", "no-appendfsync-on-rewrite", "io-threads", "lua-time-limit"):
        config.update(await redis.config_get(name))
    faults = []
    if not persistence.get("aof_enabled"):
        faults.append("appendonly is off: a restart forgets everything")
    elif config.get("appendfsync", "always") != "always":
        faults.append(f"appendfsync is {config['appendfsync']}: a crash loses answered orders")
    if config.get("no-appendfsync-on-rewrite", "no") != "no":
        faults.append("no-appendfsync-on-rewrite is on: no fsync during a rewrite")
    if memory.get("maxmemory_policy", "noeviction") != "noeviction":
        faults.append(f"maxmemory-policy is {memory['maxmemory_policy']}: keys may be dropped")
    if stats.get("evicted_keys", 0):
        faults.append(f"{stats['evicted_keys']} keys were evicted: the stock may be incomplete")
    if int(str(server["redis_version"]).split(".")[0]) < 7:
        if config.get("io-threads", "1") != "1":
            faults.append("io-threads above 1 before Redis 7 answers before the fsync")
        if config.get("lua-time-limit", "0") != "0":
            faults.append("lua-time-limit above 0 before Redis 7 answers before the fsync")
    return faults
