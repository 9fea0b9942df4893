"""Keeps the trouble of one campaign from the others.

An error of one campaign's own keys is logged once, and the campaign is passed over until it has
recovered. An error that concerns all campaigns, such as a store that is away, is raised as usual.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final

import asyncpg
import structlog
from redis.exceptions import ResponseError

from sale.domain.problem import DAMAGED, Refused
from sale.ledger.chain import CorruptLedger
from sale.stock.catalogue import Unreadable

TROUBLES: Final = (
    *DAMAGED,
    CorruptLedger,
    ResponseError,
    asyncpg.DataError,
    asyncpg.LockNotAvailableError,
)
"""Errors that a campaign's own values, or a concurrent change of it, can cause."""

log = structlog.get_logger()


class Isolation:
    """Remembers which campaigns are in trouble, and in which step."""

    def __init__(self) -> None:
        self._failing: dict[tuple[str, str], str] = {}

    @contextmanager
    def of(self, campaign_id: str, step: str) -> Iterator[None]:
        """Run one step for one campaign; an error of its own ends the step only."""
        try:
            yield
        except TROUBLES as error:
            self.note(campaign_id, step, in_words(error))
        else:
            self.note(campaign_id, step, "")

    @property
    def failing(self) -> dict[str, str]:
        """Campaigns in trouble, each with the first error."""
        found: dict[str, str] = {}
        for (campaign_id, _), why in self._failing.items():
            found.setdefault(campaign_id, why)
        return found

    def note(self, campaign_id: str, step: str, why: str) -> None:
        """Record the error of a campaign in a step; '' if there is none."""
        known = self._failing.get((campaign_id, step), "")
        if why and why != known:
            log.warning("campaign.step_failed", campaign=campaign_id, step=step, why=why)
        if why:
            self._failing[campaign_id, step] = why
        elif known:
            del self._failing[campaign_id, step]
            log.info("campaign.step_back", campaign=campaign_id, step=step)

    def forget_others(self, step: str, there: Collection[str]) -> None:
        """Forget a step's errors of campaigns that are not among ``there``."""
        for place in [each for each in self._failing if each[1] == step and each[0] not in there]:
            del self._failing[place]


def in_words(error: Exception) -> str:
    """Say in one line what is wrong with a campaign."""
    if isinstance(error, Unreadable):
        return error.why
    if isinstance(error, Refused | CorruptLedger):
        return str(error)[:200]
    return f"{type(error).__name__}: {error}"[:200]
