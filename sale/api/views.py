"""The remaining tickets of a campaign, in the words of the contract."""

from sale.api.schemas import AvailabilityView, RemainingView
from sale.domain.campaign_view import CampaignNow
from sale.domain.clock import rfc3339


def remaining_views(now: CampaignNow) -> list[RemainingView]:
    """Word what is left of each showing."""
    return [
        RemainingView(showing.id, tickets, remaining)
        for showing, tickets, remaining in zip(
            now.campaign.showings, now.tickets, now.remaining, strict=True
        )
    ]


def availability_view(now: CampaignNow) -> AvailabilityView:
    """Word what is left of a campaign, and when that was so."""
    return AvailabilityView(remaining_views(now), rfc3339(now.as_of_ms))
