"""What becomes of event numbers that a Redis gave out and has lost.

A number for which somebody still knows the sale (an API process handed it in, or a broken stream
still tells it) is filled again, if the sale fits what the ledger says up to there; every other is
voided. Neither is ever used again. What is claimed and not filled is not dropped: it goes to
``conflict``, with why.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Final

import msgspec

from sale.domain.campaign import Campaign
from sale.ledger.chain import Entry, Event, make_entry
from sale.ledger.fold import CampaignState
from sale.ledger.kinds import SOLD, VOIDED
from sale.trust.comparison import Steps

ENTRY_ROWS_MAX: Final = 256
"""As many events as the largest batch of purchases."""
ACTOR: Final = "recovery"
OPENING: Final = {
    "draft": "opened",
    "scheduled": "opened",
    "paused": "resumed",
    "closed": "reopened",
}
"""What must have happened before a sale that was acknowledged, by the state before it."""


class Refilled(msgspec.Struct):
    """The lost numbers as the ledger will have them.

    ``voided`` are ranges, first to last; ``strays`` are claims that do not stand, each with why;
    ``unused`` counts those of them that were handed in.
    """

    events: list[Event] = []
    filled: int = 0
    voided: list[tuple[int, int]] = []
    strays: list[tuple[Event, str]] = []
    unused: int = 0

    async def entries(self, chain: str) -> list[Entry]:
        """Write them as entries that go on from ``chain``."""
        entries: list[Entry] = []
        steps = Steps()
        for (at_ms, epoch), group in groupby(self.events, lambda event: (event.at_ms, event.epoch)):
            events = list(group)
            for at in range(0, len(events), ENTRY_ROWS_MAX):
                rows = [_row(event) for event in events[at : at + ENTRY_ROWS_MAX]]
                await steps.done(len(rows))
                entries.append(make_entry(chain, events[at].seq, at_ms, epoch, rows))
                chain = entries[-1].chain
        return entries


async def refill(
    books: CampaignState, clock_ms: int, claims: Iterable[Event], last: int
) -> Refilled:
    """Fill or void every number after ``books`` up to ``last``; ``books`` go along.

    ``claims`` are what is still known of them, what was acknowledged first. ``clock_ms`` is the
    moment of the ledger's last event. There may be millions, so others get their turns meanwhile.
    """
    work, steps = _Refill(books, clock_ms), Steps()
    by_number: dict[int, list[Event]] = defaultdict(list)
    for claim in claims:
        await steps.done()
        if all(_content(claim) != _content(other) for other in by_number[claim.seq]):
            by_number[claim.seq].append(claim)
    for seq in range(books.seq + 1, last + 1):
        await work.settle(by_number.get(seq, ()))
    await work.flush()
    return work.result


class _Refill:
    """Goes through the lost numbers, one by one; voided ones wait, as one may have to open."""

    def __init__(self, books: CampaignState, clock_ms: int) -> None:
        self._books = books
        self._clock_ms = clock_ms
        self._campaign = msgspec.convert(books.config, Campaign) if books.config else None
        self._waiting = 0
        self._steps = Steps()
        self.result = Refilled(events=[], voided=[], strays=[])

    async def settle(self, claims: Sequence[Event]) -> None:
        """Decide the next number."""
        await self._steps.done()
        if len(claims) == 1 and not (why := self._misfit(claims[0])):
            await self._open_before(claims[0])
            await self.flush()
            self._clock_ms = max(self._clock_ms, claims[0].at_ms)
            self._add(claims[0])
            self.result.filled += 1
            return
        self._waiting += 1
        for claim in claims:
            told = why if len(claims) == 1 else f"{len(claims)} different sales claim this number"
            self.result.strays.append((claim, told))

    async def flush(self) -> None:
        """Void the numbers that wait."""
        if self._waiting:
            first = self._books.seq + 1
            self.result.voided.append((first, first + self._waiting - 1))
        for _ in range(self._waiting):
            await self._steps.done()
            self._add(self._event(VOIDED, {"actor": ACTOR}))
        self._waiting = 0

    def _misfit(self, claim: Event) -> str:
        """Say why a claim cannot stand at its number; '' where it can."""
        books, campaign = self._books, self._campaign
        if claim.kind != SOLD:
            return f"what was {claim.kind} is not repeated by a recovery"
        quantity, card = claim.quantity or 0, claim.card_no or ""
        if books.state == "deleted":
            return "the campaign was deleted"
        if campaign is None or claim.showing not in books.remaining or quantity < 1:
            return "no such showing"
        held = books.cards.get(card, ())
        if any(record.key_hash == claim.key_hash for record in held):
            return "another event has the same card and key"
        if sum(record.quantity for record in held) + quantity > campaign.card_limit:
            return "it would exceed the card's limit"
        if books.remaining[claim.showing] < quantity:
            return "fewer tickets are left than it sold"
        if claim.price_fen != campaign.price_fen or claim.at_ms < self._clock_ms:
            return "its price or time is not the ledger's"
        if not self._open_at(claim.at_ms) and not self._waiting:
            return f"the campaign was {books.state}"
        return ""

    def _open_at(self, at_ms: int) -> bool:
        books = self._books
        return (
            books.state == "open"
            and (books.opens_at_ms is None or books.opens_at_ms <= at_ms)
            and (books.closes_at_ms is None or at_ms < books.closes_at_ms)
        )

    async def _open_before(self, claim: Event) -> None:
        """Put what must have opened the campaign in the place of a lost number before a sale.

        That the sale was acknowledged proves that it happened; by whom is lost, but for the clock.
        """
        if self._open_at(claim.at_ms):
            return
        books = self._books
        self._waiting -= 1
        await self.flush()
        data: dict[str, Any] = {"actor": ACTOR, "reason": "sales after it were acknowledged"}
        if books.state == "scheduled" and (books.opens_at_ms or claim.at_ms + 1) <= claim.at_ms:
            data = {"actor": "clock"}
        else:
            data["opens_at"] = min(books.opens_at_ms or claim.at_ms, claim.at_ms)
        if books.closes_at_ms is not None and books.closes_at_ms <= claim.at_ms:
            data["closes_at"] = None
        self._add(self._event(OPENING.get(books.state, "reopened"), data))

    def _event(self, kind: str, data: dict[str, Any]) -> Event:
        return Event(0, 0, 0, kind, data=data)

    def _add(self, event: Event) -> None:
        books = self._books
        event = msgspec.structs.replace(
            event, seq=books.seq + 1, at_ms=self._clock_ms, epoch=books.epoch
        )
        books.apply(event)
        self.result.events.append(event)


def _content(event: Event) -> tuple[object, ...]:
    return (event.kind, event.card_no, event.showing, event.quantity, event.key_hash, event.data)


def _row(event: Event) -> list[Any]:
    if event.kind == SOLD:
        return [
            SOLD, event.card_no, event.showing, event.quantity, event.key_hash, event.price_fen,
        ]  # fmt: skip
    return [event.kind, event.data]
