"""The members about whom a sold-out campaign must still ask Redis.

When nothing is left, nearly everybody can be refused by one ``peek``; but a member who has bought
must get the order again under the same key (INV-4) and be told the limit before the stock, and a
revoked one must be told that. This filter holds one bit a member for those. It is exact up to the
marks it states (event number, roster revision), and as large as the highest number in it demands:
23 KB for 182,850 members. A hash filter of fixed size was its predecessor: 2 MiB for each campaign,
and wrong for some of those who had bought nothing.
"""

import asyncio
from typing import Final

import structlog
from redis.asyncio import Redis

from sale.domain.member import MADE_UP_FROM, MEMBERS_MAX
from sale.ledger.chain import parse_entry
from sale.ledger.kinds import HELD, SOLD
from sale.lifetime import cancel_and_wait
from sale.stock.head import ROSTER, TRUST
from sale.stock.keys import campaign_keys
from sale.stock.scripts import Peek

GROWS_BYTES: Final = 1_024
SCAN_COUNT: Final = 2_000
CATCH_UP_ENTRIES: Final = 64
LOAD_AGAIN_S: Final = 0.5

log = structlog.get_logger()


class BuyerFilter:
    """Members who have bought or may not buy, complete up to ``seq`` and ``roster_rev``."""

    def __init__(self, redis: Redis, campaign_id: str, *, made_up: bool = False) -> None:
        self._redis = redis
        self._campaign_id = campaign_id
        self._keys = campaign_keys(campaign_id)
        self._loop = asyncio.get_running_loop()
        self._load_not_before = 0.0
        self._ails = ""
        self.first = MADE_UP_FROM if made_up else 0
        """The member whose bit is the first; rehearsals are sold to made-up members alone."""
        self.bits = bytearray()
        """Bit ``member_no - first``; the batcher looks here itself, a call would cost more."""
        self.seq = -1
        self.epoch = -1
        self.roster_rev = -1
        self.loading: asyncio.Task[None] | None = None
        """Under way, or the last: it takes a while, and nobody waits for it."""

    def __contains__(self, member_no: int) -> bool:
        """Whether Redis must be asked about this member."""
        place = member_no - self.first
        return 0 <= place < len(self.bits) << 3 and bool(self.bits[place >> 3] >> (place & 7) & 1)

    async def come_up_to(self, peek: Peek) -> bool:
        """Whether everything that the peek saw is held; where it is not, see to that.

        Raises CorruptLedger, RedisError, OSError.
        """
        if self.complete_for(peek.seq, peek.epoch, peek.roster_rev):
            return True
        if self.loading is not None and not self.loading.done():
            return False  # it sets the marks itself
        if 0 <= self.seq < peek.seq and self.epoch == peek.epoch:
            await self.catch_up(peek.seq)
            if self.complete_for(peek.seq, peek.epoch, peek.roster_rev):
                return True
            if 0 <= self.seq < peek.seq:
                return False  # the next peek goes on from there
        if self._loop.time() >= self._load_not_before:
            self.loading = self._loop.create_task(self._load(peek))
        return False

    async def close(self) -> None:
        """Load nothing any more."""
        if self.loading is not None:
            await cancel_and_wait([self.loading])

    def complete_for(self, seq: int, epoch: int, roster_rev: int) -> bool:
        """Whether everything up to these marks is held."""
        return self.seq >= seq and self.epoch == epoch and self.roster_rev == roster_rev

    async def _load(self, peek: Peek) -> None:
        try:
            if self.complete_for(peek.seq, peek.epoch, self.roster_rev):
                await self.load_revoked()
            else:
                await self.load()
        except Exception as error:  # noqa: BLE001 - refusals take the longer way meanwhile
            why = type(error).__name__
            if why != self._ails:
                log.warning("buyer_filter.not_loaded", campaign=self._campaign_id, why=why)
            self._ails = why
            self._load_not_before = self._loop.time() + LOAD_AGAIN_S
        else:
            self._ails = ""

    async def load(self) -> None:
        """Read all buyers and revoked members, in bounded steps, while sales may go on.

        What a scan may miss came after its start, so the marks are read before it. Members are
        never taken out of either place within an epoch, or are held for a while longer: both are
        safe.
        """
        head = await TRUST.read(self._redis, self._campaign_id)
        if head.seq is None or not head.epoch:
            return
        async for field in self._redis.hscan_iter(self._keys.members, count=SCAN_COUNT):
            self._add(int(field[0] if isinstance(field, tuple) else field))
        self.seq, self.epoch = head.seq, head.epoch
        await self.load_revoked()

    async def load_revoked(self) -> None:
        """Read the revoked members, after the roster has changed."""
        roster_rev = (await ROSTER.read(self._redis, self._campaign_id)).roster_rev
        if roster_rev is None:
            return
        async for member_no in self._redis.sscan_iter(self._keys.revoked, count=SCAN_COUNT):
            self._add(int(member_no))
        self.roster_rev = roster_rev

    async def catch_up(self, seq: int) -> None:
        """Read the ledger from where this filter stands, at most 64 entries."""
        rows: list[tuple[bytes, dict[bytes, bytes]]] = await self._redis.xrange(  # type: ignore[assignment]
            self._keys.stream, f"({self.seq}-0", f"{seq}-0", count=CATCH_UP_ENTRIES
        )
        for entry_id, fields in rows:
            entry = parse_entry(entry_id, fields)
            if entry.first != self.seq + 1:
                self.seq = -1  # trimmed meanwhile: load again
                return
            for event in entry.events():
                if event.kind in {SOLD, HELD} and event.member_no is not None:
                    self._add(event.member_no)
            self.seq = entry.last

    def _add(self, member_no: int) -> None:
        place = member_no - self.first
        if not 0 <= place <= MEMBERS_MAX:
            return  # made up in a real campaign, or the reverse: no token of such a one comes here
        if place >> 3 >= len(self.bits):
            self.bits.extend(bytes((place >> 3) - len(self.bits) + GROWS_BYTES))
        self.bits[place >> 3] |= 1 << (place & 7)
