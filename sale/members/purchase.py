"""The purchase: check the request, submit it to the batcher, word the answer.

A handler that waits calls ``purchase``; the fast path (``api/fast_purchase.py``) takes the same
three steps, ``check``, ``submit`` and ``word``, without a coroutine for each purchase.

``stock/lua/purchase.lua`` decides; this module makes the checks that need no store, and words the
answer. The order of the checks is the contract's: request, token, campaign, then everything that
the script decides.
"""

import asyncio
import time
from functools import lru_cache
from typing import Final, NamedTuple

import asyncpg

from sale.db import read
from sale.domain.campaign import Campaign, State
from sale.domain.clock import rfc3339
from sale.domain.fields import fields_of, requirement
from sale.domain.member import may_meet
from sale.domain.order import Order
from sale.domain.problem import Problem, Refused
from sale.domain.text import Text
from sale.http.overload import MUST_WAIT, QUEUE, TURN, Overload
from sale.identity import MemberTokens
from sale.members.orders import TicketCodes, changed_order, key_hash, placed_order
from sale.members.rate import RateLimits, TooFast
from sale.metrics import PurchaseMetrics
from sale.stock.answers import Answer, AwaitedPurchase, Purchase
from sale.stock.batchers import Batchers
from sale.stock.catalogue import Catalogue
from sale.stock.scripts import Decision

__all__ = ["Answer", "Checked", "Placed", "Purchase", "PurchaseDesk"]
"""With the types of a purchase, for the API, which may not import ``sale.stock``."""

POSTGRES_PATIENCE_S: Final = 1.0
ABSENT_S: Final = 0.1
ABSENT_MAX: Final = 1_000
Checked = tuple[int, str, int, int, str]
"""A checked request: member number, union, showing number, quantity, idempotency key."""

_PLACED: Final = frozenset({Decision.SOLD, Decision.REPLAYED})


class Placed(NamedTuple):
    """An order, and whether this answer repeats an earlier one."""

    order: Order
    replayed: bool


class PurchaseDesk:
    """Takes purchases of this process."""

    def __init__(
        self,
        catalogue: Catalogue,
        batchers: Batchers,
        tokens: MemberTokens,
        codes: TicketCodes,
        metrics: PurchaseMetrics,
        pool: asyncpg.Pool,
        limits: RateLimits,
        overload: Overload,
    ) -> None:
        self._limits = limits
        self._overload = overload
        self._pool = pool
        self._absent: dict[str, tuple[float, Refused]] = {}
        self._metrics = metrics
        self._catalogue = catalogue
        self.known = catalogue.known
        self._batchers = batchers
        self._tokens = tokens
        self._codes = codes
        self._loop = asyncio.get_running_loop()

    async def purchase(
        self,
        campaign_id: str,
        quantity: int,
        showing_id: str | None,
        key: str,
        token: str | None,
        *,
        waited_s: float = 0.0,
    ) -> Placed | Refused:
        """Buy ``quantity`` tickets of a showing, once a card and key: for those who can wait.

        ``waited_s``: its time in the waiting line, which counts towards its deadline. Raises
        Refused for what is wrong with the request or the token. A refusal of the script is
        returned, not raised: a sold-out campaign refuses by the hundred thousand.
        """
        campaign = self.known(campaign_id)
        if campaign is None:
            # Token and rate come first, so that guessed IDs cost no read of a store.
            member = self._tokens.verify(token or "", time.time())
            limited = self._limits.spend_card(member.no, time.monotonic())
            if limited is not None:
                raise TooFast(limited)
            async with asyncio.timeout(self._batchers.deadline_s):
                campaign = await self._catalogue.for_sale(campaign_id)
        if campaign is None:
            refused = await self._no_campaign(campaign_id)
            self.count_refused(campaign_id, refused.problem)
            return refused
        checked = self.check(campaign, quantity, showing_id, key, token, time.monotonic())
        member_no, union, showing, quantity, key = checked
        purchase = AwaitedPurchase(member_no, union, showing, quantity, key_hash(key), self._loop)
        purchase.asked_at -= waited_s
        self.submit(campaign, purchase)
        return self.word(campaign, purchase, await purchase.answer)

    def admit(self, now: float, *, called: bool = False) -> int:
        """Let a purchase in before anything is done for it: 0; else its Retry-After in seconds.

        ``MUST_WAIT``: it is put into the waiting line, unless it was ``called`` from there.
        ``now``, here and in ``check``, is seconds of the monotonic clock.
        """
        overload = self._overload
        reason = overload.overloaded(now, called=called)
        if not reason:
            return 0
        if not called and (reason == TURN or not overload.may_refuse(now)):
            return MUST_WAIT
        return overload.refuse(reason, now)

    def check(
        self,
        campaign: Campaign,
        quantity: int,
        showing_id: str | None,
        key: str,
        token: str | None,
        now: float,
    ) -> Checked:
        """Check what needs no store: the request, the token, and the member's rate.

        Raises Refused, TooFast.
        """
        showing = _check_request(campaign, quantity, showing_id)
        member = self._tokens.verify(token or "", time.time())
        limited = self._limits.spend(member.no, campaign.id, now)
        if limited is not None:
            raise TooFast(limited)
        if not may_meet(campaign, member.no):
            raise Refused(Problem.NOT_ELIGIBLE)
        return member.no, member.union, showing, quantity, key

    def submit(self, campaign: Campaign, purchase: Purchase) -> None:
        """Queue a checked purchase; it will be settled once. Raises Refused."""
        if self._batchers.halted:
            raise Refused(Problem.UNAVAILABLE)
        if not self._batchers.of(campaign).submit(purchase):
            wait_s = self._overload.refuse(QUEUE, time.monotonic())
            raise Refused(Problem.OVERLOADED, retry_after_s=wait_s)

    def word(self, campaign: Campaign, purchase: Purchase, answer: Answer) -> Placed | Refused:
        """Put the script's answer into an order or a refusal."""
        if answer.decision in _PLACED:
            order = placed_order(
                self._codes, campaign, purchase.showing, purchase.quantity, answer.value,
                answer.sold_at_ms, answer.price_fen, answer.card_remaining, answer.pay_before_ms,
            )  # fmt: skip
            return Placed(order, answer.decision is Decision.REPLAYED)
        if answer.record is not None:
            order = changed_order(
                self._codes, campaign, answer.record, answer.card_remaining, answer.pay_before_ms
            )
            return Placed(order, replayed=True)
        return _refusal(answer, campaign.card_limit)

    async def _no_campaign(self, campaign_id: str) -> Refused:
        """Give the refusal for a campaign that Redis has lost, or that never was."""
        asked_at, refused = self._absent.get(campaign_id, (0.0, None))
        if refused is not None and time.monotonic() - asked_at < ABSENT_S:
            return refused
        async with asyncio.timeout(POSTGRES_PATIENCE_S), self._pool.acquire() as connection:
            state = await read.state(connection, campaign_id)
        refused = Refused(Problem.UNAVAILABLE)
        if state is None or state in {State.DRAFT, State.DELETED}:
            refused = Refused(Problem.NOT_FOUND, "no such campaign")
        if len(self._absent) >= ABSENT_MAX:
            self._absent.clear()
        self._absent[campaign_id] = (time.monotonic(), refused)
        return refused

    def count_refused(self, campaign_id: str, problem: Problem) -> None:
        """Count a request that never came to the script; only known campaigns are a label."""
        known = campaign_id if self._catalogue.was_for_sale(campaign_id) else ""
        self._metrics.outcomes[known, problem.value] += 1
        if problem is Problem.INVALID_REQUEST:
            self._catalogue.doubt(campaign_id)


def _check_request(campaign: Campaign, quantity: int, showing_id: str | None) -> int:
    """Give the showing's number. Raises Refused for what is wrong with the request itself."""
    if not 1 <= quantity <= campaign.order_max:
        raise Refused(
            Problem.INVALID_REQUEST,
            requirement(fields_of(Campaign)["order_max"], campaign.order_max).of_field("quantity"),
            field="quantity",
        )
    if showing_id is None:
        if len(campaign.showings) == 1:
            return 0
        there = campaign.showings_in_words
        raise Refused(
            Problem.INVALID_REQUEST,
            Text(
                f"showing：请说明是哪一场：{there.zh}",
                f"showing: say which one of {there.en}",
            ),
            field="showing",
        )
    number = campaign.showing_numbers.get(showing_id)
    if number is None:
        there = campaign.showings_in_words
        raise Refused(
            Problem.INVALID_REQUEST,
            Text(
                f"showing：没有这一场，只有 {there.zh}",
                f"showing: there is no such one; there is {there.en}",
            ),
            field="showing",
        )
    return number


@lru_cache(maxsize=1_024)
def _refusal(answer: Answer, card_limit: int) -> Refused:  # noqa: C901 - one branch a decision
    """Give the refusal for a decision; a batch shares one."""
    match answer.decision:
        case Decision.SOLD_OUT:
            return _sold_out(answer)
        case Decision.TOO_MANY_ORDERS:
            return Refused(Problem.TOO_MANY_ORDERS)
        case Decision.LIMIT_EXCEEDED:
            return Refused(
                Problem.LIMIT_EXCEEDED,
                card_remaining=answer.value,
                card_limit=card_limit,
            )
        case Decision.NOT_OPEN:
            wait_ms = max(answer.value - answer.now_ms, 1)
            return Refused(
                Problem.NOT_OPEN,
                retry_after_s=-(-wait_ms // 1000),
                opens_at=rfc3339(answer.value),
            )
        case Decision.PAUSED:
            return Refused(Problem.PAUSED)
        case Decision.CLOSED:
            return Refused(Problem.CLOSED)
        case Decision.CARD_REVOKED:
            return Refused(Problem.CARD_REVOKED)
        case Decision.NOT_ELIGIBLE:
            return Refused(Problem.NOT_ELIGIBLE)
        case Decision.KEY_MISMATCH:
            return Refused(
                Problem.IDEMPOTENCY_MISMATCH, "this key was used for another showing or quantity"
            )
        case Decision.BAD_QUANTITY:
            return Refused(Problem.INVALID_REQUEST, "quantity: not allowed here", field="quantity")
        case Decision.DRAFT:
            return Refused(Problem.NOT_FOUND, "no such campaign")
        case _:
            return Refused(Problem.UNAVAILABLE)


def _sold_out(answer: Answer) -> Refused:
    """Say what is left, and what may come back: tickets that are held and not paid yet."""
    if not answer.held:
        return Refused(Problem.SOLD_OUT, remaining=answer.value)
    return Refused(
        Problem.SOLD_OUT,
        remaining=answer.value,
        held=answer.held,
        pay_before=rfc3339(answer.pay_before_ms),
    )
