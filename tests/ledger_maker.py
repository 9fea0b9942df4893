"""Makes valid ledgers: entries with right numbers and hashes, in memory or in a Redis stream."""

from typing import Any

import msgspec
from redis.asyncio import Redis
from stock_maker import CAMPAIGN, campaign, member

from sale.ledger.chain import GENESIS, Entry, link
from sale.stock.keys import CAMPAIGNS, campaign_keys

NOW_MS = 1_430_442_000_000


def sold(n: int, *, key: int = 1, quantity: int = 1, showing: int = 0) -> list[Any]:
    return ["sold", member(n), showing, quantity, f"{key:016x}", 500]


def created(*tickets: int, card_limit: int = 3, campaign_id: str = CAMPAIGN) -> list[Any]:
    made = campaign(*tickets, campaign_id=campaign_id, card_limit=card_limit)
    config = msgspec.json.decode(msgspec.json.encode(made))
    return [
        "created",
        {"actor": "cli:me", "reason": None, "config": config, "opens_at": NOW_MS,
         "closes_at": None},
    ]  # fmt: skip


def operation(kind: str, **data: Any) -> list[Any]:
    return [kind, {"actor": "cli:me", "reason": "wanted", **data}]


def cancelled(*, order: int, member_no: int, tickets: list[int]) -> list[Any]:
    told = {"order": order, "member_no": member_no, "tickets": tickets, "refund_fen": 0}
    return ["cancelled", {"actor": "member", **told}]


class Ledger:
    """One campaign's ledger, growing entry by entry."""

    def __init__(self, campaign_id: str = CAMPAIGN) -> None:
        self.campaign_id = campaign_id
        self.seq = 0
        self.chain = GENESIS

    def entry(self, *rows: list[Any], at_ms: int = NOW_MS, epoch: int = 1) -> Entry:
        payload = msgspec.json.encode(rows)
        first, self.seq = self.seq + 1, self.seq + len(rows)
        self.chain = link(self.chain, first, at_ms, epoch, payload)
        return Entry(first, self.seq, at_ms, epoch, self.chain, payload)

    async def append(self, redis: Redis, *rows: list[Any], at_ms: int | None = None) -> Entry:
        """Add an entry to the stream, at Redis' own time unless one is given."""
        seconds, microseconds = await redis.time()
        entry = self.entry(*rows, at_ms=at_ms or seconds * 1_000 + microseconds // 1_000)
        await self.put(redis, entry)
        return entry

    async def put(self, redis: Redis, entry: Entry) -> None:
        keys = campaign_keys(self.campaign_id)
        fields = {
            "n": entry.last - entry.first + 1,
            "t": entry.at_ms,
            "e": entry.epoch,
            "h": entry.chain,
            "d": entry.payload,
        }
        async with redis.pipeline(transaction=True) as pipe:
            pipe.xadd(keys.stream, fields, id=f"{entry.last}-0")  # type: ignore[arg-type]
            pipe.hset(keys.head, mapping={"seq": entry.last, "chain": entry.chain})
            pipe.sadd(CAMPAIGNS, self.campaign_id)
            await pipe.execute()
