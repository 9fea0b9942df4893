"""A process's mark: how far it has seen a campaign's ledger.

A mark holds the number of the last event that the process has seen and the chain hash after it. The
hash covers every event before it, of any kind and by any process. One look-up in the stream
therefore tells whether a Redis holds everything that the process acknowledged. Each script that a
process calls returns number and hash.

The alternative was to compare each acknowledged order with the members' records: its time grew
with the number of orders, and each further kind of step would have needed a comparison of its own.
"""

from enum import Enum
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sale.ledger.chain import CorruptLedger, parse_entry
from sale.stock.keys import CampaignKeys


class Mark(NamedTuple):
    """``incarnation`` is the ``run_id:replid:epoch`` in which the process checked its mark.

    ``seq`` is the highest event number that the process has seen, ``chain`` the hash after it.
    """

    incarnation: str
    seq: int
    chain: str

    @property
    def epoch(self) -> int:
        """Epoch of the incarnation; 0 if none was checked."""
        return int(self.incarnation.rpartition(":")[2] or 0)


NOT_CHECKED: Final = Mark("", 0, "")


class Found(Enum):
    """The result of a look-up.

    HELD: the ledger passes through the mark. TRIMMED: the stream begins after it, so PostgreSQL
    alone can tell. LACKING: the ledger ends before it, passes it by, or cannot be read.
    """

    HELD = 1
    TRIMMED = 2
    LACKING = 3


async def look_up(redis: Redis, keys: CampaignKeys, mark: Mark) -> Found:
    """Look for the entry that ends at the mark. Raises redis-py's errors."""
    if not mark.seq:
        return Found.HELD
    try:
        rows: Any = await redis.xrange(keys.stream, f"{mark.seq}-0", count=1)
        entry = parse_entry(*rows[0]) if rows else None
    except (ResponseError, CorruptLedger):
        return Found.LACKING  # the key holds another type, or the entry is damaged
    if entry is None:
        return Found.LACKING
    if entry.first > mark.seq:
        return Found.TRIMMED
    same = (entry.last, entry.chain) == (mark.seq, mark.chain)
    return Found.HELD if same else Found.LACKING
