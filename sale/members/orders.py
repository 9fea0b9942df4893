"""Makes the documents of orders, and reads a member's own orders.

An order is readable from the moment of its 201: until the writer has applied it, it is read from
the member's record in Redis, and then from PostgreSQL.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Final

import asyncpg
import structlog
from redis.asyncio import Redis

from sale.db import read
from sale.db.errors import POSTGRES_ERRORS
from sale.db.read import OrderRow
from sale.domain.campaign import Campaign
from sale.domain.clock import rfc3339
from sale.domain.order import Order, OrderCursor, Ticket, order_number, parse_order_number
from sale.domain.problem import Problem, Refused
from sale.ledger.fold import SaleRecord
from sale.stock.catalogue import Catalogue
from sale.stock.records import read_member, read_member_everywhere

CODE_BYTES: Final = 16
CONFIRMED: Final = "confirmed"
LOW_BITS: Final = 0xFFFFFF
POSTGRES_PATIENCE_S: Final = 2.0

log = structlog.get_logger()


class TicketCodes:
    """Ticket codes: 128 bits of a keyed hash of the order and the ticket's number.

    Nobody can guess one without the deployment's secret, none is stored, and a replay gives the
    same again (``HOLES.md`` row 18: codes made from the clock).
    """

    def __init__(self, secret: bytes) -> None:
        self._keyed = hashlib.blake2b(key=secret, digest_size=CODE_BYTES)

    def of(self, order_no: str, quantity: int) -> list[Ticket]:
        """Give the tickets of an order. 0.4 µs a code here, where hmac.digest took 1.9."""
        tickets = []
        for no in range(1, quantity + 1):
            code = self._keyed.copy()
            code.update(f"{order_no}/{no}".encode())
            tickets.append(Ticket(no, code.hexdigest()))
        return tickets


def key_hash(idempotency_key: str) -> str:
    """Hash under which a key is kept, 16 hex digits: 64 bits are ample for one member's keys."""
    return hashlib.blake2b(idempotency_key.encode(), digest_size=8).hexdigest()


def live_tickets(records: Sequence[SaleRecord]) -> int:
    """Tickets that count towards the member's limit."""
    return sum(record.quantity for record in records)


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
        place = parse_order_number(order_no)
        if place is None:
            raise Refused(Problem.NOT_FOUND, "no such order")
        campaign_id, seq, low_bits = place
        campaign = await self._campaign(campaign_id)
        if campaign is not None:
            records, _ = await read_member(self._redis, campaign_id, member_no)
            for record in records:
                if record.seq == seq and record.at_ms & LOW_BITS == low_bits:
                    return self._from_redis(campaign, record, records)
        async with asyncio.timeout(POSTGRES_PATIENCE_S), self._pool.acquire() as connection:
            row = await read.order(connection, campaign_id, seq)
        if row is None or row.member_no != member_no or row.created_at_ms & LOW_BITS != low_bits:
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
            for record in (records := held[campaign_id]):
                cursor = OrderCursor(record.at_ms, campaign.id, record.seq)
                if before is None or cursor < before:
                    found[cursor] = self._from_redis(campaign, record, records)
        page = sorted(found, reverse=True)[: limit + 1]
        following = page[limit - 1] if len(page) > limit else None
        return [found[cursor] for cursor in page[:limit]], following

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

    def _from_redis(
        self, campaign: Campaign, record: SaleRecord, records: Sequence[SaleRecord]
    ) -> Order:
        return placed_order(
            self._codes,
            campaign,
            record.showing,
            record.quantity,
            record.seq,
            record.at_ms,
            campaign.price_fen,
            campaign.card_limit - live_tickets(records),
        )

    def _from_postgres(self, row: OrderRow) -> Order:
        order_no = order_number(row.campaign_id, row.seq, row.created_at_ms)
        return Order(
            order_no=order_no,
            campaign=row.campaign_id,
            showing=row.showing_id,
            quantity=row.quantity,
            state=row.state,
            amount_fen=row.amount_fen,
            pay_before=None,
            created_at=rfc3339(row.created_at_ms),
            tickets=self._codes.of(order_no, row.quantity),
            card_remaining=row.card_remaining,
        )


def placed_order(
    codes: TicketCodes,
    campaign: Campaign,
    showing: int,
    quantity: int,
    seq: int,
    at_ms: int,
    price_fen: int,
    card_remaining: int,
) -> Order:
    """Word an order as the contract has it."""
    order_no = order_number(campaign.id, seq, at_ms)
    return Order(
        order_no=order_no,
        campaign=campaign.id,
        showing=campaign.showings[showing].id,
        quantity=quantity,
        state=CONFIRMED,
        amount_fen=quantity * price_fen,
        pay_before=None,
        created_at=rfc3339(at_ms),
        tickets=codes.of(order_no, quantity),
        card_remaining=card_remaining,
    )
