"""Connections to PostgreSQL, with a bound on every wait.

Each connection gets all of its arguments from the URL (``store_urls.py``), and sets the schema of
its names: a ``search_path`` of the role or the database would make a second, empty set of tables.
It is set after connecting, because poolers refuse settings in the startup packet.
"""

import asyncio
from typing import Any, Final, TypeAlias

import asyncpg

from sale.store_urls import PostgresUrl

Connection: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"
"""One connection with asyncpg's own codecs: jsonb comes and goes as text."""

CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 3.0
IDLE_CONNECTION_S: Final = 300.0
"""A connection that lay idle this long is closed; balancers forget it silently otherwise."""


SCHEMA: Final = "public"
"""Where all tables of the engine are."""

USE_SCHEMA: Final = f"SET search_path TO {SCHEMA};"


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that the pool resets to our schema, not to the role's."""

    def get_reset_query(self) -> str:
        return f"{super().get_reset_query()}\n{USE_SCHEMA}"


async def connect(
    database_url: str,
    *,
    name: str,
    timeout_s: float = CONNECT_TIMEOUT_S,
    **options: Any,  # noqa: ANN401 - asyncpg's
) -> "asyncpg.Connection[Any]":
    """Open one connection, called ``name`` in PostgreSQL; ``options`` are asyncpg's.

    Raises BadUrl, POSTGRES_ERRORS.
    """
    url = PostgresUrl.read(database_url)
    where = url.connection()
    options = {
        "connection_class": _Connection,
        "timeout": timeout_s,
        "server_settings": {"application_name": name},
        **options,
    }
    try:
        conn = await asyncpg.connect(**where, **options)
    except (TimeoutError, asyncpg.InvalidPasswordError):
        raise
    except (OSError, asyncpg.InvalidAuthorizationSpecificationError):
        if not url.tls_is_optional:
            raise
        conn = await asyncpg.connect(**{**where, "ssl": False}, **options)
    try:
        await conn.execute(USE_SCHEMA, timeout=timeout_s)
    except BaseException:
        conn.terminate()
        raise
    return conn


async def open_pool(
    database_url: str,
    *,
    max_size: int = 4,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    command_timeout_s: float = COMMAND_TIMEOUT_S,
) -> "asyncpg.Pool[Any]":
    """Open a pool; the caller closes it.

    The pool connects when a caller needs a connection. With a minimum size, asyncpg would connect
    in the background too, and log a traceback at each attempt while PostgreSQL is away.

    Raises BadUrl, ConnectionError, which says where, or asyncpg.PostgresError where the server
    cannot be reached.
    """

    async def connect_by_url(_dsn: None, **options: Any) -> "asyncpg.Connection[Any]":  # noqa: ANN401
        return await connect(database_url, name="sale", timeout_s=connect_timeout_s, **options)

    pool = await asyncpg.create_pool(
        connect=connect_by_url,
        connection_class=_Connection,
        min_size=0,
        max_size=max_size,
        command_timeout=command_timeout_s,
        max_inactive_connection_lifetime=IDLE_CONNECTION_S,
    )
    try:
        async with pool.acquire():
            return pool
    except (OSError, TimeoutError) as error:
        why = str(error) or f"no answer in {connect_timeout_s:g} s"
        raise ConnectionError(
            f"PostgreSQL at {place(database_url)} cannot be reached: {why}"
        ) from None


async def close_pool(pool: "asyncpg.Pool[Any]") -> None:
    """Close a pool, by force if the server does not answer in time."""
    try:
        await asyncio.wait_for(pool.close(), CLOSE_TIMEOUT_S)
    except TimeoutError:
        pool.terminate()


def place(database_url: str) -> str:
    """Give the place of a URL, without user and password."""
    return PostgresUrl.read(database_url).place
