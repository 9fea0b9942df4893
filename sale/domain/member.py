"""Members and their cards: which numbers there are, and how a card number is shown.

A member has a number that the roster gives, small and for ever. The whole engine knows members by
it. Card numbers stand in the roster's tables alone, because a card may be lost and replaced.
"""

import re
from typing import Final

from sale.domain.campaign import Campaign

CARD_NO: Final = re.compile(r"[0-9]{12,19}")
MEMBERS_MAX: Final = 100_000_000
"""The highest number that the roster gives; a filter of one bit a member stays within 12.5 MB."""

MADE_UP_FROM: Final = 2_000_000_000
"""Members from this number on are made up by rehearsals, at most ``MEMBERS_MAX`` of them."""


def is_member_no(number: int) -> bool:
    """Whether a number is one that a member, real or made up, can have."""
    return 1 <= number <= MEMBERS_MAX or MADE_UP_FROM <= number < MADE_UP_FROM + MEMBERS_MAX


def is_made_up(member_no: int) -> bool:
    """Whether a member was made up by a rehearsal and stands in no roster."""
    return member_no >= MADE_UP_FROM


def may_meet(campaign: Campaign, member_no: int) -> bool:
    """Whether a member may have to do with a campaign at all.

    Made-up members with rehearsals, real ones with real campaigns, and never otherwise.
    """
    return (member_no >= MADE_UP_FROM) is bool(campaign.rehearsal_of)


def mask_card(card_no: str) -> str:
    """A card number as it may be shown: only the last four digits."""
    return "*" * max(len(card_no) - 4, 0) + card_no[-4:]
