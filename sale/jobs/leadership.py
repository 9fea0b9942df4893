"""Who of several like processes works: an advisory lock of PostgreSQL, with a heartbeat.

One process holds the lock and works, the others ask for it several times a second. A holder that is
killed loses it with its connection. One that is stopped, or cut off, must lose it as well, so the
lock's connection has an idle timeout that is longer than the heartbeat and shorter than any pause
we mean to survive. Between the messages of a prepared statement a session is not idle, for as long
as the next one does not come; so what a holder says is one message (``execute`` without arguments),
or it would keep the lock where it is stopped between two. A holder whose heart gets no answer drops
its work without waiting for it.

The lock only saves work. Nobody may rely on it for being alone: between the loss and the moment at
which the holder notices, there are two. What both do must be a compare-and-set.

Rejected: waiting inside ``pg_advisory_lock``. The waiting statement is not idle, so a stand-by that
is stopped would be given the lock and keep it.
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
"""Longest that work may take to end by itself once it was told to stop."""


class LockLost(ConnectionError):  # noqa: N818 - says what happened
    """The heart does not beat: another process may hold the lock by now."""


class Leadership:
    """One process' part in an office: it holds the lock, or stands by."""

    def __init__(self, database_url: str, leader_lock: LeaderLock) -> None:
        self._database_url = database_url
        self._leader_lock = leader_lock
        self._beat_at_s = float("-inf")

    @property
    def sure(self) -> bool:
        """Whether this process holds the lock for certain, by its own clock.

        A process that was stopped is not, from the moment at which it wakes up.
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
        """Wait for the lock, calling ``stand_by`` while another has it; then do ``work``.

        Returns when the work has ended, or ``stop`` is set. ``sever`` is called each time before
        work is cancelled: it cuts the connections on which the work may be waiting.

        Raises:
            UnfitProxy: something before PostgreSQL hands its sessions round.
            LockLost, POSTGRES_AWAY, asyncpg.PostgresError: try again.

        """
        async with connected(
            self._database_url,
            self._leader_lock.mine(),
            command_timeout_s=ANSWER_TIMEOUT_S,
            # A proxy may have given the backend to others before, with statements of our names.
            statements=0,
        ) as conn:
            backend = await own_backend(conn, self._database_url)
            # Set here, as proxies take no such settings at the start of a session.
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
            asked_s = time.monotonic()
            if await locks.try_lock(conn, self._leader_lock):
                self._beat_at_s = asked_s
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
            # Before each try: work that has outlived one may have connected again.
            await cancel_and_wait(everything, first=lambda: None if working.done() else sever())

    async def _beat(self, conn: "asyncpg.Connection[Any]", backend: int) -> None:
        """Keep the lock's connection from its idle timeout; ends by the error that it is lost."""
        lost = asyncio.Event()
        conn.add_termination_listener(lambda _: lost.set())
        while True:
            await pause(lost, HEARTBEAT_S)
            asked_s = time.monotonic()
            try:
                found = await conn.execute(f"SELECT WHERE pg_backend_pid() = {backend}")
            except POSTGRES_ERRORS as error:
                raise LockLost(f"and the lock with it ({in_words(error)})") from error
            if found != "SELECT 1":
                raise pools_transactions(self._database_url)
            self._beat_at_s = asked_s


async def refuse_unfit_proxy(database_url: str, leader_lock: LeaderLock) -> None:
    """Look once, before anything else is opened, whether the lock can be held there.

    A PostgreSQL that is away is none of this function's business. Raises UnfitProxy.
    """
    with contextlib.suppress(*POSTGRES_ERRORS):
        async with connected(
            database_url, leader_lock.mine(), command_timeout_s=ANSWER_TIMEOUT_S, statements=0
        ) as conn:
            await own_backend(conn, database_url)


async def _patience(stop: asyncio.Event) -> None:
    await stop.wait()
    await asyncio.sleep(STOP_PATIENCE_S)
