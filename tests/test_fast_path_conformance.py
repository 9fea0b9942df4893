"""The same few thousand requests through both paths, compared by status, headers and body.

Those of ``fast_path_requests`` and ``fast_path_attacks``, and variants made of them by chance:
other header lines, cut anywhere, with an end behind them, in pipelines. ``SALE_TEST_SEED`` repeats
what chance chose.
"""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
from aiohttp import web
from fast_path_attacks import Attack, attacks
from fast_path_client import UNREADABLE, Exchange, in_turn
from fast_path_fixtures import BOTH_LOOPS, campaigns, revoked, world_fixture  # noqa: F401 - fixtures
from fast_path_requests import Case, one
from fast_path_rig import LAST, TIME, WISH, Side, World, shorter
from fast_path_variants import CHANGES, changed, cut, in_steps
from test_fast_path import AT_ONCE, MEANT, alone, cases_for

Cut = Callable[[bytes, random.Random], list[bytes]]

CUTS: dict[str, Cut] = {
    "in two": lambda raw, rng: cut(raw, 1, rng),
    "in ten": lambda raw, rng: cut(raw, 9, rng),
    "in small pieces": lambda raw, rng: in_steps(raw, 7 if len(raw) < 2_000 else 1_000),
    "in one, with an end behind it": lambda raw, _: [raw],
    "in two, with an end behind it": lambda raw, rng: cut(raw, 1, rng),
}
MANY_PIECES, FEW_AT_ONCE = frozenset({"in ten", "in small pieces"}), 8
ATTACKS = 3
"""How often each attack is tried, cut otherwise each time."""

CHANCE = random.Random(0)
PIPELINES = 4
"""How often all requests are shuffled and sent in pipelines."""


@pytest.fixture
def counted(capsys: pytest.CaptureFixture[str], seed: int) -> Callable[[int, str], None]:
    """Print how many requests went through each path."""

    def say(count: int, what: str) -> None:
        with capsys.disabled():
            print(f"\n{count} {what} through each path, seed {seed}", end="")

    return say


def lingering_shortly() -> AbstractContextManager[Any]:
    """Let aiohttp wait less for the rest of a body behind its answer."""
    defaults: Any = web.RequestHandler.__init__.__kwdefaults__
    assert "lingering_time" in defaults
    return mock.patch.dict(defaults, lingering_time=0.3)


async def told(
    side: Side, case: Case, split: Cut, rng: random.Random = CHANCE, *, ends: bool = False
) -> Exchange:
    """The answers to one case on a connection of its own, request by request."""
    async with side.wire() as wire:
        wire.heads = case.heads
        for number, request in enumerate(case.pieces, 1):
            await wire.send(*split(request, rng))
            if ends and number == len(case.pieces):
                wire.end()
                return await wire.until_closed()
            answers = await wire.answers(number)
        if not answers.closed:
            await wire.send(LAST)
            try:
                answers = await wire.until_closed()
            except TimeoutError:
                pytest.fail(f"{side.name} never closes: {case.name} {answers}")
        return answers


def unlike(ours: dict[str, Exchange], theirs: dict[str, Exchange]) -> dict[str, object]:
    assert ours.keys() == theirs.keys()
    return {
        name: (each.alike(), theirs[name].alike())
        for name, each in ours.items()
        if each.alike() != theirs[name].alike() and name not in MEANT
    }


@pytest.mark.parametrize("how", [*CHANGES, *CUTS])
def test_both_paths_answer_changed_requests_alike(
    world: World, how: str, seed: int, counted: Callable[[int, str], None]
) -> None:
    def whole(raw: bytes, _: random.Random) -> list[bytes]:
        return [raw]

    async def all_told(side: Side) -> dict[str, Exchange]:
        work = {}
        for case in cases_for(world):
            rng = random.Random(f"{seed} {how} {case.name}")
            made = changed(case, how, rng) if how in CHANGES else case
            split = CUTS.get(how, whole)
            work[case.name] = told(side, made, split, rng, ends="an end" in how)
        # A head has a second here, and many pieces take turns with those of the other connections.
        at_once = FEW_AT_ONCE if how in MANY_PIECES else AT_ONCE
        return dict(zip(work, await in_turn([*work.values()], at_once), strict=True))

    async def judge() -> None:
        async with world.both() as (fast_path, aiohttp):
            ours, theirs = await all_told(fast_path), await all_told(aiohttp)
            assert unlike(ours, theirs) == {}
            assert fast_path.engine.metrics.outcomes == aiohttp.engine.metrics.outcomes
            counted(len(ours), f"requests, {how}")

    with shorter(), lingering_shortly():
        world.run(judge())


# At each byte.


def _kept(world: World) -> dict[str, bytes]:
    """Requests behind which the connection goes on, cut after cut."""
    member = world.member()
    plain = member.buy("sold-out")
    rng = random.Random(0)
    return {
        "sold": member.buy(Idempotency_Key=b"one"),
        "refused": plain,
        "wrong": member.buy("sold-out", b'{"quantity":x}'),
        "another's": TIME,
        "unknown": member.buy("unknown"),
        "unusual": changed(one("", plain), "in any case", rng).whole,
        "strange": member.buy(target=b"/api/v1/campaigns/x/%6frders"),
    }


def _last(world: World) -> dict[str, bytes]:
    """Requests that end their connection, or delegate it to aiohttp."""
    member = world.member()
    chunks = b"2\r\n" + WISH[:2] + b"\r\nc;a=b\r\n" + WISH[2:] + b"\r\n0\r\nA: b\r\n\r\n"
    return {
        "chunks": member.buy(
            "sold-out", chunks, drop=["Content-Length"], Transfer_Encoding=b"chunked"
        ),
        "closing": member.buy("sold-out", WISH, b"Connection: close"),
        "a bare CR": member.buy("sold-out", WISH, b"X: y\rZ: a"),
        "two lengths": member.buy("sold-out", WISH, b"Content-Length: 0"),
    }


async def _replayed(side: Side, raw: bytes, cuts: range) -> list[Any]:
    """The answers to a request, whole and then cut at these places, on one connection."""
    async with side.wire() as wire:
        await wire.send(raw)
        await wire.answers(1)
        for number, at in enumerate(cuts, 2):
            await wire.send(raw[:at], raw[at:])
            answers = (await wire.answers(number)).answers
        return [each.told for each in answers]


async def _dribbled(side: Side, raw: bytes) -> list[Any]:
    """The answer to a request that comes byte by byte."""
    async with side.wire() as wire:
        await wire.send(*in_steps(raw, 1))
        return [each.told for each in (await wire.answers(1)).answers]


def test_both_paths_answer_alike_when_cut_at_any_byte(
    world: World, counted: Callable[[int, str], None]
) -> None:
    async def judge_kept(sides: tuple[Side, Side]) -> int:
        count = 0
        for name in _kept(world):
            got = []
            for side in sides:
                raw = _kept(world)[name]
                work = [_replayed(side, raw, range(k, len(raw), 8)) for k in range(1, 9)]
                got.append((await _dribbled(side, raw), *await in_turn(work, 8)))
            assert got[0] == got[1], name
            (first,), *answers = got[0]
            replays = [each for told in answers for each in told]
            assert len(replays) == 8 + len(raw) - 1
            if name == "sold":
                assert all(("Idempotency-Replayed", "true") in each[1] for each in replays)
                assert all(each[2] == first[2] for each in replays)
            else:
                assert all(each == first for each in replays), name
            count += 1 + len(replays)
        return count

    async def judge_last(sides: tuple[Side, Side]) -> int:
        count = 0
        for name in _last(world):
            got = []
            for side in sides:
                raw = _last(world)[name]
                work = [
                    told(side, one(name, raw), lambda whole, _, at=at: [whole[:at], whole[at:]])
                    for at in range(1, len(raw))
                ]
                got.append([each.alike() for each in await in_turn(work, 16)])
            assert got[0] == got[1], name
            assert all(each == got[0][0] for each in got[0]), name
            count += len(got[0])
        return count

    async def judge() -> None:
        async with world.both() as sides:
            counted(await judge_kept(sides) + await judge_last(sides), "requests, cut at each byte")

    with shorter():
        world.run(judge())


# In pipelines.


@BOTH_LOOPS
def test_both_paths_answer_pipelined_requests_as_if_alone(
    world: World, seed: int, counted: Callable[[int, str], None]
) -> None:
    async def one_pipeline(side: Side, cases: list[Case], rng: random.Random) -> list[Any]:
        data = b"".join(case.whole for case in cases) + LAST
        pieces = cut(data, rng.choice([0, 0, 1, 3, 10]), rng)
        async with side.wire() as wire:
            wire.heads = tuple(head for case in cases for head in case.heads)
            await wire.send(*pieces)
            try:
                answers = await wire.until_closed()
            except TimeoutError:
                names, lengths = [case.name for case in cases], [len(piece) for piece in pieces]
                pytest.fail(f"{side.name} never ends: {names} {lengths} {wire.got!r}")
        assert not answers.rest
        return [each.told for each in answers.answers]

    async def all_pipelines(side: Side, closing: set[str]) -> list[tuple[list[Case], list[Any]]]:
        rng, chosen = random.Random(f"{seed} {world.loop_name}"), []
        for number in range(PIPELINES):
            without = closing if number % 2 else set()
            cases = [each for each in cases_for(world) if each.name not in without]
            rng.shuffle(cases)
            while cases:
                count = rng.choice([2, 2, 3, 5, 8, 20])
                chosen.append((cases[:count], random.Random(rng.random())))
                del cases[:count]
        work = [one_pipeline(side, cases, chance) for cases, chance in chosen]
        answers = await in_turn(work, AT_ONCE)
        return [(cases, told) for (cases, _), told in zip(chosen, answers, strict=True)]

    async def judge() -> None:
        async with world.both() as (fast_path, aiohttp):
            expected = await alone(world, fast_path)
            closing = {name for name, told in expected.items() if told.closed}
            ours, theirs = [await all_pipelines(side, closing) for side in (fast_path, aiohttp)]
        for (cases, mine), (same, other) in zip(ours, theirs, strict=True):
            names = [case.name for case in cases]
            assert names == [case.name for case in same]
            wanted = _together(cases, expected)
            last = next((name for name in names if name in closing), "")
            for got in (mine, other):
                by_handler = last.startswith("chunked") and _by_handler(got, wanted)
                assert got == wanted or by_handler, (names, got, wanted)
        whole = sum(len(cases) for cases, _ in ours)
        alike = sum(mine == other for (_, mine), (_, other) in zip(ours, theirs, strict=True))
        counted(whole, f"requests in {len(ours)} pipelines ({alike} answered just alike)")

    with shorter():  # what never ends, and what aiohttp waits for in vain: a chunk it refused
        world.run(judge())


def _by_handler(got: list[Any], wanted: list[Any]) -> bool:
    """Tell whether the handler refuses the unreadable chunk.

    Its head came in a read of its own then; else aiohttp says so, before there is a handler.
    """
    if len(got) != len(wanted) or got[:-1] != wanted[:-1]:
        return False
    if wanted[-1][2]["detail_en"] != UNREADABLE:
        return False
    status, headers, body = got[-1]
    said = body.get("detail", "") if isinstance(body, dict) else ""
    closes = ("Connection", "close") in headers
    return closes and status == "HTTP/1.1 400 Bad Request" and "the body cannot be read" in said


def _together(cases: list[Case], expected: dict[str, Exchange]) -> list[Any]:
    """The answers that a pipeline is worth: all up to one that closes the connection."""
    wanted: list[Any] = []
    for case in cases:
        told = expected[case.name]
        answers = [answer.told for answer in told.answers]
        if not told.closed:
            answers.pop()
        wanted += answers
        if told.closed:
            return wanted
    return [*wanted, expected["time"].answers[-1].told]


# Smuggling.


def test_hidden_purchase_sells_only_where_a_strict_proxy_sees_it(
    world: World, seed: int, counted: Callable[[int, str], None]
) -> None:
    async def all_attacked(side: Side) -> list[tuple[Attack, Exchange]]:
        rng = random.Random(f"{seed} smuggling")
        tried = [attack for _ in range(ATTACKS) for attack in attacks(world.member())]
        work = [_attacked(side, each.raw + LAST, rng.choice([0, 0, 1, 3]), rng) for each in tried]
        return list(zip(tried, await in_turn(work, AT_ONCE), strict=True))

    async def judge() -> None:
        async with world.both() as sides:
            ours, theirs = [await all_attacked(side) for side in sides]
            for (attack, mine), (same, other) in zip(ours, theirs, strict=True):
                assert attack.name == same.name
                assert mine.alike() == other.alike(), attack.name
                for tried, answers in ((attack, mine), (same, other)):
                    sold = await sides[0].orders_of(tried.victim)
                    assert _withstood(tried, answers, sold), (attack.name, answers.statuses, sold)
            counted(len(ours), "attacks")

    with shorter(HEAD_WITHIN_S=0.5, BODY_WITHIN_S=0.5):
        world.run(judge())


def _withstood(attack: Attack, told: Exchange, sold: int) -> bool:
    if attack.requests:
        return len(told.answers) == attack.requests + 1 and sold == attack.requests - 1
    return told.closed and len(told.answers) <= 1 and not sold


async def _attacked(side: Side, raw: bytes, cuts: int, rng: random.Random) -> Exchange:
    """The answers to an attack with a last request behind it, cut at so many places."""
    pieces = cut(raw, cuts, random.Random(rng.random()))
    async with side.wire() as wire:
        await wire.send(*pieces)
        told = await wire.until_closed()
        told.closed = not told.answers or b'{"status":"ok"' not in told.answers[-1].raw
        return told
