"""Giving tickets back: the member's own step.

``stock/lua/cancel.lua`` decides. The key of a request is not remembered: it names ticket numbers,
and the tickets' state tells a repeat.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from sale.domain.order import Order, OrderPlace, parse_order_number
from sale.domain.problem import Problem, Refused
from sale.domain.text import Text
from sale.ledger.chain import parse_row
from sale.ledger.kinds import MEMBER
from sale.members.orders import OwnOrders
from sale.stock.batcher import Batcher
from sale.stock.batchers import Batchers
from sale.stock.catalogue import Catalogue
from sale.stock.scripts import CallReply, OrderReply, Scripts, Untrusted

TRIES_MAX: Final = 100
"""Each ends up to 256 holds that are due, or waits PAUSE_S."""
PAUSE_S: Final = 0.05
_WHY: Final = {
    1: (
        "expired",
        Text(
            "订单没有按时付款，已经过期，没有票可退。",
            "The order was not paid in time and has expired: it has no tickets to give back.",
        ),
    ),
    2: (
        "collected",
        Text("票已经领取，不能再退。", "Tickets that are collected cannot be given back."),
    ),
    3: (
        "too-late",
        Text(
            "本活动不能退票，或者已过退票截止时间。",
            "Tickets of this campaign cannot be given back, or not any more.",
        ),
    ),
    4: (
        "not-paid",
        Text(
            "订单还没有付款，只能整单取消。",
            "An order that is not paid yet can be cancelled only as a whole.",
        ),
    ),
}
"""By the reasons in the header of ``cancel.lua``: name, and what a person is told."""
CANCEL_REASONS: Final = tuple(reason for reason, _ in _WHY.values())


class CancelDesk:
    """Takes members' cancellations in this process."""

    def __init__(
        self, scripts: Scripts, catalogue: Catalogue, batchers: Batchers, orders: OwnOrders
    ) -> None:
        self._scripts = scripts
        self._catalogue = catalogue
        self._batchers = batchers
        self._orders = orders

    async def cancel(self, member_no: int, order_no: str, tickets: Sequence[int] | None) -> Order:
        """Give tickets back, None: all that can be. Give the order as it is then.

        Raises Refused.
        """
        place = parse_order_number(order_no)
        campaign = None if place is None else await self._catalogue.for_sale(place.campaign_id)
        if place is None or campaign is None:
            await self._orders.one(member_no, order_no)  # raises where the member has no such order
            raise Refused(Problem.UNAVAILABLE)
        if self._batchers.halted:
            raise Refused(Problem.UNAVAILABLE)
        await give_back(
            self._scripts, place, member_no, tickets or (), MEMBER, None,
            batcher=self._batchers.of(campaign), limited=True,
        )  # fmt: skip
        return await self._orders.one(member_no, order_no)


async def give_back(
    scripts: Scripts,
    place: OrderPlace,
    member_no: int,
    tickets: Sequence[int],
    actor: str,
    reason: str | None,
    *,
    batcher: Batcher | None,
    limited: bool,
) -> int:
    """Give tickets back; give the event's number, 0 where nothing was left to do. Raises Refused.

    ``batcher``: that of the campaign in an API process, which keeps the step until PostgreSQL has
    it (INV-3); None elsewhere.
    """

    async def ask() -> OrderReply:
        mark = None if batcher is None else batcher.mark
        reply = await scripts.cancel(
            place, member_no, tickets, actor, reason, mark=mark, limited=limited
        )
        if batcher is not None and mark is not None:
            if reply.reply is CallReply.UNCHECKED:
                await batcher.check_acknowledged()
            elif mark.incarnation != batcher.mark.incarnation:
                # A reply of an earlier incarnation is not valid in this one: ask again.
                return OrderReply(CallReply.UNCHECKED, ())
        return reply

    reply = await _patiently(scripts, place.campaign_id, ask)
    seq, chain, now_ms, _, _, event = _accepted(reply)
    if seq and batcher is not None:
        batcher.unapplied.add([parse_row(seq, now_ms, batcher.mark.epoch, event)])
        batcher.advance(seq, chain.decode())
    return int(seq)


async def _patiently(
    scripts: Scripts, campaign_id: str, ask: Callable[[], Awaitable[OrderReply]]
) -> OrderReply:
    """Ask a script about an order until it has decided, at most TRIES_MAX times.

    It runs ``expire.lua`` where the time of a hold is up. Raises Refused (unavailable).
    """
    for _ in range(TRIES_MAX):
        reply = await ask()
        if reply.reply is CallReply.DUE:
            try:
                await scripts.expire(campaign_id)
            except Untrusted:
                break
        elif reply.reply in {CallReply.UNCHECKED, CallReply.UNVERIFIED}:
            await asyncio.sleep(PAUSE_S)
        else:
            return reply
    raise Refused(Problem.UNAVAILABLE)


def _accepted(reply: OrderReply) -> tuple[Any, ...]:
    """Give the values of a cancellation that was done, now or before. Raises Refused."""
    match reply.reply:
        case CallReply.OK:
            return reply.values
        case CallReply.NOT_FOUND:
            raise Refused(Problem.NOT_FOUND, "no such order")
        case CallReply.INVALID:
            no = reply.values[0]
            raise Refused(
                Problem.INVALID_REQUEST,
                Text(f"这个订单没有第 {no} 张票", f"tickets: there is no ticket {no}"),
                field="tickets",
            )
        case CallReply.WRONG_STATE if reply.values[0] in _WHY:
            reason, words = _WHY[reply.values[0]]
            raise Refused(Problem.WRONG_STATE, words, reason=reason)
        case _:
            raise Refused(Problem.UNAVAILABLE)
