"""The proof after a run: every answer against PostgreSQL, and the engine's own audit beside it.

A load test that does not look at the books measures how fast wrong answers can be given.
"""

import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtest.books.answers import Answer
from loadtest.books.check import check
from loadtest.books.ledger import WAIT_S, BooksError, highest, load_books, wait_applied
from loadtest.engine import EngineError, engine_settings, find_database, run_program
from loadtest.record import Finding, Proof
from sale import config
from sale.config import Settings
from sale.host.embedded import find

AUDIT_S: Final = 600.0
AUDIT_FINDINGS_MAX: Final = 200
PROBLEMS: Final = (BooksError, EngineError, OSError, ValueError)
SETTLED: Final = frozenset({"held", "confirmed", "collected"})


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """Where the books are: the data directory of a ``sale up``, or the stores' URLs.

    ``environment`` are the engine's settings, empty where ours are the same. With ``database_url``
    alone the answers are compared, but the audit, which reads Redis as well,
    cannot run.
    """

    data_dir: str = ""
    database_url: str = ""
    redis_url: str = ""
    environment: dict[str, str] = {}

    @property
    def known(self) -> bool:
        """Whether there is any way to the books."""
        return bool(self.data_dir or self.database_url)

    def books_url(self) -> str:
        """URL of PostgreSQL. Raises EngineError where none runs in the data directory."""
        return self.database_url or find_database(Path(self.data_dir))

    def settings(self) -> dict[str, str] | None:
        """Settings for ``sale`` beside the engine, or None where they do not suffice.

        All that the engine's own commands would read here, with these stores. Raises SettingsError.
        """
        if self.database_url and not (self.redis_url or self.data_dir):
            return None
        where = {
            "SALE_DATA_DIR": str(Path(self.data_dir).absolute()) if self.data_dir else "",
            "SALE_DATABASE_URL": self.database_url,
            "SALE_REDIS_URL": self.redis_url,
        }
        told = (self.environment or config.as_environment(engine_settings())) | where
        return {name: value for name, value in told.items() if value}


def books_of(
    data_dir: str, database_url: str, redis_url: str, config_file: Path | None = None
) -> Where:
    """Where the books are: by options, else as the engine's commands find them.

    That is the URLs of its settings, or the data directory that is set, or the one in which an
    engine runs. Raises SettingsError.
    """
    settings = engine_settings(
        config_file, data_dir=data_dir, database_url=database_url, redis_url=redis_url
    )
    set_apart = settings.data_dir != Settings().data_dir
    runs = settings.database_url is None and find(settings.data_dir) is not None
    return Where(
        data_dir=str(settings.data_dir) if data_dir or set_apart or runs else "",
        database_url=settings.database_url or "",
        redis_url=settings.redis_url or "",
        environment=config.as_environment(settings) if config_file else {},
    )


async def prove(
    answers: Iterable[Answer],
    campaign: str,
    where: Where,
    *,
    alone: bool = False,
    within_s: float = WAIT_S,
) -> Proof:
    """Wait for the ledger, compare each answer with the books, and run ``sale audit``.

    ``alone``: nobody else buys in this campaign and no ticket comes back to it, so that orders
    nobody asked for, and refusals as sold out with tickets left, are findings too.

    Raises:
        BooksError: the books cannot be read, or the ledger is not written within ``within_s``.
        EngineError: no PostgreSQL runs in the data directory.

    """
    told, url = list(answers), where.books_url()
    await wait_applied(url, campaign, highest(told), within_s=within_s)
    books = await load_books(url, campaign)
    findings = await asyncio.to_thread(
        check, told, books, alone=alone, only_falls=alone
    )  # a million answers take seconds
    settings = where.settings()
    audit_clean: bool | None = None
    if settings is not None:
        audit_clean, found = await audit(campaign, settings)
        findings = [*findings, *found]
    live = [order for order in books.orders if order.state in SETTLED]
    return Proof(
        clean=not findings and audit_clean is not False,
        findings=findings,
        audit_clean=audit_clean,
        orders=len(books.orders),
        tickets=sum(order.quantity for order in live),
    )


async def audit(campaign: str, settings: dict[str, str]) -> tuple[bool | None, list[Finding]]:
    """Run ``sale audit CAMPAIGN``: whether clean (None: it could not check), and what it found."""
    command = (sys.executable, "-m", "sale", "audit", campaign, "--json")
    status, out, complaint = await run_program(*command, within_s=AUDIT_S, settings=settings)
    if status not in (0, 1):
        said = " ".join(complaint.splitlines()[-1:])
        return None, [Finding("audit-not-done", f"sale audit: {said}")]
    try:
        told = msgspec.json.decode(out, type=_Audit)
    except msgspec.DecodeError as error:
        return None, [Finding("audit-not-done", f"sale audit: {error}")]
    found = [
        Finding(f"audit {finding['invariant']}", finding["what"])
        for each in told.campaigns
        for finding in each["findings"]
    ]
    if not told.clean and not found:
        found = [Finding("audit", "sale audit is not clean")]
    return told.clean, found[:AUDIT_FINDINGS_MAX]


class _Audit(msgspec.Struct):
    clean: bool
    campaigns: list[dict[str, Any]]
