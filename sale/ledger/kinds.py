"""Kinds of events: one table, which decoding, fold, writer, audit and recovery follow.

To add a kind: its payload, its fold and its entry in ``KINDS``; the statement that applies a run of
it, in ``db/sql/apply.sql``; a migration that adds it to the constraint ``event_kind_known``; and
the script that writes it. Tests compare the constraint and the statements with this table.

A kind that is written by the hundred thousand has a positional payload, ``[kind, field, …]``, so
that it carries no field names. Every other one is ``[kind, {…}]`` with actor, reason and details.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import msgspec

from sale.domain.member import is_made_up

if TYPE_CHECKING:
    from sale.ledger.chain import Event
    from sale.ledger.fold import CampaignState

SOLD: Final = "sold"
VOIDED: Final = "voided"
"""A number that was given out, is lost, and is never used again."""
RECOVERED: Final = "recovered"
"""The only kind that begins an epoch."""
CLOCK: Final = "clock"
"""Actor of what the campaign's clock alone has changed: nobody's action."""

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


def _no_breaches(_state: "CampaignState", _event: "Event") -> Breaches:
    return iter(())


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of event.

    ``fold(state, event)`` changes the campaign's state. ``apply`` names statements of
    ``db/sql/apply.sql``, which do a run of events of this kind in PostgreSQL, in this order; they
    get campaign, first number, last number and kind, and then ``arguments``. ``breaches`` says what
    must hold before an event. ``audited``: it is somebody's use of power and has a row in the audit
    log, unless the clock did it. ``recoverable``: a recovery fills a lost number with it again
    where it is still known and breaks nothing; every other lost number is voided.
    """

    payload: type[Sale | Step]
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
    held = state.members.get(member_no, ())
    if sum(record.quantity for record in held) + quantity > state.config.get("card_limit", 0):
        yield "INV-2", f"member {member_no} passed the limit"
    if any(record.key_hash == event.key_hash for record in held):
        yield "INV-4", f"a key of member {member_no} sold twice"
    if is_made_up(member_no) is not bool(state.config.get("rehearsal_of")):
        yield "INV-9", f"member {member_no} and this campaign may not meet"
    if event.price_fen != state.config.get("price_fen"):
        yield "INV-5", "not the campaign's price"


def _create(state: "CampaignState", event: "Event") -> None:
    made = event.read(Created)
    state.config = made.config
    state.tickets = {no: row["tickets"] for no, row in enumerate(made.config["showings"])}
    state.remaining = dict(state.tickets)
    state.members = {}
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
