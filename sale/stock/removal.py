"""Takes a rehearsal out of Redis. Nothing else is ever taken out."""

from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import WatchError

from sale.domain.campaign import Campaign
from sale.stock.head import CONFIG
from sale.stock.keys import CAMPAIGNS, campaign_keys, rebuilt_keys

TRIES_MAX: Final = 5


class NotRemoved(Exception):  # noqa: N818 - says what happened
    """It is not a rehearsal, or changes all the time."""


async def remove_rehearsal(redis: Redis, campaign_id: str) -> bool:
    """Remove all keys of a rehearsal; whether there were any. Raises NotRemoved.

    The caller has struck it off in PostgreSQL; that its head says so too is a second look.
    """
    keys = campaign_keys(campaign_id)
    for _ in range(TRIES_MAX):
        async with redis.pipeline(transaction=True) as pipe:
            await pipe.watch(keys.head)
            config = (await CONFIG.read(pipe, campaign_id)).config
            if config and not _CONFIG.decode(config).rehearsal_of:
                raise NotRemoved(f"{campaign_id} is not a rehearsal: its keys stay")
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.unlink(*keys, *rebuilt_keys(campaign_id))
            try:
                (removed,) = await pipe.execute()
            except WatchError:
                continue
        # Last, so that what is left of a removal that died is still found by its ID.
        await redis.srem(CAMPAIGNS, campaign_id)
        return bool(removed)
    raise NotRemoved(f"{campaign_id}: its head keeps changing; try again")


_CONFIG: Final = msgspec.json.Decoder(Campaign)
