"""Select the active one of several equal processes by a PostgreSQL advisory lock and a heartbeat.

One process holds the lock and works; the standbys try to take it several times a second. A holder
that is killed loses the lock with its connection. A holder that is stopped or cut off must lose it
too, so the lock's connection has an idle timeout that is longer than the heartbeat and shorter than
any outage we want to survive. A session that waits for the next message of a prepared statement is
not idle; a holder stopped between two such messages would keep the lock. So the holder sends every
statement as one message (``execute`` without arguments). A holder whose heartbeat gets no answer
cancels its work at once.

The lock only saves work. No process may rely on being the only one: between the loss of the lock
and the moment at which the holder notices it, two processes work. Everything both do must be a
compare-and-set.

Rejected: waiting inside ``pg_advisory_lock``. A waiting statement is not idle, so a stopped standby
would get the lock and keep it.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from sale.db import locks
from sale.db.errors import POSTGRES_AWAY, POSTGRES_ERRORS, in_words
from sale.db.locks import LeaderLock
from sale.jobs.backoff import pause
from sale.jobs.pooling import connected, own_backend, pools_transactions
from sale.lifetime import cancel_and_wait

if TYPE_CHECKING:
    import asyncpg

LOCK_TIMEOUT_S: Final = 1.5
HEARTBEAT_S: Final = 0.4
ANSWER_TIMEOUT_S: Final = 2.0
POLL_S: Final = 0.2
STOP_PATIENCE_S: Final = 10.0
"""Longest time for work to end by itself after the stop; then it is cancelled."""


class LockLost(ConnectionError):  # noqa: N818 - says what happened
    """The heartbeat failed, so another process may hold the lock."""


class Leadership:
    """Takes and holds one leader lock for this process, or stands by."""

    def __init__(self, database_url: str, leader_lock: LeaderLock) -> None:
        self._database_url = database_url
        self._leader_lock = leader_lock
        self._beat_at_s = float("-inf")

    @property
    def sure(self) -> bool:
        """Whether this process certainly holds the lock, by its own clock.

        A process that resumes after a long stop is not sure until its next heartbeat.
        """
        return time.monotonic() - self._beat_at_s < LOCK_TIMEOUT_S

    async def lead(
        self,
        stop: asyncio.Event,
        work: Callable[[], Awaitable[None]],
        *,
        stand_by: Callable[[], None],
        sever: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for the lock, calling ``stand_by`` while another process has it; then do ``work``.

        Returns when the work has ended, or after ``stop`` is set. ``sever`` is called before each
        cancellation of the work, to close the connections for which the work may be waiting.

        Raises:
            UnfitProxy: a proxy shares PostgreSQL's sessions between clients.
            LockLost, POSTGRES_AWAY, asyncpg.PostgresError: the caller should try again.

        """
        async with connected(
            self._database_url,
            self._leader_lock.mine(),
            command_timeout_s=ANSWER_TIMEOUT_S,
            # Behind a proxy the backend may hold statements of other clients under our names.
            statements=0,
        ) as conn:
            backend = await own_backend(conn, self._database_url)
            # Set here, because proxies refuse such settings at the start of a session.
            timeout_ms = round(LOCK_TIMEOUT_S * 1_000)
            await conn.execute(
                f"SET idle_session_timeout = {timeout_ms};"
                f"SET idle_in_transaction_session_timeout = {timeout_ms}"
            )
            if await self._take(conn, stop, stand_by):
                await self._hold(conn, backend, stop, work, sever)
                with contextlib.suppress(*POSTGRES_AWAY):
                    await locks.unlock(conn)

    async def _take(
        self, conn: "asyncpg.Connection[Any]", stop: asyncio.Event, stand_by: Callable[[], None]
    ) -> bool:
        while not stop.is_set():
            sent_s = time.monotonic()
            if await locks.try_lock(conn, self._leader_lock):
                self._beat_at_s = sent_s
                return True
            stand_by()
            await pause(stop, POLL_S)
        return False

    async def _hold(
        self,
        conn: "asyncpg.Connection[Any]",
        backend: int,
        stop: asyncio.Event,
        work: Callable[[], Awaitable[None]],
        sever: Callable[[], None],
    ) -> None:
        working = asyncio.ensure_future(work())
        beating = asyncio.create_task(self._beat(conn, backend))
        ending = asyncio.create_task(_patience(stop))
        everything = (working, beating, ending)
        try:
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if beating.done():
                beating.result()
        finally:
            self._beat_at_s = float("-inf")
            # Before each attempt: work that survived one may have connected again.
            await cancel_and_wait(everything, first=lambda: None if working.done() else sever())

    async def _beat(self, conn: "asyncpg.Connection[Any]", backend: int) -> None:
        """Keep the lock's connection from its idle timeout. Raises LockLost, or UnfitProxy."""
        lost = asyncio.Event()
        conn.add_termination_listener(lambda _: lost.set())
        while True:
            await pause(lost, HEARTBEAT_S)
            sent_s = time.monotonic()
            try:
                found = await conn.execute(f"SELECT WHERE pg_backend_pid() = {backend}")
            except POSTGRES_ERRORS as error:
                raise LockLost(f"and the lock with it ({in_words(error)})") from error
            if found != "SELECT 1":
                raise pools_transactions(self._database_url)
            self._beat_at_s = sent_s


async def refuse_unfit_proxy(database_url: str, leader_lock: LeaderLock) -> None:
    """Check once, before anything else is opened, that the lock can be held there.

    A PostgreSQL that does not answer passes this check. Raises UnfitProxy.
    """
    with contextlib.suppress(*POSTGRES_ERRORS):
        async with connected(
            database_url, leader_lock.mine(), command_timeout_s=ANSWER_TIMEOUT_S, statements=0
        ) as conn:
            await own_backend(conn, database_url)


async def _patience(stop: asyncio.Event) -> None:
    await stop.wait()
    await asyncio.sleep(STOP_PATIENCE_S)
