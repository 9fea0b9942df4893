"""Connections to PostgreSQL, with a bound on every wait."""

import asyncio
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import asyncpg

POSTGRES_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""What a call to PostgreSQL raises where it is away, slow, or refuses it; asyncpg calls a server
that dies in mid-call an internal error of its own."""

CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 3.0
IDLE_CONNECTION_S: Final = 300.0
"""A connection that lay idle this long is closed; balancers forget it silently otherwise."""


async def open_pool(
    database_url: str,
    *,
    min_size: int = 1,
    max_size: int = 4,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    command_timeout_s: float = COMMAND_TIMEOUT_S,
) -> "asyncpg.Pool[Any]":
    """Open a pool; the caller closes it.

    Raises ConnectionError, which says where, or asyncpg.PostgresError where the server cannot be
    reached.
    """
    try:
        return await asyncpg.create_pool(
            database_url,
            min_size=min_size,
            max_size=max_size,
            timeout=connect_timeout_s,
            command_timeout=command_timeout_s,
            max_inactive_connection_lifetime=IDLE_CONNECTION_S,
            server_settings={"application_name": "sale"},
        )
    except (OSError, TimeoutError) as error:
        why = str(error) or f"no answer in {connect_timeout_s:g} s"
        raise ConnectionError(
            f"PostgreSQL at {place(database_url)} cannot be reached: {why}"
        ) from None


async def close_pool(pool: "asyncpg.Pool[Any]") -> None:
    """Close a pool, gently first: a server that does not answer holds nobody up."""
    try:
        await asyncio.wait_for(pool.close(), CLOSE_TIMEOUT_S)
    except TimeoutError:
        pool.terminate()


def place(database_url: str) -> str:
    """Where a URL leads to, without what it says of users and passwords."""
    parts = urlsplit(database_url)
    asked = parse_qs(parts.query)
    host = parts.netloc.rpartition("@")[2] or asked.get("host", ["?"])[0]
    return f"{host} port {asked['port'][0]}" if "port" in asked else host
