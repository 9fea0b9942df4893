"""The sum of a campaign's events: the state that Redis must hold, exactly."""

from typing import Any

import msgspec

from sale.domain.problem import DAMAGED
from sale.ledger.chain import CorruptLedger, Event
from sale.ledger.kinds import KINDS


class SaleRecord(msgspec.Struct, frozen=True, gc=False):
    """One order of a member, as the member's record in Redis holds it."""

    seq: int
    at_ms: int
    showing: int
    quantity: int
    key_hash: str


class CampaignState(msgspec.Struct):
    """The sum of a campaign's events: the state that Redis must hold, exactly."""

    seq: int = 0
    epoch: int = 1
    state: str = ""
    opens_at_ms: int | None = None
    closes_at_ms: int | None = None
    config: dict[str, Any] = {}
    tickets: dict[int, int] = {}
    remaining: dict[int, int] = {}
    members: dict[int, list[SaleRecord]] = {}
    operations: dict[str, str] = {}
    config_seq: int = 0
    """Number of the event that gave the configuration."""
    made: int = 0
    """Number of the last ``created`` event: an ID may be used again once its draft is deleted."""

    def apply(self, event: Event) -> None:
        """Fold in the next event. Raises CorruptLedger for what cannot follow."""
        if event.seq != self.seq + 1:
            raise CorruptLedger(f"event {self.seq + 1} is missing: next is {event.seq}")
        kind = KINDS.get(event.kind)
        if kind is None:
            raise CorruptLedger(f"event {event.seq}: unknown kind {event.kind!r}")
        try:
            kind.fold(self, event)
        except DAMAGED as error:
            raise CorruptLedger(f"event {event.seq}: no such {event.kind}: {error!r}") from None
        if op := event.data.get("op"):
            self.operations[op] = f"{event.seq}:{event.data.get('content', '')}"
        self.seq = event.seq
        self.epoch = event.epoch

    def add_order(self, sale: Event) -> None:
        """Take a sale's tickets, and add it to the orders of its member. Raises ValueError."""
        member_no, showing, quantity = sale.member_no, sale.showing, sale.quantity
        if member_no is None or showing is None or quantity is None or sale.key_hash is None:
            raise ValueError("it lacks a field")
        if showing not in self.remaining:
            raise ValueError(f"no showing {showing}")
        self.remaining[showing] -= quantity
        self.members.setdefault(member_no, []).append(
            SaleRecord(sale.seq, sale.at_ms, showing, quantity, sale.key_hash)
        )
