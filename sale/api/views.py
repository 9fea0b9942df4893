"""Campaigns in the words of the contract, for members and operators alike."""

from sale.api.schemas import AvailabilityView, CampaignView, RemainingView, ShowingView
from sale.domain.clock import rfc3339
from sale.members.campaigns import CampaignNow


def campaign_view(now: CampaignNow) -> CampaignView:
    """Word a campaign as the contract has it."""
    campaign = now.campaign
    return CampaignView(
        id=campaign.id,
        title=campaign.title,
        category=campaign.category,
        price_fen=campaign.price_fen,
        payment=campaign.payment,
        card_limit=campaign.card_limit,
        order_max=campaign.order_max,
        state=now.state.value,
        opens_at=None if now.opens_at_ms is None else rfc3339(now.opens_at_ms),
        closes_at=None if now.closes_at_ms is None else rfc3339(now.closes_at_ms),
        unions=list(campaign.unions),
        owner=campaign.owner,
        showings=[
            ShowingView(
                id=showing.id,
                title=showing.title,
                starts_at=None if showing.starts_at is None else showing.starts_at.isoformat(),
                tickets=tickets,
            )
            for showing, tickets in zip(campaign.showings, now.tickets, strict=True)
        ],
    )


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
