"""An open loop against the benchmark's engine: the offer, and its answers against PostgreSQL."""

import asyncio
import time
from dataclasses import dataclass, field

import msgspec

from loadtest.bench.cases import Bench
from loadtest.bench.rig import SHOWING
from loadtest.books.answers import Spool
from loadtest.books.check import check, so_many
from loadtest.books.ledger import BooksError, load_books
from loadtest.engine import EngineError
from loadtest.generator import Generator
from loadtest.members import Ask, minted_key, minted_no
from loadtest.record import Finding
from loadtest.rush import arrivals
from loadtest.tables import CLEAN
from loadtest.tally import Bounds, Tally


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """The check of what open loops were told: ``compared`` answers were compared with PostgreSQL.

    ``audit`` is ``clean``, or what that or the audit of all that was sold has found.
    """

    compared: int
    audit: str

    @property
    def measured(self) -> bool:
        """Whether there is a figure."""
        return True


@dataclass(slots=True)
class OpenLoops:
    """Open loops on one bench. ``answers``: how many were compared with PostgreSQL so far."""

    bench: Bench
    answers: int = 0
    findings: list[Finding] = field(default_factory=list)

    def generator(
        self, campaign: str, rate: float, seconds: float, bounds: Bounds, address: str = ""
    ) -> tuple[Generator, Spool]:
        """A generator of purchases by new cards, as Poisson arrivals, and where its answers go."""
        offsets = arrivals.make("poisson", rate, seconds, seed=1)
        cards = self.bench.cards(len(offsets))
        raws, spool = list(self.bench.requests(campaign, cards)), spool_of(cards)
        address = address or self.bench.rig.address
        return Generator(address, offsets, raws.__getitem__, spool, bounds), spool

    async def offer(
        self, campaign: str, rate: float, seconds: float, bounds: Bounds, address: str = ""
    ) -> tuple[Tally, Spool]:
        """Play such a generator, from ``warm_s`` from now on."""
        generator, spool = self.generator(campaign, rate, seconds, bounds, address)
        return await generator.run(time.monotonic() + bounds.warm_s), spool

    async def compare(self, campaign: str, spool: Spool) -> None:
        """Wait for the ledger, and compare answers with it. Raises EngineError."""
        rig = self.bench.rig
        await rig.written(campaign)
        self.bench.note(f"{len(spool):,} answers compared with PostgreSQL")
        try:
            books = await load_books(rig.settings["SALE_DATABASE_URL"], campaign)
        except BooksError as error:
            raise EngineError(str(error)) from None
        self.findings += await asyncio.to_thread(check, spool, books)
        self.answers += len(spool)

    async def verdict(self) -> str:
        """``clean``, or what the comparison found, or the audit of all that was sold."""
        audit = await self.bench.audit()
        if not self.findings:
            return audit
        first = self.findings[0]
        told = f"{so_many(self.findings)} among the answers, first {first.kind}: {first.what}"
        return told if audit == CLEAN else f"{told}; {audit}"


def spool_of(cards: range) -> Spool:
    """Answers to the requests that `Bench.requests` makes for these cards."""
    return Spool(lambda n: Ask(minted_no(cards[n]), minted_key(cards[n]), SHOWING, 1))
