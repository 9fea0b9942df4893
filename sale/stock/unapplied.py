"""Steps that this process acknowledged and PostgreSQL may not have yet.

If Redis is restored from older files, only the API processes still know these steps: the recovery
fills the lost numbers from what they hand in. Each batch is kept as one packed value, so that a
long outage of PostgreSQL costs bytes and not objects. If all of a batch was sold, the value is the
script's argument itself, so keeping it costs nothing. The number of steps is bounded by
``ledger_behind_max_events``: the scripts sell nothing when PostgreSQL is further behind.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from sale.ledger.chain import Event, parse_row
from sale.ledger.kinds import HELD, SOLD
from sale.stock.batch_codec import unpack_batch


class Batch(NamedTuple):
    """A batch of ``purchase.lua`` that was sold completely, as event ``first`` and the following.

    ``pay_before`` is 0 where it was sold for good. ``packed`` is the script's argument.
    """

    epoch: int
    price_fen: int
    first: int
    at_ms: int
    pay_before: int
    size: int
    packed: bytes

    @property
    def highest(self) -> int:
        """Number of its last event."""
        return self.first + self.size - 1

    def events(self) -> Iterator[Event]:
        """Give its sales."""
        members, _, showings, quantities, keys = unpack_batch(self.packed)
        kind, pay_before = (HELD, self.pay_before) if self.pay_before else (SOLD, None)
        columns = zip(members, showings, quantities, keys, strict=True)
        for seq, (member, showing, quantity, key) in enumerate(columns, self.first):
            yield Event(
                seq, self.at_ms, self.epoch, kind, int(member), showing, quantity, key,
                self.price_fen, pay_before,
            )  # fmt: skip


class _Rows(NamedTuple):
    """Other steps: ``packed`` are their numbers, moments (ms) and rows as an entry holds them."""

    epoch: int
    highest: int
    size: int
    packed: bytes

    def events(self) -> Iterator[Event]:
        for seq, at_ms, row in _DECODER.decode(self.packed):
            yield parse_row(seq, at_ms, self.epoch, row)


class Unapplied:
    """The acknowledged steps of one campaign in this process that may not be applied yet."""

    def __init__(self) -> None:
        self._batches: deque[Batch | _Rows] = deque()
        self._count = 0
        self._replayed: set[tuple[int, str]] = set()
        self.total = 0
        """Steps ever added; a change shows that there are new ones."""
        self.applied = 0
        """Number of the last event that PostgreSQL is known to have, with all before it."""

    def __len__(self) -> int:
        """How many steps are kept."""
        return self._count

    def add(self, events: Sequence[Event]) -> None:
        """Keep steps of one epoch that are about to be acknowledged."""
        if events:
            rows = [(each.seq, each.at_ms, msgspec.json.encode(each.row())) for each in events]
            highest = max(each.seq for each in events)
            self._keep(_Rows(events[0].epoch, highest, len(events), _ENCODER.encode(rows)))

    def add_batch(self, batch: Batch) -> None:
        """Keep a batch that was sold completely."""
        self._keep(batch)

    def _keep(self, batch: Batch | _Rows) -> None:
        self._batches.append(batch)
        self._count += batch.size
        self.total += batch.size

    def first_replay(self, seq: int, key_hash: str) -> bool:
        """Whether a replayed sale is to be added: true at its first replay only."""
        known = (seq, key_hash) in self._replayed
        self._replayed.add((seq, key_hash))
        return not known

    def drop_applied(self, applied: int) -> None:
        """Drop the steps that PostgreSQL has."""
        if applied > self.applied and self._replayed:
            self._replayed = {each for each in self._replayed if each[0] > applied}
        self.applied = max(self.applied, applied)
        while self._batches and self._batches[0].highest <= self.applied:
            self._count -= self._batches.popleft().size

    def clear(self) -> None:
        """Drop all steps, after they were handed in."""
        self._batches.clear()
        self._replayed.clear()
        self._count = 0

    def events(self) -> Iterator[Event]:
        """Give the steps in the order in which they were acknowledged."""
        for batch in list(self._batches):
            yield from batch.events()


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(list[tuple[int, int, bytes]])
