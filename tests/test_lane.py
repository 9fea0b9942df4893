"""The fast lane answers as aiohttp does, and one connection may mix both.

Each request of ``lane_requests`` goes through an API process with the lane and one without, over
real sockets and on both event loops; what comes back must be the same but for ``MEANT``. Some
thousands more are made of them by ``test_lane_conformance.py``.
"""

import asyncio
import time
from typing import Any

from lane_client import Answer, Told, in_turn, until
from lane_fixtures import BOTH_LOOPS, campaigns, revoked, world_fixture  # noqa: F401 - fixtures
from lane_requests import Case, all_cases
from lane_rig import TIME, WISH, Side, World, shorter

AT_ONCE = 48
TRIES = 5

MEANT: dict[str, str] = {}
"""Requests that the two answer differently, and why that is meant."""


def cases_for(world: World) -> list[Case]:
    """The same cases, as a card of its own sends them."""
    service = world.service
    expired = service.token("110101012345", now_s=1_600_000_000)
    return all_cases(
        world.member(), revoked=world.revoked, expired=expired, operator=service.admin_token
    )


async def alone(world: World, side: Side) -> dict[str, Told]:
    """Each case on a connection of its own."""
    cases = cases_for(world)
    told = await in_turn(
        [side.ask(*case.pieces, count=case.count, heads=case.heads) for case in cases], AT_ONCE
    )
    return {case.name: each for case, each in zip(cases, told, strict=True)}


# Both alike.


@BOTH_LOOPS
def test_given_any_request_then_both_lanes_answer_alike(world: World) -> None:
    async def judge() -> tuple[dict[str, Told], dict[str, Told]]:
        async with world.both() as (lane, aiohttp):
            ours, theirs = await alone(world, lane), await alone(world, aiohttp)
            # All purchases are counted, and told apart by their outcomes.
            assert lane.engine.metrics.outcomes == aiohttp.engine.metrics.outcomes
            return ours, theirs

    with shorter():
        ours, theirs = world.run(judge())

    unlike = {
        name: (told.alike(), theirs[name].alike())
        for name, told in ours.items()
        if told.alike() != theirs[name].alike()
    }
    assert unlike.keys() == MEANT.keys(), unlike
    assert {"HTTP/1.1 201 Created", "HTTP/1.1 409 Conflict"} <= {
        told.answers[0].status for told in ours.values() if told.answers
    }


@BOTH_LOOPS
def test_given_purchases_and_others_on_one_connection_then_each_goes_its_way(world: World) -> None:
    async def judge() -> None:
        async with world.side(fast_lane=True) as side, side.wire() as wire:
            asked = 0

            async def ask(raw: bytes) -> Answer:
                nonlocal asked
                asked += 1
                await wire.send(raw)
                return (await wire.answers(asked)).answers[-1]

            member = world.member()
            assert (await ask(member.buy())).status == "HTTP/1.1 201 Created"
            assert side.connection._inner is None
            for _ in range(20):
                assert (await ask(TIME)).status == "HTTP/1.1 200 OK"
                inner = side.connection._inner
                served = inner._request_count
                assert (await ask(world.member().buy())).status == "HTTP/1.1 201 Created"
                assert inner._request_count == served
                assert not side.connection.busy
                assert (await ask(member.buy("sold-out"))).status == "HTTP/1.1 409 Conflict"
                assert side.connection._inner is inner
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
    """The answers to requests on one connection, without the seconds to wait."""
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


def test_given_limits_then_both_lanes_charge_the_same_and_say_so_alike(world: World) -> None:
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


def test_given_too_much_to_do_or_no_store_then_both_lanes_say_so_alike(world: World) -> None:
    async def judge() -> list[Any]:
        async with world.both(purchase_deadline_ms=300, turn_max_ms=100) as sides:
            told = []
            for side in sides:
                with world.service.stopped("redis"):
                    unavailable = await _asked_in_turn(side, [world.member().buy()])
                door = side.engine.admission
                door._look_at, door._room = float("inf"), 0  # a full house, and no look at it
                overloaded = await _asked_in_turn(
                    side, [world.member().buy(), world.member().buy()]
                )
                shed = dict(door.shed)
                door._look_at = 0.0
                told.append((unavailable, overloaded, shed))
            return told

    ours, theirs = world.run(judge())

    assert ours == theirs
    assert [each[0][2]["code"] for each in ours[:2]] == ["unavailable", "overloaded"]


def test_given_a_purchase_that_stood_past_its_deadline_when_called_then_nothing_is_bought(
    world: World,
) -> None:
    async def judge() -> list[Any]:
        async with world.both(purchase_deadline_ms=300) as sides:
            told = []
            for side in sides:
                member, door = world.member(), side.engine.admission
                door._look_at, door._room = float("inf"), 0  # a full house, and no look at it
                door._refusals_due = float("inf")  # and no time to refuse
                asked = asyncio.create_task(_asked_in_turn(side, [member.buy()]))
                await until(lambda: door.standing == 1, 5)  # noqa: B023 - awaited here
                await asyncio.sleep(0.4)
                door._look_at = 0.0
                answers = await asked
                told.append((answers, await side.orders_of(member)))
            return told

    ours, theirs = world.run(judge())

    assert ours == theirs
    answers, orders = ours
    assert (answers[0][2]["code"], orders) == ("unavailable", 0)
