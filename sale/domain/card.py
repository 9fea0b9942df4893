"""Card numbers: their shape, those made up for rehearsals, and how one is shown."""

import re
from typing import Final

from sale.domain.campaign import Campaign

CARD_NO: Final = re.compile(r"[0-9]{12,19}")
REHEARSAL_CARDS: Final = "0000"
"""Card numbers that begin so are made up for rehearsals, and no roster takes them.

ISO/IEC 7812 gives a first digit 0 to no issuer of such cards, so no real one is shut out; and a
spreadsheet that drops leading zeros cannot turn a made-up number into one of the same length.
"""


def is_made_up(card_no: str) -> bool:
    """Whether a card number is one of rehearsals: it stands in no roster."""
    return card_no.startswith(REHEARSAL_CARDS)


def may_meet(campaign: Campaign, card_no: str) -> bool:
    """Whether a card may have to do with a campaign at all.

    Made-up cards with rehearsals, real cards with real campaigns, and never otherwise.
    """
    return card_no.startswith(REHEARSAL_CARDS) is bool(campaign.rehearsal_of)


def mask_card(card_no: str) -> str:
    """A card number as it may be shown: only the last four digits."""
    return "*" * max(len(card_no) - 4, 0) + card_no[-4:]
