"""How this process reaches Redis."""

from typing import Any, Final, NamedTuple

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


class Product(NamedTuple):
    """A server's product, ``Redis`` or ``Valkey``, and its own version."""

    name: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        """``Valkey 9.1.2``."""
        return f"{self.name} {'.'.join(map(str, self.version))}"


def product_of(info: dict[str, Any]) -> Product:
    """Read the product from INFO.

    Valkey says in ``redis_version`` which Redis it is compatible with.
    """
    name = str(info.get("server_name") or ("valkey" if "valkey_version" in info else "redis"))
    told = str(info.get(f"{name}_version") or info.get("redis_version") or "0")
    numbers = tuple(int(part) for part in told.split(".") if part.isdecimal())
    return Product(name.capitalize(), numbers)


def too_old(product: Product) -> str:
    """Say in words that this version is not supported, or '' where it is."""
    oldest = OLDEST_VERSIONS.get(product.name, ())
    if product.version >= oldest:
        return ""
    wanted = ".".join(map(str, oldest))
    return f"{product} is too old: {wanted} is the oldest {product.name} that is supported"
