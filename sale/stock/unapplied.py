"""Sales that this process acknowledged and PostgreSQL may not have yet.

If Redis is restored from older files, only the API processes still know these sales: they hand them
in, and the recovery fills in the lost numbers. Each batch is stored as one packed value, so that a
long outage of PostgreSQL costs bytes and not objects. If all of a batch was sold, the value is the
script's argument itself, so storing it costs nothing. The number of sales is bounded by
``ledger_behind_max_events``: the scripts sell nothing when PostgreSQL is further behind. Whether
Redis has these sales is not asked of them, but of the process's mark (``mark.py``).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

import msgspec

from sale.stock.batch_codec import unpack_batch

Sale: TypeAlias = tuple[int, int, int, int, int, str]
"""Event number, sold at (ms), member, showing number, quantity, key hash."""


class AcknowledgedSale(msgspec.Struct, frozen=True):
    """An acknowledged sale."""

    epoch: int
    price_fen: int
    seq: int
    at_ms: int
    member_no: int
    showing: int
    quantity: int
    key_hash: str


class Unapplied:
    """The acknowledged sales of one campaign in this process that may not be applied yet."""

    def __init__(self) -> None:
        self._batches: deque[_Batch] = deque()
        self._count = 0
        self._replayed: set[tuple[int, str]] = set()
        self.total = 0
        """Sales ever added; a change shows that there are new ones."""
        self.applied = 0
        """Number of the last event that PostgreSQL is known to have, with all before it."""

    def __len__(self) -> int:
        """Number of sales."""
        return self._count

    def add(self, epoch: int, price_fen: int, sales: Sequence[Sale]) -> None:
        """Store sales that are about to be acknowledged."""
        if sales:
            highest = max(sale[0] for sale in sales)
            self._append(_Batch(highest, len(sales), epoch, price_fen, 0, _ENCODER.encode(sales)))

    def add_batch(
        self, epoch: int, price_fen: int, first: int, at_ms: int, count: int, packed: bytes
    ) -> None:
        """Store a batch that was sold completely, as event ``first`` and the following ones.

        ``packed`` is the script's argument (``pack_batch``).
        """
        self._append(_Batch(first + count - 1, count, epoch, price_fen, at_ms, packed))

    def _append(self, batch: "_Batch") -> None:
        self._batches.append(batch)
        self._count += batch.size
        self.total += batch.size

    def first_replay(self, seq: int, key_hash: str) -> bool:
        """Whether a replayed sale is to be added: true at its first replay only."""
        known = (seq, key_hash) in self._replayed
        self._replayed.add((seq, key_hash))
        return not known

    def drop_applied(self, applied: int) -> None:
        """Drop the sales that PostgreSQL has."""
        if applied > self.applied and self._replayed:
            self._replayed = {each for each in self._replayed if each[0] > applied}
        self.applied = max(self.applied, applied)
        while self._batches and self._batches[0].highest <= self.applied:
            self._count -= self._batches.popleft().size

    def clear(self) -> None:
        """Drop all sales, after they were handed in."""
        self._batches.clear()
        self._replayed.clear()
        self._count = 0

    def sales(self) -> Iterator[AcknowledgedSale]:
        """Give the sales in the order in which they were acknowledged."""
        for batch in list(self._batches):
            for sale in batch.sales():
                yield AcknowledgedSale(batch.epoch, batch.price_fen, *sale)


class _Batch(NamedTuple):
    """Sales of one call. ``packed`` is a script's argument if ``at_ms`` is set, else ``Sale``s."""

    highest: int
    size: int
    epoch: int
    price_fen: int
    at_ms: int
    packed: bytes

    def sales(self) -> list[Sale]:
        if not self.at_ms:
            return _DECODER.decode(self.packed)
        members, _, showings, quantities, keys = unpack_batch(self.packed)
        numbers = range(self.highest - self.size + 1, self.highest + 1)
        times = [self.at_ms] * self.size
        return list(zip(numbers, times, map(int, members), showings, quantities, keys, strict=True))


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(list[Sale])
