"""Measures shapes of the purchase script: arguments of a batch, form of the answers, connection.

Goal: figures for the choices in the header of ``purchase.lua`` and in
``stock/script_connection.py``, repeatable with ``python tests/measure_scripts.py``. Each shape is
the real script with the one line changed that reads its arguments, or that gives its answers, run
in turn with the others on the same Redis; of several rounds the least is told. Redis' time is its
own ``usec_per_call``, so it has no share of an idle core; the client's is packing a batch and
reading the reply with hiredis.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any, Final

import hiredis
import msgspec
import structlog
import uvloop
from rich.console import Console

from loadtest.bench.__main__ import bench_up
from loadtest.bench.cases import STOCK, TINY, Bench
from loadtest.tables import grid, wide_console
from sale.stock.keys import campaign_keys
from sale.stock.script_connection import ScriptConnection, pack
from sale.stock.scripts import PEEK, PURCHASE

BATCHES: Final = (1, 32, 256)
ROUNDS: Final = 12
CALLS: Final = 40
LINE_CALLS: Final = 2_000
CAMPAIGN: Final = "shapes"
FAR_BEHIND: Final = 10**9
FIRST_CARD: Final = 10_000_000

Row = tuple[str, str, int, int, str]
Columns = tuple[list[str], list[str], list[int], list[int], list[str]]

_READS: Final = (
    "local members, unions, showings, quantities, keys = unpack(cmsgpack.unpack(ARGV[8]))\n"
)
_ANSWERS: Final = "reply[3], reply[4] = head.seq, head.chain\nreturn reply\n"
_FROM_ROWS: Final = """local members, unions, showings, quantities, keys = {}, {}, {}, {}, {}
for i, row in ipairs(cmsgpack.unpack(ARGV[8])) do
  members[i], unions[i], showings[i], quantities[i], keys[i] = unpack(row)
end
"""
_FROM_FLAT: Final = """local members, unions, showings, quantities, keys = {}, {}, {}, {}, {}
for i = 1, (#ARGV - 7) / 5 do
  local at = 5 * i + 3
  members[i], unions[i], keys[i] = ARGV[at], ARGV[at + 1], ARGV[at + 4]
  showings[i], quantities[i] = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
end
"""
_AN_ANSWER_EACH: Final = """reply[3], reply[4] = head.seq, head.chain
local each, number = { OK, head.now, head.seq, head.epoch, rules.price_fen }, reply[7]
for i = 1, purchases do
  local told = reply[RESULTS + i]
  if told >= 0 then
    number = number + 1
    each[5 + i] = { SOLD, number, told, head.now }
  else
    each[5 + i] = { reply[1 - told], reply[2 - told], reply[3 - told], reply[4 - told] }
  end
end
"""


def _rows(columns: Columns) -> list[Row]:
    return list(zip(*columns, strict=True))


class Shape(msgspec.Struct, frozen=True):
    """One shape: the lines of the script that it changes, and how a batch is packed for it."""

    name: str
    source: str
    arguments: Callable[[Columns], tuple[str | int | bytes, ...]]


def _shape(
    name: str,
    arguments: Callable[[Columns], tuple[str | int | bytes, ...]],
    *changes: tuple[str, str],
) -> Shape:
    source = PURCHASE.source
    for before, after in changes:
        if source.count(before) != 1:
            raise ValueError(f"{name}: the script has changed; see {before!r}")
        source = source.replace(before, after)
    return Shape(name, source, arguments)


def shapes() -> list[Shape]:
    """The shapes to compare; the first is the engine's."""
    packed = msgspec.msgpack.encode
    return [
        _shape("MessagePack columns, an integer a sale", lambda columns: (packed(columns),)),
        _shape(
            "MessagePack rows",
            lambda columns: (packed(_rows(columns)),),
            (_READS, _FROM_ROWS),
        ),
        _shape(
            "JSON columns",
            lambda columns: (msgspec.json.encode(columns),),
            (_READS, _READS.replace("cmsgpack.unpack", "cjson.decode")),
        ),
        _shape(
            "five arguments a purchase",
            lambda columns: tuple(chain.from_iterable(_rows(columns))),
            (_READS, _FROM_FLAT),
        ),
        _shape(
            "an array an answer",
            lambda columns: (packed(columns),),
            (_ANSWERS, _AN_ANSWER_EACH + "return each\n"),
        ),
        _shape(
            "all answers as MessagePack",
            lambda columns: (packed(columns),),
            (_ANSWERS, _AN_ANSWER_EACH + "return cmsgpack.pack(each)\n"),
        ),
    ]


class Cost(msgspec.Struct):
    """µs a purchase, the least of the rounds, by purchases a call."""

    name: str
    redis_us: dict[int, float] = {}
    client_us: dict[int, float] = {}

    def note(self, batch: int, redis_us: float, client_us: float) -> None:
        """Keep the least."""
        self.redis_us[batch] = min(redis_us, self.redis_us.get(batch, redis_us))
        self.client_us[batch] = min(client_us, self.client_us.get(batch, client_us))


class Shapes(msgspec.Struct, frozen=True):
    """All of it. ``call_us``: the client's CPU µs a call, by connection."""

    costs: list[Cost]
    call_us: dict[str, float]


class Comparing:
    """One comparison on one rig."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.redis = bench.rig.redis
        self.keys = campaign_keys(CAMPAIGN)
        self._calls = 0
        self._cards = FIRST_CARD

    async def run(self) -> Shapes:
        """Measure. Raises EngineError, redis-py's errors."""
        await self.bench.rig.campaign(CAMPAIGN, STOCK)
        nonce, run_id, replid, epoch = [
            value.decode()
            for value in await self.redis.hmget(
                self.keys.head, ["nonce", "run_id", "replid", "epoch"]
            )
        ]
        self._nonce, self._incarnation = nonce, f"{run_id}:{replid}:{epoch}"
        line = ScriptConnection.to(self.redis)
        assert line is not None
        every = shapes()
        costs = [Cost(shape.name) for shape in every]
        for number, batch in ((n, b) for n in range(ROUNDS) for b in BATCHES):
            self.bench.note(f"round {number + 1} of {ROUNDS}: {batch} purchases a call")
            # Another one first in each round: the first finds everybody's caches cold.
            for place in range(number, number + len(every)):
                shape, cost = every[place % len(every)], costs[place % len(every)]
                cost.note(batch, *await self._measure(line, shape, batch))
        await self.redis.script_load(PEEK.source)
        call_us = {
            "a connection of our own (stock/script_connection.py)": await self._call_us(line.call),
            "redis-py": await self._call_us(self._by_redis_py),
        }
        await line.close()
        return Shapes(costs, call_us)

    async def _measure(
        self, line: ScriptConnection, shape: Shape, batch: int
    ) -> tuple[float, float]:
        """Redis' and the client's µs a purchase."""
        sha = await self.redis.script_load(shape.source)
        reader = hiredis.Reader()
        await self.redis.config_resetstat()
        packing_s = reading_s = 0.0
        for columns in self._batches(batch):
            self._calls += 1
            head = (
                "EVALSHA", sha, len(self.keys), *self.keys, "shapes", self._calls,
                self._incarnation, 0, self._nonce, FAR_BEHIND, FAR_BEHIND,
            )  # fmt: skip
            began = time.process_time()
            command = pack(*head, *shape.arguments(columns))
            packing_s += time.process_time() - began
            reply = await line.call(command)
            answers = msgspec.msgpack.decode(reply) if isinstance(reply, bytes) else reply
            if answers[0] != 0:
                raise ValueError(f"{shape.name}: refused with {answers[0]}")
            wire = _as_sent(reply)
            began = time.process_time()
            reader.feed(wire)
            read = reader.gets()
            if isinstance(read, bytes):
                msgspec.msgpack.decode(read)
            reading_s += time.process_time() - began
        stats = (await self.redis.info("commandstats"))["cmdstat_evalsha"]
        purchases = CALLS * batch
        return stats["usec"] / purchases, (packing_s + reading_s) / purchases * 1e6

    def _batches(self, batch: int) -> Iterator[Columns]:
        for _ in range(CALLS):
            cards = [str(self._cards + n) for n in range(batch)]
            self._cards += batch
            keys = [hashlib.blake2b(card.encode(), digest_size=8).hexdigest() for card in cards]
            ones, zeros = list(repeat(1, batch)), list(repeat(0, batch))
            yield cards, list(repeat("district", batch)), zeros, ones, keys

    async def _call_us(self, call: Callable[[bytes], Any]) -> float:
        """The client's CPU µs for a call of ``peek.lua``."""
        command = pack(
            *("EVALSHA", PEEK.sha, len(self.keys), *self.keys),
            *(self._incarnation, 0, self._nonce, 0),
        )
        best = float("inf")
        for _ in range(ROUNDS):
            began = time.process_time()
            for _ in range(LINE_CALLS):
                await call(command)
            best = min(best, (time.process_time() - began) / LINE_CALLS * 1e6)
        return best

    async def _by_redis_py(self, _: bytes) -> None:
        keys = len(self.keys)
        await self.redis.evalsha(PEEK.sha, keys, *self.keys, self._incarnation, 0, self._nonce, 0)


def _as_sent(reply: Any) -> bytes:
    """A reply as Redis writes it (RESP 2)."""
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(_as_sent, reply))
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    return b":%d\r\n" % reply


def print_shapes(result: Shapes, console: Console) -> None:
    """Print the tables."""
    rows = [
        [cost.name, *(f"{cost.redis_us[n]:.1f} + {cost.client_us[n]:.1f}" for n in BATCHES)]
        for cost in result.costs
    ]
    title = "µs a purchase: Redis + client, by purchases a call"
    console.print(grid(title, "|".join(("", *map(str, BATCHES))), rows))
    calls = [(name, f"{call_us:.0f}") for name, call_us in result.call_us.items()]
    console.print(grid("the client's CPU µs for one small call", "|µs", calls))


async def _measured() -> Shapes:
    async with bench_up(TINY, program=None, console=None) as bench:
        return await Comparing(bench).run()


def main() -> None:
    """Print the tables; with ``--json`` as an argument, one JSON value."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    result = uvloop.run(_measured())
    if "--json" in sys.argv[1:]:
        print(json.dumps(msgspec.to_builtins(result, str_keys=True)))
    else:
        print_shapes(result, wide_console())


if __name__ == "__main__":
    main()
