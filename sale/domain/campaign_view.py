"""A campaign at a moment, and the two ways in which it is shown.

``CampaignView`` is what members are told, ``DeskView`` what operators are told; the API and the
command line answer with the same ones. Every setting in ``Terms`` is shown by both.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sale.domain.campaign import Campaign, Showing, ShowingTerms, State, Terms
from sale.domain.clock import in_bounds, rfc3339
from sale.domain.order import Count, Time

StateShown = Annotated[
    str,
    Meta(
        extra_json_schema={
            "enum": [state.value for state in State],
            "description": "`deleted`: told to an operator alone, who repeats what made or filled "
            "a draft that is gone since.",
        }
    ),
]


class CampaignNow(msgspec.Struct, frozen=True):
    """A campaign at a moment. ``tickets``, ``remaining``, ``held`` (in holds) by showing number.

    ``state`` counts what the clock has changed; ``recorded`` is what the ledger says so far.
    ``config_seq`` is the number of the event that gave it its configuration.
    """

    campaign: Campaign
    config_seq: int
    state: State
    recorded: State
    opens_at_ms: int | None
    closes_at_ms: int | None
    recovering: str
    seq: int
    chain: str
    epoch: int
    roster_rev: int
    tickets: tuple[int, ...]
    remaining: tuple[int, ...]
    held: tuple[int, ...]
    as_of_ms: int

    @property
    def visible(self) -> bool:
        """Whether members may know of it."""
        return self.state not in {State.DRAFT, State.DELETED}

    @property
    def window_fault(self) -> str:
        """The fault of the opening that it waits for; '' where there is none."""
        waits = self.state in {State.DRAFT, State.SCHEDULED}
        if not waits or self.opens_at_ms is None or in_bounds(self.opens_at_ms):
            return ""
        return f"its opening ({rfc3339(self.opens_at_ms)}) is out of bounds: schedule it again"

    @property
    def listed(self) -> bool:
        """Whether members are told of it unasked."""
        return self.visible and not self.campaign.rehearsal_of


class ShowingView(ShowingTerms, frozen=True, kw_only=True):
    """A showing with its stock; what remains of it is told by the availability."""

    tickets: Count


class CampaignView(Terms, frozen=True, kw_only=True):
    """A campaign as everyone may see it. ``unions`` is ``["*"]`` or the codes that may buy."""

    state: StateShown
    opens_at: Time | None
    closes_at: Time | None
    showings: tuple[ShowingView, ...]


class StockView(ShowingView, frozen=True, kw_only=True):
    """A showing with its stock, what remains of it, and the tickets in unpaid holds."""

    remaining: Count
    held: Count


class DeskView(CampaignView, frozen=True, kw_only=True):
    """A campaign as operators see it.

    ``recovering`` says why a recovering campaign does not sell; ``ledger_seq`` is the number of its
    last event, ``config_seq`` that of the event which gave it its configuration.
    """

    rehearsal_of: str | None
    recovering: str | None
    ledger_seq: Count
    config_seq: Count
    showings: tuple[StockView, ...]


def campaign_view(now: CampaignNow) -> CampaignView:
    """Show a campaign to members."""
    showings = (
        ShowingView(**_showing_terms(showing), tickets=tickets)
        for showing, tickets in zip(now.campaign.showings, now.tickets, strict=True)
    )
    return CampaignView(**_terms(now), showings=tuple(showings))


def desk_view(now: CampaignNow) -> DeskView:
    """Show a campaign to operators."""
    showings = (
        StockView(**_showing_terms(showing), tickets=tickets, remaining=remaining, held=held)
        for showing, tickets, remaining, held in zip(
            now.campaign.showings, now.tickets, now.remaining, now.held, strict=True
        )
    )
    return DeskView(
        **_terms(now),
        rehearsal_of=now.campaign.rehearsal_of or None,
        recovering=now.recovering or None,
        ledger_seq=now.seq,
        config_seq=now.config_seq,
        showings=tuple(showings),
    )


def _terms(now: CampaignNow) -> dict[str, Any]:
    """Give the settings and the state that both views have."""
    terms = {name: getattr(now.campaign, name) for name in Terms.__struct_fields__}
    return terms | {
        "state": now.state.value,
        "opens_at": None if now.opens_at_ms is None else rfc3339(now.opens_at_ms),
        "closes_at": None if now.closes_at_ms is None else rfc3339(now.closes_at_ms),
    }


def _showing_terms(showing: Showing) -> dict[str, Any]:
    return {name: getattr(showing, name) for name in ShowingTerms.__struct_fields__}
