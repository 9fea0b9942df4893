"""PostgreSQL's advisory locks: their numbers, and the processes that hold or await them.

A leader lock's holder and waiters are found in PostgreSQL's own lists, where the connection of each
is named after the lock, the host and the process.
"""

import os
import socket
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sale.db import queries

if TYPE_CHECKING:
    import asyncpg

NAME_MAX_BYTES: Final = 63
"""PostgreSQL cuts an ``application_name`` there."""


class LeaderLock(NamedTuple):
    """An advisory lock's number, and the name of its connections."""

    lock: int
    name: str

    def mine(self) -> str:
        """Name of this process' connection: ``<lock> <host>:<process>``."""
        tail = f":{os.getpid()}"
        host = socket.gethostname().encode("ascii", "replace").decode()
        return f"{self.name} {host[: NAME_MAX_BYTES - len(self.name) - len(tail) - 1]}{tail}"


MIGRATIONS: Final = 0x53414C45_0001
"""One number is "SALE" and a small number. A migrator holds this one while it migrates."""
ROSTER_CHANGES: Final = 0x53414C45_0002
"""A trigger of the roster's schema: changes get their revisions in the order of their commits."""
ROSTER_IMPORT: Final = 0x53414C45_0003
"""``sql/roster.sql``: one import at a time."""
WRITER: Final = LeaderLock(0x53414C45_0004, "sale-writer")
SCHEDULER: Final = LeaderLock(0x53414C45_0005, "sale-scheduler")
KEEPER: Final = LeaderLock(0x53414C45_0006, "sale-keeper")
REHEARSAL: Final = 0x53414C45_0010
"""Held while a rehearsal is played or removed."""
RECOVERY_CLASS: Final = 0x53414C45
"""First of two numbers, the second one a campaign's hash: held while that campaign is recovered."""
ROSTER_LOAD_CLASS: Final = 0x53414C46
"""Likewise: held during the first load of the roster into that campaign."""

WRITER_APPLIES: Final = "sale-writer-apply"
"""Name of the connection on which the active writer writes."""


class LockMember(NamedTuple):
    """One process that is connected for a leader lock: ``host:process``."""

    who: str
    active: bool


async def try_lock(conn: "asyncpg.Connection[Any]", leader_lock: LeaderLock) -> bool:
    """Take the lock for this session, if no other session holds it."""
    taken: bool = await conn.fetchval(_SQL["try_lock"], leader_lock.lock)
    return taken


async def unlock(conn: "asyncpg.Connection[Any]") -> None:
    """Give back the lock that this session holds, in one message (``jobs/leadership.py``)."""
    await conn.execute(_SQL["unlock"])


async def expel(conn: "asyncpg.Connection[Any]", name: str) -> int:
    """End all other sessions of that name and of this user; how many there were.

    A stopped process does not notice that it has lost its lock, and a session that it left in the
    middle of a COPY has no timeout of its own: it would hold its rows for as long as it is stopped.
    """
    ended: int = await conn.fetchval(_SQL["expel"], name)
    return ended


async def members(conn: Any, leader_lock: LeaderLock) -> list[LockMember]:  # noqa: ANN401 - pooled or not
    """Give the processes connected for a leader lock, the active one first."""
    rows = await conn.fetch(_SQL["members"], leader_lock.name, leader_lock.lock)
    return [LockMember(row["who"], row["active"]) for row in rows]


_SQL: Final = queries.load("locks")
