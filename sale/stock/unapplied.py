"""What this process told members and PostgreSQL may not have yet.

Should Redis come back with older files, these are the only ones who still know: the recovery fills
the lost numbers from what the API processes hand in. A batch is kept as one packed value (where all
of it was sold, the very bytes that the script was given, so that keeping costs nothing), so that a
long outage of PostgreSQL costs bytes and not objects; how many there can be is bounded by how far
PostgreSQL may be behind before nothing more is sold (``ledger_behind_max_events``).
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from redis.asyncio import Redis

from sale.ledger.fold import SaleRecord
from sale.stock.batch_codec import unpack_bids
from sale.stock.keys import CampaignKeys
from sale.stock.records import parse_records

CHECK_CHUNK: Final = 1_000
CHECK_TIMEOUT_S: Final = 2.0
"""For one chunk: how long all of them take depends on how much is kept."""

Told: TypeAlias = tuple[int, int, int, int, int, str]
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
        """Sales that were ever kept: it tells whether there are new ones."""
        self.applied = 0
        """Number up to which PostgreSQL is known to have everything."""

    def __len__(self) -> int:
        """How many sales are kept."""
        return self._count

    def add(self, epoch: int, price_fen: int, told: Sequence[Told]) -> None:
        """Keep sales that are about to be told."""
        if told:
            highest = max(sale[0] for sale in told)
            self._keep(_Batch(highest, len(told), epoch, price_fen, 0, _ENCODER.encode(told)))

    def add_batch(
        self, epoch: int, price_fen: int, first: int, at_ms: int, count: int, bids: bytes
    ) -> None:
        """Keep a batch of which everything was sold, from number ``first`` on, as it was asked."""
        self._keep(_Batch(first + count - 1, count, epoch, price_fen, at_ms, bids))

    def _keep(self, batch: "_Batch") -> None:
        self._batches.append(batch)
        self._count += batch.sales
        self.total += batch.sales

    def first_replay(self, seq: int, key_hash: str) -> bool:
        """Whether a sale that is told again is to be kept: once, however often it is asked for."""
        known = (seq, key_hash) in self._replayed
        self._replayed.add((seq, key_hash))
        return not known

    def drop_applied(self, applied: int) -> None:
        """Forget what PostgreSQL has."""
        if applied > self.applied and self._replayed:
            self._replayed = {each for each in self._replayed if each[0] > applied}
        self.applied = max(self.applied, applied)
        while self._batches and self._batches[0].highest <= self.applied:
            self._count -= self._batches.popleft().sales

    def clear(self) -> None:
        """Forget everything: it was handed in."""
        self._batches.clear()
        self._replayed.clear()
        self._count = 0

    def sales(self) -> Iterator[AcknowledgedSale]:
        """Give what is kept, in the order in which it was told."""
        for batch in list(self._batches):
            for sale in batch.told():
                yield AcknowledgedSale(batch.epoch, batch.price_fen, *sale)

    async def lacking(self, redis: Redis, keys: CampaignKeys) -> int:
        """Count the kept sales that this Redis does not know. Raises redis-py's errors."""
        lacking = 0
        sales = self.sales()
        while chunk := list(islice(sales, CHECK_CHUNK)):
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                members = [str(sale.member_no) for sale in chunk]
                values: list[Any] = await redis.hmget(keys.members, members)
            for sale, value in zip(chunk, values, strict=True):
                record = SaleRecord(
                    sale.seq, sale.at_ms, sale.showing, sale.quantity, sale.key_hash
                )
                try:
                    lacking += record not in parse_records(value or b"")
                except ValueError:
                    lacking += 1  # a damaged record: the recovery builds it again
        return lacking


class _Batch(NamedTuple):
    """Sales that were told together; ``packed`` is bids where ``at_ms`` is given, else ``Told``."""

    highest: int
    sales: int
    epoch: int
    price_fen: int
    at_ms: int
    packed: bytes

    def told(self) -> list[Told]:
        if not self.at_ms:
            return _DECODER.decode(self.packed)
        members, _, showings, quantities, keys = unpack_bids(self.packed)
        numbers = range(self.highest - self.sales + 1, self.highest + 1)
        times = [self.at_ms] * self.sales
        return list(zip(numbers, times, map(int, members), showings, quantities, keys, strict=True))


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(list[Told])
