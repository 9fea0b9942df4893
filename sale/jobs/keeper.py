"""The keeper drives money until it has arrived: it presents, asks, closes and refunds.

One keeper is active and the others stand by (``leadership.py``). The lock only saves work: each
step is known by a number at the ledger or at the provider and may be done twice, so two keepers, or
one that is killed at any moment, do no harm. A keeper takes rows for some seconds (``FOR UPDATE
SKIP LOCKED``), and rows that a dead one had taken are taken again. A try that fails is put off,
twice as long each time, up to a bound. After many failed tries a refund is stuck, which is for
people; it shows in the metrics, the alerts, ``sale doctor`` and ``sale report money``.

Presenting, asking and refunding are loops of their own, so that a provider that does not answer
delays no presentation. All of the keeper's work is in PostgreSQL, so it waits while that is away.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import asyncpg
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from sale.db import payments
from sale.db.errors import POSTGRES_ERRORS, in_words
from sale.db.locks import KEEPER
from sale.db.payments import PaymentRow, RefundRow
from sale.jobs.backoff import Backoff, pause
from sale.jobs.leadership import Leadership
from sale.members.pay import present
from sale.members.provider import PROVIDER_TIMEOUT_S, Paid, Providers, Returned
from sale.stock.scripts import Scripts

TURN_S: Final = 0.2
COUNT_EVERY_S: Final = 2.0
AT_ONCE: Final = 10
TAKEN_MAX: Final = 50
TAKEN_FOR_S: Final = 30.0
"""How long a row is left to the keeper that took it."""
PRESENTED_FOR_S: Final = 10.0
"""The same of a payment that is presented: INV-11 allows a minute."""
PUT_OFF_MAX_S: Final = 60.0
ASK_AGAIN_S: Final = 5.0
STUCK_AFTER: Final = 20
ENDED: Final = frozenset({"expired", "cancelled"})
REFUND_STATES: Final = ("due", "sent", "done", "stuck")

assert TAKEN_MAX / AT_ONCE * PROVIDER_TIMEOUT_S < TAKEN_FOR_S  # noqa: S101 - the bound is derived

Row = TypeVar("Row")
log = structlog.get_logger()


class KeeperMetrics:
    """The keeper's metrics, registered in ``registry``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.active = Gauge(
            "sale_keeper_active",
            "1 if this keeper is active, 0 if it is a standby.",
            registry=registry,
        )
        self.payments = Counter(
            "sale_payments",
            "Steps that the keeper took with payments.",
            ["outcome"],
            registry=registry,
        )
        self.refunds = Gauge(
            "sale_refunds", "Refunds by their state.", ["state"], registry=registry
        )


class Keeper:
    """Repeats its turns until it is stopped."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        scripts: Scripts,
        providers: Providers,
        database_url: str,
        *,
        refunds_per_s: int,
        registry: CollectorRegistry,
    ) -> None:
        self._pool = pool
        self._scripts = scripts
        self._providers = providers
        self._refunds_a_turn = max(1, min(round(refunds_per_s * TURN_S), TAKEN_MAX))
        self._refund_turn_s = self._refunds_a_turn / refunds_per_s
        self._metrics = KeeperMetrics(registry)
        self._leadership = Leadership(database_url, KEEPER)
        self._failed_steps: set[str] = set()
        self.active: bool | None = None
        """Whether this keeper is active; None until that is decided."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set. Raises UnfitProxy if the lock cannot be held."""
        backoff = Backoff()

        async def lead() -> None:
            self._set_active(active=True)
            backoff.reset()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._repeat(stop, "present", self.present_taken, TURN_S))
                group.create_task(self._repeat(stop, "ask", self.ask, TURN_S))
                group.create_task(self._repeat(stop, "refund", self.refund, self._refund_turn_s))
                group.create_task(self._repeat(stop, "count", self._count_refunds, COUNT_EVERY_S))

        def stand_by() -> None:
            backoff.reset()
            self._set_active(active=False)

        try:
            while not stop.is_set():
                try:
                    await self._leadership.lead(stop, lead, stand_by=stand_by)
                except POSTGRES_ERRORS as error:
                    self._failed("lead", error)
                    self._set_active(active=False)
                    await pause(stop, backoff.next())
        finally:
            self._metrics.active.set(0)

    def _set_active(self, *, active: bool) -> None:
        if self.active is not active:
            self.active = active
            self._metrics.active.set(active)
            if active:
                self._failed_steps.clear()
                log.info("keeper.active")
            else:
                self._metrics.refunds.clear()  # the active one tells them
                log.info("keeper.standby")

    async def _repeat(
        self, stop: asyncio.Event, step: str, turn: Callable[[], Awaitable[None]], every_s: float
    ) -> None:
        while not stop.is_set():
            began_s = time.monotonic()
            try:
                await turn()
            except Exception as error:  # noqa: BLE001 - one failing step must not stop the others
                self._failed(step, error)
            else:
                if step in self._failed_steps:
                    log.info("keeper.step_back", step=step)
                self._failed_steps.discard(step)
            await pause(stop, max(every_s - (time.monotonic() - began_s), every_s / 10))

    def _failed(self, step: str, error: Exception) -> None:
        """Log the first failure of a step; the next turn tries it again, without limit."""
        if step not in self._failed_steps:
            log.warning("keeper.step_failed", step=step, why=in_words(error))
        self._failed_steps.add(step)

    # Turns: each takes what waits, once, and raises PostgreSQL's errors -------------------------

    async def present_taken(self) -> None:
        """Present the payments that came in and that no applied event names yet."""
        async with self._pool.acquire() as connection:
            rows = await payments.take_payments(connection, "paid", TAKEN_MAX, PRESENTED_FOR_S)
        await self._each(rows, self._present)

    async def ask(self) -> None:
        """Ask what became of open payments, and close those of ended orders."""
        async with self._pool.acquire() as connection:
            rows = await payments.take_payments(connection, "open", TAKEN_MAX, TAKEN_FOR_S)
        await self._each(rows, self._ask)

    async def refund(self) -> None:
        """Send money back, and ask whether it has arrived."""
        async with self._pool.acquire() as connection:
            rows = await payments.take_refunds(connection, self._refunds_a_turn, TAKEN_FOR_S)
        await self._each(rows, self._refund)

    async def _count_refunds(self) -> None:
        async with self._pool.acquire() as connection:
            counts = await payments.refunds_by_state(connection)
        for state in REFUND_STATES:
            self._metrics.refunds.labels(state).set(counts.get(state, 0))

    async def _each(self, rows: Iterable[Row], step: Callable[[Row], Awaitable[None]]) -> None:
        """Take a step with each row, AT_ONCE at a time; one that fails stops no other."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(row: Row) -> None:
            async with gate:
                try:
                    await step(row)
                except POSTGRES_ERRORS as error:  # the row is taken again later
                    self._failed("write", error)
                except Exception:
                    log.exception("keeper.row_failed")

        async with asyncio.TaskGroup() as group:
            for row in rows:
                group.create_task(one(row))

    # Rows -----------------------------------------------------------------------------------------

    async def _present(self, row: PaymentRow) -> None:
        trouble = await present(self._scripts, row)
        # Once it is decided, the event names the payment when it is applied.
        await self._put_off(row, trouble, 1.0 if trouble else PRESENTED_FOR_S)
        self._count("presented" if not trouble else "not-presented")

    async def _ask(self, row: PaymentRow) -> None:
        provider = self._providers.get(row.provider)
        if provider is None:
            await self._put_off(row, f"provider {row.provider!r} is not configured", PUT_OFF_MAX_S)
            return
        ended = row.order_state in ENDED or time.time() * 1000 > row.expires_at_ms
        try:
            async with asyncio.timeout(PROVIDER_TIMEOUT_S):
                status = await (
                    provider.close(row.payment_no) if ended else provider.query(row.payment_no)
                )
        except Exception as error:  # noqa: BLE001 - an adapter's fault counts as a failed try
            await self._put_off(row, str(error) or type(error).__name__, backoff_s(row.tries))
            self._count("not-answered")
            return
        async with self._pool.acquire() as connection:
            if status.paid is Paid.YES:
                await payments.record_paid(
                    connection, row.payment_no, status.amount_fen, status.ref
                )
                self._count("found-paid")
            elif status.paid is Paid.CLOSED:
                await payments.record_closed(connection, row.payment_no)
                self._count("closed")
            else:
                left_s = row.expires_at_ms / 1000 - time.time()
                await payments.put_off_payment(
                    connection, row.payment_no, max(min(left_s, PUT_OFF_MAX_S), 1.0), ""
                )
                self._count("open")

    async def _refund(self, row: RefundRow) -> None:
        """Take the next step of a refund: ask for it, or ask what became of it."""
        provider = self._providers.get(row.provider)
        returned: Returned | None = None
        trouble = f"provider {row.provider!r} is not configured"
        if provider is not None:
            try:
                async with asyncio.timeout(PROVIDER_TIMEOUT_S):
                    # Also after a try whose outcome is unknown: under the same number.
                    returned = await (
                        provider.query_refund(row.refund_no)
                        if row.state == "sent"
                        else provider.refund(
                            row.payment_no, row.refund_no, row.amount_fen, row.total_fen
                        )
                    )
                trouble = "the provider refused it" if returned is Returned.FAILED else ""
            except Exception as error:  # noqa: BLE001 - an adapter's fault counts as a failed try
                trouble = str(error) or type(error).__name__
        # Where nothing was answered, the same question again.
        state, next_in_s = row.state if returned is None else "due", backoff_s(row.tries)
        if returned is Returned.DONE:
            state, next_in_s = "done", 0.0
        elif returned is Returned.PENDING:
            state, next_in_s = "sent", ASK_AGAIN_S
        elif row.tries >= STUCK_AFTER:
            state = "stuck"
            log.error("refund.stuck", refund=row.refund_no, why=trouble)
        async with self._pool.acquire() as connection:
            await payments.set_refund(connection, row.refund_no, state, next_in_s, trouble)

    async def _put_off(self, row: PaymentRow, trouble: str, for_s: float) -> None:
        async with self._pool.acquire() as connection:
            await payments.put_off_payment(connection, row.payment_no, for_s, trouble)

    def _count(self, outcome: str) -> None:
        self._metrics.payments.labels(outcome).inc()


def backoff_s(tries: int) -> float:
    """How long to wait after so many tries: twice as long each time, bounded."""
    return float(min(2.0 ** min(tries, 10), PUT_OFF_MAX_S))
