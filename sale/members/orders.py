"""Makes the documents of orders, and reads a member's own orders.

An order is readable from the moment of its 201: until the writer has applied it, it is read from
the member's record in Redis, and then from PostgreSQL.
"""

import asyncio
import hashlib
from functools import lru_cache
from typing import Final

import asyncpg
import msgspec
import structlog
from redis.asyncio import Redis

from sale.db import payments, read
from sale.db.errors import POSTGRES_ERRORS
from sale.db.read import OrderRow
from sale.domain.campaign import Campaign
from sale.domain.clock import rfc3339
from sale.domain.order import (
    COLLECTED,
    GIVEN_BACK,
    VALID,
    Order,
    OrderCursor,
    OrderState,
    Payment,
    PaymentState,
    Ticket,
    order_number,
    parse_order_number,
)
from sale.domain.problem import Problem, Refused
from sale.ledger.fold import OrderRecord
from sale.stock.catalogue import Catalogue
from sale.stock.records import MemberOrders, read_member, read_member_everywhere

CODE_BYTES: Final = 16
POSTGRES_PATIENCE_S: Final = 2.0
CANCELLED: Final = "cancelled"
_TICKET_STATES: Final = {VALID: "valid", COLLECTED: "collected", GIVEN_BACK: CANCELLED}

log = structlog.get_logger()


class TicketCodes:
    """Ticket codes: 128 bits of a keyed hash of the order and the ticket's number.

    Nobody can guess one without the deployment's secret, none is stored, and a replay gives the
    same again (``HOLES.md`` row 18: codes made from the clock).
    """

    def __init__(self, secret: bytes) -> None:
        self._keyed = hashlib.blake2b(key=secret, digest_size=CODE_BYTES)

    def of(self, order_no: str, quantity: int) -> list[Ticket]:
        """Give the tickets of a new order. 0.4 µs a code here, where hmac.digest took 1.9."""
        return [Ticket(no, self._code(order_no, no)) for no in range(1, quantity + 1)]

    def by_letters(self, order_no: str, letters: str, *, ended: bool) -> list[Ticket]:
        """Give the tickets of an order by their letters; ``ended``: none of them counts."""
        return [
            Ticket(no, self._code(order_no, no), CANCELLED if ended else _TICKET_STATES[letter])
            for no, letter in enumerate(letters, 1)
        ]

    def _code(self, order_no: str, no: int) -> str:
        code = self._keyed.copy()
        code.update(f"{order_no}/{no}".encode())
        return code.hexdigest()


class NoCodes(TicketCodes):
    """Tickets without their codes, for those who may see an order and not collect it."""

    def __init__(self) -> None:
        super().__init__(b"")

    def _code(self, order_no: str, no: int) -> str:  # noqa: ARG002 - the signature of the base
        return ""


def key_hash(idempotency_key: str) -> str:
    """Hash under which a key is kept, 16 hex digits: 64 bits are ample for one member's keys."""
    return hashlib.blake2b(idempotency_key.encode(), digest_size=8).hexdigest()


class OwnOrders:
    """A member's own orders; those of others are not found."""

    def __init__(
        self, catalogue: Catalogue, redis: Redis, pool: asyncpg.Pool, codes: TicketCodes
    ) -> None:
        self._catalogue = catalogue
        self._redis = redis
        self._pool = pool
        self._codes = codes

    async def one(self, member_no: int, order_no: str) -> Order:
        """Give one order. Raises Refused (not-found), also for another member's order."""
        return (await self._with_refunds([await self._one(member_no, order_no)]))[0]

    async def _one(self, member_no: int, order_no: str) -> Order:
        place = parse_order_number(order_no)
        if place is None:
            raise Refused(Problem.NOT_FOUND, "no such order")
        campaign = await self._campaign(place.campaign_id)
        if campaign is not None:
            own = await read_member(self._redis, place.campaign_id, member_no)
            for record in own.records:
                if place.is_of(record.seq, record.at_ms):
                    return self._from_redis(campaign, record, own)
        async with asyncio.timeout(POSTGRES_PATIENCE_S), self._pool.acquire() as connection:
            row = await read.order(connection, place.campaign_id, place.seq)
        if (
            row is None
            or row.member_no != member_no
            or not place.is_of(row.record.seq, row.record.at_ms)
        ):
            raise Refused(Problem.NOT_FOUND, "no such order")
        return self._from_postgres(row)

    async def page(
        self, member_no: int, before: OrderCursor | None, limit: int
    ) -> tuple[list[Order], OrderCursor | None]:
        """Give up to ``limit`` orders, newest first, and where to go on.

        If PostgreSQL is away, gives the orders of the campaigns in Redis.
        """
        found: dict[OrderCursor, Order] = {}
        try:
            async with asyncio.timeout(POSTGRES_PATIENCE_S), self._pool.acquire() as connection:
                rows = await read.orders_of_member(
                    connection, member_no, before=before, limit=limit + 1
                )
        except POSTGRES_ERRORS as error:
            log.warning("orders.without_postgres", error=type(error).__name__)
            rows = []
        found.update({row.cursor: self._from_postgres(row) for row in rows})
        held = await read_member_everywhere(self._redis, member_no)
        campaigns = await self._catalogue.those_for_sale(list(held))
        for campaign_id, campaign in campaigns.items():
            for record in (own := held[campaign_id]).records:
                cursor = OrderCursor(record.at_ms, campaign.id, record.seq)
                if before is None or cursor < before:
                    found[cursor] = self._from_redis(campaign, record, own)
        page = sorted(found, reverse=True)[: limit + 1]
        following = page[limit - 1] if len(page) > limit else None
        orders = [found[cursor] for cursor in page[:limit]]
        return await self._with_refunds(orders), following

    async def _with_refunds(self, orders: list[Order]) -> list[Order]:
        """Say of orders whose money goes back how much has arrived, as far as PostgreSQL tells."""
        asked = [each.order_no for each in orders if each.payment.state == PaymentState.REFUNDING]
        if not asked:
            return orders
        try:
            async with asyncio.timeout(POSTGRES_PATIENCE_S), self._pool.acquire() as connection:
                refunded = await payments.refunded(connection, asked)
        except POSTGRES_ERRORS as error:
            log.warning("orders.without_refunds", error=type(error).__name__)
            return orders
        return [
            each if each.order_no not in refunded else _refunded(each, refunded[each.order_no])
            for each in orders
        ]

    async def _campaign(self, campaign_id: str) -> Campaign | None:
        """Give a campaign that may have orders.

        If the catalogue has none, Redis is read again: the campaign may be younger than the
        catalogue's last read, and its orders are readable at once.
        """
        campaign = await self._catalogue.for_sale(campaign_id)
        if campaign is None:
            now = await self._catalogue.read(campaign_id)
            campaign = now.campaign if now is not None and now.visible else None
        return campaign

    def _from_redis(self, campaign: Campaign, record: OrderRecord, own: MemberOrders) -> Order:
        return changed_order(
            self._codes,
            campaign,
            record,
            campaign.card_limit - own.live_tickets,
            own.pay_before.get(record.seq, 0),
        )

    def _from_postgres(self, row: OrderRow) -> Order:
        return _worded(
            self._codes,
            row.record,
            campaign_id=row.campaign_id,
            showing_id=row.showing_id,
            price_fen=row.price_fen,
            payment=row.payment,
            cancel_until=row.cancel_until,
            card_remaining=row.card_remaining,
            pay_before_ms=row.pay_before_ms,
        )


def _refunded(order: Order, refunded_fen: int) -> Order:
    """Word that so much has gone back of an order's money."""
    live = sum(ticket.state != CANCELLED for ticket in order.tickets)
    goes_back = order.amount_fen - live * (order.amount_fen // order.quantity)
    state = PaymentState.REFUNDED if refunded_fen >= goes_back else PaymentState.REFUNDING
    payment = msgspec.structs.replace(order.payment, state=state, refunded_fen=refunded_fen)
    return msgspec.structs.replace(order, payment=payment)


def placed_order(
    codes: TicketCodes,
    campaign: Campaign,
    showing: int,
    quantity: int,
    seq: int,
    at_ms: int,
    price_fen: int,
    card_remaining: int,
    pay_before_ms: int = 0,
) -> Order:
    """Word an order that has just been made, as the contract has it; 0: it is not held."""
    order_no = order_number(campaign.id, seq, at_ms)
    return Order(
        order_no=order_no,
        campaign=campaign.id,
        showing=campaign.showings[showing].id,
        quantity=quantity,
        state=OrderState.HELD if pay_before_ms else OrderState.CONFIRMED,
        amount_fen=quantity * price_fen,
        pay_before=rfc3339(pay_before_ms) if pay_before_ms else None,
        created_at=rfc3339(at_ms),
        tickets=codes.of(order_no, quantity),
        card_remaining=card_remaining,
        payment=_payment(campaign.payment, price_fen, quantity, quantity),
        cancel_until=campaign.cancel_until_shown,
    )


def changed_order(
    codes: TicketCodes,
    campaign: Campaign,
    record: OrderRecord,
    card_remaining: int,
    pay_before_ms: int,
) -> Order:
    """Word an order from its record; ``pay_before_ms`` is 0 unless it is held."""
    return _worded(
        codes,
        record,
        campaign_id=campaign.id,
        showing_id=campaign.showings[record.showing].id,
        price_fen=campaign.price_fen,
        payment=campaign.payment,
        cancel_until=campaign.cancel_until_shown,
        card_remaining=card_remaining,
        pay_before_ms=pay_before_ms,
    )


def _worded(
    codes: TicketCodes,
    record: OrderRecord,
    *,
    campaign_id: str,
    showing_id: str,
    price_fen: int,
    payment: str,
    cancel_until: str | None,
    card_remaining: int,
    pay_before_ms: int,
) -> Order:
    order_no = order_number(campaign_id, record.seq, record.at_ms)
    held = record.state is OrderState.HELD
    collected = record.live > 0 and VALID not in record.letters
    return Order(
        order_no=order_no,
        campaign=campaign_id,
        showing=showing_id,
        quantity=record.quantity,
        state="collected" if collected else record.state,
        amount_fen=record.quantity * price_fen,
        pay_before=rfc3339(pay_before_ms) if held and pay_before_ms else None,
        created_at=rfc3339(record.at_ms),
        tickets=codes.by_letters(order_no, record.letters, ended=not record.live),
        card_remaining=card_remaining,
        payment=_payment(
            payment, price_fen, record.quantity, record.live,
            paid=record.paid, returned=record.returned,
        ),
        cancel_until=cancel_until,
    )  # fmt: skip


@lru_cache(maxsize=1_024)
def _payment(
    method: str,
    price_fen: int,
    quantity: int,
    live: int,
    *,
    paid: bool = False,
    returned: bool = False,
) -> Payment:
    """Word the money of an order; the orders of a batch share one."""
    amount_fen = quantity * price_fen
    if method == "none" or not amount_fen:
        return Payment(PaymentState.NONE, amount_fen, 0, 0)
    if not paid:
        return Payment(PaymentState.DUE if live else PaymentState.NONE, amount_fen, 0, 0)
    goes_back = returned or live < quantity
    state = PaymentState.REFUNDING if goes_back else PaymentState.PAID
    return Payment(state, amount_fen, amount_fen, 0)
