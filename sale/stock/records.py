"""A member's orders in Redis: a value of the hash ``members``, one record of 31 bytes an order.

The layout stands in the header of ``purchase.lua``, which writes it.
"""

from collections.abc import Iterable
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from sale.ledger.fold import SaleRecord
from sale.stock import survey
from sale.stock.atomic import read_at_once
from sale.stock.catalogue import campaign_ids
from sale.stock.keys import campaign_keys

RECORD_BYTES: Final = 31

log = structlog.get_logger()


def parse_records(value: bytes) -> list[SaleRecord]:
    """Read a member's orders, oldest first. Raises ValueError where the value is not whole."""
    if len(value) % RECORD_BYTES:
        raise ValueError(f"a member's value of {len(value)} bytes is not whole records")
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
    """Write a member's orders as ``purchase.lua`` does. The reverse of ``parse_records``."""
    return b"".join(
        record.key_hash.encode("ascii")
        + record.seq.to_bytes(5, "big")
        + record.at_ms.to_bytes(6, "big")
        + record.showing.to_bytes(2, "big")
        + record.quantity.to_bytes(2, "big")
        for record in records
    )


async def read_member(
    redis: Redis, campaign_id: str, member_no: int
) -> tuple[list[SaleRecord], bool]:
    """Read a member's orders in a campaign, oldest first, and whether the member is revoked."""
    keys = campaign_keys(campaign_id)

    def ask(pipe: Any) -> None:  # noqa: ANN401 - redis-py's pipeline
        pipe.hget(keys.members, str(member_no))
        pipe.sismember(keys.revoked, str(member_no))

    value, revoked = await read_at_once(redis, keys.head, ask)
    return parse_records(value or b""), bool(revoked)


async def read_member_everywhere(redis: Redis, member_no: int) -> dict[str, list[SaleRecord]]:
    """Read a member's orders in all campaigns, by campaign; those without any are left out.

    Two round trips, however many campaigns there are or were. One whose value is damaged is left
    out, so that the others are seen: the audit tells of it.
    """
    ids = await campaign_ids(redis)
    async with redis.pipeline(transaction=False) as pipe:
        survey.add_reads(pipe, [campaign_keys(each).members for each in ids], [str(member_no)])
        values = survey.replies_by_key(await pipe.execute(), len(ids))
    held: dict[str, list[SaleRecord]] = {}
    for campaign_id, value in zip(ids, values, strict=True):
        if isinstance(value, Exception):
            log.warning("orders.unreadable", campaign=campaign_id, error=str(value))
        elif value[0]:
            try:
                held[campaign_id] = parse_records(value[0])
            except ValueError as error:
                log.warning("orders.unreadable", campaign=campaign_id, error=str(error))
    return held
