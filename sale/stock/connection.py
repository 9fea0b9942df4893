"""Opens the connection pool to Redis, and reads the server's product and version."""

from typing import Any, NamedTuple

from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    Redis,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sale.config import OLDEST_VERSIONS
from sale.store_urls import RedisUrl

SOCKET_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0


def open_redis(url: str, *, max_connections: int = 16) -> Redis:
    """Open a client with a bounded pool; a caller waits for a free connection.

    The client itself never retries: only code that knows the idempotency key may repeat a call
    whose outcome is unknown. Raises BadUrl.
    """
    address = RedisUrl.read(url)
    kinds = (Connection, SSLConnection)
    pool = BlockingConnectionPool(
        connection_class=UnixDomainSocketConnection if address.path else kinds[address.tls],
        **address.connection(),
        max_connections=max_connections,
        timeout=CONNECT_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
    )
    # ``from_pool`` makes the client own the pool: closing it closes the connections.
    return Redis.from_pool(pool)


class Product(NamedTuple):
    """A server's product, ``Redis`` or ``Valkey``, and its own version."""

    name: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        """``Valkey 9.1.2``."""
        return f"{self.name} {'.'.join(map(str, self.version))}"


def product_of(info: dict[str, Any]) -> Product:
    """Read the product from INFO.

    Valkey's ``redis_version`` is the Redis version with which it is compatible.
    """
    name = str(info.get("server_name") or ("valkey" if "valkey_version" in info else "redis"))
    version = str(info.get(f"{name}_version") or info.get("redis_version") or "0")
    numbers = tuple(int(part) for part in version.split(".") if part.isdecimal())
    return Product(name.capitalize(), numbers)


def too_old(product: Product) -> str:
    """Say in words that this version is not supported, or '' if it is."""
    oldest = OLDEST_VERSIONS.get(product.name, ())
    if product.version >= oldest:
        return ""
    least = ".".join(map(str, oldest))
    return f"{product} is too old: {least} is the oldest {product.name} that is supported"
