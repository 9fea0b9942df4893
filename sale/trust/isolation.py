"""One campaign's trouble must not keep the others waiting.

What is wrong with one campaign's own keys is told once, and passed over until it is well again.
What concerns all of them, a store that is away, is raised as ever.
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
"""Errors that a campaign's own values, or another's work on it, can cause."""

log = structlog.get_logger()


class Isolation:
    """Remembers which campaigns are in trouble, each with what was being done."""

    def __init__(self) -> None:
        self._failing: dict[tuple[str, str], str] = {}

    @contextmanager
    def of(self, campaign_id: str, step: str) -> Iterator[None]:
        """Do one step for one campaign; its own trouble ends the step and goes no further."""
        try:
            yield
        except TROUBLES as error:
            self.note(campaign_id, step, in_words(error))
        else:
            self.note(campaign_id, step, "")

    @property
    def failing(self) -> dict[str, str]:
        """Campaigns in trouble, each with what was met first."""
        found: dict[str, str] = {}
        for (campaign_id, _), why in self._failing.items():
            found.setdefault(campaign_id, why)
        return found

    def note(self, campaign_id: str, step: str, why: str) -> None:
        """Note what is wrong with a campaign in a step; '' where nothing is."""
        known = self._failing.get((campaign_id, step), "")
        if why and why != known:
            log.warning("campaign.step_failed", campaign=campaign_id, step=step, why=why)
        if why:
            self._failing[campaign_id, step] = why
        elif known:
            del self._failing[campaign_id, step]
            log.info("campaign.step_back", campaign=campaign_id, step=step)

    def forget_others(self, step: str, there: Collection[str]) -> None:
        """Forget where a step failed for campaigns that are gone; ``there`` are the others."""
        for place in [each for each in self._failing if each[1] == step and each[0] not in there]:
            del self._failing[place]


def in_words(error: Exception) -> str:
    """Say in one line what is wrong with a campaign."""
    if isinstance(error, Unreadable):
        return error.why
    if isinstance(error, Refused | CorruptLedger):
        return str(error)[:200]
    return f"{type(error).__name__}: {error}"[:200]
