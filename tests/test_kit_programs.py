"""The kit's programs with an engine of their own, each as small as it may be; what they prove."""

import io
import time
from types import SimpleNamespace
from typing import TypeVar

import msgspec
import pytest
from rich.console import Console
from test_loadtest import run_program

from loadtest.bench.durable import SECONDS_MIN, Durable
from loadtest.bench.half import Half, Round, Side
from loadtest.bench.open_loop import OpenLoops, spool_of
from loadtest.bench.overload import Overload
from loadtest.bench.rig import SHOWING
from loadtest.books.answers import Spool
from loadtest.books.check import key_hash
from loadtest.books.ledger import Books, BooksError, OrderRow
from loadtest.engine import EngineError
from loadtest.members import Mint
from loadtest.tables import CLEAN
from sale.identity import MemberTokens, SigningKey

Result = TypeVar("Result", Durable, Overload, Half)

WITHIN_S = 60


# The programs ------------------------------------------------------------------------------------


async def told_by(kind: type[Result], *words: str) -> Result:
    """Run a program with --json; it says that its books are clean."""
    status, out = await run_program(*words, "--json", within_s=WITHIN_S)
    *_, last = ["", *out.splitlines()]
    assert last.startswith("{"), (status, out)
    told = msgspec.json.decode(last, type=kind)
    measured = isinstance(told, Durable) or told.measured
    assert status == (0 if measured else 1), out
    assert told.audit == CLEAN
    return told


@pytest.mark.load
async def test_shortest_durable_run_stands_in_the_books() -> None:
    words = ("--tiny", "--durable", str(SECONDS_MIN), "--client", "ours")
    told = await told_by(Durable, "loadtest.bench", *words)
    assert told.check == CLEAN
    assert 0 < told.slowest_second <= told.rows_a_second
    assert told.orders > told.rows_a_second * told.window_s
    assert told.ratio == pytest.approx(told.rows_a_second * 2 / sum(told.constants))
    assert {"serve", "writer", "redis", "postgresql"} <= set(told.cpu)
    assert all(told.latency_ms)


@pytest.mark.load
async def test_smallest_overload_compares_each_answer() -> None:
    words = ("overload", "--seconds", "1", "--far", "1", "--near")
    told = await told_by(Overload, "loadtest", *words)
    (scene,) = told.scenes
    assert scene.name == "far"
    (step,) = scene.steps
    assert (step.times, step.other) == (1, {})
    assert step.offered == pytest.approx(scene.capacity, rel=0.2)
    assert step.sold > 0
    assert told.compared == step.offered
    assert told.refusal_us > 0
    assert all(us > 0 for us in told.purchase_us.values())


@pytest.mark.load
async def test_half_of_capacity_compares_each_answer() -> None:
    told = await told_by(Half, "loadtest", "overload", "--seconds", "1", "--half", "1")
    (only,) = told.rounds
    assert told.rate == told.capacity / 2
    assert told.compared == pytest.approx(told.rate, rel=0.2)
    limited = only.constant.bottleneck or only.purchases.bottleneck
    assert (told.goal.got is None) is bool(limited)
    assert only.purchases.p99_ms >= only.purchases.p50_ms > 0


# Half of the capacity ----------------------------------------------------------------------------


def side(p50_ms: float, p99_ms: float, bottleneck: str = "") -> Side:
    return Side(p50_ms, p99_ms, 0, bottleneck)


def half_of(*rounds: Round) -> Half:
    return Half(capacity=10_000.0, rate=5_000.0, rounds=list(rounds), compared=7, audit=CLEAN)


def shown(result: Half) -> str:
    console = Console(file=io.StringIO(), width=116)
    result.show(console)
    return str(console.file.getvalue())


def test_rounds_limited_by_the_generator_do_not_count() -> None:
    good = Round(side(1.0, 2.0), side(1.5, 4.0))
    limited = (
        Round(side(1.0, 2.0, "late"), side(1.5, 90.0)),
        Round(side(1.0, 2.0), side(1.5, 91.0, "late")),
    )
    result = half_of(good, *limited)
    assert (result.goal.got, result.goal.met) == (4.0, True)
    assert "1, " not in (said := shown(result))
    assert said.count("the generator's limit: late") == 2


def test_disturbed_constant_does_not_flatter_the_engine() -> None:
    result = half_of(
        Round(side(0.5, 2.0), side(1.5, 4.0)),
        Round(side(80.0, 90.0), side(1.5, 5.0)),
        Round(side(0.6, 2.0), side(1.5, 6.0)),
    )
    assert (result.goal.got, result.goal.met) == (10.0, True)


def test_nothing_is_measured_without_a_round_that_counts() -> None:
    nothing_sold = Round(side(0.0, 0.0), side(0.0, 0.0))
    result = half_of(Round(side(1.0, 2.0, "late"), side(1.5, 90.0)), nothing_sold)
    assert (result.goal.got, result.goal.met) == (None, None)
    assert "median: not measured" in shown(result)


# The answers of an open loop ---------------------------------------------------------------------


class QuietBench:
    """A bench whose books are what a test makes them."""

    def __init__(self, audit: str = CLEAN) -> None:
        self._audit = audit
        self.rig = SimpleNamespace(settings={"SALE_DATABASE_URL": "x"}, written=self.written)

    async def written(self, _: str) -> None: ...

    async def audit(self) -> str:
        return self._audit

    def note(self, _: str) -> None: ...


def spool() -> Spool:
    """Card 41 was told of an order, card 42 that there are none left."""
    made = spool_of(range(41, 43))
    made(0, 201, False, b'{"order_no":"c.5.000001","showing":"general","quantity":1,'
         b'"amount_fen":500,"tickets":[{"code":"a"}]}')  # fmt: skip
    made(1, 409, False, b'{"code":"sold-out"}')
    return made


ORDER = OrderRow("c.5.000001", "10000041", SHOWING, 1, 500, "confirmed",
                 key_hash("k000000000041"))  # fmt: skip


@pytest.mark.parametrize(
    ("orders", "audit", "verdict"),
    [
        ([ORDER], CLEAN, CLEAN),
        ([ORDER], "a gap", "a gap"),
        ([], CLEAN, "1 finding among the answers, first lost: order c.5.000001"),
        ([], "a gap", "; a gap"),
        ([msgspec.structs.replace(ORDER, quantity=2)], CLEAN, "first wrong-content: order"),
    ],
)
async def test_untrue_answers_of_an_open_loop_are_told(
    monkeypatch: pytest.MonkeyPatch, orders: list[OrderRow], audit: str, verdict: str
) -> None:
    async def books(*_: str) -> Books:
        return Books(tuple(orders), {SHOWING: 100}, 3)

    monkeypatch.setattr("loadtest.bench.open_loop.load_books", books)
    loops = OpenLoops(QuietBench(audit))
    await loops.compare("c", spool())
    assert loops.answers == 2
    told = await loops.verdict()
    assert verdict in told
    assert (told == CLEAN) is (verdict == CLEAN)


async def test_unreadable_books_fail_the_run_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def gone(*_: str) -> Books:
        raise BooksError("PostgreSQL: gone")

    monkeypatch.setattr("loadtest.bench.open_loop.load_books", gone)
    with pytest.raises(EngineError, match="PostgreSQL: gone"):
        await OpenLoops(QuietBench()).compare("c", spool())


def test_answers_name_the_member_and_key_that_were_sent() -> None:
    key = SigningKey(b"k" * 32)
    mint = Mint(key.secret)
    for raw, answer in zip(mint.requests("h", "c", SHOWING, range(41, 43)), spool(), strict=True):
        token = raw.partition(b"Bearer ")[2].partition(b"\r\n")[0].decode()
        assert str(MemberTokens(key).verify(token, time.time()).no) == answer.member_no
        assert f"Idempotency-Key: {answer.key}\r\n".encode() in raw
        assert raw.endswith(b'{"quantity":%d,"showing":"%s"}'
                            % (answer.quantity, answer.showing.encode()))  # fmt: skip
