"""The purchase on the fast path: checked, queued, and answered straight from the batch's result.

The checks, the desk and the words are those of the handler that aiohttp calls (``member.py``).
"""

from typing import Final

import structlog

from sale.api.charge import CHARGED, charge
from sale.api.dispatch import refused_by
from sale.api.member import ORDER_REQUEST, order_answer
from sale.api.problems import problem_answer
from sale.api.request import BodyLate, check_media_type, checked_key, decode_body
from sale.bootstrap import Engine
from sale.domain.campaign import Campaign
from sale.domain.problem import Problem, Refused
from sale.http.fast_routes import Exchange, FastBodyHandler, Head
from sale.http.request import bearer_token
from sale.http.wire import rendered
from sale.members.orders import key_hash
from sale.members.purchase import Answer, Checked, Purchase
from sale.members.rate import TooFast

log = structlog.get_logger()


class FastPurchases(FastBodyHandler):
    """POST /api/v1/campaigns/{id}/orders, of campaigns that this process knows."""

    waits = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._desk = engine.desk
        self._same: tuple[Answer, Campaign, bytes] | None = None

    def find(self, name: str) -> Campaign | None:
        """Find a campaign whose purchases need no look at a store before they are queued."""
        return self._desk.known(name)

    def serve(
        self,
        exchange: Exchange,
        found: Campaign,
        head: Head,
        body: bytes,
        asked_at: float,
        now: float,
    ) -> bytes | None:
        """Check a purchase and queue it, or answer at once why not."""
        desk = self._desk
        try:
            check_media_type(head.content_type or "")
            wish = decode_body(body, ORDER_REQUEST)
            key, token = checked_key(head.key), bearer_token(head.authorization or "")
            checked = desk.check(found, wish.quantity, wish.showing, key, token, now)
            purchase = FastPurchase(self, exchange, found, checked, asked_at)
            desk.submit(found, purchase)
        except Exception as error:  # noqa: BLE001 - every error is answered
            path = f"/api/v1/campaigns/{found.id}/orders"
            refused = refused_by(error, path, exchange.request_id)
            return self._refusal(exchange, found, head, refused)
        exchange.pending = purchase
        return None

    def count_overloaded(self, found: Campaign) -> None:
        """Count a purchase that was refused before anything was done for it."""
        self._desk.count_refused(found.id, Problem.OVERLOADED)

    def refuse_late_body(self, exchange: Exchange, found: Campaign, head: Head) -> bytes:
        """Give the answer to a purchase whose body did not come in time."""
        return self._refusal(exchange, found, head, BodyLate(), last=True)

    def _refusal(
        self,
        exchange: Exchange,
        campaign: Campaign,
        head: Head,
        refused: Refused,
        *,
        last: bool = False,
    ) -> bytes:
        """Count and charge a purchase that was not queued; give its answer."""
        self._desk.count_refused(campaign.id, refused.problem)
        if refused.problem in CHARGED:
            token = bearer_token(head.authorization or "")
            limited = charge(
                self._engine, refused.problem, token, exchange.peer, head.forwarded_for
            )
            if limited is not None:
                refused = TooFast(limited)
        return rendered(*problem_answer(refused), last=last or exchange.last)

    def wire(self, purchase: "FastPurchase", answer: Answer) -> bytes:
        """Give the bytes of an answer; purchases that one peek refuses share them."""
        same = self._same
        if same is not None and same[0] is answer and same[1] is purchase.campaign:
            return same[2]
        exchange = purchase.exchange
        last = exchange.last
        try:
            outcome = self._desk.word(purchase.campaign, purchase, answer)
            wire = rendered(*order_answer(outcome), last=last)
        except Exception:
            # The order exists although its answer failed; a retry with its key finds it.
            log.exception(
                "purchase.not_worded",
                campaign=purchase.campaign.id,
                request_id=exchange.request_id,
            )
            return rendered(*problem_answer(Refused(Problem.UNAVAILABLE)), last=last)
        if isinstance(outcome, Refused) and answer.decision is not None and not last:
            self._same = (answer, purchase.campaign, wire)
        return wire


class FastPurchase(Purchase):
    """A purchase whose answer goes straight to its connection."""

    __slots__ = ("_handler", "_key", "campaign", "exchange")

    def __init__(
        self,
        handler: FastPurchases,
        exchange: Exchange,
        campaign: Campaign,
        checked: Checked,
        asked_at: float,
    ) -> None:
        self.member_no, self.union, self.showing, self.quantity, self._key = checked
        self.asked_at = asked_at
        self.exchange = exchange
        self._handler = handler
        self.campaign = campaign

    @property
    def key_hash(self) -> str:  # type: ignore[override]
        """The hash of the key, made on demand: a peek refuses most purchases without it."""
        return key_hash(self._key)

    def settle(self, answer: Answer) -> None:
        """Answer the client, if it is still there."""
        exchange = self.exchange
        if exchange.pending is self:  # a second answer would be another request's
            exchange.pending = SETTLED
            exchange.post(self._handler.wire(self, answer))


SETTLED: Final = object()
"""In place of a purchase whose answer is about to be sent."""
