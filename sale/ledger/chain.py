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

How an event is written, its entry in ``kinds.py`` says. The alternative, one stream entry an event,
means an XADD and a hash for each sale instead of one a call.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from sale.domain.clock import nearest
from sale.domain.problem import DAMAGED
from sale.ledger.kinds import KINDS, Kind, Sale

_Payload = TypeVar("_Payload", bound=msgspec.Struct)

GENESIS: Final = "0" * 40
"""The chain hash before a campaign's first event."""


class Position(NamedTuple):
    """A place in a ledger: number of the last event and chain hash after it."""

    seq: int
    chain: str


START: Final = Position(0, GENESIS)


class CorruptLedger(Exception):  # noqa: N818 - says what it is
    """A stream entry cannot be read or applied, has a gap, or breaks the hash chain (INV-5)."""


class Event(msgspec.Struct, frozen=True):
    """One event. A field that its kind does not have is None; ``data`` is empty in positional ones.

    ``order`` is the number of the event that made the order which this one changes.
    """

    seq: int
    at_ms: int
    epoch: int
    kind: str
    member_no: int | None = None
    showing: int | None = None
    quantity: int | None = None
    key_hash: str | None = None
    price_fen: int | None = None
    pay_before: int | None = None
    order: int | None = None
    data: dict[str, Any] = {}

    @property
    def actor(self) -> str | None:
        """The actor, for every event that is not a sale."""
        return self.data.get("actor")

    @property
    def reason(self) -> str | None:
        """Why, where a reason was given."""
        return self.data.get("reason")

    def read(self, payload: type[_Payload]) -> _Payload:
        """Read ``data``. Raises ValidationError, a ValueError."""
        return msgspec.convert(self.data, payload)

    def row(self) -> list[Any]:
        """Give the event as an entry holds it."""
        kind = KINDS[self.kind]
        if kind.positional:
            return [self.kind, *(getattr(self, name) for name in kind.payload.__struct_fields__)]
        return [self.kind, self.data]


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
            rows = _ROWS.decode(self.payload)
        except DAMAGED as error:
            raise CorruptLedger(f"entry {self.last}: {_why(self.payload, error)}") from None
        if len(rows) != self.last - self.first + 1:
            raise CorruptLedger(f"entry {self.last}: holds {len(rows)} events, not as announced")
        at_ms, epoch = self.at_ms, self.epoch
        return [
            Event(
                seq, at_ms, epoch, _KIND_OF[type(row)], row.member_no, row.showing, row.quantity,
                row.key_hash, row.price_fen,
            )
            if isinstance(row, Sale)
            else _event(seq, at_ms, epoch, row)
            for seq, row in enumerate(rows, self.first)
        ]  # fmt: skip


def _event(seq: int, at_ms: int, epoch: int, row: Any) -> Event:  # noqa: ANN401 - of _ROWS
    """Give the event of a decoded row that is not a sale."""
    kind = _KIND_OF[type(row)]
    if KINDS[kind].positional:
        return Event(seq, at_ms, epoch, kind, **msgspec.structs.asdict(row))
    member_no, order = row.data.get("member_no"), row.data.get("order")
    return Event(seq, at_ms, epoch, kind, member_no=member_no, order=order, data=row.data)


def parse_row(seq: int, at_ms: int, epoch: int, row: bytes | str) -> Event:
    """Read one event as an entry holds it (JSON). Raises CorruptLedger."""
    try:
        return _event(seq, at_ms, epoch, _ONE_ROW.decode(row))
    except DAMAGED as error:
        raise CorruptLedger(f"event {seq}: {error}") from None


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


def check_chain(entries: Iterable[Entry], position: Position) -> Position:
    """Follow ``entries`` from a position to the next. Raises CorruptLedger."""
    seq, chain = position
    for entry in entries:
        if entry.first != seq + 1:
            raise CorruptLedger(f"event {seq + 1} is missing: next is {entry.first}")
        if not entry.follows(chain):
            raise CorruptLedger(f"the chain breaks at event {entry.first}")
        seq, chain = entry.last, entry.chain
    return Position(seq, chain)


def _why(payload: bytes, error: Exception) -> str:
    """Say why a payload cannot be decoded: a kind that is not known, or what msgspec says."""
    try:
        kinds = [row[0] for row in msgspec.json.decode(payload, type=list[list[Any]])]
        return next(f"unknown kind {kind!r}" for kind in kinds if kind not in KINDS)
    except (StopIteration, *DAMAGED):
        return str(error)


def _row_type(name: str, kind: Kind) -> type[msgspec.Struct]:
    """Give the type of ``[kind, field, …]`` or ``[kind, {…}]``, which msgspec tells by the kind."""
    if kind.positional:
        return kind.payload
    return msgspec.defstruct(
        name, [("data", dict[str, Any])],
        frozen=True, array_like=True, tag=name, forbid_unknown_fields=True,
    )  # fmt: skip


_KIND_OF: Final = {_row_type(name, kind): name for name, kind in KINDS.items()}
_ROW: Final = reduce(or_, _KIND_OF)
_ROWS: Final = msgspec.json.Decoder[list[Any]](list[_ROW])  # type: ignore[valid-type]
_ONE_ROW: Final = msgspec.json.Decoder[Any](_ROW)
