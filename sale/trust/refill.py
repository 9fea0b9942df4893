"""Fills in or voids event numbers that a Redis gave out and has lost.

If the sale of a number is still known (an API process handed it in, or a broken stream holds it)
and fits the ledger up to there, the number is filled in; otherwise it is voided. In both cases it
is never used again. A claim that is not filled in goes to ``conflict``, with the reason.

No process is told of an expiry or of a payment, so nobody hands these in. If a claim does not fit
and holds were due by then, lost numbers before it become their expiries. If claims still do not
fit, all is done again and every hold that was due before a claim ends first: sales in between may
have hidden that its expiry was among the lost numbers. The first way is preferred, because a lost
number may as well have been the payment of such a hold.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import msgspec

from sale.domain.problem import DAMAGED
from sale.ledger.chain import Entry, Event, make_entry
from sale.ledger.fold import CampaignState
from sale.ledger.kinds import CLOCK, EXPIRED, KINDS, VOIDED
from sale.trust.history import Steps

ENTRY_ROWS_MAX: Final = 256
"""As many events as the largest batch of purchases."""
ACTOR: Final = "recovery"
OUTSIDE_WINDOW: Final = "INV-7"
"""Broken if the campaign was not open; an opening repairs that, if a lost number precedes it."""
OPENING: Final = {
    "draft": "opened",
    "scheduled": "opened",
    "paused": "resumed",
    "closed": "reopened",
}
"""The step that must precede an acknowledged sale, by the state before it."""


class Refilled(msgspec.Struct):
    """The lost numbers as the ledger will have them.

    ``voided`` are ranges, first to last; ``strays`` are claims that were not filled in, each with
    the reason; ``unused`` counts those of them that were handed in. ``books`` is the state after
    all of it.
    """

    events: list[Event] = []
    filled: int = 0
    voided: list[tuple[int, int]] = []
    books: CampaignState = msgspec.field(default_factory=CampaignState)
    strays: list[tuple[Event, str]] = []
    unused: int = 0

    async def entries(self, chain: str) -> list[Entry]:
        """Give the events as entries that follow ``chain``."""
        entries: list[Entry] = []
        steps = Steps()
        for (at_ms, epoch), group in groupby(self.events, lambda event: (event.at_ms, event.epoch)):
            events = list(group)
            for at in range(0, len(events), ENTRY_ROWS_MAX):
                rows = [event.row() for event in events[at : at + ENTRY_ROWS_MAX]]
                await steps.done(len(rows))
                entries.append(make_entry(chain, events[at].seq, at_ms, epoch, rows))
                chain = entries[-1].chain
        return entries


async def refill(
    books: CampaignState, clock_ms: int, claims: Iterable[Event], last: int
) -> Refilled:
    """Fill in or void every number after ``books`` up to ``last``; ``books`` may change.

    ``claims`` are the events that are still known, acknowledged ones first. ``clock_ms`` is the
    moment of the ledger's last event. There may be millions of numbers, so it pauses regularly.
    """
    steps = Steps()
    by_number: dict[int, list[Event]] = defaultdict(list)
    for claim in claims:
        await steps.done()
        if all(_content(claim) != _content(other) for other in by_number[claim.seq]):
            by_number[claim.seq].append(claim)
    again = books.copy() if books.config.get("payment") == "online" else None
    refilled = await _Refill(books, clock_ms, by_number).run(last)
    if refilled.strays and again is not None:
        other = await _Refill(again, clock_ms, by_number, ends_due=True).run(last)
        if len(other.strays) < len(refilled.strays):
            return other
    return refilled


class _Refill:
    """Goes through the lost numbers; voided ones wait, because one may become an opening."""

    def __init__(
        self,
        books: CampaignState,
        clock_ms: int,
        claims: Mapping[int, Sequence[Event]],
        *,
        ends_due: bool = False,
    ) -> None:
        """With ``ends_due``, holds that are due end before each claim, and not only if needed."""
        self._books = books
        self._clock_ms = clock_ms
        self._claims = claims
        self._ends_due = ends_due
        # A hold that somebody paid or gave back did not expire.
        self._changed = {claim.order for some in claims.values() for claim in some}
        self._waiting = 0
        self._steps = Steps()
        self.result = Refilled(events=[], voided=[], strays=[], books=books)

    async def run(self, last: int) -> Refilled:
        """Go through all numbers up to ``last``."""
        for seq in range(self._books.seq + 1, last + 1):
            await self.settle(self._claims.get(seq, ()))
        await self.flush()
        return self.result

    async def settle(self, claims: Sequence[Event]) -> None:
        """Fill in or void the next number."""
        await self._steps.done()
        if len(claims) == 1 and not (why := await self._misfit_after_expiry(claims[0])):
            await self._open_before(claims[0])
            await self.flush()
            self._clock_ms = max(self._clock_ms, claims[0].at_ms)
            self._add(claims[0])
            self.result.filled += 1
            return
        self._waiting += 1
        for claim in claims:
            what = why if len(claims) == 1 else f"{len(claims)} different sales claim this number"
            self.result.strays.append((claim, what))

    async def flush(self) -> None:
        """Void the numbers that wait."""
        if self._waiting:
            first = self._books.seq + 1
            self.result.voided.append((first, first + self._waiting - 1))
        for _ in range(self._waiting):
            await self._steps.done()
            self._add(self._event(VOIDED, {"actor": ACTOR}))
        self._waiting = 0

    async def _misfit_after_expiry(self, claim: Event) -> str:
        """Say why a claim does not fit, also once the holds that were due by then have ended.

        Their expiries took some of the lost numbers before it: a ticket that was sold again, say.
        """
        why = self._misfit(claim)
        if not self._waiting or not (why or self._ends_due):
            return why
        due = sorted(
            (ends, *map(int, name.split(":")))
            for name, ends in self._books.holds.items()
            if ends <= claim.at_ms
        )
        due = [each for each in due if each[1] not in self._changed][: self._waiting]
        if not due:
            return why
        self._waiting -= len(due)
        await self.flush()
        for ends, order, member_no in due:
            self._clock_ms = max(self._clock_ms, ends)
            self._add(Event(0, 0, 0, EXPIRED, member_no=member_no, order=order))
        return self._misfit(claim)

    def _misfit(self, claim: Event) -> str:
        """Say why a claim does not fit at its number; '' if it fits."""
        kind, books = KINDS[claim.kind], self._books
        if not kind.recoverable:
            return f"what was {claim.kind} is not repeated by a recovery"
        if books.state == "deleted":
            return "the campaign was deleted"
        if claim.at_ms < self._clock_ms and claim.order is None:  # a record lacks when it changed
            return "its time is before that of the event before it"
        try:
            broken = list(kind.breaches(books, claim))
        except DAMAGED as error:
            return f"it is no {claim.kind}: {error!r}"
        for invariant, what in broken:
            if invariant != OUTSIDE_WINDOW:
                return what
            if not self._waiting:
                return f"the campaign was {books.state}"
        return ""

    async def _open_before(self, claim: Event) -> None:
        """Put an opening in the place of the lost number before a sale.

        The acknowledged sale proves that the campaign was open. The actor is lost, unless it was
        the clock.
        """
        books = self._books
        broken = KINDS[claim.kind].breaches(books, claim)
        if all(invariant != OUTSIDE_WINDOW for invariant, _ in broken):
            return
        self._waiting -= 1
        await self.flush()
        data: dict[str, Any] = {"actor": ACTOR, "reason": "sales after it were acknowledged"}
        if books.state == "scheduled" and (books.opens_at_ms or claim.at_ms + 1) <= claim.at_ms:
            data = {"actor": CLOCK}
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
    return tuple(event.row())
