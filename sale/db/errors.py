"""Errors of a PostgreSQL that is away: not reached, or unable to write for any reason.

Such a state passes by itself or by work on the server, so callers retry without limit. Errors that
concern one campaign's events alone are that campaign's fault and not listed here.
"""

from typing import Final

import asyncpg

from sale import failures

POSTGRES_AWAY: Final = (
    OSError,  # with it TimeoutError: no answer in time
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a connection that dies in mid-call may raise
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TransactionRollbackError,
)
"""Errors of a call while PostgreSQL is away."""

POSTGRES_ERRORS: Final = (*POSTGRES_AWAY, asyncpg.PostgresError)
"""Errors of a call where PostgreSQL is away, slow, or refuses it for any other reason."""

POSTGRES_SAYS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""Errors that no other store or file raises."""

NO_SCHEMA: Final = "the database has no schema yet, or an old one: run `sale migrate`"

_REASONS: Final[failures.Reasons] = (
    (asyncpg.ReadOnlySQLTransactionError, "it is read-only"),
    (asyncpg.DiskFullError, "its disk is full"),
    (asyncpg.TooManyConnectionsError, "it takes no more connections"),
    (asyncpg.InsufficientResourcesError, "it is out of memory or of another resource"),
    (asyncpg.CannotConnectNowError, "it is starting or shutting down"),
    (asyncpg.AdminShutdownError, "it has ended the connection"),
    (asyncpg.CrashShutdownError, "it has crashed"),
    (asyncpg.QueryCanceledError, "a statement was cancelled, or took longer than it allows"),
    (asyncpg.PostgresSystemError, "it cannot read or write its files"),
    (TimeoutError, "no answer in time"),
    (asyncpg.PostgresConnectionError, "the connection was lost"),
    (asyncpg.InterfaceError, "the connection was lost"),
    (asyncpg.InternalClientError, "the connection was lost"),
    (ConnectionRefusedError, "it cannot be reached"),
    (ConnectionError, "the connection was lost"),
    (OSError, "it cannot be reached"),
)


def in_words(error: Exception) -> str:
    """Say in one line why PostgreSQL is away, and what it said itself."""
    return failures.in_words(error, _REASONS)
