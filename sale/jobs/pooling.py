"""Is there a proxy before PostgreSQL that hands its sessions round? Then no lock can be held there.

An advisory lock, and the idle timeout that takes it from a stopped holder, belong to one session of
PostgreSQL. A proxy that pools transactions gives each transaction to whichever session is free, so
that two processes hold one lock, or nobody the one that he was given.

PostgreSQL tells each client at the start which backend serves it. Where the backend itself says the
same, there is nothing between. Where not, there is a proxy, and whether it pools is tried: other
connections begin transactions, and none of them may get the backend that this idle one had, nor may
this one get another meanwhile. A proxy whose sessions are all taken makes them wait: that one
gives whole sessions.
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
    """The lock's connection leads through a proxy that cannot carry it; one line for people."""


@contextlib.asynccontextmanager
async def connected(
    database_url: str, name: str, *, command_timeout_s: float, statements: int = 100
) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Open a connection of that name; a block that ends by an error drops it without a word.

    Raises UnfitProxy where something before PostgreSQL refuses its settings.
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
                f"settings ({error}): the lock {_INSTEAD}"
            ) from None
        raise
    try:
        yield conn
    except BaseException:
        # Not gently: where the server does not answer, a rollback or a farewell waits for it.
        conn.terminate()
        raise
    with contextlib.suppress(*POSTGRES_AWAY):
        await conn.close(timeout=CLOSE_TIMEOUT_S)


async def own_backend(conn: "asyncpg.Connection[Any]", database_url: str) -> int:
    """Process number of the backend that serves this connection for good.

    Raises UnfitProxy where none does, and the errors of a PostgreSQL that is away.
    """
    try:
        backend = await _backend(conn)
        if backend == conn.get_server_pid():
            return backend
        handed_round = await _handed_round(conn, backend, database_url)
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if "pooling mode" not in str(error):
            raise
        handed_round = True  # PgBouncer, of a transaction where it pools single statements
    if handed_round:
        raise pools_transactions(database_url)
    return backend


def pools_transactions(database_url: str) -> UnfitProxy:
    """Give the error of a connection whose backend changes."""
    return UnfitProxy(
        f"PostgreSQL at {place(database_url)} is reached through a proxy that pools transactions: "
        f"the lock {_INSTEAD}"
    )


async def _handed_round(conn: "asyncpg.Connection[Any]", backend: int, database_url: str) -> bool:
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
                    others = await _ask(other)
            except TimeoutError:
                return False
            if others == backend or await _backend(conn) != backend:
                return True
    return False


async def _backend(conn: "asyncpg.Connection[Any]") -> int:
    """Ask within a transaction: outside of one, a proxy may part the question from its answer."""
    async with conn.transaction():
        return await _ask(conn)


async def _ask(conn: "asyncpg.Connection[Any]") -> int:
    backend: int = await conn.fetchval("SELECT pg_backend_pid()")
    return backend


_INSTEAD: Final = (
    "needs a direct connection or session pooling; set database_url (SALE_DATABASE_URL) to "
    "PostgreSQL itself, or the proxy to pool whole sessions"
)
