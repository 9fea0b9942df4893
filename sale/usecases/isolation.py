"""One campaign's trouble must not keep the others waiting.

What is wrong with one campaign's own keys is told once, and passed over until it is well again.
What concerns all of them, a store that is away, is raised as ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import asyncpg
import structlog
from redis.exceptions import ResponseError

TROUBLES: Final = (
    ResponseError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    asyncpg.LockNotAvailableError,
)
"""What a campaign's own values can bring about, and somebody else at work on it."""

log = structlog.get_logger()


class Isolation:
    """Remembers which campaigns are in trouble, each with what was being done."""

    def __init__(self) -> None:
        self._ailing: dict[tuple[str, str], str] = {}

    @contextmanager
    def of(self, campaign_id: str, step: str) -> Iterator[None]:
        """Do one step for one campaign; its own trouble ends the step and goes no further."""
        try:
            yield
        except TROUBLES as error:
            why = f"{type(error).__name__}: {error}"[:200]
            if self._ailing.get((campaign_id, step)) != why:
                log.warning("campaign.step_failed", campaign=campaign_id, step=step, why=why)
            self._ailing[campaign_id, step] = why
        else:
            if self._ailing.pop((campaign_id, step), None):
                log.info("campaign.step_back", campaign=campaign_id, step=step)
