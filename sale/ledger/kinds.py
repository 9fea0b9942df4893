"""Kinds of events: one table, which decoding, fold, writer, audit and recovery follow.

To add a kind: its payload, its fold and its entry in ``KINDS``; the statement that applies a run of
it, in ``db/sql/apply.sql``; a migration that adds it to the constraint ``event_kind_known``; and
the script that writes it. Tests compare the constraint and the statements with this table.

A kind that is written by the hundred thousand has a positional payload, ``[kind, field, …]``, so
that it carries no field names. Every other one is ``[kind, {…}]`` with actor, reason and details.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import msgspec

from sale.domain.member import is_made_up
from sale.domain.order import GIVEN_BACK, ORDERS_MAX, VALID, OrderState

if TYPE_CHECKING:
    from sale.ledger.chain import Event
    from sale.ledger.fold import CampaignState

SOLD: Final = "sold"
HELD: Final = "held"
"""Taken, and to be paid by a moment."""
EXPIRED: Final = "expired"
PAID: Final = "paid"
CANCELLED: Final = "cancelled"
VOIDED: Final = "voided"
"""A number that was given out, is lost, and is never used again."""
RECOVERED: Final = "recovered"
"""The only kind that begins an epoch."""
CLOCK: Final = "clock"
"""Actor of what the campaign's clock alone has changed: nobody's action."""
MEMBER: Final = "member"
"""Actor of what members do with their own orders: no use of power."""

Integer: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
"""As PostgreSQL's columns have it. Whether a number makes sense is for its constraints to say."""
Moment: TypeAlias = int | None
"""UTC milliseconds, however far away; what is stored of it is ``clock.nearest``."""
Breaches: TypeAlias = Iterator[tuple[str, str]]
"""Invariants that an event breaks, each with what is wrong."""


class Sale(
    msgspec.Struct, frozen=True, gc=False, array_like=True, tag=SOLD, forbid_unknown_fields=True
):
    """All of what the client asked for, so a retry is told from a key that is used twice."""

    member_no: Integer
    showing: Integer
    quantity: Integer
    key_hash: str
    price_fen: Integer


class Hold(
    msgspec.Struct, frozen=True, gc=False, array_like=True, tag=HELD, forbid_unknown_fields=True
):
    """A sale that lasts only if it is paid before ``pay_before`` (UTC ms)."""

    member_no: Integer
    showing: Integer
    quantity: Integer
    key_hash: str
    price_fen: Integer
    pay_before: int


class Expiry(
    msgspec.Struct, frozen=True, gc=False, array_like=True, tag=EXPIRED, forbid_unknown_fields=True
):
    """The end of a hold that nobody paid; ``order`` is the number of the event that made it."""

    order: int
    member_no: Integer


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of every named payload: ``op`` and ``content`` tell an operator's repeat."""

    actor: str | None = None
    reason: str | None = None
    op: str | None = None
    content: str | None = None


class Created(Step, frozen=True, kw_only=True):
    """A draft, with its whole configuration."""

    config: dict[str, Any]
    opens_at: Moment = None
    closes_at: Moment = None


class StockAdded(Step, frozen=True, kw_only=True):
    """Tickets more of one showing."""

    showing: Integer
    add: Integer


class Transition(Step, frozen=True, kw_only=True):
    """Another state, and another window where one is given."""

    opens_at: Moment | msgspec.UnsetType = msgspec.UNSET
    closes_at: Moment | msgspec.UnsetType = msgspec.UNSET


class Recovered(Step, frozen=True, kw_only=True):
    """The first event of an epoch; ``voided`` are ranges of numbers, each an event of its own."""

    epoch: int
    voided: list[tuple[int, int]]


class OrderStep(Step, frozen=True, kw_only=True):
    """A change of one order, which the number of its own event names."""

    order: int
    member_no: Integer


class Outcome(StrEnum):
    """The effect of a payment on its order, decided by ``pay.lua``."""

    KEPT = "kept"
    """The hold is confirmed."""
    REVIVED = "revived"
    """The hold had expired, and its tickets were still there: it is confirmed."""
    RETURNED = "returned"
    """The order had ended for good: the money goes back."""


class Paid(OrderStep, frozen=True, kw_only=True):
    """Money that came in for an order."""

    outcome: Outcome
    amount_fen: int


class Cancelled(OrderStep, frozen=True, kw_only=True):
    """Tickets given back, by their numbers in the order, and how much money goes back."""

    tickets: list[int]
    refund_fen: int


def _no_breaches(_state: "CampaignState", _event: "Event") -> Breaches:
    return iter(())


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of event.

    ``fold(state, event)`` changes the campaign's state. ``apply`` names statements of
    ``db/sql/apply.sql``, which do a run of events of this kind in PostgreSQL, in this order; they
    get campaign, first number, last number and kind, and then ``arguments``. ``breaches`` says what
    must hold before an event. ``audited``: it is somebody's use of power and has a row in the audit
    log, unless the clock or a member did it. ``recoverable``: a recovery fills a lost number with
    it again where it is still known and breaks nothing; every other lost number is voided.
    """

    payload: type[Sale | Hold | Expiry | Step]
    fold: Callable[["CampaignState", "Event"], None]
    apply: Sequence[str] = ()
    arguments: Sequence[str] = ()
    breaches: Callable[["CampaignState", "Event"], Breaches] = _no_breaches
    audited: bool = False
    needs_reason: bool = False
    recoverable: bool = False

    @property
    def positional(self) -> bool:
        """Whether its payload is a row without field names."""
        return self.payload.__struct_config__.array_like


def _sell(state: "CampaignState", event: "Event") -> None:
    state.add_order(event)


def _sale_breaches(state: "CampaignState", event: "Event") -> Breaches:
    """Say which invariants a sale breaks. Shares not a line with ``purchase.lua``."""
    quantity, member_no = event.quantity or 0, event.member_no or 0
    if state.state != "open":
        yield "INV-7", f"sold while {state.state or 'nothing'}"
    if (state.opens_at_ms is not None and event.at_ms < state.opens_at_ms) or (
        state.closes_at_ms is not None and event.at_ms >= state.closes_at_ms
    ):
        yield "INV-7", "sold outside the window"
    if state.remaining.get(event.showing or 0, 0) < quantity or quantity < 1:
        yield "INV-1", f"{quantity} sold, fewer were left"
    orders = state.members.get(member_no, ())
    yield from _limit_breaches(state, member_no, event.showing or 0, quantity)
    if len(orders) >= ORDERS_MAX:
        yield "INV-2", f"member {member_no} passed {ORDERS_MAX} orders"
    if any(order.key_hash == event.key_hash for order in orders):
        yield "INV-4", f"a key of member {member_no} sold twice"
    if is_made_up(member_no) is not bool(state.config.get("rehearsal_of")):
        yield "INV-9", f"member {member_no} and this campaign may not meet"
    if event.price_fen != state.config.get("price_fen"):
        yield "INV-5", "not the campaign's price"
    if (event.kind == HELD) is not (state.config.get("payment") == "online"):
        yield "INV-5", f"{event.kind}, which is not how this campaign is paid"
    if event.pay_before is not None and event.pay_before <= event.at_ms:
        yield "INV-7", "held until a moment that had passed"


def _limit_breaches(
    state: "CampaignState", member_no: int, showing: int, quantity: int
) -> Breaches:
    """Say which limits ``quantity`` more tickets of a showing break."""
    orders = state.members.get(member_no, ())
    if sum(order.live for order in orders) + quantity > state.config.get("card_limit", 0):
        yield "INV-2", f"member {member_no} passed the limit"
    limit = state.config["showings"][showing].get("showing_limit")
    of_showing = sum(order.live for order in orders if order.showing == showing)
    if limit is not None and of_showing + quantity > limit:
        yield "INV-2", f"member {member_no} passed the limit of showing {showing}"


def _expiry_breaches(state: "CampaignState", event: "Event") -> Breaches:
    order = state.order_of(event)
    if order.state != OrderState.HELD:
        yield "INV-6", f"order {order.seq} expired while {order.state}"
    elif event.at_ms < state.pay_before(event):
        yield "INV-7", f"order {order.seq} expired before its time"


def _expire(state: "CampaignState", event: "Event") -> None:
    state.change(event, state=OrderState.EXPIRED, live=0)


def _payment_breaches(state: "CampaignState", event: "Event") -> Breaches:
    """Say whether a payment did what its order's state demands. Shares not a line with pay.lua."""
    order, paid = state.order_of(event), event.read(Paid)
    if order.paid:
        yield "INV-11", f"order {order.seq} was paid twice"
    if paid.amount_fen != order.quantity * state.config.get("price_fen", 0):
        yield "INV-11", f"order {order.seq} was paid {paid.amount_fen} fen"
    if (order.state == OrderState.HELD) is not (paid.outcome is Outcome.KEPT):
        yield "INV-11", f"order {order.seq} was {order.state}, and its payment {paid.outcome}"
    if paid.outcome is not Outcome.REVIVED:
        return
    if order.state != OrderState.EXPIRED:
        yield "INV-6", f"order {order.seq} was revived while {order.state}"
    if state.state != "open":
        yield "INV-7", f"order {order.seq} was revived while {state.state}"
    if state.remaining.get(order.showing, 0) < order.quantity:
        yield "INV-1", f"order {order.seq} was revived, fewer tickets were left"
    yield from _limit_breaches(state, event.member_no or 0, order.showing, order.quantity)


def _pay(state: "CampaignState", event: "Event") -> None:
    order, paid = state.order_of(event), event.read(Paid)
    if paid.outcome is Outcome.RETURNED:
        state.change(event, paid=True, returned=True)
    else:
        state.change(event, state=OrderState.CONFIRMED, live=order.quantity, paid=True)


def _cancellation_breaches(state: "CampaignState", event: "Event") -> Breaches:
    order, given = state.order_of(event), event.read(Cancelled)
    if order.state not in {OrderState.HELD, OrderState.CONFIRMED}:
        yield "INV-6", f"order {order.seq} was cancelled while {order.state}"
    if not given.tickets or any(
        not 1 <= no <= order.quantity or order.letters[no - 1] != VALID for no in given.tickets
    ):
        yield "INV-6", f"order {order.seq}: tickets {given.tickets} cannot be given back"
    if len(set(given.tickets)) != len(given.tickets):
        yield "INV-6", f"order {order.seq}: a ticket is given back twice"
    if order.state == OrderState.HELD and len(given.tickets) != order.quantity:
        yield "INV-6", f"order {order.seq} is unpaid, and was cancelled in part"
    due = len(given.tickets) * state.config.get("price_fen", 0) if order.paid else 0
    if given.refund_fen != due:
        yield "INV-11", f"order {order.seq}: {given.refund_fen} fen go back, not {due}"


def _cancel(state: "CampaignState", event: "Event") -> None:
    order, tickets = state.order_of(event), event.read(Cancelled).tickets
    letters = "".join(
        GIVEN_BACK if no in tickets else letter for no, letter in enumerate(order.letters, 1)
    )
    live = order.live - len(tickets)
    state.change(
        event,
        state=order.state if live else OrderState.CANCELLED,
        live=live,
        letters=letters,
    )


def _create(state: "CampaignState", event: "Event") -> None:
    made = event.read(Created)
    state.config = made.config
    state.tickets = {no: row["tickets"] for no, row in enumerate(made.config["showings"])}
    state.remaining = dict(state.tickets)
    state.members, state.holds = {}, {}
    state.held = dict.fromkeys(state.tickets, 0)
    state.state = "draft"
    state.made = state.config_seq = event.seq
    state.opens_at_ms, state.closes_at_ms = made.opens_at, made.closes_at


def _add_stock(state: "CampaignState", event: "Event") -> None:
    added = event.read(StockAdded)
    state.tickets[added.showing] += added.add
    state.remaining[added.showing] += added.add


def _nothing(_state: "CampaignState", _event: "Event") -> None:
    """Change no more than the number."""


def _transition(after: str, *, needs_reason: bool = False) -> Kind:
    """Make the kind of event that leaves a campaign in the state ``after``."""

    def fold(state: "CampaignState", event: "Event") -> None:
        given = event.read(Transition)
        state.state = after
        if given.opens_at is not msgspec.UNSET:
            state.opens_at_ms = given.opens_at
        if given.closes_at is not msgspec.UNSET:
            state.closes_at_ms = given.closes_at

    return Kind(
        payload=Transition,
        fold=fold,
        apply=("change_state",),
        arguments=(after,),
        audited=True,
        needs_reason=needs_reason,
    )


KINDS: Final[Mapping[str, Kind]] = {
    SOLD: Kind(
        payload=Sale,
        fold=_sell,
        apply=("add_orders",),
        breaches=_sale_breaches,
        recoverable=True,
    ),
    HELD: Kind(
        payload=Hold,
        fold=_sell,
        apply=("add_orders",),
        breaches=_sale_breaches,
        recoverable=True,
    ),
    EXPIRED: Kind(
        payload=Expiry,
        fold=_expire,
        apply=("expire_orders", "hurry_payments"),
        breaches=_expiry_breaches,
        recoverable=True,
    ),
    PAID: Kind(
        payload=Paid,
        fold=_pay,
        apply=("pay_orders", "settle_payments", "return_payments"),
        breaches=_payment_breaches,
        recoverable=True,
    ),
    CANCELLED: Kind(
        payload=Cancelled,
        fold=_cancel,
        apply=("cancel_tickets", "cancel_orders", "refund_tickets", "hurry_payments"),
        breaches=_cancellation_breaches,
        audited=True,
        recoverable=True,
    ),
    VOIDED: Kind(payload=Step, fold=_nothing),
    RECOVERED: Kind(payload=Recovered, fold=_nothing, audited=True),
    "created": Kind(
        payload=Created,
        fold=_create,
        apply=("remove_showings", "configure", "add_showings"),
        audited=True,
    ),
    "stock_added": Kind(
        payload=StockAdded,
        fold=_add_stock,
        apply=("add_stock",),
        audited=True,
        needs_reason=True,
    ),
    "scheduled": _transition("scheduled"),
    "opened": _transition("open"),
    "paused": _transition("paused", needs_reason=True),
    "resumed": _transition("open"),
    "closed": _transition("closed"),
    "reopened": _transition("open", needs_reason=True),
    "deleted": _transition("deleted"),
}
"""Every kind of event, by its name in the ledger."""
