"""Payments and refunds without HTTP: orders of one campaign, and a provider of the tests' own."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from shop import Shop
from stock_maker import Bid, campaign, key, member, now_ms

from sale.db import payments
from sale.domain.order import LOW_BITS, OrderPlace, order_number
from sale.jobs.keeper import Keeper
from sale.members.pay import payment_number
from sale.members.provider import BadNotice, Notice, Paid, ProviderError, Returned, Status
from sale.stock.scripts import CallReply, Decision

PRICE_FEN = 500
HANGS_S = 60.0


class Bank:
    """A provider that does what its plan says; by default it pays refunds at once."""

    name = "bank"

    def __init__(self) -> None:
        self.paid: dict[str, int] = {}
        self.returned: dict[str, int] = {}
        """What was sent back under each number; a number is paid once."""
        self.asked: Counter[str] = Counter()
        self.plan: dict[str, list[str]] = {}
        """What happens to the calls of a refund, in order: see ``_turn``. The last one stays."""
        self.silent = False
        self.pause_s = 0.0
        """Before and after a refund is paid, so that a caller may be cancelled in either place."""

    async def create(self, payment_no: str, amount: int, expires_at_ms: int, return_to: str) -> str:
        raise ProviderError(f"{payment_no}: {amount}, {expires_at_ms}, {return_to}")

    async def query(self, payment_no: str) -> Status:
        if self.silent:
            await asyncio.sleep(HANGS_S)
        amount = self.paid.get(payment_no)
        return Status(Paid.NO) if amount is None else Status(Paid.YES, amount, "ref")

    async def close(self, payment_no: str) -> Status:
        found = await self.query(payment_no)
        return found if found.paid is Paid.YES else Status(Paid.CLOSED)

    async def refund(
        self, payment_no: str, refund_no: str, amount_fen: int, total_fen: int
    ) -> Returned:
        assert refund_no.startswith(payment_no)
        assert amount_fen <= total_fen
        self.asked[refund_no] += 1
        await asyncio.sleep(self.pause_s)
        turn = self._turn(refund_no)
        if turn == "refused":
            return Returned.FAILED
        if turn == "broken":
            raise KeyError(refund_no)
        if turn == "away":
            raise ProviderError("away")
        assert self.returned.setdefault(refund_no, amount_fen) == amount_fen
        await asyncio.sleep(HANGS_S if turn == "lost" else self.pause_s)
        return Returned.PENDING if turn == "accepted" else Returned.DONE

    async def query_refund(self, refund_no: str) -> Returned:
        self.asked[f"query {refund_no}"] += 1
        turn = self._turn(refund_no)
        if turn == "away":
            raise ProviderError("away")
        if turn == "refused":
            return Returned.FAILED
        return Returned.PENDING if turn == "accepted" else Returned.DONE

    def verify(self, headers: Mapping[str, str], body: bytes) -> Notice:
        raise BadNotice(f"{headers} {body!r}")

    def _turn(self, refund_no: str) -> str:
        """'done', 'accepted' (not there yet), 'lost' (done, no answer), 'refused', 'away', …"""
        turns = self.plan.get(refund_no) or self.plan.get("*") or ["done"]
        return turns.pop(0) if len(turns) > 1 else turns[0]


class Till:
    """A campaign that is paid online, and its orders by member."""

    def __init__(self, shop: Shop, bank: Bank) -> None:
        self.shop, self.bank = shop, bank
        self.orders: dict[int, str] = {}
        self.registry = CollectorRegistry()

    def keeper(self, refunds_per_s: int = 200) -> Keeper:
        """A keeper with its own registry, that of the last one stays in ``registry``."""
        self.registry = CollectorRegistry()
        return Keeper(
            self.shop.pool,
            self.shop.scripts,
            {self.bank.name: self.bank},
            self.shop.database_url,
            refunds_per_s=refunds_per_s,
            registry=self.registry,
        )

    async def hold(self, *numbers: int, quantity: int = 1) -> None:
        """Hold tickets for each member and begin to pay them."""
        stock = self.shop.stock
        for at in range(0, len(numbers), 200):
            bids = [Bid(member(n), key(1), quantity) for n in numbers[at : at + 200]]
            for told in await stock.buy(*bids):
                assert told.decision is Decision.SOLD, told
        records = await stock.records()
        expires_at_ms = await now_ms(stock.redis) + 280_000
        async with self.shop.pool.acquire() as connection:
            for n in numbers:
                (order,) = records[member(n)]
                place = OrderPlace(stock.id, order.seq, order.at_ms & LOW_BITS)
                number = self.orders[n] = order_number(stock.id, order.seq, order.at_ms)
                await payments.begin(
                    connection, payment_number(number), number, place, member(n),
                    quantity * PRICE_FEN, self.bank.name, expires_at_ms, expires_at_ms,
                )  # fmt: skip

    async def take_money(self, *numbers: int, quantity: int = 1) -> None:
        """Note that the members' money came in."""
        async with self.shop.pool.acquire() as connection:
            for n in numbers:
                payment_no, amount = payment_number(self.orders[n]), quantity * PRICE_FEN
                self.bank.paid[payment_no] = amount
                assert await payments.record_paid(connection, payment_no, amount, "ref")

    async def sell(self, *numbers: int, quantity: int = 1) -> None:
        """Hold, pay and confirm."""
        await self.hold(*numbers, quantity=quantity)
        await self.take_money(*numbers, quantity=quantity)
        keeper = self.keeper()
        for _ in range(0, len(numbers), 50):
            await keeper.present_taken()
        await self.shop.applied()

    async def give_back(self, *numbers: int, tickets: tuple[int, ...] = ()) -> None:
        """Cancel the members' orders as an operator; their refunds are due afterwards."""
        records = await self.shop.stock.records()
        for n in numbers:
            (order,) = records[member(n)]
            place = OrderPlace(self.shop.stock.id, order.seq, order.at_ms & LOW_BITS)
            reply = await self.shop.scripts.cancel(
                place, member(n), tickets, "cli:me", "wanted", mark=None, limited=False
            )
            assert reply.reply is CallReply.OK, reply
        await self.shop.applied()

    async def refunds(self) -> dict[str, Any]:
        """All refunds, by number."""
        rows = await self.shop.pool.fetch("SELECT * FROM refund ORDER BY event_seq")
        return {row["refund_no"]: row for row in rows}

    async def hurry(self) -> None:
        """Let the keeper look at everything now."""
        await self.shop.pool.execute("UPDATE refund SET next_at = now() WHERE state <> 'done'")
        await self.shop.pool.execute("UPDATE payment SET next_at = now() WHERE event_seq IS NULL")

    def shown(self, name: str, **labels: str) -> float | None:
        """A value of the last keeper's metrics."""
        return self.registry.get_sample_value(name, labels)


async def open_till(shop: Shop, tickets: int = 1_000) -> Till:
    """Open a campaign that is paid online."""
    await shop.create(campaign(tickets, payment="online"))
    await shop.step("open")
    return Till(shop, Bank())
