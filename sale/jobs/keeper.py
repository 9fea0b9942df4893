"""The keeper drives money until it has arrived: it presents, asks, closes and refunds.

Everything it does is known by a number and may be done twice, so two keepers, or one that is killed
at any moment, do no harm: whoever works takes rows for some seconds (``FOR UPDATE SKIP LOCKED``),
and what was taken by a keeper that died is taken again. A try that fails is put off, twice as long
each time, up to a bound, and is never given up: after many, a refund is stuck, which is for people,
and shows in the metrics, the alerts and ``sale report money``.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final

import asyncpg
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from sale.db import payments
from sale.db.errors import POSTGRES_ERRORS, in_words
from sale.db.payments import PaymentRow, RefundRow
from sale.jobs.backoff import pause
from sale.members.pay import present
from sale.members.provider import PROVIDER_TIMEOUT_S, Paid, ProviderError, Providers, Returned
from sale.stock.scripts import Scripts

TURN_S: Final = 0.2
TAKEN_FOR_S: Final = 10.0
"""How long a row is left to the keeper that took it: longer than any of its calls."""
PAYMENTS_MAX: Final = 100
AT_ONCE: Final = 10
PUT_OFF_MAX_S: Final = 60.0
ASK_AGAIN_S: Final = 5.0
STUCK_AFTER: Final = 20
ENDED: Final = frozenset({"expired", "cancelled"})
REFUND_STATES: Final = ("due", "sent", "done", "stuck")

log = structlog.get_logger()


class KeeperMetrics:
    """The keeper's metrics, registered in ``registry``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.payments = Counter(
            "sale_payments",
            "What became of the keeper's looks at payments.",
            ["outcome"],
            registry=registry,
        )
        self.refunds = Gauge(
            "sale_refunds", "Refunds by their state.", ["state"], registry=registry
        )
        for state in REFUND_STATES:
            self.refunds.labels(state).set(0)


class Keeper:
    """Repeats its turns until it is stopped."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        scripts: Scripts,
        providers: Providers,
        *,
        refunds_per_s: int,
        registry: CollectorRegistry,
    ) -> None:
        self._pool = pool
        self._scripts = scripts
        self._providers = providers
        self._refunds_a_turn = max(1, round(refunds_per_s * TURN_S))
        self._metrics = KeeperMetrics(registry)
        self._failing = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set; what is under way is finished."""
        while not stop.is_set():
            began = time.monotonic()
            try:
                await self.turn()
            except POSTGRES_ERRORS as error:
                if self._failing != type(error).__name__:
                    log.warning("keeper.without_postgres", why=in_words(error))
                self._failing = type(error).__name__
            else:
                self._failing = ""
            await pause(stop, max(TURN_S - (time.monotonic() - began), TURN_S / 10))

    async def turn(self) -> None:
        """Take what waits, once. Raises PostgreSQL's errors."""
        async with self._pool.acquire() as connection:
            due = await payments.take_payments(connection, PAYMENTS_MAX, TAKEN_FOR_S)
            refunds = await payments.take_refunds(connection, self._refunds_a_turn, TAKEN_FOR_S)
            counts = await payments.refunds_by_state(connection)
        for state in REFUND_STATES:
            self._metrics.refunds.labels(state).set(counts.get(state, 0))
        gate = asyncio.Semaphore(AT_ONCE)

        async def bounded(work: Coroutine[Any, Any, None]) -> None:
            async with gate:
                try:
                    await work
                except POSTGRES_ERRORS as error:  # taken again in TAKEN_FOR_S seconds
                    log.warning("keeper.step_failed", why=in_words(error))
                except Exception:
                    log.exception("keeper.step_failed")  # one bad row never stops the others

        async with asyncio.TaskGroup() as group:
            for work in [*(self._see_to(row) for row in due), *(self._refund(r) for r in refunds)]:
                group.create_task(bounded(work))

    async def _see_to(self, row: PaymentRow) -> None:
        """Take the next step of a payment."""
        if row.state == "paid":
            trouble = await present(self._scripts, row)
            # Once it is decided, the event names the payment when it is applied.
            await self._put_off(row, trouble, 1.0 if trouble else TAKEN_FOR_S)
            self._count("presented" if not trouble else "not-presented")
            return
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
        except (ProviderError, OSError, TimeoutError) as error:
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
        returned, trouble = Returned.FAILED, f"provider {row.provider!r} is not configured"
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
            except (ProviderError, OSError, TimeoutError) as error:
                trouble = str(error) or type(error).__name__
        state, next_in_s = "due", backoff_s(row.tries)
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
