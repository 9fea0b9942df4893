"""How this process reaches Redis."""

from typing import Any, Final

from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    Redis,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from sale.config import OLDEST_VERSIONS
from sale.store_urls import RedisUrl

REDIS_ERRORS: Final = (RedisError, OSError, TimeoutError)
"""What a call to Redis raises where Redis is away, slow, or refuses it."""

SOCKET_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0


def open_redis(url: str, *, max_connections: int = 16) -> Redis:
    """Open a client whose connections are bounded and waited for (``HOLES.md`` row 2).

    No retry inside the client: a call whose outcome is unknown is asked again by whoever knows its
    idempotency key, and by nobody else. Raises BadUrl.
    """
    told = RedisUrl.read(url)
    kinds = (Connection, SSLConnection)
    pool = BlockingConnectionPool(
        connection_class=UnixDomainSocketConnection if told.path else kinds[told.tls],
        **told.connection(),
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
