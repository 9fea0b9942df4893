"""A client that shuts down its sending side gets its answers, then its connection closes.

The fast path and aiohttp alone must do so alike, and as for a client that stays.
"""

import asyncio
import contextlib
import gzip
import socket
from unittest import mock

import pytest
from aiohttp import web
from fast_path_client import Exchange, Wire, in_turn
from fast_path_fixtures import BOTH_LOOPS, campaigns, revoked, world_fixture  # noqa: F401 - fixtures
from fast_path_rig import TIME, WISH, Side, World, shorter
from test_attack_fast_path import no_room
from waiting import until

from sale.http import aiohttp_handler
from sale.http.aiohttp_handler import LoneHandler

CLOSED_WITHIN_S = 5.0
"""Less than any bound of a connection: it is closed because all is answered."""

PAGE = TIME.replace(b"/api/v1/time", b"/openapi.json")
NOT_YET = "half of what is no head"
"""The fast path refuses it for a client that stays when the head is whole, or its time is over."""


GARBAGE = b"\x16\x03\x01\x02\x00\r\n\r\n"


def _sent(world: World) -> dict[str, tuple[bytes, list[int]]]:
    """Bytes before the end, and the statuses that answer them."""

    def sold() -> bytes:
        return world.member().buy()

    def refused() -> bytes:
        return world.member().buy("sold-out")

    def packed(body: bytes) -> bytes:
        return world.member().buy(
            "sold-out", body, drop=["Content-Length"], Transfer_Encoding=b"chunked"
        )

    def half(raw: bytes) -> bytes:
        return raw[: raw.index(b"\r\n\r\n") + 4 + 5]

    bomb = gzip.compress(bytes(10_000_000))
    bomb = packed(b"%x\r\n" % len(bomb) + bomb + b"\r\n0\r\n\r\n").replace(
        b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n", 1
    )
    in_chunks = packed(b"e\r\n" + WISH + b"\r\n0\r\n\r\n")
    strange = world.member().buy("unknown")
    unread = world.member().buy("sold-out", b"a" * 200_000)
    closing = world.member().buy("sold-out", WISH, b"Connection: close")
    upgrade = world.member().buy("sold-out", WISH, b"Connection: upgrade", b"Upgrade: websocket")
    return {
        "nothing": (b"", []),
        "a purchase": (sold(), [201]),
        "a sold-out purchase": (refused(), [409]),
        "a purchase of nobody knows what": (strange, [404]),
        "a GET": (TIME, [200]),
        "two purchases": (sold() + refused(), [201, 409]),
        "two sold": (sold() + sold(), [201, 201]),
        "a purchase and a GET": (sold() + TIME, [201, 200]),
        "a GET and a purchase": (TIME + sold(), [200, 201]),
        "half a head": (sold()[:60], []),
        "a letter": (b"P", []),
        "half a body": (half(sold()), []),
        "half a strange body": (half(strange), []),
        "a purchase and half a head": (sold() + sold()[:60], [201]),
        "a purchase and half a body": (sold() + half(sold()), [201]),
        "a GET and half a head": (TIME + TIME[:20], [200]),
        "a GET and half a body": (TIME + half(refused()), [200]),
        "chunks": (in_chunks, [409]),
        "chunks and a purchase": (in_chunks + sold(), [409, 201]),
        "half a chunk": (packed(b"e\r\n" + WISH[:5]), []),
        "chunks without an end": (packed(b"e\r\n" + WISH + b"\r\n"), []),
        "a purchase and half a chunk": (sold() + packed(b"e\r\n" + WISH[:5]), [201]),
        "a bad chunk": (packed(b"zz\r\n"), [400]),
        "a purchase and a bomb": (sold() + bomb, [201, 415]),
        "a big body": (unread, [413]),
        "a last request": (closing, [409]),
        "an upgrade": (upgrade, [409]),
        "an upgrade and half a body": (upgrade + half(sold()), [409]),
        "an upgrade and a purchase": (upgrade + sold(), [409, 201]),
        "garbage": (GARBAGE, [400]),
        "a purchase and what is none": (sold() + GARBAGE, [201, 400]),
        NOT_YET: (b"P\x00", [400]),
        "a hundred": (b"".join(refused() + TIME for _ in range(50)), [409, 200] * 50),
        # aiohttp parses 32 and stops, and goes on when it has answered half of them.
        "chunks and a hundred": (
            in_chunks + b"".join(refused() + TIME for _ in range(50)),
            [409] + [409, 200] * 50,
        ),
    }


async def _closed(wire: Wire) -> Exchange:
    await until(wire.closed.is_set, CLOSED_WITHIN_S)
    return await wire.until_closed()


async def _ended(
    side: Side, raw: bytes, *before: bytes, under_way_s: float = 0, answered: int = 0
) -> Exchange:
    """The answers to bytes and an end behind them, after some requests on the same connection."""
    async with side.wire() as wire:
        for number, each in enumerate(before):
            await wire.send(each)
            await wire.answers(number + 1)
        wire.told.clear()
        await wire.send(raw)
        await asyncio.sleep(under_way_s)
        await wire.answers(answered)
        wire.end()
        return await _closed(wire)


async def _stayed(side: Side, raw: bytes, count: int) -> list[object]:
    """The answers to a client that sends the same and stays."""
    async with side.wire() as wire:
        await wire.send(raw)
        return [each.told for each in (await wire.answers(count)).answers[:count]]


@BOTH_LOOPS
@pytest.mark.parametrize(
    "when", ["at once", "on a kept connection", "when it is under way", "when it is answered"]
)
def test_both_paths_answer_a_half_closed_connection_alike(world: World, when: str) -> None:
    before = (world.member().buy("sold-out"), TIME) if when == "on a kept connection" else ()

    async def ask(side: Side) -> tuple[dict[str, Exchange], dict[str, list[object]]]:
        sent = _sent(world)
        with contextlib.ExitStack() as stack:
            late_s = 0.0
            if when == "when it is under way":
                stack.enter_context(world.service.stopped("redis"))
                late_s = 0.15
            work = [
                asyncio.create_task(
                    _ended(side, raw, *before, under_way_s=late_s, answered=len(worth) * answered)
                )
                for name, (raw, worth) in sent.items()
                for answered in (when == "when it is answered" and name != NOT_YET,)
            ]
            await asyncio.sleep(2 * late_s)
        told = dict(zip(sent, await asyncio.gather(*work), strict=True))
        await until(lambda: not side.api._connections)
        sent = _sent(world)
        del sent[NOT_YET]
        usual = await in_turn(
            [_stayed(side, sent[name][0], len(told[name].answers)) for name in sent], 16
        )
        return told, dict(zip(sent, usual, strict=True))

    async def judge() -> None:
        async with world.both() as sides:
            (ours, stayed), (theirs, stayed_there) = [await ask(side) for side in sides]
        for name, (_, worth) in _sent(world).items():
            assert ours[name].statuses == worth, name
            assert ours[name].alike() == theirs[name].alike(), name
            assert not ours[name].rest, name
        for name, usual in stayed.items():
            assert [each.told for each in ours[name].answers] == usual, name
            assert [each.told for each in theirs[name].answers] == stayed_there[name], name

    world.run(judge())


@BOTH_LOOPS
def test_only_whole_requests_are_answered_after_a_cut(world: World) -> None:
    async def judge() -> None:
        raw, other = world.member().buy("sold-out"), TIME
        async with world.both() as sides:
            for side in sides:
                cut = [raw[:at] for at in range(len(raw))]
                assert all(not each.answers for each in await _each(side, cut))
                cut = [other + raw + other[:at] for at in range(len(other))]
                assert all(each.statuses == [200, 409] for each in await _each(side, cut))

    async def _each(side: Side, sent: list[bytes]) -> list[Exchange]:
        return await in_turn([_ended(side, each) for each in sent], 32)

    world.run(judge())


def test_half_closed_waiter_is_refused_and_served_on(world: World) -> None:
    async def judge() -> None:
        async with world.side(fast_path=True) as side:
            with no_room():
                one, two = world.member(), world.member()
                wires = [await side.connect() for _ in range(3)]
                await wires[0].send(one.buy() + TIME + two.buy() + TIME[:9])
                await wires[1].send(one.buy()[:-1])
                await wires[2].send(world.member().buy())
                await until(lambda: len(side.fast_path.waiting_line) == 3)
                for wire in wires[:2]:
                    wire.end()
                told = [await _closed(wire) for wire in wires[:2]]
                assert [each.statuses for each in told] == [[503, 200, 503], []]
                assert told[0].answers[0].body["code"] == "overloaded"
                assert not wires[2].told
            assert (await wires[2].answers(1)).statuses == [201]
            assert not side.fast_path.waiting_line
            assert await side.orders_of(one) == await side.orders_of(two) == 0
            wires[2].transport.abort()

    world.run(judge())


@pytest.mark.parametrize("fast_path", [True, False])
def test_half_closed_waiter_of_aiohttp_buys_nothing(world: World, fast_path: bool) -> None:
    async def judge() -> None:
        async with world.side(fast_path=fast_path) as side:
            leaves, stays = world.member(), world.member()
            with no_room():
                wires = [await side.connect() for _ in range(2)]
                for number, (wire, member) in enumerate(zip(wires, (leaves, stays), strict=True)):
                    await wire.send(
                        member.buy("open", b"e\r\n" + WISH + b"\r\n0\r\n\r\n",
                                   drop=["Content-Length"], Transfer_Encoding=b"chunked")
                    )  # fmt: skip
                    await until(lambda: side.engine.overload.waiters == number + 1)  # noqa: B023
                wires[0].end()
                await asyncio.sleep(0.05)
            assert (await _closed(wires[0])).statuses == [503]
            assert (await wires[1].answers(1)).statuses == [201]
            wires[1].transport.abort()
            assert (await side.orders_of(leaves), await side.orders_of(stays)) == (0, 1)

    world.run(judge())


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_connection_of_a_client_that_reads_nothing_ends(
    world: World, fast_path: bool, ends: bool
) -> None:
    async def judge() -> None:
        async with world.side(fast_path=fast_path) as side:
            for raw in (PAGE * 16, world.member().buy("sold-out") + PAGE * 15):
                async with side.wire(reads=False) as wire:
                    wire.transport.write(raw)
                    if ends:
                        wire.end()
                    await until(lambda: len(side.api._connections) == 1)
                    await until(lambda: not side.api._connections)

    alone = {"ENDED_WITHIN_S": 0.5} if ends else {"UNREAD_WITHIN_S": 0.4}
    with shorter(UNREAD_WITHIN_S=0.4), mock.patch.multiple(aiohttp_handler, **alone):
        world.run(judge())


@BOTH_LOOPS
@pytest.mark.parametrize("resets", [True, False])
def test_order_stands_when_its_client_leaves(world: World, resets: bool) -> None:
    async def judge() -> None:
        async with world.side(fast_path=True) as side:
            members = [world.member() for _ in range(20)]
            wishes = [member.buy(Idempotency_Key=b"one") for member in members]
            wires = [await side.connect() for _ in wishes]
            with world.service.stopped("redis"):
                for wire, wish in zip(wires, wishes, strict=True):
                    wire.transport.write(wish)
                await until(lambda: sum(each.busy for each in side.fast_path.connections) == 20)
                for wire in wires:
                    if resets:
                        sock = wire.transport.get_extra_info("socket")
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *bytes(7)]))
                    wire.transport.abort()
                if resets:
                    await until(lambda: not side.fast_path.connections)
            await until(lambda: not side.fast_path.connections)
            for wish, member in zip(wishes, members, strict=True):
                told = (await side.ask(wish)).answers[0]
                assert told.status == "HTTP/1.1 201 Created"
                assert told.body["card_remaining"] == 2
                assert await side.orders_of(member) == 1

    world.run(judge())


@pytest.mark.parametrize("ends", [True, False])
def test_both_paths_refuse_an_unreadable_later_chunk_and_close(world: World, ends: bool) -> None:
    """aiohttp by itself makes the reader of the body wait for the rest, ten seconds here."""

    async def asked(side: Side, begun: bytes, broken: bytes) -> Exchange:
        async with side.wire() as wire:
            wire.transport.write(begun)
            await until(lambda: any(each.busy for each in side.api._connections))
            await asyncio.sleep(0.02)
            wire.transport.write(broken)
            if ends:
                wire.end()
            return await _closed(wire)

    async def judge() -> None:
        async with world.both() as sides:
            told = []
            for side in sides:
                member = world.member()
                head = member.buy(
                    "open", b"", drop=["Content-Length"], Transfer_Encoding=b"chunked"
                )
                told.append(await asked(side, head, b"zz\r\n"))
                told.append(await asked(side, head + b"e\r\n" + WISH[:9], WISH[9:] + b"\r\nzz\r\n"))
                assert await side.orders_of(member) == 0
                before = b"".join(
                    world.member().buy(
                        "open", b"e\r\n" + WISH + b"\r\n0\r\n\r\n",
                        drop=["Content-Length"], Transfer_Encoding=b"chunked",
                    )
                    for _ in range(3)
                )  # fmt: skip
                told.append(await asked(side, before + head, b"zz\r\n"))
        assert [each.statuses for each in told] == [[400], [400], [201, 201, 201, 400]] * 2
        assert [each.alike() for each in told[:2]] == [each.alike() for each in told[3:5]]
        assert not any(each.rest for each in told)

    world.run(judge())


async def test_lone_aiohttp_handler_ends_as_expected() -> None:
    """At the moments that no client can choose: before it begins, and between two requests."""
    served: list[str] = []

    async def serve(request: web.BaseRequest) -> web.Response:
        await request.read()
        served.append(request.path)
        return web.Response(text="done")

    whole, cut_off = b"GET /%d HTTP/1.1\r\nHost: sale\r\n\r\n", TIME[:20]
    half = b"PUT /half HTTP/1.1\r\nHost: sale\r\nContent-Length: 9\r\n\r\nabc"
    before = asyncio.all_tasks()
    for turns in range(8):
        for count in range(3):
            for rest in (b"", cut_off, half):
                served.clear()
                server = web.Server(serve)  # type: ignore[arg-type]
                handler = LoneHandler(
                    server, refusals=mock.Mock(), draining=lambda: False, overload=mock.Mock()
                )
                transport = mock.Mock()
                transport.is_closing = lambda made=transport: made.close.called
                handler.connection_made(transport)
                for _ in range(turns % 4):
                    await asyncio.sleep(0)
                handler.data_received(b"".join(whole % no for no in range(count)) + rest)
                for _ in range(turns):
                    await asyncio.sleep(0)
                kept = handler.eof_received()
                await until(lambda made=transport: made.close.called)
                assert served == [f"/{no}" for no in range(count)], (turns, count, rest)
                written = b"".join(call.args[0] for call in transport.write.call_args_list)
                written += b"".join(
                    part for call in transport.writelines.call_args_list for part in call.args[0]
                )
                assert written.count(b"HTTP/1.1 200 OK") == count, (turns, count, rest)
                assert kept or handler.transport is None
                handler.connection_lost(None)
                assert handler._end_by is None or handler._end_by.cancelled()
                await until(lambda: asyncio.all_tasks() == before)
