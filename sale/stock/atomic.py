"""Reading several values of a campaign as they stood at one moment.

A Redis that is out of memory refuses to queue a transaction, also one that only reads. Then the
values are read one after the other, between two looks at the event number: nothing of a campaign
changes without an event. Not always so, because a transaction never has to be repeated.
"""

from collections.abc import Callable
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from sale.stock.head import SEQ

TRIES_MAX: Final = 5


async def read_at_once(redis: Redis, head: str, ask: Callable[[Any], None]) -> list[Any]:
    """Give the replies to the reading commands that ``ask`` puts into a pipeline.

    ``head`` is the campaign's. Raises redis-py's errors.
    """
    try:
        async with redis.pipeline(transaction=True) as pipe:
            ask(pipe)
            return list(await pipe.execute())
    except OutOfMemoryError as error:
        refused = error
    for _ in range(TRIES_MAX):
        async with redis.pipeline(transaction=False) as pipe:
            pipe.hget(head, SEQ)
            ask(pipe)
            pipe.hget(head, SEQ)
            before, *replies, after = await pipe.execute()
        if before == after:
            return replies
    raise refused
