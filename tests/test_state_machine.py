"""Random lives of campaigns, on a real Redis and PostgreSQL, against ``model.py``.

Only the clock is faked: a campaign's clock is set to a moment that this machine has not reached,
and moves when a rule moves it, so that openings and closings are met to the millisecond.
"""

import asyncio
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import STEPS, Asked, Model
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from stock_maker import BEHIND_MAX, Bid, Stock, campaign, key, member, now_ms, operation, packed

from sale.db.apply import apply_entries
from sale.db.pool import open_pool
from sale.ledger.chain import START, Event, check_chain, parse_entry
from sale.ledger.kinds import SOLD
from sale.metrics import PurchaseMetrics
from sale.stock.answers import Answer, AwaitedPurchase
from sale.stock.batchers import Batchers
from sale.stock.catalogue import read_campaign
from sale.stock.connection import open_redis
from sale.stock.mark import NOT_CHECKED
from sale.stock.process_reports import collect_report
from sale.stock.scripts import CallReply, Decision, Scripts
from sale.trust import verify
from sale.trust.audit import audit
from sale.trust.revocation import sync_campaign

if TYPE_CHECKING:
    import asyncpg

HOUR_MS = 3_600_000
ANSWER_WITHIN_S = 20.0
CARDS = 5
UNIONS = ("dhm", "jsm")
PROCESSES = (0, 1)
GO_ON = {"draft": "open", "scheduled": "open", "paused": "resume", "closed": "reopen"}
T = TypeVar("T")

asked = st.tuples(
    st.integers(0, CARDS - 1), st.integers(0, 1), st.integers(1, 3), st.integers(0, 2)
)
moves_ms = st.sampled_from([1, 2, 999, 1_000, 60_000])
offsets_ms = st.sampled_from([-1_000, -1, 0, 1, 2, 1_000, 60_000])


class UnreliableScripts(Scripts):
    """Executes purchases and loses as many replies as it is told to."""

    lose = 0
    last: tuple[Any, ...] = ()

    async def purchase(self, *args: Any) -> list[Any]:
        self.last = args[:-1]  # without the line, which may be closed when it is sent again
        reply = await super().purchase(*args)
        if self.lose:
            self.lose -= 1
            raise RedisConnectionError("the reply was lost")
        return reply


class Rig:
    """Loop, Redis and PostgreSQL that all examples share; each has a campaign of its own."""

    def __init__(self, redis_url: str, database_url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.redis_url = redis_url
        self.redis: Redis = open_redis(redis_url)
        self.pool: asyncpg.Pool[Any] = self.run(open_pool(database_url))
        self.examples = 0
        self.clock = self.run(now_ms(self.redis)) + HOUR_MS
        self.run(self.pool.executemany(
            "INSERT INTO member (member_no, name, union_code, phone, status) "
            "VALUES ($1, '某某', $2, '', 'active')",
            [(member(n), UNIONS[n % 2]) for n in range(CARDS)],
        ))  # fmt: skip

    def run(self, work: Awaitable[T]) -> T:
        async def within() -> T:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await work

        return self.loop.run_until_complete(within())

    async def set_status(self, status: str, *members: int) -> None:
        """Change members on the roster, at the campaign's clock."""
        async with self.pool.acquire() as conn, conn.transaction():
            before = await conn.fetchval("SELECT coalesce(max(rev), 0) FROM member_change")
            await conn.execute(
                "UPDATE member SET status = $1 WHERE member_no = ANY($2::int[])",
                status,
                list(members),
            )
            await conn.execute(
                "UPDATE member_change SET at = to_timestamp($2::bigint / 1000.0) WHERE rev > $1",
                before,
                self.clock,
            )

    def close(self) -> None:
        self.run(self.redis.aclose())
        self.run(self.pool.close())
        self.loop.close()


class Sale(RuleBasedStateMachine):
    """One campaign's life."""

    rig: Rig

    def __init__(self) -> None:
        super().__init__()
        self.rig.examples += 1
        self.run = self.rig.run
        self.id = f"life-{self.rig.examples}"
        self.stock = Stock(self.rig.redis, self.id)
        self.scripts = UnreliableScripts(self.rig.redis, self.stock.scripts.nonce)
        self.model = Model(self.rig.clock)
        self.position = START
        self.applied = 0
        self.events: list[Event] = []
        self.shops: dict[int, Batchers] = {}
        self.processes = 0
        self.run(self.rig.set_status("active", *(member(n) for n in range(CARDS))))
        for place in PROCESSES:
            self._start(place)

    # A campaign -----------------------------------------------------------------------------------

    @initialize(
        tickets=st.lists(st.integers(0, 4), min_size=1, max_size=2),
        limit=st.integers(1, 4),
        everyone=st.sampled_from([True, True, True, False]),
        opens=st.sampled_from([0, -1, 1, -1_000, 1_000, None]),
        closes=st.sampled_from([None, None, 1, 1_000, 120_000]),
        draft=st.sampled_from([False] * 7 + [True]),
    )
    def begin(self, **how: Any) -> None:
        self._create("create", **how)
        if self.model.state_now() == "draft" and not how["draft"]:
            self._operate("open")

    @precondition(lambda self: self.model.state == "deleted")
    @rule(tickets=st.lists(st.integers(0, 6), min_size=1, max_size=2), limit=st.integers(1, 4))
    def make_anew(self, tickets: list[int], limit: int) -> None:
        self._create(f"create-{self.model.seq}", tickets, limit, True, None, None, True)

    def _create(
        self,
        op: str,
        tickets: list[int],
        limit: int,
        everyone: bool,
        opens: int | None,
        closes: int | None,
        draft: bool,
    ) -> None:
        opens_at = None if opens is None else self.model.clock + opens
        closes_at = None if closes is None else (opens_at or self.model.clock) + closes
        unions = ("*",) if everyone else UNIONS[:1]
        self.made = campaign(
            *tickets, campaign_id=self.id, card_limit=limit, order_max=min(limit, 3),
            unions=unions, opens_at_ms=opens_at, closes_at_ms=closes_at,
        )  # fmt: skip
        scheduled = opens_at is not None and not draft
        by = operation(op, "create")
        reply = self.run(self.stock.create(self.made, schedule=scheduled, by=by))
        assert reply.reply is CallReply.OK
        self.model.create(op, tickets, limit, set(unions), opens_at, closes_at, scheduled)
        assert reply.seq == self.model.seq
        self.run(self.stock.set_clock(self.model.clock))
        self._follow_roster()
        # The API never gives a draft to a batcher, so none outlives a draft that is made anew.
        for place in PROCESSES:
            self.process_restarts(place)

    # Members --------------------------------------------------------------------------------------

    @rule(place=st.sampled_from(PROCESSES), wanted=st.lists(asked, min_size=1, max_size=5))
    def purchase(self, place: int, wanted: list[tuple[int, int, int, int]]) -> None:
        self._buy(place, [self._asked(*each) for each in wanted])

    @precondition(lambda self: self.model.state_now() not in {"draft", "deleted"})
    @rule(
        showing=st.integers(0, 1),
        key_no=st.integers(0, 2),
        turns=st.lists(st.sampled_from(PROCESSES), min_size=1, max_size=4),
        shut=st.sampled_from([None, None, None, "pause", "close", "closing moment"]),
    )
    def everybody_asks_and_asks_again(
        self, showing: int, key_no: int, turns: list[int], shut: str | None
    ) -> None:
        wanted = [self._asked(who, showing, 1, key_no) for who in range(CARDS)]
        self._buy(turns[0], wanted)
        if shut == "closing moment":
            self.time_passes(max((self.model.closes_at or 0) - self.model.clock, 0))
        elif shut and self.model.state_now() == "open":
            self._operate(shut)
        for place in turns:
            self._buy(place, wanted)

    @precondition(lambda self: self.model.orders)
    @rule(place=st.sampled_from(PROCESSES), data=st.data(), other=st.booleans())
    def same_key_again(self, place: int, data: st.DataObject, other: bool) -> None:
        (who, key_hash), order = data.draw(st.sampled_from(sorted(self.model.orders.items())))
        quantity = order["quantity"]
        if other:
            quantity = quantity % self.made.order_max + 1
        union = UNIONS[who % 2]
        self._buy(place, [Asked(who, union, order["showing"], quantity, key_hash)])

    @rule(times=st.integers(1, 2))
    def replies_will_be_lost(self, times: int) -> None:
        self.scripts.lose = times

    @precondition(lambda self: self.scripts.last)
    @rule()
    def last_call_arrives_once_more(self) -> None:
        assert self.run(Scripts.purchase(self.scripts, *self.scripts.last)) == [CallReply.LATE]

    def _asked(self, who: int, showing: int, quantity: int, key_no: int) -> Asked:
        return Asked(
            member(who), UNIONS[who % 2], showing % len(self.made.showings),
            min(quantity, self.made.order_max), key(key_no),
        )  # fmt: skip

    def _buy(self, place: int, wanted: list[Asked]) -> None:
        lost = self.scripts.lose > 0
        answers = self.run(self._answers(place, wanted))
        lost = lost and self.scripts.lose == 0
        at_first = [self.model.decide(each) for each in wanted]
        in_order = [self.model.buy(each) for each in wanted]
        at_last = [self.model.decide(each) for each in wanted]
        for n, answer in enumerate(answers):
            # A peek may refuse what waits before the others are decided; after a lost reply all
            # are asked again. Each answer must be right at one of these moments.
            allowed = [in_order[n]]
            if at_first[n][0] not in {"sold", "replayed"}:
                allowed.append(at_first[n])
            if lost:
                allowed.append(at_last[n])
            assert _said(answer) in allowed, (wanted[n], _said(answer), allowed)
            assert answer.now_ms == self.model.clock
        self._maybe_recorded()

    async def _answers(self, place: int, wanted: list[Asked]) -> list[Answer]:
        batcher = self.shops[place].of(self.made)
        purchases = [
            AwaitedPurchase(a.member, a.union, a.showing, a.quantity, a.key, self.rig.loop)
            for a in wanted
        ]
        assert all(batcher.submit(purchase) for purchase in purchases)
        answers = [await purchase.answer for purchase in purchases]
        buyer_filter = batcher._buyer_filter
        if buyer_filter is not None and buyer_filter.loading is not None:
            await buyer_filter.loading
        return answers

    def _maybe_recorded(self) -> None:
        """A purchase that sold nothing records an opening or closing; a peek does not."""
        if int(self.run(self.stock.head("seq"))[0]) > self.model.seq:
            self.model.record_crossings()

    # Operators ------------------------------------------------------------------------------------

    @rule(
        action=st.sampled_from(sorted(STEPS)), op=st.integers(0, 20), opens=st.none() | offsets_ms
    )
    def step(self, action: str, op: int, opens: int | None) -> None:
        opens_at = None if opens is None else self.model.clock + opens
        content = f"{action}|{opens_at}"
        by = operation(f"op{op}", content)
        reply = self.run(self.scripts.transition(self.id, action, by, opens_at))
        assert reply.reply.name.lower() == self.model.step(action, by.op, content, opens_at)
        if reply.reply is CallReply.WRONG_STATE:
            assert reply.state == self.model.state_now()
        if reply.reply in {CallReply.OK, CallReply.REPLAYED}:
            assert reply.seq == self.model.operations[by.op][1]

    @precondition(lambda self: self.model.state_now() in GO_ON)
    @rule()
    def go_on(self) -> None:
        """Back to selling, so that a life is not spent closed."""
        self._operate(GO_ON[self.model.state_now()])

    def _operate(self, action: str) -> None:
        by = operation()
        assert self.run(self.scripts.transition(self.id, action, by)).reply is CallReply.OK
        assert self.model.step(action, by.op, by.content, None) == "ok"

    @rule(op=st.integers(0, 20), showing=st.integers(0, 1), add=st.integers(1, 3))
    def add_stock(self, op: int, showing: int, add: int) -> None:
        showing %= len(self.made.showings)
        content = f"stock|{showing}|{add}"
        by = operation(f"op{op}", content)
        reply = self.run(self.scripts.add_stock(self.id, by, showing, add))
        assert reply.reply.name.lower() == self.model.add_stock(by.op, content, showing, add)

    @rule(who=st.integers(0, CARDS - 1), revoke=st.booleans())
    def revoke_or_restore(self, who: int, revoke: bool) -> None:
        self.run(self.rig.set_status("suspended" if revoke else "active", member(who)))
        (self.model.revoked.add if revoke else self.model.revoked.discard)(member(who))
        self._follow_roster()

    def _follow_roster(self) -> None:
        if self.model.state != "deleted":
            self.run(sync_campaign(self.rig.redis, self.scripts, self.rig.pool, self.id))

    # Time and misfortune --------------------------------------------------------------------------

    @rule(ms=moves_ms)
    def time_passes(self, ms: int) -> None:
        self.rig.clock = self.model.clock = self.model.clock + ms
        self.run(self.stock.set_clock(self.model.clock))

    @rule()
    def scheduler_ticks(self) -> None:
        reply = self.run(self.scripts.tick(self.id))
        assert (reply.reply, reply.tickets) == (CallReply.OK, len(self.model.crossings()))
        self.model.record_crossings()

    @rule(place=st.sampled_from(PROCESSES))
    def process_restarts(self, place: int) -> None:
        self.run(self.shops[place].close())
        self._start(place)

    def _start(self, place: int) -> None:
        self.processes += 1
        self.shops[place] = Batchers(
            self.scripts, f"process-{self.processes}", PurchaseMetrics(), batch_max=64,
            queue_max=64, deadline_s=10.0, behind_max=BEHIND_MAX,
        )  # fmt: skip

    @rule()
    def scripts_are_flushed(self) -> None:
        self.run(self.rig.redis.script_flush())

    @rule()
    def connections_are_cut(self) -> None:
        self.run(self.rig.redis.connection_pool.disconnect())
        for shop in self.shops.values():
            if shop._connection is not None:
                self.run(shop._connection.close())  # it connects again when it is next used

    @rule()
    def redis_gets_another_identity(self) -> None:
        self.run(self.rig.redis.hset(self.stock.keys.head, "run_id", "f" * 40))
        bid = packed([Bid(member(0), key(9), union=UNIONS[0])])
        call = (self.stock.keys, "stranger", self.model.seq, NOT_CHECKED, BEHIND_MAX, bid)
        assert self.run(Scripts.purchase(self.scripts, *call)) == [CallReply.UNVERIFIED]
        by = operation()
        reply = self.run(self.scripts.transition(self.id, "close", by))
        assert reply.reply is CallReply.UNVERIFIED
        self.run(self._verified())

    async def _verified(self) -> None:
        redis, pool = self.rig.redis, self.rig.pool
        report = await collect_report(redis)
        assert await verify.verify(redis, self.scripts, pool, self.id, report)

    # The writer -----------------------------------------------------------------------------------

    @rule(entries=st.integers(1, 8))
    def writer_goes_on(self, entries: int) -> None:
        self.run(self._apply(entries))

    @rule()
    def applied_entries_are_trimmed(self) -> None:
        if self.applied > 0:
            # The last entry stays: the head's number is checked against it.
            self.run(
                self.rig.redis.xtrim(
                    self.stock.keys.stream, minid=f"{self.applied}-0", approximate=False
                )
            )

    async def _apply(self, entries: int | None) -> None:
        rows: Any = await self.rig.redis.xrange(
            self.stock.keys.stream, f"({self.applied}-0", "+", count=entries
        )
        async with self.rig.pool.acquire() as conn:
            done = await apply_entries(conn, self.id, [parse_entry(*row) for row in rows])
            assert done.conflicts == []
            self.applied = done.position.seq
            await self._check_postgres(conn)

    async def _check_postgres(self, conn: Any) -> None:
        orders = await conn.fetch("SELECT * FROM orders WHERE campaign_id = $1", self.id)
        assert {(row["member_no"], row["key_hash"]): _order(row) for row in orders} == {
            who: order for who, order in self.model.orders.items() if order["seq"] <= self.applied
        }
        showings = await conn.fetch(
            "SELECT stock, live FROM showing WHERE campaign_id = $1 ORDER BY showing_no", self.id
        )
        expected = self.model.showings_at(self.applied)
        assert [(row["stock"], row["live"]) for row in showings] == expected

    # Invariants after every step ------------------------------------------------------------------

    @invariant()
    def redis_holds_what_the_model_says(self) -> None:
        if self.model.seq:
            self.run(self._check_redis())

    async def _check_redis(self) -> None:
        model, redis, keys = self.model, self.rig.redis, self.stock.keys
        now = await read_campaign(redis, self.id)
        assert now is not None
        assert (now.seq, now.state, now.recorded) == (model.seq, model.state_now(), model.state)
        assert (now.opens_at_ms, now.closes_at_ms) == (model.opens_at, model.closes_at)
        assert (now.recovering, now.as_of_ms) == ("", model.clock)
        assert list(now.tickets) == model.tickets
        assert list(now.remaining) == [model.left(n) for n in range(len(model.tickets))]
        assert min(now.remaining) >= 0
        held: dict[tuple[str, str], dict[str, int]] = {}
        for who, records in (await self.stock.records()).items():
            assert model.held(who) <= model.limit
            for r in records:
                held[who, r.key_hash] = {
                    "seq": r.seq, "showing": r.showing, "quantity": r.quantity,
                }  # fmt: skip
        assert held == model.orders
        if model.state != "deleted":
            revoked: Any = await redis.smembers(keys.revoked)
            assert {int(each) for each in revoked} == model.revoked
        await self._check_ledger()

    async def _check_ledger(self) -> None:
        """New entries of the stream follow the chain and equal the model's log."""
        rows: Any = await self.rig.redis.xrange(self.stock.keys.stream, f"({self.position.seq}-0")
        entries = [parse_entry(*row) for row in rows]
        known = len(self.events)
        self.position = check_chain(entries, self.position)
        self.events += [event for entry in entries for event in entry.events()]
        assert [_logged(event) for event in self.events[known:]] == self.model.log[known:]

    def teardown(self) -> None:
        try:
            self.run(self._apply(None))
            report = self.run(audit(self.rig.redis, self.rig.pool, self.id))
            assert report.clean, report.campaigns
        finally:
            for shop in self.shops.values():
                self.run(shop.close())


def _said(answer: Answer) -> tuple[str, int, int]:
    what = "unknown" if answer.decision is None else answer.decision.name.lower()
    left = answer.card_remaining
    return what, answer.value, left if answer.decision in {Decision.SOLD, Decision.REPLAYED} else 0


def _logged(event: Event) -> tuple[Any, ...]:
    if event.kind == SOLD:
        return (SOLD, event.member_no, event.showing, event.quantity, event.key_hash)
    if event.kind == "created":
        return ("created", tuple(row["tickets"] for row in event.data["config"]["showings"]))
    if event.kind == "stock_added":
        return ("stock_added", event.data["showing"], event.data["add"])
    return (event.kind,)


def _order(row: Any) -> dict[str, int]:
    return {"seq": row["seq"], "showing": row["showing_no"], "quantity": row["quantity"]}


@pytest.fixture
def rig(redis_url: str, database_url: str, redis: Redis) -> Iterator[Rig]:
    rig = Rig(redis_url, database_url)
    yield rig
    rig.close()


@pytest.mark.timeout(600)  # about 10 s; a failure is shrunk first, and that takes its time
def test_engine_and_model_agree(rig: Rig, seed: int) -> None:
    """A failure prints the steps; SALE_TEST_SEED of the report's head repeats them."""
    machine = hypothesis.seed(seed)(type("Sale", (Sale,), {"rig": rig}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
