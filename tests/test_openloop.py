"""The open loop: when it sends, from when it counts, what it repeats, what it refuses to tell."""

import asyncio
import contextlib
import dataclasses
import io
import itertools
import math
import multiprocessing
import os
import pickle
import struct
import sys
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import uvloop
from rich.console import Console
from service import Client, Service, free_port

from loadtest.books.answers import Answer
from loadtest.books.check import FINDINGS_MAX
from loadtest.books.ledger import BooksError, count_orders, wait_applied
from loadtest.books.proof import Where, prove
from loadtest.generator import Generator, closed
from loadtest.record import Finding, Proof, Record, RecordError, decode, encode
from loadtest.rush import arrivals
from loadtest.rush import play as plays
from loadtest.rush.__main__ import main, parser, plan_of, remarks, table, verdict
from loadtest.rush.arrivals import ArrivalsError
from loadtest.rush.asks import Asks, AsksError, Load, write_minted
from loadtest.rush.plan import Plan, RushError
from loadtest.rush.play import only_loopback, play
from loadtest.rush.worker import Job, Worker
from loadtest.summary import fill
from loadtest.tally import Bounds, Tally
from loadtest.thresholds import told_outcome
from loadtest.wire import ProtocolError, Unreachable, get_request
from sale.identity import MemberTokens, SigningKey

SOLD = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}"
OVERLOADED = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 21\r\n\r\n"
    b'{"code":"overloaded"}'
)
GONE = b""
SILENT = None


# Arrivals ----------------------------------------------------------------------------------------


def test_constant_arrivals_are_evenly_spaced() -> None:
    made = arrivals.make("constant", 50, 2, seed=1)
    assert len(made) == 100
    assert made[0] == 0
    assert {round(b - a, 9) for a, b in itertools.pairwise(made)} == {0.02}


def test_poisson_arrivals_follow_their_seed() -> None:
    made = arrivals.make("poisson", 1_000, 10, seed=7)
    assert made == arrivals.make("poisson", 1_000, 10, seed=7)
    assert made != arrivals.make("poisson", 1_000, 10, seed=8)
    assert abs(len(made) - 10_000) < 4 * 100
    gaps = [b - a for a, b in itertools.pairwise(made)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert 0.95 < spread / mean < 1.05  # an exponential's deviation is its mean
    assert min(gaps) >= 0


def test_release_arrivals_thin_out() -> None:
    made = arrivals.make("release", 1_000, 10, seed=7)
    assert len(made) == 10_000
    by_second = Counter(int(offset) for offset in made)
    assert by_second[0] > by_second[1] > by_second[3] > by_second[9]
    assert 0.45 < by_second[0] / 10_000 < 0.53


def test_recorded_arrivals_begin_at_their_first_moment(tmp_path: Path) -> None:
    offsets, counted = tmp_path / "offsets", tmp_path / "counted.csv"
    offsets.write_text("12.5\n10\n# a remark\n11\n")
    assert list(arrivals.make(f"file:{offsets}", 0, 0, seed=1)) == [0, 1, 2.5]
    counted.write_text("t,count\n100,3\n101,0\n102,5\n")
    made = arrivals.make(f"file:{counted}", 0, 0, seed=1)
    assert Counter(int(offset) for offset in made) == {0: 3, 2: 5}
    assert made == arrivals.make(f"file:{counted}", 0, 0, seed=1)


@pytest.mark.parametrize(
    ("rows", "within"),
    [
        # Steps of half a second, the last as long as the one before it.
        ("0,40\n0.5,0\n1.0,40\n", [(0, 0.5), (1, 1.5)]),
        ("5,40\n0,40\n", [(0, 5), (5, 10)]),
        ("100,40\n105,40\n106,40\n", [(0, 5), (5, 6), (6, 7)]),
        ("7,40\n", [(0, 1)]),
    ],
)
def test_recorded_counts_are_spread_over_their_step(
    tmp_path: Path, rows: str, within: list[tuple[float, float]]
) -> None:
    (tmp_path / "f").write_text("t,count\n" + rows)
    made = arrivals.recorded(tmp_path / "f", seed=1)
    assert len(made) == 40 * len(within)
    for number, (since, until) in enumerate(within):
        here = made[40 * number : 40 * number + 40]
        assert since <= min(here) < since + 0.25 * (until - since)
        assert until > max(here) > until - 0.25 * (until - since)


@pytest.mark.parametrize("text", ["", "soon\n", "1,2,3\n", "1,-2\n", "nan\n", "1,999999999\n"])
def test_bad_recording_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(ArrivalsError, match="arrivals"):
        arrivals.recorded(tmp_path / "f", seed=1)


@pytest.mark.parametrize("how", [("constant", 0, 1), ("poisson", 1, -1), ("noon", 1, 1)])
def test_impossible_arrivals_are_refused(how: tuple[str, float, float]) -> None:
    with pytest.raises(ArrivalsError):
        arrivals.make(*how, seed=1)


def test_missing_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArrivalsError, match=r"/none: No such file or directory$"):
        arrivals.recorded(tmp_path / "none", seed=1)


# What is asked -----------------------------------------------------------------------------------


def load_of(tokens: Path = Path(), **more: Any) -> Load:
    return Load(address="h:1", campaign="films", tokens=str(tokens), salt="s",
                showings=("a", "b"), order_max=3, **more)  # fmt: skip


def asks_of(tokens: Path, **more: Any) -> Asks:
    return Asks(load_of(tokens, **more))


def test_engine_accepts_minted_tokens(tmp_path: Path) -> None:
    key = SigningKey(b"k" * 32)
    write_minted(tmp_path / "t", key, first=5, count=40)
    assert (tmp_path / "t").stat().st_mode & 0o077 == 0
    with asks_of(tmp_path / "t", quantity=0) as asks:
        assert asks.cards == 40
        wishes = [asks.ask(member) for member in range(120)]
        raws = [asks.raw(member) for member in range(120)]
    assert len({wish.member_no for wish in wishes}) == 40
    assert len({wish.key for wish in wishes}) == 120
    assert {(w.quantity, w.showing) for w in wishes} == {(q, s) for q in (1, 2, 3) for s in "ab"}
    for wish, raw in zip(wishes, raws, strict=True):
        token = raw.partition(b"Bearer ")[2].partition(b"\r\n")[0].decode()
        assert str(MemberTokens(key).verify(token, time.time()).no) == wish.member_no
        assert f"Idempotency-Key: {wish.key}\r\n".encode() in raw
        assert raw.endswith(
            b'{"quantity":%d,"showing":"%s"}' % (wish.quantity, wish.showing.encode())
        )


def test_missing_or_broken_tokens_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t"
    with pytest.raises(AsksError, match="No such file"):
        asks_of(file)
    file.write_text('{"card_no":"6229000000000001","token":"t"}\n')
    with pytest.raises(AsksError, match="2 are wanted"):
        asks_of(file, cards=2)
    file.write_text("nonsense\n")
    with pytest.raises(AsksError, match="line 1"):
        asks_of(file)


def test_duplicate_share_repeats_so_many_requests() -> None:
    load = load_of(duplicate_share=0.2, seed=3)
    made = load.members(10_000)
    assert made == load.members(10_000)
    again = 10_000 - len(set(made))
    assert 1_800 < again < 2_200
    seen = -1
    for member in made:
        assert member >= seen - 50
        seen = max(seen, member)


# The loop against a small server -----------------------------------------------------------------

Reply = Callable[[bytes], Awaitable[bytes | None]]


@contextlib.asynccontextmanager
async def serving(reply: Reply) -> AsyncIterator[str]:
    """A server that answers each GET with what ``reply`` gives; b"" hangs up, None is mute."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                answer = await reply(await reader.readuntil(b"\r\n\r\n"))
                if answer == GONE:
                    break
                if answer is not SILENT:
                    writer.write(answer)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        await asyncio.sleep(0.02)  # its handlers see the end of their connections


async def played(
    reply: Reply, offsets: list[float], bounds: Bounds
) -> tuple[Tally, list[tuple[int, int]]]:
    """Play arrivals of GET /NUMBER; give the tally, and (number, status) of each answer."""
    spooled: list[tuple[int, int]] = []
    async with serving(reply) as address:
        loop = Generator(
            address,
            array("d", offsets),
            lambda number: get_request("h", f"/{number}"),
            lambda number, status, *_: spooled.append((number, status)),
            bounds,
        )
        return await loop.run(time.monotonic() + 0.05), spooled


def outcomes(tally: Tally) -> dict[str, int]:
    return dict(Counter(tally.codes[index] for index in tally.outcome))


async def test_latency_counts_from_the_intended_time() -> None:
    """Two connections, 100 members while nobody is answered: a closed loop would have asked two."""
    started = 0.0

    async def stall(_: bytes) -> bytes:
        nonlocal started
        started = started or time.monotonic()
        await asyncio.sleep(max(started + 0.5 - time.monotonic(), 0))
        return SOLD

    offsets = [n * 0.01 for n in range(100)]
    tally, spooled = await played(stall, offsets, Bounds(connections=2))
    assert outcomes(tally) == {"sold": 100}
    assert len(spooled) == 100
    latency = [done - offset for done, offset in zip(tally.done_at, offsets, strict=True)]
    for number in range(40):  # intended before the stall ended, so each waited for its end
        assert latency[number] >= 0.49 - offsets[number]
    assert sum(each > 0.2 for each in latency) >= 25
    assert tally.connections == 2
    assert tally.pool_waits >= 40


async def test_pool_of_connections_grows_to_its_bound() -> None:
    most = busy = 0

    async def slow(_: bytes) -> bytes:
        nonlocal most, busy
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.05)
        busy -= 1
        return SOLD

    tally, _ = await played(slow, [0.0] * 60, Bounds(connections=12, warm=1))
    assert outcomes(tally) == {"sold": 60}
    assert tally.connections == most == 12


@pytest.mark.load
async def test_uncertain_answers_are_repeated_within_bounds() -> None:
    """/0 is overloaded once, /1 loses its connection, /2 is never answered, /3 is refused."""
    asked: list[tuple[float, bytes]] = []

    async def reply(request: bytes) -> bytes | None:
        path = request.split(b" ")[1]
        before = sum(each == path for _, each in asked)
        asked.append((time.monotonic(), path))
        match path, before:
            case (b"/0", 0):
                return OVERLOADED
            case (b"/1", 0):
                return GONE
            case (b"/2", _):
                return SILENT
            case (b"/3", _):
                return b'HTTP/1.1 409 C\r\nContent-Length: 19\r\n\r\n{"code":"sold-out"}'
        return SOLD

    bounds = Bounds(connections=8, timeout_s=0.5, retries=2, give_up_s=9)
    tally, spooled = await played(reply, [0.0, 0.0, 0.0, 0.0], bounds)
    assert outcomes(tally) == {"sold": 2, "no-answer": 1, "sold-out": 1}
    times = Counter(path for _, path in asked)
    assert times == {b"/0": 2, b"/1": 2, b"/2": 3, b"/3": 1}
    assert Counter(spooled) == Counter({(0, 503): 1, (0, 201): 1, (1, 0): 1, (1, 201): 1,
                                        (2, 0): 3, (3, 409): 1})  # fmt: skip
    first, second = (at for at, path in asked if path == b"/0")
    assert 1.0 <= second - first < 1.8  # Retry-After, and a jitter later
    assert tally.done_at[0] >= 1.0  # the whole attempt counts, from its first intended moment
    assert tally.retries == 4
    assert tally.sent.total() == 8


BALANCER: dict[bytes, bytes] = {
    b"/0": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
    b"/1": b"HTTP/1.1 504 Gateway Time-out\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"/2": b"HTTP/1.0 502 Bad Gateway\r\nConnection: close\r\n\r\n<html>",
    b"/3": b"HTTP/1.1 520 Unknown\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
}


async def test_balancers_5xx_are_asked_again_within_bounds() -> None:
    """Given a balancer that answers once itself, and for /4 always; it ends as an open outcome."""
    seen: Counter[bytes] = Counter()

    async def reply(request: bytes) -> bytes:
        path = request.split(b" ")[1]
        seen[path] += 1
        return BALANCER[b"/0"] if path == b"/4" else BALANCER[path] if seen[path] == 1 else SOLD

    tally, spooled = await played(reply, [0.0] * 5, Bounds(connections=8, retries=2, give_up_s=9))
    assert outcomes(tally) == {"sold": 4, "HTTP 502": 1}
    assert seen == {b"/0": 2, b"/1": 2, b"/2": 2, b"/3": 2, b"/4": 3}
    assert Counter(status for _, status in spooled) == {502: 5, 504: 1, 520: 1, 201: 4}
    assert told_outcome("HTTP 502") == "outcome unknown: HTTP 502, not the engine's answer"


async def test_repeat_without_a_connection_keeps_its_last_answer() -> None:
    """It was our own pool that was full: "no answer" would blame the server."""

    async def reply(request: bytes) -> bytes | None:
        return OVERLOADED if request.split(b" ")[1] == b"/0" else SILENT

    bounds = Bounds(connections=1, timeout_s=2.4, retries=2, give_up_s=2.1)
    tally, spooled = await played(reply, [0.0, 0.1], bounds)
    assert outcomes(tally) == {"overloaded": 1, "no-answer": 1}
    assert spooled == [(0, 503), (1, 0)]


async def test_members_beyond_the_queue_count_as_not_sent() -> None:
    async def slow(_: bytes) -> bytes:
        await asyncio.sleep(0.1)
        return SOLD

    tally, _ = await played(slow, [0.0] * 20, Bounds(connections=1, queue=3))
    assert outcomes(tally) == {"sold": 4, "not-sent": 16}


async def test_open_loop_without_a_server_raises_an_error() -> None:
    loop = Generator(f"127.0.0.1:{free_port()}", array("d", [0.0]), bytes, lambda *_: None)
    with pytest.raises(Unreachable, match="127"):
        await loop.run(time.monotonic())


# The closed loop ---------------------------------------------------------------------------------


async def test_window_bounds_requests_under_way() -> None:
    most = busy = 0
    paths: list[bytes] = []

    async def quick(request: bytes) -> bytes:
        nonlocal most, busy
        busy += 1
        most = max(most, busy)
        paths.append(request.split(b" ")[1])
        await asyncio.sleep(0)
        busy -= 1
        return SOLD

    raws = [get_request("h", f"/{n}") for n in range(500)]
    async with serving(quick) as address:
        tally = await closed(address, raws, 500, 8)
    assert sorted(paths) == sorted(b"/%d" % n for n in range(500))
    assert tally.outcomes() == {"sold": tally.sent.total()} == {"sold": 500}
    assert tally.connections == most == 8
    took_ms = tally.took_ms("sold", sent=True)
    assert len(took_ms) == 500
    assert 0 < sum(took_ms) <= 8 * tally.duration_s * 1e3


async def test_window_sends_nothing_before_the_start() -> None:
    moments: list[float] = []

    async def quick(_: bytes) -> bytes:
        moments.append(time.monotonic())
        return SOLD

    raw = get_request("h", "/")
    async with serving(quick) as address:
        start = time.monotonic() + 0.3
        offsets, bounds = array("d", bytes(8 * 20)), Bounds(connections=4, warm=4, window=True)
        tally = await Generator(address, offsets, lambda _: raw, lambda *_: None, bounds).run(start)
    assert min(moments) >= start
    assert len(moments) == 20
    record = record_of(tally)
    assert (record.offered, record.outcomes) == (20, {"sold": 20})
    assert record.notes == ["a closed loop: its latencies count from sending"]


async def test_end_of_the_requests_ends_a_closed_loop() -> None:
    async def slow(_: bytes) -> bytes:
        await asyncio.sleep(0.02)
        return SOLD

    async with serving(slow) as address:
        tally = await closed(address, lambda n: get_request("h", "/") if n < 10 else b"", 999, 4)
    assert tally.outcomes() == {"sold": 10, "not-sent": 989}
    assert tally.sent.total() == tally.answered.total() == 10


async def test_closed_loop_goes_on_after_lost_connections() -> None:
    seen = 0

    async def cut_every_fifth(_: bytes) -> bytes:
        nonlocal seen
        seen += 1
        return GONE if seen % 5 == 0 else SOLD

    async with serving(cut_every_fifth) as address:
        tally = await closed(address, [get_request("h", "/")] * 50, 50, 4)
    assert tally.outcomes() == {"no-answer": 10, "sold": 40}


async def test_closed_loop_survives_close_and_reports_bad_answers() -> None:
    answers = [
        b"HTTP/1.1 413 Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
    ]

    async def reply(_: bytes) -> bytes:
        return answers[0]

    raws = [get_request("h", "/")] * 10
    async with serving(reply) as address:
        assert (await closed(address, raws, 10, 2)).outcomes() == {"HTTP 413": 10}
        answers.pop(0)
        with pytest.raises(ProtocolError, match="chunked"):
            await closed(address, raws, 10, 2)


async def test_closed_loop_ends_when_the_server_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loadtest.generator.AWAY_S", 0.2)
    server: asyncio.Server

    async def die(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()
        writer.transport.abort()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    with pytest.raises(Unreachable):
        await closed(f"{host}:{port}", [get_request("h", "/")] * 4, 4, 1)


# The record --------------------------------------------------------------------------------------


def tally_of(latencies_ms: list[float], *, late_ms: float = 0.1, cpu: float = 0.2) -> Tally:
    """What a process counted whose members came 100 a second and were all sold."""
    count = len(latencies_ms)
    offsets = array("d", (n / 100 for n in range(count)))
    done = array("d", (at + ms / 1e3 for at, ms in zip(offsets, latencies_ms, strict=True)))
    late = array("f", [late_ms / 1e3]) * count
    sold = array("B", [0]) * count
    tally = Tally(offsets, done, sold, late, lags=array("f", [0.0]), cpu=[cpu] * 5)
    tally.sent[0] = tally.answered[1] = count
    tally.duration_s = done[-1]
    return tally


def record_of(*tallies: Tally) -> Record:
    record = Record(name="r", campaign="films", started_at="2026-01-01T00:00:00Z", duration_s=0)
    fill(record, tallies)
    return record


def at(record: Record, share: float) -> float:
    return next(each.ms for each in record.latency if each.share >= share)


def test_tallies_of_processes_are_added_up() -> None:
    record = record_of(tally_of([10.0] * 300), tally_of([100.0] * 100))
    assert (record.offered, record.sent, record.answered) == (400, 400, 400)
    assert record.outcomes == {"sold": 400}
    assert at(record, 0.74) == pytest.approx(10, rel=0.002)
    assert at(record, 0.76) == pytest.approx(100, rel=0.002)
    assert record.latency == record.latency_sold
    first, second, third = record.seconds[:3]
    assert (first.offered, second.offered, third.offered) == (200, 100, 100)
    assert first.p50_ms == pytest.approx(10)
    assert first.max_ms == pytest.approx(100)
    assert (first.sent, second.answered) == (400, 400)
    assert not record.bottleneck
    assert decode(encode(record)) == record


def test_members_without_an_answer_count_in_latency() -> None:
    count = 100
    done, outcome = array("d", [0.001] * 50 + [math.nan] * 50), array("B", [0] * 50 + [2] * 50)
    late = array("f", [0.0]) * count
    record = record_of(Tally(array("d", [0.0]) * count, done, outcome, late, duration_s=7.0))
    assert record.outcomes == {"sold": 50, "no-answer": 50}
    assert at(record, 0.9) == pytest.approx(7_000, rel=0.002)
    assert record.achieved_rate == pytest.approx(50 / 7)


@pytest.mark.parametrize(
    ("tally", "says"),
    [
        (tally_of([20.0] * 300, late_ms=10), "late at p99"),
        (tally_of([20.0] * 300, cpu=0.99), "used all of its core"),
    ],
)
def test_limited_generator_reports_no_figures(tally: Tally, says: str) -> None:
    record = record_of(tally)
    assert says in record.bottleneck
    assert record.latency == record.latency_sold == []
    assert record.achieved_rate == 0
    assert {second.p99_ms for second in record.seconds} == {0.0}
    assert {second.answered for second in record.seconds} == {None}
    assert not any(second.outcomes for second in record.seconds)
    assert (record.sent, record.outcomes) == (300, {"sold": 300})
    (why,) = verdict(record, proof_wanted=False)
    assert "the generator itself was the limit" in why


def test_slow_server_excuses_a_little_lateness() -> None:
    assert not record_of(tally_of([200.0] * 300, late_ms=10)).bottleneck
    assert not record_of(tally_of([4.0] * 300, late_ms=2)).bottleneck


def test_small_lateness_is_told_in_a_note() -> None:
    assert record_of(tally_of([20.0] * 300, late_ms=1.9)).notes == []
    record = record_of(tally_of([20.0] * 300, late_ms=4))
    assert not record.bottleneck
    assert [note for note in remarks(record) if "may be 4.0 of the 20.0 ms" in note]


def test_run_of_a_second_tells_what_it_did_not_see() -> None:
    tally = tally_of([20.0] * 100)
    assert record_of(tally).notes == []
    short = dataclasses.replace(tally, cpu=[1.0])
    for tallies in ((short,), (tally, short)):
        (note,) = record_of(*tallies).notes
        assert "short of CPU" in note


def test_older_record_of_a_limited_run_is_withheld() -> None:
    record = record_of(tally_of([20.0] * 300))
    record.bottleneck = "late"
    again = decode(encode(record))
    assert again.latency == again.latency_sold == []
    assert again.achieved_rate == 0
    assert {(each.answered, each.p99_ms) for each in again.seconds} == {(None, 0.0)}


async def test_cpu_before_the_start_does_not_count() -> None:
    async def quick(_: bytes) -> bytes:
        return SOLD

    async with serving(quick) as address:
        loop = Generator(
            address, array("d", [0.0]), lambda _: get_request("h", "/"), lambda *_: None
        )
        tally = await loop.run(time.monotonic() + 1.3)
    assert tally.cpu == []


def test_lateness_p99_is_not_above_its_maximum() -> None:
    tally = tally_of([20.0] * 300)
    plan = record_of(dataclasses.replace(tally, lags=array("f", [0.002] * 9))).plan
    assert plan["generator lateness p99 ms"] == plan["generator lateness max ms"] == 2


async def test_generator_that_is_held_up_finds_itself_late() -> None:
    async def quick(_: bytes) -> bytes:
        return SOLD

    def dawdle(number: int) -> bytes:
        time.sleep(0.01)
        return get_request("h", f"/{number}")

    offsets = array("d", (n / 200 for n in range(60)))
    async with serving(quick) as address:
        loop = Generator(address, offsets, dawdle, lambda *_: None)
        tally = await loop.run(time.monotonic() + 0.05)
    assert "itself was" in record_of(tally).bottleneck


def test_rush_that_sold_next_to_nothing_does_not_count() -> None:
    record = record_of(tally_of([10.0] * 300))
    assert record.not_played == ""
    codes = ["sold", "replayed", "no-answer", "not-sent", "closed"]
    shut = Tally(array("d", [0.0]) * 300, array("d", [0.1] * 300), array("B", [4] * 300),
                 array("f", [0.0] * 300), codes=codes, duration_s=1.0)  # fmt: skip
    none = record_of(shut)
    (why,) = verdict(none, proof_wanted=False)
    assert why.startswith("the rush did not happen: 300 of 300 members could not buy")
    assert decode(encode(none)).not_played == none.not_played


def test_missed_threshold_fails_the_run_and_is_shown() -> None:
    record = Record(name="r", campaign="c", started_at="2026-01-01T00:00:00Z", duration_s=0)
    fill(record, [tally_of([10.0] * 300)], ("p99>9ms", "errors>0%"))
    assert verdict(record, proof_wanted=False) == ["threshold missed: p99>9ms: it was 10.0 ms"]
    console = Console(file=io.StringIO(), width=116)
    console.print(table(record))
    assert "10.0 ms, missed" in (said := str(console.file.getvalue()))
    assert "0.000%, met" in said
    assert decode(encode(record)).thresholds == record.thresholds


def test_run_counts_only_with_clean_books() -> None:
    record = record_of(tally_of([10.0] * 10))
    assert verdict(record, proof_wanted=False) == []
    assert "not proved" in verdict(record, proof_wanted=True)[0]
    record.proof = Proof(clean=True)
    assert verdict(record, proof_wanted=True) == []
    record.proof = Proof(clean=False, findings=[Finding("lost", "order x")])
    assert "do not balance: 1 finding" in verdict(record, proof_wanted=True)[0]
    record.proof.findings *= FINDINGS_MAX
    assert "do not balance: 1,000 or more findings" in verdict(record, proof_wanted=True)[0]
    assert table(record).row_count > 10
    record.plan |= {"connections": 5, "waited for a connection": 9}
    assert "all 5 were taken" in remarks(record)[0]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b'{"name":"r"}',
        encode(record_of(tally_of([1.0]))).replace(b'"version": 1', b'"version": 9'),
    ],
)
def test_bytes_that_are_no_record_are_refused(raw: bytes) -> None:
    with pytest.raises(RecordError, match="record"):
        decode(raw)


# The command line and a whole run ----------------------------------------------------------------


def test_command_line_gives_a_plan_or_a_reason() -> None:
    must = ["--target", "http://127.0.0.1:8080/", "--campaign", "films"]

    def plan(*more: str) -> Plan:
        return plan_of(parser().parse_args([*must, *more]))

    made = plan("--rate", "5", "--give-up", "3", "--data-dir", "d", "--at-opening", "--no-proof")
    assert (made.target, made.rate, made.give_up_s) == ("127.0.0.1:8080", 5, 3)
    assert made.at_opening
    assert not made.proof
    assert made.books == Where(data_dir="d")
    assert "d" not in made.told().values()
    assert made.name == "poisson, 5/s, 10 s"
    for option, value in (
        *(("duplicate-share", "1"), ("retries", "-1"), ("timeout", "0"), ("rate", "-5")),
        *(("rate", "inf"), ("cards", "-3"), ("warm", "-1"), ("ledger-within", "-1")),
    ):
        with pytest.raises(ValueError, match=f"--{option} {value}: from"):
            plan(f"--{option}", value)
    with pytest.raises(ValueError, match=r"--first-card 6\.222e\+15: from 0 and below 9e\+07"):
        plan("--first-card", "6222000000000001")  # a card's whole number
    with pytest.raises(ValueError, match="--redis-url: give --database-url"):
        plan("--redis-url", "redis://127.0.0.1:1")
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        plan("--target", "127.0.0.1:8080")
    assert only_loopback("127.0.0.1:1") == only_loopback("[::1]:1") == ""
    assert only_loopback("192.0.2.7:80") == "192.0.2.7 is not a loopback address"


def test_rush_without_books_is_refused_as_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--target", f"http://127.0.0.1:{free_port()}", "--campaign", "x", "--cards", "3"]
    for more, says in (
        ([], "rush: error: nothing to compare the answers with, so nothing was sold: give"),
        (["--unproved", "--fail-if", "p98>1s"], "no figure 'p98'; there are p50, "),
        (["--data-dir", "d", "--fail-if", "p99>1s,errors>x"], "'errors>x': "),
    ):
        monkeypatch.setattr("sys.argv", ["rush", *words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert says in capsys.readouterr().err


def test_books_are_found_by_the_engines_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    must = ["--target", "http://127.0.0.1:8080/", "--campaign", "films"]
    monkeypatch.setenv("SALE_DATABASE_URL", "postgresql://x@127.0.0.1/x")
    monkeypatch.setenv("SALE_DURABILITY", "relaxed")
    assert plan_of(parser().parse_args(must)).books == Where(
        database_url="postgresql://x@127.0.0.1/x"
    )
    file = tmp_path / "s.toml"
    file.write_text('data_dir = "there"\nredis_url = "redis://127.0.0.1:1"\n')
    books = plan_of(parser().parse_args([*must, "--config", str(file)])).books
    assert (books.data_dir, books.redis_url) == ("there", "redis://127.0.0.1:1")
    told = books.settings()
    assert told is not None
    assert (told["SALE_DURABILITY"], told["SALE_DATA_DIR"]) == ("relaxed", str(tmp_path / "there"))


def test_word_in_pieces_is_read_whole_under_uvloop() -> None:
    """uvloop makes the pipe non-blocking; a tally of many members comes in pieces."""
    ours, theirs = multiprocessing.Pipe()
    worker, word = Worker.__new__(Worker), pickle.dumps("late")
    worker.name, worker._pipe = "generator-1", ours
    raw = struct.pack("!i", len(word)) + word

    def send() -> None:
        os.write(theirs.fileno(), raw[:-2])
        time.sleep(0.2)
        os.write(theirs.fileno(), raw[-2:])

    with ThreadPoolExecutor(2) as threads, ours, theirs:
        sent = threads.submit(send)
        with pytest.raises(RushError, match=r"^late$"):
            threads.submit(lambda: uvloop.run(worker.hear(20))).result()
        sent.result()


@pytest.mark.load
async def test_generators_end_with_a_process_that_is_killed(
    service: Service, client: Client, tmp_path: Path
) -> None:
    campaign = await client.campaign(10_000)
    words = ["--target", service.url, "--campaign", campaign, "--data-dir", str(service.data_dir)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "rush", *words, "--rate", "20", "--seconds", "60"),
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    while b"offered" not in await process.stderr.readline():
        pass
    children = psutil.Process(process.pid).children()
    process.kill()
    await process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert len(children) >= 1
    assert not alive


def small(service: Service, campaign: str, **changes: object) -> Plan:
    books = Where(data_dir=str(service.data_dir))
    plan = Plan(target=service.url.removeprefix("http://"), campaign=campaign, books=books,
                rate=300, seconds=1, alone=True, connections=40)  # fmt: skip
    return msgspec.structs.replace(plan, **changes)


@pytest.mark.load
async def test_two_processes_rush_a_real_engine_with_proof(
    service: Service, client: Client
) -> None:
    campaign = await client.campaign(200)
    plan = small(service, campaign, processes=2, quantity=0, duplicate_share=0.2, first_card=9_000)
    record = await play(plan)
    record.bottleneck = ""  # a busy machine may well make the generator late
    assert not verdict(record, proof_wanted=True), record
    assert record.proof is not None
    assert record.proof.audit_clean
    assert record.proof.tickets == 200
    assert set(record.outcomes) == {"sold", "replayed", "sold-out"}
    assert record.proof.orders >= record.outcomes["sold"] > 0
    assert record.offered == record.sent == record.answered == sum(record.outcomes.values())
    assert sum(second.offered for second in record.seconds) == record.offered
    assert {"generator-1", "generator-2", "serve-1"} <= set(record.samples[-1].processes)
    assert record.settings
    assert record.versions["redis server"]


@pytest.mark.load
async def test_answer_that_the_books_lack_fails_the_run(
    service: Service, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sold answer is kept back and another doctored: both must be found."""
    campaign = await client.campaign(1_000)
    kept: list[Answer] = []
    real = Job.answers

    def doctored(job: Job) -> list[Answer]:
        first, second, *rest = real(job)
        kept.extend([first, second, *rest])
        return [msgspec.structs.replace(second, told_quantity=7), *rest]

    monkeypatch.setattr(Job, "answers", doctored)
    books = Where(database_url=service.database_url)
    key_file = str(service.data_dir / "signing.key")
    plan = small(service, campaign, rate=100, seconds=0.3, books=books, signing_key_file=key_file)
    record = await play(plan)
    assert record.proof is not None
    assert record.proof.audit_clean is None  # Redis is not known
    assert {finding.kind for finding in record.proof.findings} == {"unasked", "wrong-content"}
    assert "do not balance" in verdict(record, proof_wanted=True)[-1]
    assert (await prove(kept, campaign, books, alone=True)).clean


async def test_impossible_plan_is_refused_with_its_reason(service: Service, client: Client) -> None:
    campaign = await client.campaign(10)
    with pytest.raises(RushError, match="no showing"):
        await play(small(service, campaign, showing="nope"))
    with pytest.raises(RushError, match="quantity 4"):
        await play(small(service, campaign, quantity=4))
    with pytest.raises(RushError, match="no opening to wait for"):
        await play(small(service, campaign, at_opening=True, cards=5))
    with pytest.raises(RushError, match=r"^no campaign nothing-here at 127\.0\.0\.1:"):
        await play(small(service, "nothing-here"))


@pytest.mark.load
async def test_unreachable_books_are_refused_before_the_load(
    service: Service, client: Client
) -> None:
    campaign = await client.campaign(100)
    away = Where(database_url=f"postgresql://x@127.0.0.1:{free_port()}/x")
    key_file = str(service.data_dir / "signing.key")
    plan = small(service, campaign, rate=40, seconds=0.3, alone=False, books=away)
    with pytest.raises(BooksError, match="PostgreSQL: "):
        await play(msgspec.structs.replace(plan, signing_key_file=key_file))
    assert await count_orders(service.database_url, campaign) == 0


async def test_tokens_are_signed_with_the_key_of_the_settings(
    service: Service, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a key file that only the environment names; another key is refused before the load."""
    campaign = await client.campaign(100)
    books = Where(database_url=service.database_url)
    plan = small(service, campaign, rate=40, seconds=0.3, books=books)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SALE_SIGNING_KEY_FILE", str(service.data_dir / "signing.key"))
    record = await play(plan)
    assert record.outcomes == {"sold": record.offered}
    monkeypatch.delenv("SALE_SIGNING_KEY_FILE")
    monkeypatch.setenv("SALE_SIGNING_KEY", "k" * 32)
    with pytest.raises(RushError, match="does not take the tokens"):
        await play(msgspec.structs.replace(plan, alone=False))
    monkeypatch.delenv("SALE_SIGNING_KEY")
    with pytest.raises(RushError, match="no tokens: no signing key at"):
        await play(msgspec.structs.replace(plan, alone=False))


async def test_rush_at_a_closed_campaign_fails(service: Service, client: Client) -> None:
    campaign = await client.campaign(100)
    await client.step(campaign, "close")
    told: list[str] = []
    record = await play(small(service, campaign, rate=40, seconds=0.3), told.append)
    assert f"campaign {campaign} is closed: it refuses everybody" in told
    assert record.outcomes == {"closed": record.offered}
    assert record.proof is not None
    assert record.proof.clean
    record.bottleneck = ""
    (why,) = verdict(record, proof_wanted=True)
    assert "the rush did not happen" in why


async def test_books_of_another_engine_are_refused_before_the_load(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plays, "BOOKS_WITHIN_S", 0.3)
    with pytest.raises(BooksError, match="PostgreSQL does not know campaign elsewhere"):
        await plays._look_at_books(small(service, "elsewhere"))


async def test_run_is_reported_when_its_books_went_away(
    service: Service, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a campaign that has orders since then is nobody's alone."""
    campaign = await client.campaign(100)

    async def gone(*_: object, **__: object) -> None:
        raise BooksError("PostgreSQL: it went away")

    monkeypatch.setattr("loadtest.rush.play.prove", gone)
    record = await play(small(service, campaign, rate=40, seconds=0.3, alone=False))
    assert record.offered == record.outcomes["sold"] > 0
    assert record.proof is None
    assert record.not_proved.startswith("PostgreSQL: ")
    assert f"not proved: {record.not_proved}" in verdict(record, proof_wanted=True)
    assert decode(encode(record)).not_proved == record.not_proved
    await wait_applied(service.database_url, campaign, record.offered)
    with pytest.raises(RushError, match="orders already"):
        await play(small(service, campaign))


def test_unwritable_folder_is_refused_before_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["--target", f"http://127.0.0.1:{free_port()}", "--campaign", "x", "--unproved"]
    monkeypatch.setattr("sys.argv", ["rush", *words, "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"rush: --out {tmp_path}/file/out: Not a directory\n"
