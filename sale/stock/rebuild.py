"""Writes a campaign's state beside the old one, in small steps, and puts it in its place at once.

Redis answers others between two steps, however many orders there are; the exchange itself is a few
renames (``recover.lua``). The alternative, one script that writes it all, would stop every campaign
of the server for seconds.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from sale.domain.campaign import Campaign
from sale.ledger.chain import Entry
from sale.ledger.fold import CampaignState
from sale.stock.head import frozen, packed
from sale.stock.keys import CAMPAIGNS, campaign_keys, rebuilt_keys
from sale.stock.records import pack_records
from sale.stock.scripts import RECOVER, CallReply, Scripts

CHUNK: Final = 1_000
ENTRIES_CHUNK: Final = 100
VOIDED_TOLD_MAX: Final = 100
"""Ranges that the event names; each number is an event of its own in any case."""


class Rebuild(msgspec.Struct, frozen=True):
    """The parts that a campaign is built from.

    ``old`` is number and chain hash of the head to be replaced, as Redis holds them ('' for none);
    ``seq`` and ``chain`` are where ``books`` stand, ``applied`` is where PostgreSQL does.
    ``voided`` are ranges of numbers, first to last. The stream becomes ``entries``, or stays where
    ``keep_stream``.
    """

    campaign_id: str
    old: tuple[str, str]
    books: CampaignState
    seq: int
    chain: str
    epoch: int
    clock_ms: int
    keep_stream: bool
    entries: Sequence[Entry]
    applied: int
    voided: Sequence[tuple[int, int]]
    actor: str
    reason: str


async def freeze(redis: Redis, campaign_id: str, why: str) -> None:
    """Mark a campaign as recovering, whatever state its head is in: it sells nothing (INV-8)."""
    await redis.hset(campaign_keys(campaign_id).head, mapping=frozen(why, "recovery"))


async def rebuild(scripts: Scripts, plan: Rebuild) -> CallReply:
    """Build and exchange; STALE or BROKEN where somebody has changed something meanwhile."""
    redis = scripts.redis
    old, new = campaign_keys(plan.campaign_id), rebuilt_keys(plan.campaign_id)
    await redis.sadd(CAMPAIGNS, plan.campaign_id)
    await redis.unlink(*new)
    counts = await _write_beside(redis, plan)
    books = plan.books
    campaign = packed(
        msgspec.convert(books.config, Campaign),
        msgspec.json.encode(books.config),
        books.opens_at_ms,
        books.closes_at_ms,
    )
    reply: Any = await redis.execute_command(  # type: ignore[no-untyped-call]
        "EVAL", RECOVER.source, 13, *old,
        new.stream, new.stock, new.members, new.operations, new.holds,
        *plan.old, plan.seq, plan.chain, plan.epoch, plan.clock_ms, int(plan.keep_stream),
        books.state, campaign, scripts.nonce, *counts,
        msgspec.json.encode(plan.actor), msgspec.json.encode(plan.reason),
        plan.applied, msgspec.json.encode(plan.voided[:VOIDED_TOLD_MAX]),
        books.made, books.config_seq, len(books.holds),
    )  # fmt: skip
    await redis.unlink(*new)
    return CallReply(reply[0])


async def _write_beside(redis: Redis, plan: Rebuild) -> tuple[int, int, int, int]:
    """Write the new keys; how many members, stock fields, operations and entries they hold."""
    new, books = rebuilt_keys(plan.campaign_id), plan.books
    stock = {f"t{number}": count for number, count in books.tickets.items()}
    stock |= {f"r{number}": count for number, count in books.remaining.items()}
    stock |= {f"h{number}": count for number, count in books.held.items()}
    stock |= {f"k{number}": 0 for number in books.tickets}
    for chunk in _chunks(stock):
        await redis.hset(new.stock, mapping=chunk)
    for chunk in _chunks(books.holds):
        await redis.zadd(new.holds, chunk)
    for chunk in _chunks(books.operations):
        await redis.hset(new.operations, mapping=chunk)
    for chunk in _chunks(books.members):
        values: dict[Any, Any] = {
            member_no: pack_records(held) for member_no, held in chunk.items()
        }
        await redis.hset(new.members, mapping=values)
    entries = () if plan.keep_stream else plan.entries
    for at in range(0, len(entries), ENTRIES_CHUNK):
        await _copy(redis, new.stream, entries[at : at + ENTRIES_CHUNK])
    return len(books.members), len(stock), len(books.operations), len(entries)


async def _copy(redis: Redis, stream: str, entries: Sequence[Entry]) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for entry in entries:
            fields: dict[Any, Any] = {
                "n": entry.last - entry.first + 1,
                "t": entry.at_ms,
                "e": entry.epoch,
                "h": entry.chain,
                "d": entry.payload,
            }
            pipe.xadd(stream, fields, id=f"{entry.last}-0")
        await pipe.execute()


def _chunks(mapping: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    items = iter(mapping.items())
    while chunk := dict(islice(items, CHUNK)):
        yield chunk
