"""The batcher on a real Redis: group commit, lost connections, refusals by peek, deadlines."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis.asyncio as redis_asyncio
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from stock_maker import (
    BEHIND_MAX,
    NONCE,
    Bid,
    Stock,
    campaign,
    key,
    member,
    memory_kept_tiny,
    now_ms,
    open_stock,
    operation,
)
from structlog.testing import capture_logs

from sale.domain.campaign import Campaign
from sale.domain.member import MADE_UP_FROM
from sale.host import embedded
from sale.metrics import PurchaseMetrics
from sale.stock import batcher as batcher_module
from sale.stock.answers import Answer, AwaitedPurchase
from sale.stock.batcher import GATHER_AT_LEAST, Batcher
from sale.stock.batchers import Batchers
from sale.stock.buyer_filter import GROWS_BYTES, BuyerFilter
from sale.stock.connection import open_redis
from sale.stock.scripts import CallReply, Decision, Peek, Scripts

HOUR_MS = 3_600_000
ANSWER_WITHIN_S = 15.0
UNIX_PREFIX = "unix://"
no_memory = asynccontextmanager(memory_kept_tiny)


class Line:
    """A connection to Redis that can be cut; a list says what happens to the next script calls."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.faults: list[str] = []
        self.held: list[bytes] = []
        self.seen = 0
        self._open: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        try:
            while request := await reader.read(1 << 20):
                fault = ""
                if b"EVAL" in request:
                    self.seen += 1
                    fault = self.faults.pop(0) if self.faults else ""
                if fault == "cut before":
                    return
                if fault == "hold":
                    self.held.append(request)
                    return
                if fault == "hang":
                    await reader.read(1 << 20)
                    return
                up_writer.write(request)
                reply = await up_reader.read(1 << 20)
                if fault == "lose reply":
                    return
                writer.write(reply)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            up_writer.close()
            writer.close()

    async def release(self) -> list[bytes]:
        """Send the held calls to Redis; give its replies."""
        replies = []
        for request in self.held:
            reader, writer = await asyncio.open_unix_connection(self._upstream)
            writer.write(request)
            replies.append(await reader.read(1 << 20))
            writer.close()
        return replies

    async def close(self) -> None:
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)


@pytest.fixture
async def line(redis_url: str, short_path: Path) -> AsyncIterator[Line]:
    """The script connection of ``far``."""
    assert redis_url.startswith(UNIX_PREFIX)
    line = Line(redis_url.removeprefix(UNIX_PREFIX).split("?")[0])
    server = await asyncio.start_unix_server(line.serve, short_path / "line")
    yield line
    server.close()
    await line.close()


@pytest.fixture
async def far(line: Line, redis: Redis, short_path: Path) -> AsyncIterator[Redis]:
    client = open_redis(f"{UNIX_PREFIX}{short_path / 'line'}")
    yield client
    await client.aclose()


def impatient(url: str) -> Redis:
    """A client like the engine's, with a timeout of a tenth of a second."""
    return redis_asyncio.from_url(url, socket_timeout=0.1, protocol=2, retry=Retry(NoBackoff(), 0))


class Shop:
    """The batcher of one process and campaign."""

    def __init__(self, batchers: Batchers, made: Campaign, metrics: PurchaseMetrics) -> None:
        self.batchers = batchers
        self.metrics = metrics
        self.batcher: Batcher = batchers.of(made)

    def submit(self, bid: Bid) -> AwaitedPurchase | None:
        purchase = AwaitedPurchase(
            bid.member_no, bid.union, bid.showing, bid.quantity, bid.key_hash,
            asyncio.get_running_loop(),
        )  # fmt: skip
        return purchase if self.batcher.submit(purchase) else None

    async def ask(self, *bids: Bid) -> list[Answer]:
        purchases = [self.submit(bid) for bid in bids]
        async with asyncio.timeout(ANSWER_WITHIN_S):
            return [await purchase.answer for purchase in purchases if purchase]

    async def one(self, *args: Any, **kwargs: Any) -> Answer:
        return (await self.ask(Bid(*args, **kwargs)))[0]

    async def until_it_peeks(self) -> None:
        """Buy until the buyer filter is loaded and a refusal costs only a peek."""
        for n in range(100):
            await self.one(member(90_000_000 + n), key(1))
            buyer_filter = self.batcher._buyer_filter
            if (
                buyer_filter is not None
                and buyer_filter.seq >= self.batcher.mark.seq
                and buyer_filter.roster_rev >= 0  # it reads the revoked members last
            ):
                return
            await asyncio.sleep(0.01)
        pytest.fail("the filter of buyers was never loaded")


OpenShop = Callable[..., Shop]


@pytest.fixture
async def open_shop() -> AsyncIterator[OpenShop]:
    opened: list[Batchers] = []

    def make(
        client: Redis,
        made: Campaign,
        process: str = "shop-1",
        *,
        scripts: Any = None,
        **bounds: Any,
    ) -> Shop:
        metrics = PurchaseMetrics()
        batchers = Batchers(
            scripts or Scripts(client, NONCE),
            process,
            metrics,
            behind_max=BEHIND_MAX,
            **{"batch_max": 256, "queue_max": 4_096, "deadline_s": 5.0, **bounds},
        )
        opened.append(batchers)
        return Shop(batchers, made, metrics)

    yield make
    for batchers in opened:
        await batchers.close()


def decisions(answers: list[Answer]) -> list[Decision | None]:
    return [answer.decision for answer in answers]


async def calls_of(stock: Stock, process: str = "shop-1") -> int:
    return int(await stock.redis.hget(stock.keys.calls, process) or 0)


# Gathering --------------------------------------------------------------------------------------


async def test_waiting_purchases_go_into_one_call(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 1_000)
    shop = open_shop(redis, campaign(1_000))
    answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(600)))
    assert set(decisions(answers)) == {Decision.SOLD}
    sizes = [entry.last - entry.first + 1 for entry in await stock.entries()][2:]
    assert sizes == [256, 256, 88]
    assert sum(shop.metrics.batch_size.counts) == 3
    assert len({answer.value for answer in answers}) == 600
    assert {answer.price_fen for answer in answers} == {500}
    await stock.check_books()


async def test_purchases_of_several_turns_go_into_one_call(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 1_000)
    shop = open_shop(redis, campaign(1_000))
    await shop.one(member(999), key(1))
    before = await calls_of(stock)
    purchases = []
    for turn in range(5):
        purchases += [
            shop.submit(Bid(member(turn * GATHER_AT_LEAST + n), key(1)))
            for n in range(GATHER_AT_LEAST)
        ]
        await asyncio.sleep(0)
    answers = [await purchase.answer for purchase in purchases if purchase]
    assert decisions(answers) == [Decision.SOLD] * 5 * GATHER_AT_LEAST
    assert await calls_of(stock) == before + 1


async def test_single_purchases_do_not_wait_for_others(redis: Redis, open_shop: OpenShop) -> None:
    """A turn that brings one purchase must not delay the batch: the next may bring one too."""
    stock = await open_stock(redis, 1_000)
    shop = open_shop(redis, campaign(1_000))
    await shop.one(member(999), key(1))
    first = shop.submit(Bid(member(0), key(1)))
    assert first is not None
    came = 0
    while not first.answer.done():
        came += 1
        shop.submit(Bid(member(came), key(1)))
        await asyncio.sleep(0)
    entry = (await stock.entries())[3]
    assert entry.last - entry.first < 2, "its call took those who were there, and no others"
    assert came > 2


async def test_answers_are_sent_during_the_next_call(redis: Redis, open_shop: OpenShop) -> None:
    await open_stock(redis, 1_000)
    shop = open_shop(redis, campaign(1_000), batch_max=10)
    await shop.one(member(999), key(1))
    before, begun = shop.batchers._calls, []

    class Watched(AwaitedPurchase):
        def settle(self, answer: Answer) -> None:
            begun.append(shop.batchers._calls - before)
            super().settle(answer)

    loop = asyncio.get_running_loop()
    purchases = [Watched(member(n), "dongsi", 0, 1, key(1), loop) for n in range(20)]
    for purchase in purchases:
        assert shop.batcher.submit(purchase)
    answers = [await purchase.answer for purchase in purchases]
    assert decisions(answers) == [Decision.SOLD] * 20
    assert begun == [2] * 20, "the second call had begun when the first one's answers were told"


async def test_exception_in_settle_leaves_no_purchase_waiting(
    redis: Redis, open_shop: OpenShop
) -> None:
    await open_stock(redis, 1_000)
    shop = open_shop(redis, campaign(1_000))
    await shop.one(member(999), key(1))

    class Broken(AwaitedPurchase):
        def settle(self, answer: Answer) -> None:
            if answer.decision is not None:
                raise RuntimeError("a fault of ours")
            super().settle(answer)

    loop = asyncio.get_running_loop()
    kinds = [AwaitedPurchase, Broken, AwaitedPurchase]
    purchases = [kind(member(n), "dongsi", 0, 1, key(1), loop) for n, kind in enumerate(kinds)]
    for purchase in purchases:
        assert shop.batcher.submit(purchase)
    async with asyncio.timeout(ANSWER_WITHIN_S):
        answers = [await purchase.answer for purchase in purchases]
    assert decisions(answers) == [Decision.SOLD, None, None]


async def test_short_reply_leaves_no_purchase_waiting(redis: Redis, open_shop: OpenShop) -> None:
    await open_stock(redis, 1_000)
    shop = open_shop(redis, campaign(1_000))
    await shop.one(member(999), key(1))
    whole = shop.batcher._scripts.purchase

    async def cut(*arguments: Any) -> list[int]:
        return (await whole(*arguments))[:-2]

    with mock.patch.object(shop.batcher._scripts, "purchase", cut):
        answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(6)))
    assert decisions(answers) == [None] * 6
    again = await shop.ask(*(Bid(member(n), key(1)) for n in range(6)))
    assert decisions(again) == [Decision.REPLAYED] * 6


async def test_submit_returns_false_when_the_queue_is_full(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 100)
    shop = open_shop(redis, campaign(100), queue_max=5)
    taken = [shop.submit(Bid(member(n), key(1))) for n in range(8)]
    assert [purchase is not None for purchase in taken] == [True] * 5 + [False] * 3
    for purchase in taken[:5]:
        assert purchase is not None
        assert (await purchase.answer).decision is Decision.SOLD
    assert await stock.left() == [95]
    assert (await shop.one(member(7), key(1))).decision is Decision.SOLD


async def test_order_of_a_disconnected_client_remains(redis: Redis, open_shop: OpenShop) -> None:
    """HOLES.md row 23."""
    stock = await open_stock(redis, 10)
    shop = open_shop(redis, campaign(10))
    purchase, other = shop.submit(Bid(member(1), key(1))), shop.submit(Bid(member(2), key(1)))
    assert purchase is not None
    assert other is not None
    purchase.answer.cancel()
    assert (await other.answer).decision is Decision.SOLD
    again = await shop.one(member(1), key(1))
    assert again.decision is Decision.REPLAYED
    assert again.sold_at_ms == (await stock.entries())[-1].at_ms
    assert await stock.left() == [8]


# Lost connections: INV-3, INV-4 -----------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut before", "lose reply"])
@pytest.mark.parametrize("times", [1, 3])
async def test_lost_connection_neither_loses_nor_doubles_orders(
    redis: Redis, far: Redis, line: Line, open_shop: OpenShop, fault: str, times: int
) -> None:
    """Row 4 of HOLES.md: the ticket was taken, the retry said "purchased", and no order existed."""
    stock = await open_stock(redis, 6)
    shop = open_shop(far, campaign(6))
    await shop.one(member(0), key(1))
    line.faults = [fault] * times
    answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(1, 8)))
    expected = Decision.SOLD if fault == "cut before" else Decision.REPLAYED
    assert decisions(answers) == [expected] * 5 + [Decision.SOLD_OUT] * 2
    assert [answer.value for answer in answers[:5]] == [4, 5, 6, 7, 8]
    assert line.faults == []
    assert await stock.left() == [0]
    books = await stock.check_books()
    assert len(books.members) == 6


async def test_delayed_call_sells_nothing_after_its_retry_was_refused(
    redis: Redis, far: Redis, line: Line, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 1)
    shop = open_shop(far, campaign(1))
    await shop.one(member(0), key(1))
    line.faults = ["hold"]
    assert (await shop.one(member(1), key(1))).decision is Decision.SOLD_OUT
    await stock.scripts.add_stock(stock.id, operation(), 0, 5)
    assert await line.release() == [b"*1\r\n:%d\r\n" % CallReply.LATE]
    assert await stock.left() == [5]
    assert member(1) not in (await stock.check_books()).members


async def test_delayed_call_sells_nothing_after_its_retry_was_sold(
    redis: Redis, far: Redis, line: Line, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 9)
    shop = open_shop(far, campaign(9))
    await shop.one(member(0), key(1))
    line.faults = ["hold", "hold"]
    assert (await shop.one(member(1), key(1))).decision is Decision.SOLD
    assert await line.release() == [b"*1\r\n:%d\r\n" % CallReply.LATE] * 2
    assert await stock.left() == [7]
    await stock.check_books()


async def test_random_cuts_leave_one_order_a_key(
    redis: Redis, far: Redis, line: Line, open_shop: OpenShop, rng: random.Random
) -> None:
    stock = await open_stock(redis, 150, card_limit=2)
    shop = open_shop(far, campaign(150, card_limit=2), batch_max=16)
    await shop.one(member(0), key(1))
    bids = [Bid(member(rng.randint(1, 60)), key(rng.randint(1, 3))) for _ in range(300)]
    told: dict[tuple[str, str], int] = {}
    for at in range(0, 300, 50):
        line.faults += rng.choices(["", "cut before", "lose reply", "hold"], k=5)
        for bid, answer in zip(
            bids[at : at + 50], await shop.ask(*bids[at : at + 50]), strict=True
        ):
            assert answer.decision in {
                Decision.SOLD, Decision.REPLAYED, Decision.LIMIT_EXCEEDED,
            }  # fmt: skip
            if answer.decision is not Decision.LIMIT_EXCEEDED:
                assert told.setdefault((bid.member_no, bid.key_hash), answer.value) == answer.value
    line.faults = []
    await line.release()
    books = await stock.check_books()
    del books.members[member(0)]
    held = {(c, r.key_hash): r.seq for c, records in books.members.items() for r in records}
    assert held == told


async def test_killed_clients_lose_and_double_nothing(
    redis: Redis, open_shop: OpenShop, redis_url: str, rng: random.Random
) -> None:
    stock = await open_stock(redis, 1_000)
    client = open_redis(redis_url)
    shop = open_shop(client, campaign(1_000), batch_max=16, deadline_s=ANSWER_WITHIN_S)
    purchases = [shop.submit(Bid(member(n), key(1))) for n in range(800)]

    def answered() -> int:
        return sum(1 for each in purchases if each is not None and each.answer.done())

    async with asyncio.timeout(ANSWER_WITHIN_S):
        while (before := answered()) < len(purchases):
            await redis.client_kill_filter(_type="normal", skipme=True)
            # Kill after progress, not by time: a busy machine would finish no batch in between.
            while answered() == before:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(rng.uniform(0.001, 0.01))
    answers = [each.answer.result() for each in purchases if each is not None]
    assert set(decisions(answers)) <= {Decision.SOLD, Decision.REPLAYED}
    assert len({answer.value for answer in answers}) == 800
    assert await stock.left() == [200]
    await stock.check_books()
    await client.aclose()


# Giving up: INV-8 -------------------------------------------------------------------------------


async def test_unresolved_purchase_is_unknown_never_sold_out(
    redis: Redis, line: Line, short_path: Path, open_shop: OpenShop
) -> None:
    """Rows 2 and 7 of HOLES.md: an error was answered "sold out", a timeout returned the stock."""
    stock = await open_stock(redis, 10)
    url = f"{UNIX_PREFIX}{short_path / 'line'}"
    async with impatient(url) as client:
        shop = open_shop(client, campaign(10), deadline_s=0.3)
        await shop.one(member(0), key(1))
        line.faults = ["lose reply", *["hang"] * 100]
        began = asyncio.get_running_loop().time()
        answer = await shop.one(member(1), key(1))
        assert answer.decision is None
        assert asyncio.get_running_loop().time() - began < 1.5
        assert shop.metrics.outcomes[stock.id, "unavailable"] == 1
        line.faults = []
        again = await shop.one(member(1), key(1))
        assert again.decision is Decision.REPLAYED
        assert await stock.left() == [8]


async def test_redis_out_of_memory_is_unknown_and_sells_nothing(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 10)
    shop = open_shop(redis, campaign(10))
    async with no_memory(redis):
        answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(3)))
    assert decisions(answers) == [None] * 3
    assert await stock.left() == [10]
    assert (await shop.one(member(1), key(1))).decision is Decision.SOLD


async def test_head_that_went_back_sells_nothing(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 10)
    shop = open_shop(redis, campaign(10))
    await shop.one(member(1), key(1))
    old = {name: await redis.dump(name) for name in stock.keys}
    await shop.one(member(2), key(1))
    for name, value in old.items():
        await redis.delete(name)
        if value is not None:
            await redis.restore(name, 0, value)
    answer = await shop.one(member(3), key(1))
    assert answer.decision is None
    assert (await stock.check_books()).members.keys() == {member(1)}


async def test_peek_does_not_trust_a_head_that_went_back(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 1)
    shop = open_shop(redis, campaign(1))
    old = {name: await redis.dump(name) for name in stock.keys}
    await shop.one(member(1), key(1))
    await shop.until_it_peeks()
    for name, value in old.items():
        await redis.delete(name)
        if value is not None:
            await redis.restore(name, 0, value)
    assert (await shop.one(member(3), key(1))).decision is None
    await redis.delete(stock.keys.head)
    assert (await shop.one(member(3), key(1))).decision is None


async def test_purchase_waits_for_the_verification_of_redis(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 10)
    shop = open_shop(redis, campaign(10))
    await redis.hset(stock.keys.head, "run_id", "f" * 40)
    asking = asyncio.create_task(shop.one(member(1), key(1)))
    await asyncio.sleep(0.1)
    assert not asking.done()
    seq, chain = await stock.head("seq", "chain")
    await stock.scripts.verify(stock.id, int(seq), chain)
    assert (await asking).decision is Decision.SOLD


async def test_restarted_redis_sells_only_after_verification(
    open_shop: OpenShop, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "UNTRUSTED_PATIENCE_S", 0.3)
    async with embedded.running(short_path / "d", redis=True, postgres=False) as servers:
        url = servers.endpoints.redis_url
        assert url is not None
        client = open_redis(url)
        stock = await open_stock(client, 10)
        shop = open_shop(client, campaign(10))
        sold = await shop.one(member(1), key(1))
    async with embedded.running(short_path / "d", redis=True, postgres=False):
        began = asyncio.get_running_loop().time()
        assert (await shop.one(member(1), key(1))).decision is None
        assert asyncio.get_running_loop().time() - began < 2.0
        seq, chain = await stock.head("seq", "chain")
        await stock.scripts.verify(stock.id, int(seq), chain)
        again = await shop.one(member(1), key(1))
        assert (again.decision, again.value) == (Decision.REPLAYED, sold.value)
        assert (await shop.one(member(2), key(1))).decision is Decision.SOLD
        await stock.check_books()
        await shop.batchers.close()
        await client.aclose()


class FaultyScripts(Scripts):
    """Scripts whose call raises an exception."""

    faults = 1

    async def purchase(self, *args: Any, **kwargs: Any) -> list[int]:
        if self.faults:
            self.faults -= 1
            raise ZeroDivisionError
        return await super().purchase(*args, **kwargs)


async def test_exception_in_a_script_call_leaves_no_purchase_waiting(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 10)
    shop = open_shop(redis, campaign(10), scripts=FaultyScripts(redis, NONCE), batch_max=2)
    answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(5)))
    assert decisions(answers) == [None] * 5
    assert (await shop.one(member(1), key(1))).decision is Decision.SOLD
    await stock.check_books()


async def test_close_answers_all_even_if_redis_does_not(
    redis: Redis, far: Redis, line: Line, open_shop: OpenShop
) -> None:
    await open_stock(redis, 10)
    shop = open_shop(far, campaign(10), deadline_s=0.2, batch_max=2)
    await shop.one(member(0), key(1))
    line.faults = ["hang"] * 50
    waiting = [shop.submit(Bid(member(n), key(1))) for n in range(1, 6)]
    await asyncio.sleep(0.05)
    await shop.batchers.close()
    for purchase in waiting:
        assert purchase is not None
        async with asyncio.timeout(1.0):
            assert (await purchase.answer).decision is None


async def test_close_answers_waiting_purchases(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 100)
    shop = open_shop(redis, campaign(100), batch_max=4)
    waiting = [shop.submit(Bid(member(n), key(1))) for n in range(50)]
    await shop.batchers.close()
    assert [p.answer.result().decision for p in waiting if p] == [Decision.SOLD] * 50
    assert await stock.left() == [50]


# Refusing by peek -------------------------------------------------------------------------------


async def test_peek_refuses_sold_out_without_a_purchase(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 3)
    shop = open_shop(redis, campaign(3))
    await shop.ask(*(Bid(member(n), key(1)) for n in range(4)))
    await shop.until_it_peeks()
    calls = await calls_of(stock)
    answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(100, 700)))
    assert {(a.decision, a.value) for a in answers} == {(Decision.SOLD_OUT, 0)}
    assert await calls_of(stock) == calls
    assert shop.metrics.outcomes[stock.id, "sold-out"] >= 600


async def test_buyer_gets_its_order_while_others_are_refused(
    redis: Redis, open_shop: OpenShop
) -> None:
    stock = await open_stock(redis, 3, card_limit=2)
    shop = open_shop(redis, campaign(3, card_limit=2))
    sold = await shop.ask(Bid(member(1), key(1), 2), Bid(member(2), key(1)))
    await shop.ask(Bid(member(3), key(1)))
    await shop.until_it_peeks()
    answers = await shop.ask(
        Bid(member(4), key(1)), Bid(member(1), key(1), 2), Bid(member(1), key(1), 1),
        Bid(member(1), key(2)), Bid(member(2), key(2)),
        Bid(member(2), key(1)), Bid(member(5), key(1)),
    )  # fmt: skip
    assert decisions(answers) == [
        Decision.SOLD_OUT, Decision.REPLAYED, Decision.KEY_MISMATCH,
        Decision.LIMIT_EXCEEDED, Decision.SOLD_OUT, Decision.REPLAYED, Decision.SOLD_OUT,
    ]  # fmt: skip
    assert [answers[1].value, answers[5].value] == [answer.value for answer in sold]
    await stock.check_books()


async def test_filter_knows_buyers_of_other_processes(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 1)
    here, there = open_shop(redis, campaign(1)), open_shop(redis, campaign(1), "shop-2")
    await here.one(member(1), key(1))
    await here.one(member(2), key(1))
    await here.until_it_peeks()
    await stock.scripts.add_stock(stock.id, operation(), 0, 2)
    sold = await there.ask(Bid(member(3), key(1)), Bid(member(4), key(1)))
    answers = await here.ask(
        Bid(member(3), key(1)),
        Bid(member(4), key(1)),
        Bid(member(1), key(1)),
        Bid(member(5), key(1)),
    )
    assert decisions(answers) == [Decision.REPLAYED] * 3 + [Decision.SOLD_OUT]
    assert [a.value for a in answers[:2]] == [a.value for a in sold]


async def test_returned_tickets_are_sold_at_once(redis: Redis, open_shop: OpenShop) -> None:
    stock = await open_stock(redis, 1, 0)
    shop = open_shop(redis, campaign(1, 0))
    await shop.one(member(1), key(1))
    await shop.until_it_peeks()
    await stock.scripts.add_stock(stock.id, operation(), 0, 2)
    answers = await shop.ask(
        Bid(member(2), key(1), 3), Bid(member(3), key(1)), Bid(member(4), key(1), 1, 1),
        Bid(member(5), key(1)), Bid(member(6), key(1)),
    )  # fmt: skip
    assert decisions(answers) == [
        Decision.SOLD_OUT, Decision.SOLD, Decision.SOLD_OUT, Decision.SOLD, Decision.SOLD_OUT,
    ]  # fmt: skip
    assert answers[0].value == 2
    await stock.check_books()


async def test_revoked_card_and_wrong_union_precede_sold_out(
    redis: Redis, open_shop: OpenShop
) -> None:
    how: dict[str, Any] = {"unions": ("dhm",)}
    stock = await open_stock(redis, 1, **how)
    await stock.scripts.sync_revoked(stock.id, 0, 1, [(member(2), False)])
    shop = open_shop(redis, campaign(1, **how))
    await shop.one(member(1), key(1), union="dhm")
    for n in range(100):  # the filter loads meanwhile
        await shop.one(member(50 + n), key(1), union="dhm")
        await asyncio.sleep(0)
    answers = await shop.ask(
        Bid(member(2), key(1), union="dhm"), Bid(member(3), key(1), union="x"),
        Bid(member(4), key(1), union="dhm"),
    )  # fmt: skip
    expected = [Decision.CARD_REVOKED, Decision.NOT_ELIGIBLE, Decision.SOLD_OUT]
    assert decisions(answers) == expected
    # The member is revoked after the filter was loaded.
    await stock.scripts.sync_revoked(stock.id, 1, 2, [(member(4), False), (member(2), True)])
    answers = await shop.ask(
        Bid(member(2), key(1), union="dhm"), Bid(member(4), key(1), union="dhm")
    )
    assert decisions(answers) == [Decision.SOLD_OUT, Decision.CARD_REVOKED]


async def test_peek_refuses_while_paused_closed_or_not_open(
    redis: Redis, open_shop: OpenShop
) -> None:
    opens = await now_ms(redis) + HOUR_MS
    made = campaign(50, opens_at_ms=opens, closes_at_ms=opens + 1_000)
    stock = Stock(redis)
    await stock.create(made, schedule=True)
    await stock.load_roster()
    shop = open_shop(redis, made)

    async def told(n: int) -> Answer:
        await shop.until_it_peeks()
        calls = await calls_of(stock)
        answers = await shop.ask(*(Bid(member(n + extra), key(1)) for extra in range(20)))
        assert len({answer.decision for answer in answers}) == 1
        assert await calls_of(stock) == calls
        return answers[0]

    not_open = await told(100)
    assert (not_open.decision, not_open.value) == (Decision.NOT_OPEN, opens)
    assert not_open.now_ms < opens
    await stock.set_clock(opens)
    assert (await shop.one(member(1), key(1))).decision is Decision.SOLD
    await stock.step("pause")
    assert (await shop.one(member(2), key(1))).decision is Decision.PAUSED
    assert (await told(200)).decision is Decision.PAUSED
    await stock.step("resume")
    assert (await shop.one(member(2), key(1))).decision is Decision.SOLD
    await stock.set_clock(opens + 1_000)
    assert (await shop.one(member(3), key(1))).decision is Decision.CLOSED
    assert (await told(300)).decision is Decision.CLOSED
    assert (await shop.one(member(2), key(1))).decision is Decision.REPLAYED
    await stock.check_books()


class SlowPeeks(Scripts):
    """Holds each peek's reply until it is released."""

    def __init__(self, redis: Redis, nonce: str) -> None:
        super().__init__(redis, nonce)
        self.peeked = asyncio.Event()
        self.through = asyncio.Event()
        self.through.set()

    async def peek(self, *args: Any, **kwargs: Any) -> Peek:
        peek = await super().peek(*args, **kwargs)
        self.peeked.set()
        await self.through.wait()
        return peek


async def test_peek_decides_no_later_purchase(redis: Redis, open_shop: OpenShop) -> None:
    """Otherwise a purchase after a return of tickets would be answered "sold out"."""
    stock = await open_stock(redis, 1)
    scripts = SlowPeeks(redis, NONCE)
    shop = open_shop(redis, campaign(1), scripts=scripts)
    await shop.one(member(1), key(1))
    await shop.until_it_peeks()
    scripts.peeked.clear()
    scripts.through.clear()
    early = shop.submit(Bid(member(2), key(1)))
    assert early is not None
    await scripts.peeked.wait()
    await stock.scripts.add_stock(stock.id, operation(), 0, 1)
    late = shop.submit(Bid(member(3), key(1)))
    assert late is not None
    scripts.through.set()
    assert (await early.answer).decision is Decision.SOLD_OUT
    assert (await late.answer).decision is Decision.SOLD


# The filter of buyers ---------------------------------------------------------------------------


async def test_filter_holds_buyers_and_revoked_members_exactly(
    redis: Redis, rng: random.Random
) -> None:
    stock = await open_stock(redis, 2_000, card_limit=5)
    buyer_filter = BuyerFilter(redis, stock.id)
    bought: set[int] = set()
    revoked: set[int] = set()
    ever_revoked: set[int] = set()
    rev = 0

    def is_exact() -> bool:
        held = {n for n in map(member, range(2_000)) if n in buyer_filter}
        return bought | revoked <= held <= bought | ever_revoked

    for _ in range(300):
        dice = rng.random()
        if dice < 0.5:
            bids = [Bid(member(rng.randint(1, 500)), key(rng.randint(1, 9))) for _ in range(4)]
            for bid, told in zip(bids, await stock.buy(*bids), strict=True):
                if told.decision is Decision.SOLD:
                    bought.add(bid.member_no)
        elif dice < 0.6:
            changed = member(rng.randint(400, 600))
            revoked ^= {changed}
            ever_revoked |= revoked
            await stock.scripts.sync_revoked(
                stock.id, rev, rev + 1, [(changed, changed not in revoked)]
            )
            rev += 1
        elif dice < 0.65:
            await redis.xtrim(stock.keys.stream, maxlen=rng.randint(1, 5), approximate=False)
        elif dice < 0.7:
            await buyer_filter.load()
        else:
            seq = int((await stock.head("seq"))[0])
            if 0 <= buyer_filter.seq < seq:
                await buyer_filter.catch_up(seq)
            assert not buyer_filter.complete_for(seq, 1, rev) or is_exact()
    await buyer_filter.load()
    assert buyer_filter.complete_for(int((await stock.head("seq"))[0]), 1, rev)
    assert is_exact()


async def test_filter_takes_one_bit_a_member_in_its_own_range(redis: Redis) -> None:
    highest = 182_850
    for first, made_up in ((0, False), (MADE_UP_FROM, True)):
        buyer_filter = BuyerFilter(redis, "films", made_up=made_up)
        assert first + highest not in buyer_filter
        for number in (first + highest, first + 1, MADE_UP_FROM - first, -1, 2**31 - 1):
            buyer_filter._add(number)
        assert len(buyer_filter.bits) <= highest // 8 + 1 + GROWS_BYTES
        held = [n for n in range(first, first + highest + 10_000) if n in buyer_filter]
        assert held == [first + 1, first + highest]
        assert -1 not in buyer_filter
        assert first + 2**30 not in buyer_filter


async def test_filter_reloads_after_the_ledger_was_trimmed(redis: Redis) -> None:
    stock = await open_stock(redis, 10)
    buyer_filter = BuyerFilter(redis, stock.id)
    await buyer_filter.load()
    for n in range(3):
        await stock.buy_one(member(n), key(1))
    await redis.xtrim(stock.keys.stream, maxlen=1, approximate=False)
    await buyer_filter.catch_up(5)
    assert not buyer_filter.complete_for(5, 1, 0)
    await buyer_filter.load()
    assert buyer_filter.complete_for(5, 1, 0)
    assert all(member(n) in buyer_filter for n in range(3))


async def test_filter_loads_during_sales(redis: Redis) -> None:
    stock = await open_stock(redis, 100_000)
    for at in range(0, 5_000, 250):
        await stock.buy(*(Bid(member(n), key(1)) for n in range(at, at + 250)))
    buyer_filter = BuyerFilter(redis, stock.id)
    loading = asyncio.create_task(buyer_filter.load())
    at = 5_000
    while not loading.done():
        await stock.buy(*(Bid(member(n), key(1)) for n in range(at, at + 50)))
        at += 50
    seq = int((await stock.head("seq"))[0])
    while buyer_filter.seq < seq:
        await buyer_filter.catch_up(seq)
    assert buyer_filter.complete_for(seq, 1, 0)
    assert all(member(n) in buyer_filter for n in range(at))


async def test_filter_of_a_missing_campaign_is_not_complete(redis: Redis) -> None:
    stock = Stock(redis)
    buyer_filter = BuyerFilter(redis, stock.id)
    await buyer_filter.load()
    assert buyer_filter.seq == -1
    await stock.create(campaign(1))
    await buyer_filter.load()  # no roster_rev yet
    assert not buyer_filter.complete_for(1, 1, 0)


async def test_filter_load_error_is_logged_once_and_retried_later(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Peek(0, 1, "", 1, "open", 0, 0, 1, 0, False, (1,), (0,))
    buyer_filter = BuyerFilter(redis, (await open_stock(redis, 1)).id)
    causes: list[Exception] = [
        RedisConnectionError(), RedisConnectionError(), ResponseError(), ValueError(), OSError(),
    ]  # fmt: skip
    monkeypatch.setattr(buyer_filter, "load", mock.AsyncMock(side_effect=causes))
    with capture_logs() as said:
        for _ in causes:
            assert not await buyer_filter.come_up_to(seen)
            assert buyer_filter.loading is not None
            await buyer_filter.loading
            last = buyer_filter.loading
            assert not await buyer_filter.come_up_to(seen)
            assert buyer_filter.loading is last, "it is tried again a while later"
            buyer_filter._load_not_before = 0.0
    told = [each["why"] for each in said if each["event"] == "buyer_filter.not_loaded"]
    assert told == ["ConnectionError", "ResponseError", "ValueError", "OSError"]


# Faults of ours and of the store, while a peek refuses everybody ----------------------------------


async def test_exception_in_a_peek_leaves_no_purchase_waiting(
    redis: Redis, open_shop: OpenShop
) -> None:
    await open_stock(redis, 1)
    shop = open_shop(redis, campaign(1))
    await shop.until_it_peeks()
    batcher = shop.batcher
    assert batcher._buyer_filter is not None
    with mock.patch.object(batcher._buyer_filter, "bits", None):
        answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(5)))
    assert decisions(answers) == [None] * 5
    assert (batcher.waiting, batcher._asking) == (0, [])
    assert (await shop.one(member(7), key(2))).decision is Decision.SOLD_OUT


@pytest.mark.parametrize(
    ("what", "well"), [("purchase.unknown", True), ("purchase.rejected", False)]
)
async def test_answered_peek_ends_the_state_of_a_failed_store(
    redis: Redis, open_shop: OpenShop, what: str, well: bool
) -> None:
    """Otherwise waiting purchases would count as waiting for a store and not as overload."""
    await open_stock(redis, 1)
    shop = open_shop(redis, campaign(1))
    await shop.until_it_peeks()
    shop.batcher._warn_store(what, "for a while")
    shop.batcher._store_rejects = not well
    waiting = [shop.submit(Bid(member(n), key(1))) for n in range(2)]
    assert shop.batcher.waiting_since == 0.0
    await asyncio.gather(*(each.answer for each in waiting if each))
    again = shop.submit(Bid(member(3), key(1)))
    assert (shop.batcher.waiting_since > 0) is well
    assert again is not None
    assert (await again.answer).decision is Decision.SOLD_OUT


async def test_peek_with_many_undecided_keeps_the_order(redis: Redis, open_shop: OpenShop) -> None:
    await open_stock(redis, 30)
    shop = open_shop(redis, campaign(30), batch_max=8)
    shop.batcher._all_refused = True
    loaded = BuyerFilter(redis, shop.batcher.campaign_id)
    await loaded.load()
    shop.batcher._buyer_filter = loaded
    answers = await shop.ask(*(Bid(member(n), key(1)) for n in range(40)))
    assert decisions(answers) == [Decision.SOLD] * 30 + [Decision.SOLD_OUT] * 10
    numbers = [answer.value for answer in answers[:30]]
    assert numbers == sorted(numbers)


async def test_buyers_in_a_sold_out_rush_keep_refusals_cheap(
    redis: Redis, open_shop: OpenShop
) -> None:
    """Only the script can answer a buyer's repeat, and every batch of a rush has some."""
    stock = await open_stock(redis, 1)
    shop = open_shop(redis, campaign(1), batch_max=32)
    await shop.one(member(1), key(1))
    await shop.until_it_peeks()
    calls = await calls_of(stock)
    for turn in range(10):
        others = [Bid(member(1_000 + 100 * turn + n), key(1)) for n in range(99)]
        answers = await shop.ask(*others[:50], Bid(member(1), key(1)), *others[50:])
        assert decisions(answers).count(Decision.SOLD_OUT) == 99
        assert answers[50].decision is Decision.REPLAYED
    assert await calls_of(stock) - calls <= 12, "a small call a round for the buyer, and no more"
