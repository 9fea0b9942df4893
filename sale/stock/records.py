"""A member's orders in Redis: a value of the hash ``members``, one record an order.

The layout stands in the header of ``lua/_orders.lua``.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import structlog
from redis.asyncio import Redis

from sale.domain.order import OrderState
from sale.ledger.fold import OrderRecord, hold_name
from sale.stock import survey
from sale.stock.atomic import read_at_once
from sale.stock.catalogue import campaign_ids
from sale.stock.keys import campaign_keys

RECORD: Final = struct.Struct(">16s5s6sHHHB5s")
"""All of a record but its letters: 39 bytes."""
_STATE_BITS: Final = 0x07
_PAID: Final = 0x08
_RETURNED: Final = 0x10
_STATES: Final = (OrderState.HELD, OrderState.CONFIRMED, OrderState.EXPIRED, OrderState.CANCELLED)
"""By their numbers in a record, from 1."""

log = structlog.get_logger()


def parse_records(value: bytes) -> list[OrderRecord]:
    """Read a member's orders, oldest first. Raises ValueError where the value is not whole."""
    records, at = [], 0
    while at < len(value):
        try:
            key, seq, at_ms, showing, quantity, live, flags, changed = RECORD.unpack_from(value, at)
            state = _STATES[(flags & _STATE_BITS) - 1]
        except (struct.error, IndexError):
            raise ValueError(
                f"a member's value of {len(value)} bytes is not whole records"
            ) from None
        letters_at = at + RECORD.size
        at = letters_at + quantity
        if at > len(value) or not flags & _STATE_BITS:
            raise ValueError(f"a member's value of {len(value)} bytes is not whole records")
        records.append(
            OrderRecord(
                seq=int.from_bytes(seq, "big"),
                at_ms=int.from_bytes(at_ms, "big"),
                showing=showing,
                quantity=quantity,
                key_hash=key.decode("ascii"),
                live=live,
                state=state,
                letters=value[letters_at:at].decode("ascii"),
                changed=int.from_bytes(changed, "big"),
                paid=bool(flags & _PAID),
                returned=bool(flags & _RETURNED),
            )
        )
    return records


def pack_records(records: Iterable[OrderRecord]) -> bytes:
    """Write a member's orders as the scripts do. The reverse of ``parse_records``."""
    return b"".join(
        RECORD.pack(
            record.key_hash.encode("ascii"),
            record.seq.to_bytes(5, "big"),
            record.at_ms.to_bytes(6, "big"),
            record.showing,
            record.quantity,
            record.live,
            _STATES.index(record.state) + 1 + _PAID * record.paid + _RETURNED * record.returned,
            record.changed.to_bytes(5, "big"),
        )
        + record.letters.encode("ascii")
        for record in records
    )


class MemberOrders(NamedTuple):
    """A member's orders in a campaign, oldest first; ``pay_before`` (UTC ms) of the held ones."""

    records: list[OrderRecord]
    pay_before: dict[int, int]
    revoked: bool = False

    @property
    def live_tickets(self) -> int:
        """Tickets that count towards the member's limit."""
        return sum(record.live for record in self.records)


async def read_member(redis: Redis, campaign_id: str, member_no: int) -> MemberOrders:
    """Read a member's orders in a campaign."""
    keys = campaign_keys(campaign_id)

    def ask(pipe: Any) -> None:  # noqa: ANN401 - redis-py's pipeline
        pipe.hget(keys.members, str(member_no))
        pipe.sismember(keys.revoked, str(member_no))

    value, revoked = await read_at_once(redis, keys.head, ask)
    records = parse_records(value or b"")
    holds = await _pay_before(redis, {campaign_id: records}, member_no)
    return MemberOrders(records, holds[campaign_id], bool(revoked))


async def read_member_everywhere(redis: Redis, member_no: int) -> dict[str, MemberOrders]:
    """Read a member's orders in all campaigns, by campaign; those without any are left out.

    Two or three round trips, however many campaigns there are or were. One whose value is damaged
    is left out, so that the others are seen: the audit tells of it.
    """
    ids = await campaign_ids(redis)
    async with redis.pipeline(transaction=False) as pipe:
        survey.add_reads(pipe, [campaign_keys(each).members for each in ids], [str(member_no)])
        values = survey.replies_by_key(await pipe.execute(), len(ids))
    found: dict[str, list[OrderRecord]] = {}
    for campaign_id, value in zip(ids, values, strict=True):
        if isinstance(value, Exception):
            log.warning("orders.unreadable", campaign=campaign_id, error=str(value))
        elif value[0]:
            try:
                found[campaign_id] = parse_records(value[0])
            except ValueError as error:
                log.warning("orders.unreadable", campaign=campaign_id, error=str(error))
    holds = await _pay_before(redis, found, member_no)
    return {each: MemberOrders(records, holds[each]) for each, records in found.items()}


async def _pay_before(
    redis: Redis, orders: Mapping[str, Sequence[OrderRecord]], member_no: int
) -> dict[str, dict[int, int]]:
    """Read when the held ones of these orders are to be paid, by campaign and order.

    One that has ended since its record was read is left out.
    """
    ends: dict[str, dict[int, int]] = {campaign_id: {} for campaign_id in orders}
    held = [
        (campaign_id, record.seq)
        for campaign_id, records in orders.items()
        for record in records
        if record.state is OrderState.HELD
    ]
    if not held:
        return ends
    async with redis.pipeline(transaction=False) as pipe:
        for campaign_id, seq in held:
            pipe.zscore(campaign_keys(campaign_id).holds, hold_name(seq, member_no))
        scores = await pipe.execute()
    for (campaign_id, seq), score in zip(held, scores, strict=True):
        if score is not None:
            ends[campaign_id][seq] = int(score)
    return ends
