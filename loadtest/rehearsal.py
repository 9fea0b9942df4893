"""The load tests' part of `sale rehearse`: a release played to its end, and its record.

The requests come from processes of their own (`loadtest.rush.worker`), so the process that leads a
rehearsal does not slow them down. The engine imports this module and no other of the load tests.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from loadtest.books.proof import PROBLEMS, Where
from loadtest.client import AnswerError
from loadtest.record import Record, make_folder
from loadtest.rush.asks import MIXED
from loadtest.rush.plan import Plan, RushError
from loadtest.rush.play import play
from loadtest.thresholds import missed, read_rules
from loadtest.wire import ProtocolError
from sale import config
from sale.config import Settings

LEDGER_WITHIN_S: Final = 300.0

__all__ = ["Record", "Release", "ReleaseError", "missed", "play_release", "read_rules"]


class ReleaseError(Exception):
    """The release could not be played; the message is one line for people."""


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign's release: its cards' tokens, how fast they come, and where the record goes.

    ``target`` is ``host:port``; ``fail_if`` are rules of `loadtest.thresholds`.
    """

    target: str
    campaign: str
    tokens: Path
    rate: float
    seconds: float
    arrivals: str
    processes: int
    name: str
    out: Path
    fail_if: tuple[str, ...] = ()

    def plan(self, settings: Settings) -> Plan:
        """The run that plays it, from the opening on, by members that ask for one to three."""
        embedded = settings.redis_url is None or settings.database_url is None
        return Plan(
            target=self.target,
            campaign=self.campaign,
            name=self.name,
            arrivals=self.arrivals,
            rate=self.rate,
            seconds=self.seconds,
            tokens=str(self.tokens),
            quantity=MIXED,
            processes=self.processes,
            at_opening=True,
            alone=True,
            ledger_within_s=LEDGER_WITHIN_S,
            fail_if=self.fail_if,
            books=Where(
                data_dir=str(settings.data_dir.absolute()) if embedded else "",
                database_url=settings.database_url or "",
                redis_url=settings.redis_url or "",
                environment=config.as_environment(settings),
            ),
        )


async def play_release(release: Release, settings: Settings, note: Callable[[str], None]) -> Record:
    """Play it, compare every answer with PostgreSQL, and write record and report.

    ``settings`` are those of the engine; ``note`` gets the progress. Raises ReleaseError.
    """
    from loadtest.report.page import keep

    try:
        make_folder(release.out)
        record = await play(release.plan(settings), note)
        keep(release.out, record)
    except (RushError, AnswerError, ProtocolError, ValueError, *PROBLEMS) as error:
        raise ReleaseError(" ".join(str(error).split()) or type(error).__name__) from error
    return record
