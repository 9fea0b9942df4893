"""Campaigns as members see them, and what a member may still buy."""

from typing import Final

import msgspec
from redis.asyncio import Redis

from sale.domain.campaign import CAMPAIGN_ID, State
from sale.domain.campaign_view import CampaignNow
from sale.domain.member import may_meet
from sale.domain.order import ORDERS_MAX, Count
from sale.domain.problem import Problem, Refused
from sale.identity import Member
from sale.stock.catalogue import Catalogue
from sale.stock.records import read_member


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """The member's allowance in a campaign; ``reason``: why it may buy none at all."""

    eligible: bool
    reason: str | None
    card_limit: Count
    card_remaining: Count


class PublicCampaigns:
    """The campaigns that members may know of."""

    def __init__(self, catalogue: Catalogue, redis: Redis) -> None:
        self._catalogue = catalogue
        self._redis = redis
        self.fresh = catalogue.fresh
        self.now_ms = catalogue.clock_ms

    def is_cached(self, campaign_id: str) -> bool:
        """Whether the configuration of a campaign is in memory."""
        return self._catalogue.known(campaign_id) is not None

    async def listed(self) -> list[CampaignNow]:
        """Give the campaigns of the members' list, latest opening first."""
        return [now for now in await self._catalogue.all() if now.listed]

    async def one(self, campaign_id: str) -> CampaignNow:
        """Give a campaign. Raises Refused (not-found), also for a draft."""
        now = None
        if CAMPAIGN_ID.fullmatch(campaign_id):
            now = await self._catalogue.now(campaign_id)
        if now is None or not now.visible:
            raise Refused(Problem.NOT_FOUND, "no such campaign")
        return now

    async def allowance(self, now: CampaignNow, member: Member) -> Allowance:
        """Give what a member may still buy in a campaign."""
        campaign = now.campaign
        own = await read_member(self._redis, campaign.id, member.no)
        card_remaining = campaign.card_limit - own.live_tickets
        reason = _why_not(now, member, revoked=own.revoked, card_remaining=card_remaining)
        if reason is None and len(own.records) >= ORDERS_MAX:
            reason = Problem.TOO_MANY_ORDERS
        return Allowance(
            eligible=reason is None,
            reason=reason,
            card_limit=campaign.card_limit,
            card_remaining=card_remaining,
        )


def _why_not(
    now: CampaignNow, member: Member, *, revoked: bool, card_remaining: int
) -> Problem | None:
    """Give the first reason why this member may not buy now, in the contract's order."""
    if revoked:
        return Problem.CARD_REVOKED
    if not may_meet(now.campaign, member.no) or (
        "*" not in now.campaign.unions and member.union not in now.campaign.unions
    ):
        return Problem.NOT_ELIGIBLE
    if now.state in _BY_STATE:
        return _BY_STATE[now.state]
    if card_remaining < 1:
        return Problem.LIMIT_EXCEEDED
    return Problem.SOLD_OUT if not any(now.remaining) else None


_BY_STATE: Final = {
    State.SCHEDULED: Problem.NOT_OPEN,
    State.PAUSED: Problem.PAUSED,
    State.CLOSED: Problem.CLOSED,
    State.RECOVERING: Problem.UNAVAILABLE,
}
