"""Kinds of events, and the state that each leaves a campaign in."""

from typing import Final

SOLD: Final = "sold"
VOIDED: Final = "voided"
"""A number that was given out, is lost, and is never used again."""


STATE_AFTER: Final = {
    "scheduled": "scheduled",
    "opened": "open",
    "paused": "paused",
    "resumed": "open",
    "closed": "closed",
    "reopened": "open",
    "deleted": "deleted",
}
"""State of a campaign after each kind of event that changes it."""

KINDS: Final = frozenset({"created", "stock_added", "recovered", SOLD, VOIDED, *STATE_AFTER})
