"""Paying an order: the member's call, the provider's notice, the presentation to the ledger.

What comes in is written to PostgreSQL first and presented to the ledger until an applied event
names it, so a process may die at any line here. One payment an order, numbered by a hash of the
order's number, so nobody pays twice.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from typing import Final

import asyncpg
import msgspec
import structlog

from sale.db import payments
from sale.db.payments import PaymentRow
from sale.domain.clock import parse_moment, rfc3339, to_ms
from sale.domain.order import OrderState, Time, parse_order_number
from sale.domain.problem import Problem, Refused
from sale.domain.text import Text
from sale.members.orders import OwnOrders
from sale.members.provider import PROVIDER_TIMEOUT_S, BadNotice, Paid, ProviderError, Providers
from sale.stock.errors import REDIS_ERRORS
from sale.stock.scripts import CallReply, Scripts, Untrusted

NUMBER_LETTERS: Final = 26
EXPIRES_BEFORE_MS: Final = 15_000
"""The provider takes no money in the last seconds of a hold."""
ASK_FIRST_AFTER_MS: Final = 10_000
POSTGRES_PATIENCE_S: Final = 2.0
PRESENT_TRIES: Final = 5

log = structlog.get_logger()


class PaymentView(msgspec.Struct, frozen=True):
    """Where and until when an order is paid."""

    payment_no: str
    provider: str
    pay_url: str
    amount_fen: int
    pay_before: Time


def payment_number(order_no: str) -> str:
    """Number of an order's payment: 26 letters of a hash. WeChat Pay takes at most 32."""
    number = int.from_bytes(hashlib.blake2b(order_no.encode(), digest_size=16).digest(), "big")
    letters = []
    for _ in range(NUMBER_LETTERS):
        number, letter = divmod(number, 26)
        letters.append(chr(ord("a") + letter))
    return "".join(letters)


class PayDesk:
    """Takes members' payments and providers' notices in this process."""

    def __init__(
        self, orders: OwnOrders, scripts: Scripts, pool: asyncpg.Pool, providers: Providers
    ) -> None:
        self._orders = orders
        self._scripts = scripts
        self._pool = pool
        self._providers = providers

    async def pay(self, member_no: int, order_no: str, return_to: str | None) -> PaymentView:
        """Begin the payment of a held order, or find it. Raises Refused."""
        order = await self._orders.one(member_no, order_no)
        place = parse_order_number(order_no)
        if place is None or order.state != OrderState.HELD or order.pay_before is None:
            raise Refused(
                Problem.WRONG_STATE,
                Text("这个订单现在不需要付款。", "This order is not waiting for a payment."),
                reason=order.state,
            )
        if not self._providers:
            raise Refused(
                Problem.UNAVAILABLE, Text("暂时不能付款。", "No payment provider is configured.")
            )
        provider = next(iter(self._providers.values()))
        now_ms, pay_before_ms = int(time.time() * 1000), to_ms(parse_moment(order.pay_before))
        expires_at_ms = pay_before_ms - EXPIRES_BEFORE_MS
        if expires_at_ms <= now_ms:
            raise Refused(
                Problem.WRONG_STATE,
                Text("付款时间已到。", "The time for paying is over."),
                reason="too-late",
            )
        async with asyncio.timeout(POSTGRES_PATIENCE_S), self._pool.acquire() as connection:
            row = await payments.begin(
                connection, payment_number(order_no), order_no, place, member_no, order.amount_fen,
                provider.name, expires_at_ms, min(now_ms + ASK_FIRST_AFTER_MS, expires_at_ms),
            )  # fmt: skip
        pay_url = row.pay_url or await self._create(row, return_to or "")
        return PaymentView(
            row.payment_no, row.provider, pay_url, row.amount_fen, rfc3339(pay_before_ms)
        )

    async def _create(self, row: PaymentRow, return_to: str) -> str:
        provider = self._providers.get(row.provider)
        if provider is None:
            raise Refused(Problem.UNAVAILABLE, f"provider {row.provider!r} is not configured")
        try:
            async with asyncio.timeout(PROVIDER_TIMEOUT_S):
                pay_url = await provider.create(
                    row.payment_no, row.amount_fen, row.expires_at_ms, return_to
                )
        except (ProviderError, OSError, TimeoutError) as error:
            log.warning("payment.not_created", payment=row.payment_no, why=type(error).__name__)
            raise Refused(Problem.UNAVAILABLE, "the payment provider does not answer") from None
        async with self._pool.acquire() as connection:
            await payments.set_url(connection, row.payment_no, pay_url)
        return pay_url

    async def notify(self, provider: str, headers: Mapping[str, str], body: bytes) -> None:
        """Take a provider's notice. Returns once what it says is durable. Raises Refused.

        A notice that says nothing new is taken as well: a provider repeats what is refused.
        """
        port = self._providers.get(provider)
        if port is None:
            raise Refused(Problem.NOT_FOUND, f"no provider {provider!r}")
        try:
            notice = port.verify(headers, body)
        except BadNotice as error:
            log.warning("payment.bad_notice", provider=provider, why=str(error))
            raise Refused(Problem.FORBIDDEN, "this is no notice of that provider") from None
        async with asyncio.timeout(POSTGRES_PATIENCE_S), self._pool.acquire() as connection:
            row = await payments.one(connection, notice.payment_no)
            if row is None or row.provider != provider:
                raise Refused(Problem.NOT_FOUND, "no such payment")
            if notice.status.paid is Paid.YES:
                await payments.record_paid(
                    connection, row.payment_no, notice.status.amount_fen, notice.status.ref
                )
                row = await payments.one(connection, row.payment_no)
        if row is not None and row.state == "paid" and row.outcome is None:
            await present(self._scripts, row)  # the keeper does it where this does not


async def present(scripts: Scripts, row: PaymentRow) -> str:
    """Present money that came in to the ledger; give '' once it has decided, else why not."""
    place = parse_order_number(row.order_no)
    if place is None:
        return "its order number cannot be read"
    try:
        for _ in range(PRESENT_TRIES):
            reply = await scripts.pay(place, row.member_no, row.amount_fen)
            match reply.reply:
                case CallReply.OK | CallReply.REPLAYED:
                    return ""
                case CallReply.DUE:
                    await scripts.expire(place.campaign_id)
                case _:
                    return str(reply.reply.name.lower())
    except (Untrusted, *REDIS_ERRORS) as error:
        return type(error).__name__
    return "its hold does not end"
