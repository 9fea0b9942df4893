"""Overload control and the waiting line: which requests are admitted, wait, or are refused."""

import asyncio
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry, generate_latest

from sale.api import admit as admit_module
from sale.api import member, public
from sale.api.admit import WAITING, Admission
from sale.api.calls import Call
from sale.api.dispatch import add_routes
from sale.api.request import ENGINE
from sale.domain.problem import Problem, Refused
from sale.host.metrics_server import _Snapshot
from sale.http import waiting_line as line_module
from sale.http.overload import (
    ALWAYS_WAIT,
    CALM_S,
    FILES_RESERVE,
    LATE,
    MEASURE_EVERY_S,
    MUST_WAIT,
    QUEUE,
    REFUSALS_AHEAD_S,
    REFUSALS_PER_S,
    RETRY_MAX_S,
    TURN,
    Overload,
    files_allow,
)
from sale.http.routes import Route
from sale.http.waiting_line import WaitingLine
from sale.members.purchase import PurchaseDesk
from sale.metrics import LoadMetrics

TURN_S = 0.05
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def overload(seed: int = 1, **options: Any) -> Overload:
    bounds: dict[str, Any] = {
        "connections_max": 10,
        "turn_max_s": TURN_S,
        "waiting_max": 100,
        "wait_max_s": 1.0,
    }
    return Overload(**(bounds | options), chance=random.Random(seed))


def test_connections_above_the_bound_are_refused() -> None:
    async def judge() -> None:
        admission = overload(connections_max=2)
        assert [admission.take_connection() for _ in range(3)] == [True, True, False]
        assert (admission.connections, admission.shed["connections"]) == (2, 1)
        admission.release_connection()
        assert admission.take_connection()

    asyncio.run(judge())


async def test_request_read_late_in_a_turn_is_refused() -> None:
    admission = overload()
    assert admission.overloaded(100.0) == ""
    assert admission.overloaded(100.0 + TURN_S / 2) == ""
    assert admission.overloaded(100.0 + TURN_S * 1.1) == TURN
    assert admission.turn_is_over(100.0 + TURN_S * 1.1) == TURN
    await asyncio.sleep(0)
    assert admission.overloaded(100.0 + TURN_S * 1.2) == ""


class _Reader(asyncio.Protocol):
    def __init__(self, read: Callable[[], None]) -> None:
        self._read = read

    def data_received(self, data: bytes) -> None:
        self._read()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("requests", [40, 1_500])
def test_all_requests_of_one_poll_are_one_turn(loop: str, requests: int) -> None:
    """The measure needs ``call_soon`` callbacks to run after all reads of a poll."""

    async def judge() -> list[str]:
        admission = overload(waiting_max=0)
        told: list[str] = []
        all_read = asyncio.Event()
        work_s = 2 * TURN_S / requests

        def read() -> None:
            began = time.monotonic()
            told.append(admission.overloaded(began))
            while time.monotonic() < began + work_s:
                pass
            if len(told) == requests:
                all_read.set()

        pairs = [socket.socketpair() for _ in range(requests)]
        running, transports = asyncio.get_running_loop(), []
        for ours, _ in pairs:
            ours.setblocking(False)
            made, _ = await running.create_connection(lambda: _Reader(read), sock=ours)
            transports.append(made)
        await asyncio.sleep(0.01)
        for _, theirs in pairs:
            theirs.send(b"x")
        await asyncio.wait_for(all_read.wait(), 10)
        await asyncio.sleep(0)
        assert admission.overloaded(time.monotonic()) == ""
        for (_, theirs), made in zip(pairs, transports, strict=True):
            made.abort()
            theirs.close()
        await asyncio.sleep(0.01)
        return told

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        told = runner.run(judge())
    admitted = told.index(TURN)
    assert 0 < admitted < requests
    assert set(told[:admitted]) == {""}
    assert set(told[admitted:]) == {TURN}


async def test_purchases_above_the_queue_bound_are_refused() -> None:
    waiting = (95, 99.9, 0)
    admission = overload(waiting=lambda: waiting)
    told = [admission.overloaded(100.0) for _ in range(8)]
    assert told == [""] * 5 + [QUEUE] * 3
    assert not admission.has_room(100.0)
    waiting = (0, 0.0, 0)
    assert admission.has_room(100.0 + MEASURE_EVERY_S)
    assert admission.overloaded(100.0 + MEASURE_EVERY_S) == ""


class _Queue:
    """Purchases that are served at a fixed pace, in place of the batchers' queues."""

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.waits, self.taken, self.now = 0.0, 0.0, 100.0

    def state(self) -> tuple[int, float, int]:
        return int(self.waits), self.now if self.waits >= 1 else 0.0, int(self.taken)

    def step(self, seconds: float) -> None:
        self.now += seconds
        taken = min(self.waits, self.per_s * seconds)
        self.waits, self.taken = self.waits - taken, self.taken + taken


@pytest.mark.parametrize("per_s", [700, 5_000])
@pytest.mark.parametrize("times", [2, 10])
async def test_wait_stays_near_its_bound_under_overload(per_s: int, times: int) -> None:
    """The queue also never runs empty: no refused purchase could have been served in time."""
    queue = _Queue(per_s)
    admission = overload(waiting=queue.state, waiting_max=1_000_000, turn_max_s=0)
    waits, shortest, told = [], float("inf"), Counter[str]()
    for step in range(5_000):
        for _ in range(per_s * times // 1_000):
            reason = admission.overloaded(queue.now)
            told[reason] += 1
            queue.waits += not reason
        waits.append(queue.waits / per_s)
        if step > 1_000:
            shortest = min(shortest, queue.waits)
        queue.step(0.001)
    assert max(waits) < 1.5  # wait_max_s is 1
    assert shortest > 0
    assert set(told) == {"", LATE}


async def test_wait_is_bounded_by_a_falling_pace() -> None:
    queue = _Queue(5_000)
    admission = overload(waiting=queue.state, waiting_max=1_000_000, turn_max_s=0)
    for step in range(8_000):
        queue.per_s = 5_000 if step < 2_000 else 1_000
        for _ in range(10):
            queue.waits += not admission.overloaded(queue.now)
        queue.step(0.001)
    assert 0 < queue.waits / queue.per_s < 1.2


async def test_some_purchases_may_wait_for_a_stalled_store() -> None:
    queue = _Queue(0)
    admission = overload(waiting=queue.state, waiting_max=1_000_000, turn_max_s=0)
    told = Counter[str]()
    for _ in range(1_000):
        reason = admission.overloaded(queue.now)
        told[reason] += 1
        queue.waits += not reason
        queue.step(0.001)
    assert told == {"": ALWAYS_WAIT, LATE: 1_000 - ALWAYS_WAIT}
    assert admission.turn_is_over(queue.now) == ""


async def test_pace_is_measured_anew_after_a_campaign_is_gone() -> None:
    waiting = (2_000, 99.0, 50_000)
    admission = overload(waiting=lambda: waiting, waiting_max=0, turn_max_s=0)
    admission.overloaded(100.0)
    waiting = (2_000, 99.0, 10)
    assert admission.overloaded(101.0) == ""


async def test_bounds_of_zero_refuse_nothing() -> None:
    admission = overload(turn_max_s=0, waiting_max=0, wait_max_s=0, waiting=lambda: (10**9, 1.0, 0))
    assert [admission.overloaded(now) for now in (100.0, 200.0, 300.0)] == [""] * 3


async def test_retry_after_spreads_wider_as_overload_lasts() -> None:
    admission = overload()
    first = [admission.refuse(TURN, 100.0) for _ in range(500)]
    assert set(first) == {1, 2, 3, 4, 5}
    assert min(first.count(wait_s) for wait_s in set(first)) > 50
    later = [admission.retry_after(100.0 + step * 0.02) for step in range(1_000)]
    assert max(later) > 10
    for step in range(5_000):
        assert 1 <= admission.retry_after(120.0 + step * 0.02) <= RETRY_MAX_S
    calm = [admission.retry_after(300.0 + CALM_S) for _ in range(100)]
    assert max(calm) <= 5
    assert admission.shed[TURN] == 500
    assert [overload().refuse(TURN, 1.0) for _ in range(3)] == [first[0]] * 3


def _refused_in(admission: Overload, began: float, seconds: float) -> int:
    now, told = began, 0
    while now < began + seconds:
        while admission.may_refuse(now):
            admission.refuse(LATE, now)
            told += 1
        now += 0.01
    return told


async def test_purchase_waits_if_refusals_would_cost_sales() -> None:
    admission, (least, most) = overload(), REFUSALS_PER_S
    cheap = _refused_in(admission, 100.0, 2.0)
    assert abs(cheap - (2.0 + REFUSALS_AHEAD_S) * least) <= 0.02 * least
    for _ in range(100):
        admission.adapt_refusals(time_left=True)
    assert abs(_refused_in(admission, 200.0, 1.0) - (1.0 + REFUSALS_AHEAD_S) * most) <= 0.02 * most
    for _ in range(100):
        admission.adapt_refusals(time_left=False)
    assert admission.refusals_per_s == least


class _Waiter:
    lost = False

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def called(self, since: float) -> None:
        self._call()


async def test_waiters_are_called_in_order_while_there_is_room() -> None:
    waiting = (0, 0.0, 0)
    admission = overload(waiting=lambda: waiting, waiting_max=10)
    waiting_line, seen = WaitingLine(admission), []

    def look(number: int) -> None:
        now = time.monotonic()
        reason = admission.overloaded(now)
        seen.append((number, reason))
        if reason:
            admission.refuse(reason, now)

    waiting = (10, time.monotonic(), 0)
    for number in range(3_000):
        waiting_line.join(_Waiter(lambda number=number: look(number)), time.monotonic())
    assert not seen
    await asyncio.sleep(0.05)
    told, asked = len(seen), len(waiting_line)
    assert 0 < told < 3_000
    assert told + asked == 3_000
    assert {reason for _, reason in seen} == {QUEUE}
    waiting = (0, 0.0, 0)
    admission._measure_at = 0.0
    await asyncio.sleep(0.05)
    assert "" in {reason for _, reason in seen[told:]}
    assert [number for number, _ in seen] == list(range(len(seen)))
    waiting_line.close()


async def test_waiter_over_its_time_is_called_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "WAIT_S", 0.05)
    waiting = (10, time.monotonic(), 0)
    admission = overload(waiting=lambda: waiting, waiting_max=10)
    admission._refusals_due = time.monotonic() + 60
    waiting_line, called = WaitingLine(admission), asyncio.Event()
    began = time.monotonic()
    waiting_line.join(_Waiter(called.set), began)
    await asyncio.wait_for(called.wait(), 5)
    assert time.monotonic() - began >= 0.05
    assert not len(waiting_line)
    waiting_line.close()


async def test_failing_waiter_does_not_stop_the_others() -> None:
    waiting_line, called, told = WaitingLine(overload()), asyncio.Event(), []

    def broken() -> None:
        raise RuntimeError("a bug")

    asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
    for then in (broken, called.set):
        waiting_line.join(_Waiter(then), time.monotonic())
    await asyncio.wait_for(called.wait(), 5)
    assert len(told) == 1
    assert waiting_line._calling is None
    waiting_line.close()


class _Desk:
    """A purchase desk that answers "sold out" to every admitted purchase."""

    def __init__(self, admission: Overload) -> None:
        self._overload = admission
        self.asked: list[str] = []
        self.waited_s: list[float] = []
        self.called = 0

    def admit(self, now: float, *, called: bool = False) -> int:
        self.called += called
        desk: Any = self
        return PurchaseDesk.admit(desk, now, called=called)

    async def purchase(self, *asked: Any, waited_s: float) -> Refused:
        self.asked.append(asked[3])
        self.waited_s.append(waited_s)
        return Refused(Problem.SOLD_OUT, remaining=0)

    def count_refused(self, *_: Any) -> None: ...


@dataclass
class _Beyond:
    """Purchases served by aiohttp while there is neither room nor time for refusals."""

    client: TestClient[Any, Any]
    admission: Overload
    desk: Any
    waiting_line: WaitingLine
    waiting: tuple[int, float, int]

    def make_room(self, *, room: bool = True) -> None:
        waits = 0 if room else 10
        self.waiting, self.admission._measure_at = (waits, time.monotonic() * waits, 0), 0.0

    async def buy(self, key: str) -> tuple[int, str, str]:
        """Give the status and the headers Retry-After and Connection."""
        path = "/api/v1/campaigns/films/orders"
        headers = {"Idempotency-Key": key}
        async with self.client.post(path, json={"quantity": 1}, headers=headers) as told:
            await told.read()
            said = told.headers.get("Connection", "")
            return told.status, told.headers.get("Retry-After", ""), said

    async def waiters(self, *keys: str) -> list["asyncio.Task[tuple[int, str, str]]"]:
        """Send purchases that join the waiting line, in this order."""
        tasks = []
        for number, key in enumerate(keys, start=len(self.waiting_line) + 1):
            tasks.append(asyncio.create_task(self.buy(key)))
            async with asyncio.timeout(5):
                while len(self.waiting_line) < number:  # noqa: ASYNC110 - it has no event of its own
                    await asyncio.sleep(0.001)
        return tasks


class _Server(TestServer):
    """A server that does not cancel a handler when its client disconnects, as ours does not."""

    async def _make_runner(self, **options: Any) -> web.AppRunner:
        return web.AppRunner(self.app, **options | {"handler_cancellation": False})


@pytest.fixture
async def beyond() -> AsyncIterator[_Beyond]:
    admission = overload(waiting=lambda: made.waiting, waiting_max=10)
    admission._refusals_due = time.monotonic() + 60
    waiting_line, app = WaitingLine(admission), web.Application()
    desk: Any = _Desk(admission)
    engine: Any = SimpleNamespace(overload=admission, desk=desk)
    app[ENGINE] = engine
    app[WAITING] = Admission(desk, waiting_line)
    add_routes(app, member.ROUTES)
    async with TestClient(_Server(app)) as client:
        made = _Beyond(client, admission, desk, waiting_line, (10, time.monotonic(), 0))
        yield made
        waiting_line.close()


async def test_aiohttp_purchase_waits_without_room_or_refusals(beyond: _Beyond) -> None:
    tasks = await beyond.waiters("a", "b", "c")
    await asyncio.sleep(0.05)
    assert beyond.admission.waiters == 3
    assert not any(task.done() for task in tasks)
    beyond.make_room()
    assert [told[0] for told in await asyncio.gather(*tasks)] == [409] * 3
    assert beyond.desk.asked == ["a", "b", "c"]
    assert min(beyond.desk.waited_s) >= 0.05
    assert (await beyond.buy("d"))[0] == 409
    assert beyond.desk.waited_s[3] == 0
    assert not beyond.admission.shed.total()


async def test_aiohttp_purchase_does_not_overtake_the_line(beyond: _Beyond) -> None:
    seen: list[list[str]] = []
    beyond.waiting_line.join(
        _Waiter(lambda: seen.append(list(beyond.desk.asked))), time.monotonic()
    )
    (task,) = await beyond.waiters("a")
    beyond.make_room()
    admission = Admission(beyond.desk, beyond.waiting_line)
    assert admission.admit(time.monotonic()) == MUST_WAIT
    assert (await task)[0] == 409
    assert (seen, beyond.desk.asked) == ([[]], ["a"])
    assert admission.admit(time.monotonic()) == 0


async def test_aiohttp_purchase_is_refused_after_its_wait(
    beyond: _Beyond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "WAIT_S", 0.05)
    began = time.monotonic()
    for task in await beyond.waiters("a", "b"):
        status, wait_s, said = await task
        assert (status, said) == (503, "")
        assert 1 <= int(wait_s) <= RETRY_MAX_S
    assert time.monotonic() - began >= 0.05
    assert beyond.admission.shed[QUEUE] == 2
    assert beyond.desk.asked == []


async def test_stop_empties_the_line_of_aiohttp_purchases(beyond: _Beyond) -> None:
    tasks = await beyond.waiters("a", "b")
    beyond.waiting_line.emptying = True
    async with asyncio.timeout(2):
        assert [told[0] for told in await asyncio.gather(*tasks)] == [503] * 2


async def test_aiohttp_waiters_above_the_bound_are_closed(
    beyond: _Beyond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admit_module, "WAITERS_MAX", 2)
    tasks = await beyond.waiters("a", "b")
    status, wait_s, said = await beyond.buy("c")
    assert (status, said) == (503, "close")
    assert int(wait_s) >= 1
    assert beyond.admission.shed.total() == 1
    beyond.make_room()
    assert [told[0] for told in await asyncio.gather(*tasks)] == [409] * 2
    beyond.make_room(room=False)
    tasks = await beyond.waiters("d", "e")
    beyond.make_room()
    assert [told[0] for told in await asyncio.gather(*tasks)] == [409] * 2


async def test_client_that_leaves_the_line_buys_nothing(beyond: _Beyond) -> None:
    gone, stays = await beyond.waiters("a", "b")
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await asyncio.sleep(0.05)
    beyond.make_room()
    assert (await stays)[0] == 409
    assert (beyond.desk.asked, beyond.desk.called) == (["b"], 1)


def test_connections_stay_below_the_limit_of_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1_000), hard))
        assert files_allow(100) == 100
        allowed = files_allow(2_000_000)
        now_soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert allowed <= now_soft - FILES_RESERVE
        assert now_soft == min(hard, 2_000_000 + FILES_RESERVE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def overrun() -> tuple[web.Application, Overload]:
    """An application whose turn is always over."""
    admission = overload()
    admission._in_turn, admission._turn_ends = True, 0.0
    app = web.Application()
    stores = SimpleNamespace(redis=None, pool=None, settings=None)
    engine: Any = SimpleNamespace(
        overload=admission, batchers=SimpleNamespace(halted="stopping"), stores=stores
    )
    app[ENGINE] = engine
    return app, admission


async def test_overload_answers_503_and_health_still_answers(
    overrun: tuple[web.Application, Overload],
) -> None:
    app, admission = overrun

    async def handler(_: Call[None]) -> web.Response:
        return web.Response(text="served")

    add_routes(app, [*public.ROUTES, Route(method="GET", path="/page", handler=handler)])
    async with TestClient(TestServer(app)) as client:
        waits = set()
        for _ in range(40):
            async with client.get("/page") as told:
                assert told.status == 503
                assert (await told.json())["code"] == "overloaded"
                waits.add(int(told.headers["Retry-After"]))
        async with client.get("/healthz") as told:
            assert told.status == 200
    assert len(waits) > 2
    assert admission.shed[TURN] == 40


async def test_load_metrics_are_shown_and_add_up() -> None:
    admission = overload()
    admission.take_connection()
    admission.refuse(TURN, 1.0)
    registry = CollectorRegistry()
    registry.register(
        LoadMetrics(
            lambda: admission.connections, lambda: {"films": 7}, admission.shed, {"card": 3}
        )
    )
    text = generate_latest(registry).decode()
    assert "sale_connections 1.0" in text
    assert 'sale_purchases_waiting{campaign="films"} 7.0' in text
    assert 'sale_shed_total{reason="turn"} 1.0' in text
    assert 'sale_shed_total{reason="queue"} 0.0' in text
    assert 'sale_rate_limited_total{scope="card"} 3.0' in text
    two = _Snapshot()
    two.add(_Snapshot.parse(text), gauges=True)
    two.add(_Snapshot.parse(text), gauges=True)
    assert "sale_connections 2.0" in two.text()
    assert 'sale_purchases_waiting{campaign="films"} 14.0' in two.text()
