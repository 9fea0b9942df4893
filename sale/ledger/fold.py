"""What a campaign's events add up to: the state that Redis must hold, exactly."""

from typing import TYPE_CHECKING, Any

import msgspec

from sale.ledger.chain import CorruptLedger, Event
from sale.ledger.kinds import KINDS, SOLD, STATE_AFTER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class SaleRecord(msgspec.Struct, frozen=True, gc=False):
    """One order of a card, as the card's record in Redis holds it."""

    seq: int
    at_ms: int
    showing: int
    quantity: int
    key_hash: str


class CampaignState(msgspec.Struct):
    """What a campaign's events add up to: the state that Redis must hold, exactly."""

    seq: int = 0
    epoch: int = 1
    state: str = ""
    opens_at_ms: int | None = None
    closes_at_ms: int | None = None
    config: dict[str, Any] = {}
    tickets: dict[int, int] = {}
    remaining: dict[int, int] = {}
    cards: dict[str, list[SaleRecord]] = {}
    operations: dict[str, str] = {}
    made: int = 0
    """Number of the last ``created`` event: an ID may be used again once its draft is deleted."""

    def apply(self, event: Event) -> None:
        """Fold in the next event. Raises CorruptLedger for a gap or an unknown kind."""
        if event.seq != self.seq + 1:
            raise CorruptLedger(f"event {self.seq + 1} is missing: next is {event.seq}")
        if event.kind == SOLD:
            self._sell(event)
        else:
            self._operate(event)
        self.seq = event.seq
        self.epoch = event.epoch

    def _sell(self, event: Event) -> None:
        card, showing, quantity = event.card_no, event.showing, event.quantity
        if card is None or showing is None or quantity is None or event.key_hash is None:
            raise CorruptLedger(f"event {event.seq}: a sale lacks a field")
        if showing not in self.remaining:
            raise CorruptLedger(f"event {event.seq}: no showing {showing}")
        self.remaining[showing] -= quantity
        self.cards.setdefault(card, []).append(
            SaleRecord(event.seq, event.at_ms, showing, quantity, event.key_hash)
        )

    def _operate(self, event: Event) -> None:
        data = event.data
        if event.kind == "created":
            self.config = data["config"]
            showings: Sequence[Mapping[str, Any]] = self.config["showings"]
            self.tickets = {number: row["tickets"] for number, row in enumerate(showings)}
            self.remaining = dict(self.tickets)
            self.cards = {}
            self.state = "draft"
            self.made = event.seq
            self.opens_at_ms = data.get("opens_at")
            self.closes_at_ms = data.get("closes_at")
        elif event.kind == "stock_added":
            self.tickets[data["showing"]] += data["add"]
            self.remaining[data["showing"]] += data["add"]
        elif event.kind in STATE_AFTER:
            self.state = STATE_AFTER[event.kind]
            self.opens_at_ms = data.get("opens_at", self.opens_at_ms)
            self.closes_at_ms = data.get("closes_at", self.closes_at_ms)
        elif event.kind not in KINDS:
            raise CorruptLedger(f"event {event.seq}: unknown kind {event.kind!r}")
        if data.get("op"):
            self.operations[data["op"]] = f"{event.seq}:{data.get('content', '')}"
