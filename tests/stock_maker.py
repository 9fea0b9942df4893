"""Makers for tests of the stock: a campaign in a real Redis, operations, calls and checks."""

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from redis.asyncio import Redis

from sale.domain.campaign import Campaign, Showing
from sale.domain.clock import from_ms
from sale.ledger.chain import START, Entry, check_chain, parse_entry
from sale.ledger.fold import CampaignState, OrderRecord
from sale.stock import head
from sale.stock.batch_codec import pack_batch
from sale.stock.keys import CAMPAIGNS, CampaignKeys, campaign_keys
from sale.stock.mark import Mark
from sale.stock.process_reports import read_identity
from sale.stock.records import parse_records
from sale.stock.scripts import CallReply, Decision, Operation, OperationReply, Peek, Scripts

CAMPAIGN = "five-yuan-films"
NONCE = "0123456789abcdef"
PROCESS = "p1"
STOCK_FIELDS = 4
"""Of each showing: t, r, k, h."""
BEHIND_MAX = (1_000_000, 10**12)
"""How far PostgreSQL may be behind: events, and ms."""


def member(n: int) -> int:
    return 11_010_000 + n


def key(n: int) -> str:
    """A hash of an idempotency key: 16 hex digits."""
    return f"{n:016x}"


def operation(
    op: str | None = None, content: str = "same", *, actor: str = "cli:me", reason: str = "wanted"
) -> Operation:
    return Operation(op or secrets.token_hex(12), content, actor, reason)


def campaign(
    *tickets: int,
    campaign_id: str = CAMPAIGN,
    card_limit: int = 3,
    order_max: int | None = None,
    unions: Sequence[str] = ("*",),
    opens_at_ms: int | None = None,
    closes_at_ms: int | None = None,
    payment: Literal["none", "counter", "online"] = "counter",
    cancel_until_ms: int | None = None,
    showing_limit: int | None = None,
) -> Campaign:
    return Campaign(
        id=campaign_id,
        title="五元看大片",
        category="culture",
        price_fen=500,
        payment=payment,
        hold_s=300 if payment == "online" else None,
        cancel_until=None if cancel_until_ms is None else from_ms(cancel_until_ms),
        card_limit=card_limit,
        order_max=order_max or card_limit,
        unions=tuple(unions),
        owner="district",
        showings=tuple(
            Showing(id=f"s{n}", title=f"第{n}场", tickets=count, showing_limit=showing_limit)
            for n, count in enumerate(tickets)
        ),
        opens_at=None if opens_at_ms is None else from_ms(opens_at_ms),
        closes_at=None if closes_at_ms is None else from_ms(closes_at_ms),
    )


class Bid(NamedTuple):
    """One purchase of a call of the script."""

    member_no: int
    key_hash: str
    quantity: int = 1
    showing: int = 0
    union: str = "district"


class Result(NamedTuple):
    """The result of one purchase: the code and its three numbers."""

    decision: Decision
    a: int
    b: int
    c: int


class Stock:
    """A campaign in a real Redis, used only through the scripts."""

    def __init__(self, redis: Redis, campaign_id: str = CAMPAIGN, nonce: str = NONCE) -> None:
        self.redis = redis
        self.id = campaign_id
        self.keys: CampaignKeys = campaign_keys(campaign_id)
        self.scripts = Scripts(redis, nonce)
        self.calls = 0
        self.seen = 0

    async def create(
        self, made: Campaign, *, schedule: bool = False, by: Operation | None = None
    ) -> OperationReply:
        await self.redis.sadd(CAMPAIGNS, made.id)
        return await self.scripts.create(
            made.id,
            by or operation(),
            head.packed(made, msgspec.json.encode(made), made.opens_at_ms, made.closes_at_ms),
            schedule=schedule,
        )

    async def load_roster(self, *revoked: int, rev: int = 0) -> None:
        reply = await self.scripts.sync_revoked(
            self.id, -1, rev, [(member, False) for member in revoked]
        )
        assert reply.reply is CallReply.OK

    async def step(
        self, action: str, by: Operation | None = None, opens_at_ms: int | None = None
    ) -> OperationReply:
        return await self.scripts.transition(self.id, action, by or operation(), opens_at_ms)

    async def call(
        self,
        *bids: Bid,
        process: str = PROCESS,
        call: int | None = None,
        epoch: int | None = None,
        seen: int | None = None,
        behind_max: tuple[int, int] = BEHIND_MAX,
    ) -> list[Any]:
        """Run purchase.lua once with the next call number; give the raw reply."""
        if call is None:
            self.calls += 1
            call = self.calls
        mark = Mark(await self.incarnation(epoch), self.seen if seen is None else seen, "")
        return await self.scripts.purchase(self.keys, process, call, mark, behind_max, packed(bids))

    async def incarnation(self, epoch: int | None = None) -> str:
        """The incarnation of a process that has checked this Redis; '' if there is no head."""
        if not await self.redis.exists(self.keys.head):
            return ""
        identity = await read_identity(self.redis)
        return f"{identity}:{epoch or (await self.head('epoch'))[0]}"

    async def peek(self, showings: int = 1, epoch: int | None = None, seen: int = 0) -> Peek:
        mark = Mark(await self.incarnation(epoch), seen, "")
        return await self.scripts.peek(self.keys, mark, showings)

    async def buy(self, *bids: Bid, **how: Any) -> list[Result]:
        """Run purchase.lua once, which must succeed; give the result of each purchase."""
        reply = await self.call(*bids, **how)
        assert reply[0] == CallReply.OK, CallReply(reply[0]).name
        return results(reply, len(bids))

    async def buy_one(self, *args: Any, **kwargs: Any) -> Result:
        return (await self.buy(Bid(*args, **kwargs)))[0]

    async def head(self, *fields: str) -> list[str]:
        values: list[Any] = await self.redis.hmget(self.keys.head, list(fields))
        return [value.decode() for value in values]

    async def set_clock(self, ms: int) -> None:
        """Set the campaign's clock to a moment in the machine's future."""
        await self.redis.hset(self.keys.head, "clock", str(ms))

    async def alter_rules(self, **changes: Any) -> None:
        """Let the scripts decide by other settings than the ledger says."""
        part = await head.RULES.read(self.redis, self.id)
        rules = {**head.unpacked_rules(part.rules), **changes}
        await self.redis.hset(self.keys.head, "rules", msgspec.msgpack.encode(rules))

    async def left(self) -> list[int]:
        stock = await self.redis.hgetall(self.keys.stock)
        return [int(stock[b"r%d" % n]) for n in range(len(stock) // STOCK_FIELDS)]

    async def entries(self) -> list[Entry]:
        rows: Any = await self.redis.xrange(self.keys.stream)
        return [parse_entry(*row) for row in rows]

    async def records(self) -> dict[int, list[OrderRecord]]:
        """The records of each member."""
        held: dict[Any, Any] = await self.redis.hgetall(self.keys.members)
        return {int(name): parse_records(value) for name, value in held.items()}

    async def everything(self) -> dict[str, Any]:
        """Dump all keys, without the fields that the writer updates."""
        found: dict[str, Any] = {name: await self.redis.dump(name) for name in self.keys}
        # Not the dump: a hash that grows is moved step by step, and reads move it too.
        head: Any = await self.redis.hgetall(self.keys.head)
        told = {b"applied", b"behind_since"}
        found[self.keys.head] = {name: head[name] for name in head if name not in told}
        return found

    async def check_books(self) -> CampaignState:
        """Check that the chain is whole and its fold equals the state in Redis (INV-5)."""
        entries = await self.entries()
        seq, chain = check_chain(entries, START)
        books = CampaignState()
        for entry in entries:
            for event in entry.events():
                books.apply(event)
        head = await self.head("seq", "chain", "epoch", "state", "opens_at", "closes_at")
        assert head[:2] == [str(seq), chain]
        assert head[2:4] == [str(books.epoch), books.state]
        assert head[4:] == [_text(books.opens_at_ms), _text(books.closes_at_ms)]
        stock = {f"t{n}".encode(): count for n, count in books.tickets.items()}
        stock |= {f"r{n}".encode(): count for n, count in books.remaining.items()}
        stock |= {f"h{n}".encode(): count for n, count in books.held.items()}
        stock |= {f"k{n}".encode(): 0 for n in books.tickets}
        held = {
            name: int(count) for name, count in (await self.redis.hgetall(self.keys.stock)).items()
        }
        assert held == stock
        assert await self.records() == books.members
        holds = await self.redis.zrange(self.keys.holds, 0, -1, withscores=True)
        assert {name.decode(): int(ms) for name, ms in holds} == books.holds
        done: dict[Any, Any] = await self.redis.hgetall(self.keys.operations)
        assert {op.decode(): what.decode() for op, what in done.items()} == books.operations
        return books


def packed(bids: Sequence[Bid]) -> bytes:
    return pack_batch(
        (
            [str(bid.member_no) for bid in bids],
            [bid.union for bid in bids],
            [bid.showing for bid in bids],
            [bid.quantity for bid in bids],
            [bid.key_hash for bid in bids],
        )
    )


def results(reply: list[Any], count: int) -> list[Result]:
    """Parse a reply for ``count`` purchases; see the header of ``purchase.lua``."""
    number, answers = reply[6], []
    for result in reply[9 : 9 + count]:
        if result >= 0:
            number += 1
            answers.append(Result(Decision.SOLD, number, result, 0))
        else:
            code, *numbers = reply[-result : 4 - result]
            answers.append(Result(Decision(code), *numbers))
    return answers


async def open_stock(redis: Redis, *tickets: int, **how: Any) -> Stock:
    """Make a campaign that sells: created, opened by hand, its revoked cards loaded."""
    made = campaign(*tickets, **how)
    stock = Stock(redis, made.id)
    assert (await stock.create(made)).reply is CallReply.OK
    await stock.load_roster()
    assert (await stock.step("open")).reply is CallReply.OK
    return stock


async def now_ms(redis: Redis) -> int:
    seconds, micros = await redis.time()
    return int(seconds * 1000 + micros // 1000)


async def memory_kept_tiny(redis: Redis) -> AsyncIterator[None]:
    """While the block runs, Redis has no memory for a write."""
    await redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        await redis.config_set("maxmemory", 0)


def _text(moment_ms: int | None) -> str:
    return "" if moment_ms is None else str(moment_ms)
