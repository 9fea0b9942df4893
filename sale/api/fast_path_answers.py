"""The answers to the fast path's purchases: worded, put on the wire, and sent a batch at a time."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from sale.api.member import order_answer
from sale.api.problems import problem_answer
from sale.domain.campaign import Campaign
from sale.domain.problem import Problem, Refused
from sale.http.overload import RETRY_MAX_S
from sale.http.wire import rendered
from sale.members.orders import key_hash
from sale.members.purchase import Checked, PurchaseDesk
from sale.stock.batcher import Answer, Purchase

log = structlog.get_logger()


class Buyer(Protocol):
    """A connection with a purchase under way, or None; what it is sent answers that one."""

    purchase: "FastPathPurchase | None"

    @property
    def request_id(self) -> str: ...  # noqa: D102

    def send(self, wire: bytes) -> None: ...  # noqa: D102


class FastPathAnswers:
    """Those of one process. While ``draining``, each is its connection's last, and says so."""

    def __init__(self, desk: PurchaseDesk, draining: Callable[[], bool]) -> None:
        self._desk = desk
        self._draining = draining
        self._loop = asyncio.get_running_loop()
        self._outbox: list[tuple[Buyer, bytes]] = []
        self._same: tuple[Answer, Campaign, bytes] | None = None

    def wire(self, purchase: "FastPathPurchase", answer: Answer) -> bytes:
        """Give the bytes that an answer is told with; those whom one peek refuses share them."""
        same = self._same
        if same is not None and same[0] is answer and same[1] is purchase.campaign:
            return same[2]
        last = self._draining()
        try:
            told = self._desk.word(purchase.campaign, purchase, answer)
            wire = rendered(*order_answer(told), last=last)
        except Exception:
            # What cannot be worded stands all the same, and is found by its key.
            log.exception(
                "purchase.not_worded",
                campaign=purchase.campaign.id,
                request_id=purchase.buyer.request_id,
            )
            return rendered(*problem_answer(Refused(Problem.UNAVAILABLE)), last=last)
        if isinstance(told, Refused) and answer.decision is not None and not last:
            self._same = (answer, purchase.campaign, wire)
        return wire

    def post(self, buyer: Buyer, wire: bytes) -> None:
        """Send the answer to a connection's purchase soon, with the others of its batch.

        Each write wakes the client's side. Between two of them lies the wording of one answer, in
        which a quick client falls asleep again: written in one go, 256 answers wake it less often.
        """
        if not self._outbox:
            self._loop.call_soon(self.send)
        self._outbox.append((buyer, wire))

    def send(self) -> None:
        """Send what was posted."""
        outbox, self._outbox = self._outbox, []
        for buyer, wire in outbox:
            try:
                buyer.send(wire)
            except Exception:
                log.exception("connection.not_answered")


class FastPathPurchase(Purchase):
    """A purchase whose answer goes straight to its connection."""

    __slots__ = ("_answers", "_key", "buyer", "campaign")

    def __init__(
        self,
        answers: FastPathAnswers,
        buyer: Buyer,
        campaign: Campaign,
        checked: Checked,
        now: float,
    ) -> None:
        self.card_no, self.union, self.showing, self.quantity, self._key = checked
        self.asked_at = now
        self.buyer = buyer
        self._answers = answers
        self.campaign = campaign

    @property
    def key_hash(self) -> str:  # type: ignore[override]
        """The key as the script knows it, made when it is asked for: most are refused by a peek."""
        return key_hash(self._key)

    def settle(self, answer: Answer) -> None:
        """Answer the client, if it is still there."""
        buyer = self.buyer
        if buyer.purchase is self:  # a second answer would be another request's
            buyer.purchase = _ANSWERED
            self._answers.post(buyer, self._answers.wire(self, answer))


_ANSWERED: Final = FastPathPurchase.__new__(FastPathPurchase)
"""Under way until its answer is sent, and settled already."""


def overloaded_answers() -> tuple[bytes, ...]:
    """What is answered beyond capacity, by its Retry-After in seconds."""
    refusals = [Refused(Problem.OVERLOADED, retry_after_s=s) for s in range(RETRY_MAX_S + 1)]
    return tuple(rendered(*problem_answer(refused)) for refused in refusals)
