"""Detect a proxy before PostgreSQL that pools transactions: no lock can be held through it.

An advisory lock, and the idle timeout that takes it from a stopped holder, belong to one session of
PostgreSQL. A proxy that pools transactions gives each transaction to any free session, so two
processes could hold one lock, or a process could lose a lock that it took.

At the start of a connection PostgreSQL sends the pid of the backend. If ``pg_backend_pid()`` gives
the same, there is no proxy. Otherwise there is one, and a test tells whether it pools: other
connections begin transactions; none of them may get the backend of this idle connection, and this
connection may not get another backend. If the proxy makes the other connections wait because all
its sessions are taken, it assigns whole sessions.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import asyncpg

from sale.config import StartError
from sale.db.errors import POSTGRES_AWAY
from sale.db.pool import connect, place

CONNECT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 1.0
PROBES: Final = 3
PROBE_TIMEOUT_S: Final = 2.0


class UnfitProxy(StartError):  # noqa: N818 - says what is there
    """No lock can be held through the proxy before PostgreSQL. The message is one line."""


@contextlib.asynccontextmanager
async def connected(
    database_url: str, name: str, *, command_timeout_s: float, statements: int = 100
) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Open a connection of that name. If the block fails, terminate it without a handshake.

    Raises UnfitProxy if a proxy refuses the connection's settings.
    """
    try:
        conn = await connect(
            database_url,
            name=name,
            timeout_s=CONNECT_TIMEOUT_S,
            command_timeout=command_timeout_s,
            statement_cache_size=statements,
        )
    except asyncpg.PostgresError as error:
        if "unsupported startup parameter" in str(error):
            raise UnfitProxy(
                f"PostgreSQL at {place(database_url)} is reached through a proxy that refuses our "
                f"settings ({error}): the lock {_REMEDY}"
            ) from None
        raise
    try:
        yield conn
    except BaseException:
        # ``close`` would send a rollback and wait for a server that may not answer.
        conn.terminate()
        raise
    with contextlib.suppress(*POSTGRES_AWAY):
        await conn.close(timeout=CLOSE_TIMEOUT_S)


async def own_backend(conn: "asyncpg.Connection[Any]", database_url: str) -> int:
    """Give the pid of the backend that serves this connection permanently.

    Raises UnfitProxy if the backend changes, and the errors of a PostgreSQL that is away.
    """
    try:
        backend = await _backend(conn)
        if backend == conn.get_server_pid():
            return backend
        changes = await _backend_changes(conn, backend, database_url)
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if "pooling mode" not in str(error):
            raise
        changes = True  # PgBouncer refuses transactions so when it pools statements
    if changes:
        raise pools_transactions(database_url)
    return backend


def pools_transactions(database_url: str) -> UnfitProxy:
    """Give the error for a connection whose backend changes."""
    return UnfitProxy(
        f"PostgreSQL at {place(database_url)} is reached through a proxy that pools transactions: "
        f"the lock {_REMEDY}"
    )


async def _backend_changes(
    conn: "asyncpg.Connection[Any]", backend: int, database_url: str
) -> bool:
    """Whether the proxy gives ``backend`` to other connections, or this one another backend."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(PROBES):
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    other = await stack.enter_async_context(
                        connected(
                            database_url, "sale-probe", command_timeout_s=PROBE_TIMEOUT_S,
                            statements=0,
                        )
                    )  # fmt: skip
                    await other.execute("BEGIN")
                    others = await _backend_of_statement(other)
            except TimeoutError:
                return False
            if others == backend or await _backend(conn) != backend:
                return True
    return False


async def _backend(conn: "asyncpg.Connection[Any]") -> int:
    """Read it within a transaction, which a proxy cannot spread over two backends."""
    async with conn.transaction():
        return await _backend_of_statement(conn)


async def _backend_of_statement(conn: "asyncpg.Connection[Any]") -> int:
    backend: int = await conn.fetchval("SELECT pg_backend_pid()")
    return backend


_REMEDY: Final = (
    "needs a direct connection or session pooling; set database_url (SALE_DATABASE_URL) to "
    "PostgreSQL itself, or the proxy to pool whole sessions"
)
