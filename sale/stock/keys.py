"""Every Redis key, and nothing else holds one.

All keys of a campaign share the hash tag ``{id}``, so they live in one slot of a cluster and one
script may touch them all. The layout of each value stands in the header of the script that writes
it.

========== ======== =================================================================
key        type     holds
========== ======== =================================================================
head       hash     number, chain hash, epoch, state, window, limits, clock, identity
stock      hash     of showing number n: ``t<n>`` tickets, ``r<n>`` remaining, ``k<n>`` kept for the
                    counter, ``h<n>`` in holds
members    hash     member number → the member's orders here, see ``lua/_orders.lua``
revoked    set      members who may not buy (derived from the roster, not from the ledger)
calls      hash     process → number of its last call, so that a delayed call cannot sell
operations hash     operator's idempotency key → event number and content
holds      zset     ``order number:member`` → ``pay_before`` of each held order
stream     stream   the ledger, one entry a call, ID ``<number of the last event>-0``
========== ======== =================================================================
"""

from functools import lru_cache
from typing import Final, NamedTuple

CAMPAIGNS: Final = "sale:campaigns"
"""Set of campaign IDs that have, or had, a head."""

GENERATIONS: Final = "sale:generations"
"""Sorted set of the members' generations above 0, see ``trust/generations.py``."""

REPORTS: Final = "sale:reports"
"""Hash of API process → its last report, see ``stock/process_reports.py``."""

VERIFIED: Final = "sale:verified"
"""Which Redis and deployment each campaign was compared with (``trust/verify.py``)."""

AWAITED: Final = "sale:awaited"
"""Written before a WAIT that must cover what others have written; its value means nothing."""

WHOLE: Final = "sale:whole"
"""Run ID of the Redis whose append-only file is known to be whole (``stock/durability.py``)."""


def troubles_key(reporter: str) -> str:
    """Key of the campaigns in which a process found problems, see ``stock/troubles.py``."""
    return f"sale:troubles:{reporter}"


class CampaignKeys(NamedTuple):
    """The keys of one campaign, in the order in which every script takes them as KEYS."""

    head: str
    stream: str
    stock: str
    members: str
    revoked: str
    calls: str
    operations: str
    holds: str


@lru_cache(maxsize=4_096)
def campaign_keys(campaign_id: str) -> CampaignKeys:
    """Keys of a campaign. Kept: readers of all campaigns need those of each."""
    tag = f"sale:{{{campaign_id}}}:"
    return CampaignKeys(*(tag + field for field in CampaignKeys._fields))


def rebuilt_keys(campaign_id: str) -> CampaignKeys:
    """Where a recovery writes a campaign beside the old one: the same slot, so RENAME moves it."""
    tag = f"sale:{{{campaign_id}}}:new:"
    return CampaignKeys(*(tag + field for field in CampaignKeys._fields))
