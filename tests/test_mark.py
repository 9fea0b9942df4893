"""The look-up of a process's mark in the stream of a real Redis."""

import pytest
from redis.asyncio import Redis
from stock_maker import Bid, Stock, key, member, open_stock, operation

from sale.stock.mark import NOT_CHECKED, Found, Mark, look_up


@pytest.fixture
async def stock(redis: Redis) -> Stock:
    """A campaign with entries that end at the events 1, 2, 5 and 6."""
    stock = await open_stock(redis, 9)
    await stock.buy(*(Bid(member(n), key(1)) for n in range(3)))
    await stock.buy_one(member(7), key(1))
    return stock


async def mark_at(stock: Stock, seq: int) -> Mark:
    chains = {entry.last: entry.chain for entry in await stock.entries()}
    return Mark("", seq, chains.get(seq, "0" * 40))


@pytest.mark.parametrize("seq", [1, 2, 5, 6])
async def test_mark_at_the_end_of_an_entry_is_held(stock: Stock, seq: int) -> None:
    mark = await mark_at(stock, seq)
    assert await look_up(stock.redis, stock.keys, mark) is Found.HELD
    other = mark._replace(chain=mark.chain[::-1])
    assert await look_up(stock.redis, stock.keys, other) is Found.LACKING


@pytest.mark.parametrize("seq", [3, 4, 7])
async def test_mark_within_an_entry_or_beyond_the_end_is_lacking(stock: Stock, seq: int) -> None:
    assert await look_up(stock.redis, stock.keys, await mark_at(stock, seq)) is Found.LACKING


async def test_mark_before_the_beginning_of_the_stream_is_trimmed(stock: Stock) -> None:
    marks = [await mark_at(stock, seq) for seq in (1, 2, 5, 6)]
    await stock.redis.xtrim(stock.keys.stream, minid="5-0", approximate=False)
    found = [await look_up(stock.redis, stock.keys, mark) for mark in marks]
    assert found == [Found.TRIMMED, Found.TRIMMED, Found.HELD, Found.HELD]


@pytest.mark.parametrize("damage", ["deleted", "another type", "damaged entry"])
async def test_mark_in_a_stream_that_cannot_be_read_is_lacking(stock: Stock, damage: str) -> None:
    mark = await mark_at(stock, 6)
    if damage == "damaged entry":
        await stock.redis.xdel(stock.keys.stream, "6-0")
        await stock.redis.xadd(stock.keys.stream, {"h": mark.chain}, id="7-0")
    else:
        await stock.redis.delete(stock.keys.stream)
    if damage == "another type":
        await stock.redis.set(stock.keys.stream, "")
    assert await look_up(stock.redis, stock.keys, mark) is Found.LACKING
    assert await look_up(stock.redis, stock.keys, NOT_CHECKED) is Found.HELD


async def test_each_reply_tells_the_end_of_the_ledger(stock: Stock) -> None:
    async def ends() -> tuple[int, str]:
        seq, chain = await stock.head("seq", "chain")
        return int(seq), chain

    bought = await stock.call(Bid(member(8), key(1)))
    assert (bought[2], bought[3].decode()) == await ends()
    again = await stock.call(Bid(member(8), key(1)))
    assert again[2:4] == bought[2:4]
    peek = await stock.peek()
    assert (peek.seq, peek.chain) == await ends()
    paused = await stock.step("pause")
    assert (paused.seq, paused.chain) == await ends()
    added = await stock.scripts.add_stock(stock.id, operation("op"), 0, 1)
    assert (added.seq, added.chain) == await ends()
    # A repeat names the event of the first call, which is not the end.
    assert (await stock.scripts.add_stock(stock.id, operation("op"), 0, 1)).chain == ""
