"""The fast path answers as aiohttp does, and one connection may mix both.

Each request of ``fast_path_requests`` goes through an API process with the fast path and one
without, over real sockets and on both event loops; what comes back must be the same but for
``MEANT``. Some thousands more are made of them by ``test_fast_path_conformance.py``.
"""

import asyncio
import gzip
import itertools
import logging
import re
import time
from typing import Any
from unittest import mock

import structlog
from aiohttp.log import server_logger
from fast_path_client import Answer, Exchange, in_turn
from fast_path_fixtures import BOTH_LOOPS, campaigns, revoked, world_fixture  # noqa: F401 - fixtures
from fast_path_requests import Case, all_cases
from fast_path_rig import TIME, WISH, Side, World, shorter
from waiting import until

from sale.api import authenticate
from sale.members.purchase import PurchaseDesk
from sale.members.rate import Rate, _Buckets
from sale.stock import catalogue
from sale.stock.catalogue import read_campaign

AT_ONCE = 48
TRIES = 5

MEANT: dict[str, str] = {}
"""Requests that the two paths answer differently, and the reason."""


def cases_for(world: World) -> list[Case]:
    """The same requests, from a card of their own."""
    service = world.service
    expired = service.token(7, now_s=1_600_000_000)
    return all_cases(
        world.member(), revoked=world.revoked, expired=expired, operator=service.admin_token
    )


async def alone(world: World, side: Side) -> dict[str, Exchange]:
    """Send each request on a connection of its own."""
    cases = cases_for(world)
    told = await in_turn(
        [side.ask(*case.pieces, count=case.count, heads=case.heads) for case in cases], AT_ONCE
    )
    return {case.name: each for case, each in zip(cases, told, strict=True)}


# Both alike.


@BOTH_LOOPS
def test_both_paths_answer_every_request_alike(world: World) -> None:
    async def judge() -> tuple[dict[str, Exchange], dict[str, Exchange]]:
        async with world.both() as (fast_path, aiohttp):
            ours, theirs = await alone(world, fast_path), await alone(world, aiohttp)
            # All purchases are counted, and told apart by their outcomes.
            assert fast_path.engine.metrics.outcomes == aiohttp.engine.metrics.outcomes
            return ours, theirs

    with shorter():
        ours, theirs = world.run(judge())

    unlike = {
        name: (told.alike(), theirs[name].alike())
        for name, told in ours.items()
        if told.alike() != theirs[name].alike()
    }
    assert unlike.keys() == MEANT.keys(), unlike
    for name, told in ours.items():
        for answer in told.answers:
            if ("Connection", "close") not in answer.headers or answer.body != {"status": "ok"}:
                _check_answer(name, answer)
    assert {"HTTP/1.1 201 Created", "HTTP/1.1 409 Conflict"} <= {
        told.answers[0].status for told in ours.values() if told.answers
    }


def _check_answer(name: str, answer: Answer) -> None:
    """Check the properties of every answer."""
    headers, status = dict(answer.headers), int(answer.status.split()[1])
    kind, _, what = name.partition(": ")
    if status >= 400 and answer.body:
        assert headers["Content-Type"] == "application/problem+json", name
        assert (answer.body["status"], answer.body["type"]) == (
            status, f"/problems/{answer.body['code']}",
        )  # fmt: skip
    given = headers.get("X-Request-Id")
    taken = {
        "head: id": "5f0c-A.b:c=+/@_", "head: id, long": "a" * 128,
        "read: an id": "5f0c", "read/availability: an id": "5f0c",
    }  # fmt: skip
    assert given == taken.get(name, "…") or answer.interim, name
    if kind == "once":
        assert (status, answer.body["code"]) == (400, "invalid-request"), name
        assert answer.body["field"] == what.partition(",")[0], name
    if kind == "expect" and "-Continue" not in what:
        assert (status, answer.body["field"]) == (400, "Expect"), name
    if kind == "version" and what not in {"b'HTTP/1.0'", "1.0 kept alive"}:
        assert status == 400, name
    if name in {"type: well packed", "type: packed by b'br'"}:
        assert status == 415, name


@BOTH_LOOPS
def test_purchases_and_other_requests_share_a_connection(world: World) -> None:
    async def judge() -> None:
        async with world.side(fast_path=True) as side, side.wire() as wire:
            asked = 0

            async def ask(raw: bytes) -> Answer:
                nonlocal asked
                asked += 1
                await wire.send(raw)
                return (await wire.answers(asked)).answers[-1]

            member = world.member()
            assert (await ask(member.buy())).status == "HTTP/1.1 201 Created"
            assert side.connection._delegation is None
            for _ in range(20):
                assert (await ask(TIME)).status == "HTTP/1.1 200 OK"
                inner = side.connection._delegation.handler
                served = inner._request_count
                assert (await ask(world.member().buy())).status == "HTTP/1.1 201 Created"
                assert inner._request_count == served
                assert not side.connection.busy
                assert (await ask(member.buy("sold-out"))).status == "HTTP/1.1 409 Conflict"
                assert side.connection._delegation.handler is inner
            packed = member.buy(
                "sold-out", b"0\r\n\r\n", Transfer_Encoding=b"chunked", drop=["Content-Length"]
            )
            assert (await ask(packed)).status == "HTTP/1.1 400 Bad Request"
            assert side.connection._for_good
            assert (await ask(world.member().buy())).status == "HTTP/1.1 201 Created"
            told = await wire.answers(asked)
            assert (len(told.answers), told.rest, told.closed) == (asked, b"", False)

    world.run(judge())


async def _asked_in_turn(side: Side, requests: list[bytes]) -> list[Any]:
    """The answers to requests on one connection, without the values of Retry-After."""
    async with side.wire() as wire:
        for number, raw in enumerate(requests):
            await wire.send(raw)
            told = await wire.answers(number + 1)
        return [
            (each.status, [_waitless(*header) for header in each.headers], each.body)
            for each in told.answers
        ]


def _waitless(name: str, value: str) -> tuple[str, str]:
    if name == "Retry-After":
        assert 1 <= int(value) <= 60
    return name, "…" if name in {"Retry-After", "RateLimit"} else value


def test_both_paths_charge_rate_limits_alike(world: World) -> None:
    limits = {
        "card_campaign_per_s": 1,
        "card_campaign_burst": 4,
        "card_per_s": 1,
        "card_burst": 6,
        "address_per_s": 1,
        "address_burst": 12,
        "trusted_proxies": "127.0.0.0/8",
    }

    async def judge() -> tuple[list[Any], float]:
        hammering, faulty = world.member(), world.member()
        requests = [hammering.buy("sold-out") for _ in range(6)]
        requests += [hammering.buy("paused") for _ in range(4)]
        requests += [faulty.buy("sold-out", b"{") for _ in range(8)]
        for address in (b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-For: 9.9.9.9, 5.6.7.8"):
            requests += [
                world.member().buy("sold-out", WISH, address, Authorization=b"Bearer x")
                for _ in range(14)
            ]
        async with world.both(**limits) as sides:
            began = time.monotonic()
            return [await _asked_in_turn(side, requests) for side in sides], began

    for _ in range(TRIES):
        (ours, theirs), began = world.run(judge())
        if time.monotonic() - began < 1:  # else a bucket has got one more meanwhile
            break

    assert ours == theirs
    limited = [status.split()[1] == "429" for status, _, _ in ours]
    assert [sum(limited[at:to]) for at, to in ((0, 6), (6, 10), (10, 18), (18, 32), (32, 46))] == [
        *(2, 2, 2, 2, 2)
    ]


def _odd(world: World) -> dict[str, bytes]:
    """Requests that no route sees, or that a parser or an unpacker refuses."""
    member = world.member()
    packed = gzip.compress(WISH)[:-9] + b"garbage"
    return {
        "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: sale\r\n\r\n",
        "connect": b"CONNECT sale:80 HTTP/1.1\r\nHost: sale\r\n\r\n",
        "absolute": b"GET http://sale HTTP/1.1\r\nHost: sale\r\n\r\n",
        "expect": TIME[:-2] + b"Expect: <b>\r\n\r\n",
        "expect, not ASCII": TIME[:-2] + b"Expect: \xff\r\n\r\n",
        "garbage": b"\x16\x03\x01\x02\r\n\r\n",
        "no header": b"GET /nothing HTTP/1.1\r\n\r\n",
        "a header twice": TIME[:-2] + b"Host: sale\r\n\r\n",
        "no version": b"GET /nothing\r\n\r\n",
        "packed": member.buy("open", packed, b"Content-Encoding: gzip", drop=["Authorization"]),
        "a bad chunk": member.buy(
            "open",
            b"zz\r\n",
            drop=["Content-Length", "Authorization"],
            Transfer_Encoding=b"chunked",
        ),
    }


def test_odd_requests_are_charged_to_their_address(world: World) -> None:
    async def judge() -> None:
        limits = {"address_per_s": 1, "address_burst": 3}
        async with world.both(**limits) as sides:
            for side in sides:
                for name, raw in _odd(world).items():
                    side.engine.limits._addresses = _Buckets(Rate(1, 3))
                    told = [(await side.ask(raw)).answers[0] for _ in range(5)]
                    statuses = [int(each.status.split()[1]) for each in told]
                    assert 429 not in statuses[:3], (side.name, name, statuses)
                    assert 429 in statuses[3:], (side.name, name, statuses)
                    assert all(dict(each.headers)["X-Request-Id"] for each in told)

    world.run(judge())


def test_exhausted_card_or_address_costs_the_stores_nothing(world: World) -> None:
    def look(number: int, authorization: bytes) -> bytes:
        head = b"GET /api/v1/campaigns/none-%d HTTP/1.1\r\nHost: sale\r\n" % number
        return head + authorization + b"\r\n\r\n"

    async def judge() -> None:
        limits = {"address_per_s": 1, "address_burst": 3, "card_per_s": 1, "card_burst": 3}
        read = mock.AsyncMock(side_effect=read_campaign)
        token = world.member().token.encode()
        members = b"Authorization: Bearer " + token
        with mock.patch.object(catalogue, "read_campaign", read):
            async with world.side(fast_path=True, **limits) as side:
                asked = itertools.count()  # other campaigns each time: absent ones are remembered
                for who in (b"Accept: */*", b"Authorization: Bearer x", members):
                    side.engine.limits._addresses = _Buckets(Rate(1, 3))
                    read.reset_mock()
                    raw = b"".join(look(next(asked), who) for _ in range(20))
                    told = await side.ask(raw, count=20)
                    assert told.statuses[:3] == [404] * 3
                    assert told.statuses.count(429) >= 15
                    assert 0 < read.await_count <= 5
                looked = mock.AsyncMock()
                with mock.patch.object(authenticate, "authenticate_operator", looked):
                    path = b"GET /api/v1/admin/campaigns HTTP/1.1\r\nHost: sale\r\n"
                    told = await side.ask(path + members + b"\r\n\r\n")
                    assert told.statuses[0] in {403, 429}
                    assert not looked.called

    world.run(judge())


def test_odd_requests_leave_no_line_in_the_log(world: World) -> None:
    """An odd request of 110 bytes once logged 1.7 kB of traceback."""
    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]

    async def judge() -> list[Any]:
        async with world.both() as sides:
            with structlog.testing.capture_logs() as ours:
                for side in sides:
                    for raw in _odd(world).values():
                        answers = (await side.ask(raw)).answers
                        assert answers[0].status.split()[1][0] == "4", answers
                        assert b"<b>" not in answers[0].raw
                return list(ours)

    logging.getLogger().addHandler(handler)
    try:
        with mock.patch.object(server_logger, "disabled", new=False):
            assert world.run(judge()) == []
    finally:
        logging.getLogger().removeHandler(handler)
    assert [each.getMessage() for each in lines if each.levelno >= logging.INFO] == []


def test_faults_are_logged_with_the_name_of_their_request(world: World) -> None:
    async def judge() -> None:
        async with world.both() as sides:
            for side in sides:
                fault = mock.Mock(side_effect=KeyError("a fault of ours"))
                named = (b"X-Request-Id: mine-1",), (b"X-Request-Id: " + b"a" * 129,), ()
                with (
                    mock.patch.object(PurchaseDesk, "check", fault),
                    structlog.testing.capture_logs() as lines,
                ):
                    told = [
                        (await side.ask(world.member().buy("open", WISH, *line))).answers[0]
                        for line in named
                    ]
                logged = [each["request_id"] for each in lines if each["event"] == "request.failed"]
                sent = [re.findall(rb"X-Request-Id: (\S+)", each.raw)[0].decode() for each in told]
                assert logged == sent, side.name
                assert len(set(logged)) == 3
                assert logged[0] == "mine-1"

    world.run(judge())


def test_both_paths_answer_overload_and_lost_stores_alike(world: World) -> None:
    async def judge() -> list[Any]:
        async with world.both(purchase_deadline_ms=300, turn_max_ms=100) as sides:
            told = []
            for side in sides:
                with world.service.stopped("redis"):
                    unavailable = await _asked_in_turn(side, [world.member().buy()])
                admission = side.engine.overload
                admission._measure_at, admission._room = float("inf"), 0  # full, not measured again
                overloaded = await _asked_in_turn(
                    side, [world.member().buy(), world.member().buy()]
                )
                shed = dict(admission.shed)
                admission._measure_at = 0.0
                told.append((unavailable, overloaded, shed))
            return told

    ours, theirs = world.run(judge())

    assert ours == theirs
    assert [each[0][2]["code"] for each in ours[:2]] == ["unavailable", "overloaded"]


def test_purchase_that_waited_past_its_deadline_buys_nothing(world: World) -> None:
    async def judge() -> list[Any]:
        async with world.both(purchase_deadline_ms=300) as sides:
            told = []
            for side in sides:
                member, admission = world.member(), side.engine.overload
                admission._measure_at, admission._room = float("inf"), 0  # full, not measured again
                admission._refusals_due = float("inf")  # and no time to refuse
                asked = asyncio.create_task(_asked_in_turn(side, [member.buy()]))
                await until(lambda: admission.waiters == 1, 5)  # noqa: B023 - awaited here
                await asyncio.sleep(0.4)
                admission._measure_at = 0.0
                answers = await asked
                told.append((answers, await side.orders_of(member)))
            return told

    ours, theirs = world.run(judge())

    assert ours == theirs
    answers, orders = ours
    assert (answers[0][2]["code"], orders) == ("unavailable", 0)
