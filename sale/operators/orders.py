"""Operators' work on single orders: look at one, cancel tickets of it."""

from collections.abc import Callable, Sequence

import asyncpg
from redis.asyncio import Redis

from sale.db import read
from sale.domain.campaign import Campaign
from sale.domain.order import Order, OrderPlace, parse_order_number
from sale.domain.problem import Problem, Refused
from sale.ledger.kinds import HELD, SOLD
from sale.members.cancel import give_back
from sale.members.orders import NoCodes, OwnOrders
from sale.operators.campaigns import Actor, check_may, seen, wait_a_moment
from sale.operators.steps import RUNNERS, checked_reason
from sale.stock.batcher import Batcher
from sale.stock.catalogue import Catalogue, read_campaign
from sale.stock.scripts import Scripts
from sale.stock.stream import read_event


class OrderDesk:
    """Orders as operators see them: without the tickets' codes."""

    def __init__(
        self,
        redis: Redis,
        scripts: Scripts,
        pool: asyncpg.Pool,
        catalogue: Catalogue,
        batcher_of: Callable[[Campaign], Batcher] | None = None,
    ) -> None:
        """``batcher_of``: in an API process, what keeps its steps until PostgreSQL has them."""
        self._redis = redis
        self._scripts = scripts
        self._pool = pool
        self._orders = OwnOrders(catalogue, redis, pool, NoCodes())
        self._batcher_of = batcher_of

    async def show(self, order_no: str, actor: Actor) -> Order:
        """Give an order. Raises Refused."""
        place, campaign = await self._found(order_no, actor)
        if not actor.acts_for(campaign.owner):
            raise Refused(Problem.NOT_FOUND, f"no order {order_no!r}")
        return await self._orders.one(await self._member_of(place), order_no)

    async def cancel(
        self, order_no: str, tickets: Sequence[int] | None, reason: str, actor: Actor
    ) -> Order:
        """Cancel tickets of an order at any time, None: all that can be. Raises Refused.

        A repeat finds them cancelled, so it needs no key.
        """
        place, campaign = await self._found(order_no, actor)
        check_may(actor, RUNNERS, campaign.owner)
        member_no = await self._member_of(place)
        seq = await give_back(
            self._scripts, place, member_no, tickets or (), actor.name, checked_reason(reason),
            batcher=None if self._batcher_of is None else self._batcher_of(campaign),
            limited=False,
        )  # fmt: skip
        if seq:
            await wait_a_moment(self._pool, place.campaign_id, seq)
        return await self._orders.one(member_no, order_no)

    async def _found(self, order_no: str, actor: Actor) -> tuple[OrderPlace, Campaign]:
        place = parse_order_number(order_no)
        if place is None:
            raise Refused(Problem.NOT_FOUND, f"no order {order_no[:64]!r}")
        now = seen(place.campaign_id, await read_campaign(self._redis, place.campaign_id), actor)
        return place, now.campaign

    async def _member_of(self, place: OrderPlace) -> int:
        """Find whose order it is: what PostgreSQL has not applied yet is still in the stream."""
        event = await read_event(self._redis, place.campaign_id, place.seq)
        if event is not None and event.kind in {SOLD, HELD} and event.member_no is not None:
            return event.member_no
        async with self._pool.acquire() as connection:
            row = await read.order(connection, place.campaign_id, place.seq)
        if row is None:
            raise Refused(Problem.NOT_FOUND, "no such order")
        return row.member_no
