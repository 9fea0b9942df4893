"""The sum of a campaign's events: the state that Redis must hold, exactly."""

from typing import Any

import msgspec

from sale.domain.order import GIVEN_BACK, VALID, OrderState
from sale.domain.problem import DAMAGED
from sale.ledger.chain import CorruptLedger, Event
from sale.ledger.kinds import KINDS


class OrderRecord(msgspec.Struct, frozen=True, gc=False):
    """One order of a member, as the member's record in Redis holds it.

    ``seq`` and ``changed`` are the numbers of the events that made it and changed it last (0:
    none). ``live`` tickets count; ``letters`` has one letter a ticket. ``returned``: it was paid
    when it had ended, and the money goes back.
    """

    seq: int
    at_ms: int
    showing: int
    quantity: int
    key_hash: str
    live: int
    state: OrderState
    letters: str
    changed: int = 0
    paid: bool = False
    returned: bool = False

    @property
    def given_back(self) -> list[int]:
        """Numbers of the tickets that were given back."""
        return [no for no, letter in enumerate(self.letters, 1) if letter == GIVEN_BACK]


def hold_name(seq: int, member_no: int) -> str:
    """Name of a held order in ``holds``; the same stands in ``stock/lua/_orders.lua``."""
    return f"{seq}:{member_no}"


class CampaignState(msgspec.Struct):
    """The sum of a campaign's events: the state that Redis must hold, exactly.

    ``holds`` has each held order's ``pay_before`` (UTC ms), by the order's and the member's number;
    ``held`` the tickets in holds by showing.
    """

    seq: int = 0
    epoch: int = 1
    state: str = ""
    opens_at_ms: int | None = None
    closes_at_ms: int | None = None
    config: dict[str, Any] = {}
    tickets: dict[int, int] = {}
    remaining: dict[int, int] = {}
    held: dict[int, int] = {}
    members: dict[int, list[OrderRecord]] = {}
    holds: dict[str, int] = {}
    operations: dict[str, str] = {}
    config_seq: int = 0
    """Number of the event that gave the configuration."""
    made: int = 0
    """Number of the last ``created`` event: an ID may be used again once its draft is deleted."""

    def copy(self) -> "CampaignState":
        """Give one that may change apart from this one."""
        return msgspec.structs.replace(
            self,
            tickets=dict(self.tickets),
            remaining=dict(self.remaining),
            held=dict(self.held),
            members={member_no: list(orders) for member_no, orders in self.members.items()},
            holds=dict(self.holds),
            operations=dict(self.operations),
        )

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
        state = OrderState.CONFIRMED
        if sale.pay_before is not None:
            state = OrderState.HELD
            self.holds[hold_name(sale.seq, member_no)] = sale.pay_before
            self.held[showing] += quantity
        self.members.setdefault(member_no, []).append(
            OrderRecord(
                sale.seq, sale.at_ms, showing, quantity, sale.key_hash, quantity, state,
                VALID * quantity,
            )
        )  # fmt: skip

    def order_of(self, event: Event) -> OrderRecord:
        """Give the order that an event changes. Raises LookupError where there is none."""
        for order in self.members.get(event.member_no or 0, ()):
            if order.seq == event.order:
                return order
        raise LookupError(f"member {event.member_no} has no order {event.order}")

    def pay_before(self, event: Event) -> int:
        """Give the moment (UTC ms) at which the hold of an event ends. Raises LookupError."""
        return self.holds[hold_name(event.order or 0, event.member_no or 0)]

    def change(self, event: Event, **fields: Any) -> None:  # noqa: ANN401 - an order's fields
        """Change the order of an event; stock and holds follow from its tickets and state."""
        before = self.order_of(event)
        after = msgspec.structs.replace(before, changed=event.seq, **fields)
        orders = self.members[event.member_no or 0]
        orders[orders.index(before)] = after
        self.remaining[before.showing] += before.live - after.live
        if before.state is OrderState.HELD and after.state is not OrderState.HELD:
            del self.holds[hold_name(before.seq, event.member_no or 0)]
            self.held[before.showing] -= before.live
