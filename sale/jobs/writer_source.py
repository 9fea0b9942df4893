"""Read heads and streams of campaigns from Redis for the ledger writer, with bounded waits."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import Redis

from sale.ledger.chain import CorruptLedger, Entry, parse_entry
from sale.stock import survey
from sale.stock.catalogue import ids_of
from sale.stock.dormant import Dormant
from sale.stock.errors import REDIS_ERRORS
from sale.stock.head import Head, Part, parsed
from sale.stock.keys import CAMPAIGNS, campaign_keys

REDIS_TIMEOUT_S: Final = 5.0

_T = TypeVar("_T")


class Heads(NamedTuple):
    """Redis' clock (ms), the IDs of its campaigns, and its reply for each requested head."""

    now_ms: int
    campaign_ids: list[str]
    heads: list[Head | Exception]


class LedgerSource:
    """Reads and trims the ledger in Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._dormant: dict[Part, Dormant[Head]] = {}

    def forget_head(self, campaign_id: str, part: Part) -> None:
        """Read this part of a head again, although the campaign may be dormant."""
        self._dormant[part].forget(campaign_id)

    async def read_heads(
        self, campaign_ids: Sequence[str], part: Part, *, lenient: bool = False
    ) -> Heads:
        """Read a part of the heads of these campaigns; dormant ones only after a new event.

        A head that cannot be read is replaced by its error, a ResponseError or a ValueError: that
        is the campaign's problem alone. Raises all other errors of Redis.
        """
        dormant = self._dormant.setdefault(part, Dormant(self._redis))
        due = await bounded(dormant.due(campaign_ids))
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        pipe.smembers(CAMPAIGNS)
        survey.add_reads(pipe, [campaign_keys(each).head for each in due], part.fields)
        clock, members, *replies = await bounded(pipe.execute(raise_on_error=False))
        for reply in (clock, members):
            if isinstance(reply, Exception):
                raise reply
        found: dict[str, Head | Exception] = {}
        for campaign_id, reply in zip(due, survey.replies_by_key(replies, len(due)), strict=True):
            head = found[campaign_id] = parsed(part, reply, lenient=lenient)
            if isinstance(head, Head):
                if head.seq is not None and head.dormant:
                    dormant.keep(campaign_id, head.seq, head)
            elif isinstance(head, REDIS_ERRORS) and not isinstance(
                head, redis_errors.ResponseError
            ):
                raise head
        heads = [found[each] if each in found else dormant.kept(each) for each in campaign_ids]
        return Heads(clock[0] * 1_000 + clock[1] // 1_000, ids_of(members), heads)

    async def read(self, stream: str, first: str, last: str, count: int) -> list[Entry]:
        """Read the entries of a stream between two IDs. Raises CorruptLedger."""
        rows: Any = await bounded(self._redis.xrange(stream, first, last, count))
        return [parse_entry(entry_id, fields) for entry_id, fields in rows]

    async def trim(self, stream: str, bound: str) -> None:
        """Delete the entries before an ID."""
        await bounded(self._redis.xtrim(stream, minid=bound, approximate=False))


async def bounded(call: Awaitable[_T]) -> _T:
    """Wait REDIS_TIMEOUT_S for Redis, because a stopped Redis neither answers nor disconnects.

    This does not use ``wait_for``, which in Python 3.11 swallows a cancellation that arrives
    together with the answer.
    """
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            return await call
    except TimeoutError as error:
        raise redis_errors.TimeoutError(f"no answer in {REDIS_TIMEOUT_S:g} s") from error


def readable(head: Head | Exception) -> Head:
    """Give a head that could be read. Raises the ResponseError of the reply, or CorruptLedger."""
    if isinstance(head, ValueError):
        raise CorruptLedger(f"the head in Redis cannot be read: {head}")
    if isinstance(head, Exception):
        raise head
    return head
