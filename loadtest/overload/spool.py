"""The answers of one open loop, kept in memory while it plays and compared when it is over."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from loadtest.bench.figures import CLEAN
from loadtest.bench.measure import Bench
from loadtest.bench.rig import SHOWING
from loadtest.books.answers import Answer, read_answer
from loadtest.books.check import check, so_many
from loadtest.books.ledger import BooksError, load_books
from loadtest.engine import EngineError
from loadtest.members import minted_card, minted_key
from loadtest.record import Finding
from loadtest.rush.asks import Ask


class Spool:
    """Takes down what `OpenLoop` is answered: a tuple each, which costs it next to nothing."""

    def __init__(self, cards: range) -> None:
        self._cards = cards
        self._rows: list[tuple[int, int, bool, bytes]] = []

    def __call__(self, number: int, status: int, replayed: bool, body: bytes, /) -> None:  # noqa: FBT001
        """Take down one answer."""
        self._rows.append((number, status, replayed, body))

    def __iter__(self) -> Iterator[Answer]:
        for number, status, replayed, body in self._rows:
            card = self._cards[number]
            asked = Ask(minted_card(card), minted_key(card), SHOWING, 1)
            yield read_answer(asked, status, body, replayed=replayed)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(slots=True)
class Compared:
    """Spools compared with PostgreSQL, between the measurements. ``answers``: how many so far."""

    bench: Bench
    answers: int = 0
    findings: list[Finding] = field(default_factory=list)

    async def add(self, campaign: str, spool: Spool) -> None:
        """Wait for the ledger, and compare a spool with it. Raises EngineError."""
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
