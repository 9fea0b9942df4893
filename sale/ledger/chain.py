"""The ledger's events: how they are written, chained, read back and folded.

Everything that changes what a campaign may sell is an event with the next number (INV-5). A Lua
script appends all events of one call as one stream entry, in the same atomic step that changes the
state, so one entry is one link of the hash chain. Folding a campaign's events gives its Redis
state, exactly: that is recovery, and the audit's independent check.

A stream entry has the ID ``<number of its last event>-0`` and the fields

=== ==============================================================
n   how many events it holds; they are numbered up to the entry's ID
t   milliseconds of the campaign's clock, the same for all of them
e   epoch
h   chain hash, 40 hex digits: ``sha1(previous h | first number | t | e | d)``
d   the events, a JSON array
=== ==============================================================

A sale is ``["sold", card_no, showing number, quantity, key hash, price_fen]``: it is what a rush
writes by the hundred thousand, so it carries no field names. Its content is all of what the client
asked for (showing and quantity), so no separate hash of the content is needed to tell a retry from
a key used twice. Every other event is ``[kind, {…}]`` with who, why and what. The alternative, one
stream entry an event, means an XADD and a hash for each sale instead of one a call.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from sale.domain.clock import nearest
from sale.domain.problem import DAMAGED
from sale.ledger.kinds import KINDS, SOLD

GENESIS: Final = "0" * 40
"""The chain hash before a campaign's first event."""


class CorruptLedger(Exception):  # noqa: N818 - says what it is
    """A stream entry cannot be read or applied, has a gap, or breaks the hash chain (INV-5)."""


class Event(msgspec.Struct, frozen=True):
    """One event. The fields of a sale are None in every other kind; ``data`` is empty in a sale."""

    seq: int
    at_ms: int
    epoch: int
    kind: str
    card_no: str | None = None
    showing: int | None = None
    quantity: int | None = None
    key_hash: str | None = None
    price_fen: int | None = None
    data: dict[str, Any] = {}

    @property
    def actor(self) -> str | None:
        """Who did it, for everything that is not a sale."""
        return self.data.get("actor")

    @property
    def reason(self) -> str | None:
        """Why, where a reason was given."""
        return self.data.get("reason")


class Entry(msgspec.Struct, frozen=True):
    """One link of the chain: the events of one call."""

    first: int
    last: int
    at_ms: int
    epoch: int
    chain: str
    payload: bytes

    def follows(self, chain: str) -> bool:
        """Whether this entry is the link after ``chain``."""
        return self.chain == link(chain, self.first, self.at_ms, self.epoch, self.payload)

    def events(self) -> list[Event]:
        """Decode the events. Raises CorruptLedger for all that the writer could not apply."""
        try:
            events = self._sales(_SALES.decode(self.payload), self.first)
        except DAMAGED:
            events = self._mixed()
        if len(events) != self.last - self.first + 1:
            raise CorruptLedger(f"entry {self.last}: holds {len(events)} events, not as announced")
        return events

    def _sales(self, rows: "list[_Sale]", first: int) -> list[Event]:
        at_ms, epoch = self.at_ms, self.epoch
        return [
            Event(seq, at_ms, epoch, SOLD, card, showing, quantity, key_hash, price_fen)
            for seq, (_, card, showing, quantity, key_hash, price_fen) in enumerate(rows, first)
        ]

    def _mixed(self) -> list[Event]:
        """Decode an entry that does not hold sales alone: a run of sales at once."""
        events: list[Event] = []
        try:
            for is_sale, run in groupby(_ROWS.decode(self.payload), lambda row: row[:1] == [SOLD]):
                first = self.first + len(events)
                if is_sale:
                    events += self._sales(msgspec.convert(list(run), list[_Sale]), first)
                else:
                    events += [self._step(seq, *row) for seq, row in enumerate(run, first)]
        except DAMAGED as error:
            raise CorruptLedger(f"entry {self.last}: {error}") from None
        return events

    def _step(self, seq: int, kind: str, data: dict[str, Any]) -> Event:
        if not isinstance(data, dict):
            raise TypeError(f"event {seq} is no {kind}")
        if kind not in KINDS:
            raise CorruptLedger(f"entry {self.last}: unknown kind {kind!r}")
        return Event(seq, self.at_ms, self.epoch, kind, data=data)


def link(chain: str, first: int, at_ms: int, epoch: int, payload: bytes) -> str:
    """Chain hash after an entry; the same formula stands in ``stock/lua/_ledger.lua``."""
    head = f"{chain}|{first}|{at_ms}|{epoch}|".encode()
    return hashlib.sha1(head + payload, usedforsecurity=False).hexdigest()


def make_entry(chain: str, first: int, at_ms: int, epoch: int, rows: Sequence[Any]) -> Entry:
    """Write the entry after ``chain`` that holds ``rows``, as ``_ledger.lua`` does."""
    payload = msgspec.json.encode(rows)
    return Entry(
        first=first,
        last=first + len(rows) - 1,
        at_ms=at_ms,
        epoch=epoch,
        chain=link(chain, first, at_ms, epoch, payload),
        payload=payload,
    )


def parse_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    """Read a stream entry as redis-py returns it. Raises CorruptLedger."""
    try:
        last, at_ms = int(entry_id.split(b"-")[0]), int(fields[b"t"])
        if at_ms != nearest(at_ms):
            raise CorruptLedger(f"entry {last}: its moment ({at_ms} ms) cannot be stored")
        return Entry(
            first=last - int(fields[b"n"]) + 1,
            last=last,
            at_ms=at_ms,
            epoch=int(fields[b"e"]),
            chain=fields[b"h"].decode("ascii"),
            payload=fields[b"d"],
        )
    except DAMAGED as error:
        raise CorruptLedger(f"entry {entry_id!r}: {error!r}") from None


def check_chain(entries: Iterable[Entry], applied: int, chain: str) -> tuple[int, str]:
    """Follow ``entries`` from ``applied``; give the last number and hash. Raises CorruptLedger."""
    for entry in entries:
        if entry.first != applied + 1:
            raise CorruptLedger(f"event {applied + 1} is missing: next is {entry.first}")
        if not entry.follows(chain):
            raise CorruptLedger(f"the chain breaks at event {entry.first}")
        applied, chain = entry.last, entry.chain
    return applied, chain


_Integer: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
"""As PostgreSQL's columns have it. Whether a number makes sense is for its constraints to say."""
_Sale: TypeAlias = tuple[Literal["sold"], str, _Integer, _Integer, str, _Integer]
_SALES: Final = msgspec.json.Decoder(list[_Sale])
_ROWS: Final = msgspec.json.Decoder(list[list[Any]])
