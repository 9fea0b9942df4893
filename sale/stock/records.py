"""A card's orders in Redis: a value of the hash ``cards``, one record of 31 bytes an order.

The layout stands in the header of ``purchase.lua``, which writes it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from redis.asyncio import Redis

from sale.events import SaleRecord
from sale.stock.atomic import read_at_once
from sale.stock.keys import campaign_keys

RECORD_BYTES: Final = 31


def parse_records(value: bytes) -> list[SaleRecord]:
    """Read a card's orders, oldest first. Raises ValueError where the value is not whole."""
    if len(value) % RECORD_BYTES:
        raise ValueError(f"a card's value of {len(value)} bytes is not whole records")
    return [
        SaleRecord(
            seq=int.from_bytes(value[at + 16 : at + 21], "big"),
            at_ms=int.from_bytes(value[at + 21 : at + 27], "big"),
            showing=int.from_bytes(value[at + 27 : at + 29], "big"),
            quantity=int.from_bytes(value[at + 29 : at + 31], "big"),
            key_hash=value[at : at + 16].decode("ascii"),
        )
        for at in range(0, len(value), RECORD_BYTES)
    ]


def pack_records(records: Iterable[SaleRecord]) -> bytes:
    """Write a card's orders as ``purchase.lua`` does. The reverse of ``parse_records``."""
    return b"".join(
        record.key_hash.encode("ascii")
        + record.seq.to_bytes(5, "big")
        + record.at_ms.to_bytes(6, "big")
        + record.showing.to_bytes(2, "big")
        + record.quantity.to_bytes(2, "big")
        for record in records
    )


async def read_card(redis: Redis, campaign_id: str, card_no: str) -> tuple[list[SaleRecord], bool]:
    """Read a card's orders in a campaign, oldest first, and whether it may not buy."""
    keys = campaign_keys(campaign_id)

    def ask(pipe: Any) -> None:  # noqa: ANN401 - redis-py's pipeline
        pipe.hget(keys.cards, card_no)
        pipe.sismember(keys.revoked, card_no)

    value, revoked = await read_at_once(redis, keys.head, ask)
    return parse_records(value or b""), bool(revoked)


async def read_card_everywhere(
    redis: Redis, campaign_ids_: Sequence[str], card_no: str
) -> list[list[SaleRecord]]:
    """Read a card's orders in each of these campaigns, in their order, in one round trip."""
    async with redis.pipeline(transaction=False) as pipe:
        for campaign_id in campaign_ids_:
            pipe.hget(campaign_keys(campaign_id).cards, card_no)
        values = await pipe.execute()
    return [parse_records(value or b"") for value in values]
