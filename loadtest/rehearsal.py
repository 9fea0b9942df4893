"""The load tests' part of `sale rehearse`: a release played to its end, and its record.

The requests come from processes of their own (`loadtest.rush.worker`), so the process that leads a
rehearsal does not slow them down. The engine imports this module and no other of the load tests.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

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

__all__ = ["Record", "ReleaseError", "missed", "play_release", "read_rules", "release"]


class ReleaseError(Exception):
    """The release could not be played; the message is one line for people."""


def release(settings: Settings, **more: Any) -> Plan:  # noqa: ANN401 - fields of a plan
    """The run of a campaign's release, from the opening on, by members that ask for one to three.

    ``settings`` are those of the engine; ``more`` are fields of a `Plan`.
    """
    embedded = settings.redis_url is None or settings.database_url is None
    books = Where(
        data_dir=str(settings.data_dir.absolute()) if embedded else "",
        database_url=settings.database_url or "",
        redis_url=settings.redis_url or "",
        environment=config.as_environment(settings),
    )
    more |= {"ledger_within_s": LEDGER_WITHIN_S, "quantity": MIXED, "books": books}
    return Plan(at_opening=True, alone=True, **more)


async def play_release(plan: Plan, out: Path, note: Callable[[str], None]) -> Record:
    """Play it, compare every answer with PostgreSQL, and write record and report into ``out``.

    ``note`` gets the progress. Raises ReleaseError.
    """
    from loadtest.report.page import keep

    try:
        make_folder(out)
        record = await play(plan, note)
        keep(out, record)
    except (RushError, AnswerError, ProtocolError, ValueError, *PROBLEMS) as error:
        raise ReleaseError(" ".join(str(error).split()) or type(error).__name__) from error
    return record
