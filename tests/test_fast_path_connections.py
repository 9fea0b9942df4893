"""Connections of the fast path: bounds, time limits, the end of a process."""

import asyncio
import contextlib
import inspect
import re
from collections.abc import Callable
from unittest import mock

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from fast_path_client import Exchange, Wire
from fast_path_fixtures import BOTH_LOOPS, campaigns, revoked, world_fixture  # noqa: F401 - fixtures
from fast_path_rig import TIME, WISH, Member, Side, World, bounds, shorter
from fuzz_fast_path.properties import Counter
from fuzz_fast_path.properties import Wire as FuzzWire
from fuzz_fast_path.sent import ORDERS
from waiting import until

from sale.api.fast_routes import make_fast_path
from sale.http import aiohttp_handler, request_head
from sale.http.aiohttp_handler import Handler, InnerHandler, LoneHandler
from sale.http.bounds import HELD_FREELY, HELD_MAX
from sale.http.connection import Connection
from sale.http.overload import QUEUE
from sale.http.waiting_line import WAIT_S, WaitingLine

READ_MAX = 256 * 1024
"""The most that an event loop reads at once."""

PAGE = TIME.replace(b"/api/v1/time", b"/openapi.json")


def _numbered(member: Member, number: int, *, mixed: bool = True) -> bytes:
    """A request whose answer tells its number; every tenth is aiohttp's, body and all."""
    theirs = mixed and number % 10 == 9
    target = b"/api/v1/campaigns/sold%2dout/orders" if theirs else None
    return member.buy("sold-out", b'{"quantity":1,"n%d":1}' % number, target=target)


async def _stalled(
    side: Side, wire: Wire, asked: bytes, waits: Callable[[Connection], bool]
) -> Connection:
    """Send more than the server handles now; return the connection once it stops reading."""
    wire.transport.write(asked)
    await until(lambda: any(waits(each) for each in side.fast_path.connections))
    connection = side.connection
    await until(lambda: connection._reading_paused)
    seen: list[tuple[int, bool]] = []
    for _ in range(20):
        await asyncio.sleep(0.02)
        seen.append((len(connection._held), connection._transport.is_reading()))
        if len(seen) > 4 and len(set(seen[-4:])) == 1:
            break
    held, reading = seen[-1]
    assert not reading, seen
    assert HELD_MAX < held <= HELD_MAX + READ_MAX < len(asked), seen
    return connection


@BOTH_LOOPS
@pytest.mark.parametrize("mixed", [True, False])
def test_client_that_reads_nothing_loses_nothing_and_is_bounded(world: World, mixed: bool) -> None:
    count = 2_000

    async def judge() -> None:
        member = world.member()
        asked = b"".join(_numbered(member, number, mixed=mixed) for number in range(count))
        async with world.side(fast_path=True) as side, side.wire(reads=False) as wire:
            connection = await _stalled(side, wire, asked, lambda each: each._writing_paused)
            assert connection._transport.get_write_buffer_size() < READ_MAX
            wire.transport.resume_reading()
            told = await wire.answers(count)
            numbers = [int(each.body["field"].removeprefix("n")) for each in told.answers]
            assert numbers == list(range(count))

    world.run(judge())


def test_requests_behind_a_purchase_are_bounded(world: World) -> None:
    member = world.member()
    rest = b"".join(_numbered(member, number) for number in range(1_200))

    async def judge() -> None:
        async with world.side(fast_path=True) as side, side.wire() as wire:
            with world.service.stopped("redis"):
                asked = world.member().buy() + rest
                await _stalled(side, wire, asked, lambda each: each.pending is not None)
            told = await wire.answers(1_201)
            assert told.statuses == [201] + [400] * 1_200

    world.run(judge())


@BOTH_LOOPS
def test_connections_over_the_joint_bound_are_not_read(world: World) -> None:
    bound, whole, half = 100_000, 100, 50

    async def judge() -> None:
        async with world.side(fast_path=True) as side, contextlib.AsyncExitStack() as stack:

            async def connected() -> tuple[Wire, Connection]:
                known = set(side.fast_path.connections)
                wire = await stack.enter_async_context(side.wire())
                await until(lambda: len(side.fast_path.connections) > len(known))
                (connection,) = side.fast_path.connections - known
                return wire, connection

            async def brings(connection: Connection, wire: Wire, *sent: bytes) -> int:
                before = len(connection._held)
                wire.transport.write(b"".join(sent))
                if connection._transport.is_reading():
                    await until(lambda: len(connection._held) > before)
                await asyncio.sleep(0.05)
                assert side.fast_path.held == sum(
                    len(each._held) for each in side.fast_path.connections
                )
                return len(connection._held) - before

            fat = [await connected() for _ in range(5)]
            with world.service.stopped("redis"):
                sizes, rests = [], []
                for wire, each in fat:
                    rest = [_numbered(world.member(), number) for number in range(whole)]
                    rests.append(b"".join(rest[half:]))
                    sizes.append(await brings(each, wire, world.member().buy(), *rest[:half]))
                assert all(HELD_FREELY < size < bound / 3 for size in sizes)
                over = [sum(sizes[: number + 1]) > bound for number in range(5)]
                assert [each._reading_paused for _, each in fat] == over
                for (wire, each), rest, waits in zip(fat, rests, over, strict=True):
                    assert await brings(each, wire, rest) == (0 if waits else len(rest))
                    assert each._reading_paused
                # A connection that holds a request or two is read on; its end frees its bytes.
                wire, small = await connected()
                held = side.fast_path.held
                assert await brings(small, wire, world.member().buy(), TIME)
                assert await brings(small, wire, TIME) == len(TIME)
                assert not small._reading_paused
                wire.transport.abort()
                # So is a connection that waits for the rest of its own body: when there is room.
                late = world.member().buy("sold-out", WISH.ljust(16_000))
                bodies = [await connected() for _ in range(4)]
                for wire, each in bodies:
                    assert await brings(each, wire, late[:9_000])
                    assert each._reading_paused
                assert (
                    side.fast_path.held <= bound + len(fat) * (len(rests[0]) + HELD_FREELY) + 36_000
                )
                assert side.fast_path.unread.keys() == {each for _, each in fat + bodies}
                assert side.fast_path.held > held
            for wire, _ in fat:
                assert (await wire.answers(1 + whole)).statuses == [201] + [400] * whole
            for wire, _ in bodies[1:]:  # the first of them brings nothing
                wire.transport.write(late[9_000:])
                assert (await wire.answers(1)).statuses == [409]
            wire, first = bodies[0]
            await until(lambda: side.fast_path.held == len(first._held) == 9_000)
            wire.transport.abort()
            await until(lambda: first not in side.fast_path.connections)
            assert (side.fast_path.held, side.fast_path.unread) == (0, {})
            assert all(each._transport.is_reading() for each in side.fast_path.connections)

    with bounds(HELD_BY_ALL_MAX=bound):
        world.run(judge())


async def test_silent_connection_keeps_no_other_from_being_read() -> None:
    asked = f"POST {ORDERS} HTTP/1.1\r\nHost: sale\r\nContent-Length: 16000\r\n\r\n".encode()
    counter = Counter(None)
    server = web.Server(counter.serve)  # type: ignore[arg-type]
    with shorter(HELD_BY_ALL_MAX=30_000):
        fast_path = make_fast_path(counter, server, WaitingLine(counter.overload))  # type: ignore[arg-type]
        try:
            wires = []
            for size in (15_000, 9_000, 9_000, 9_000):
                connection = Connection(fast_path)
                wires.append(FuzzWire(connection, full=False))
                connection.connection_made(wires[-1])
                connection.data_received(asked.ljust(size))
            assert [wire.reading for wire in wires] == [True, True, False, False]
            wires[0].close()
            await until(lambda: all(wire.reading for wire in wires), 1)
            assert fast_path.held == 27_000
        finally:
            fast_path.waiting_line.close()
            await fast_path.close()
            await server.shutdown(0)


class _NeverRead(FuzzWire):
    """A transport whose client reads nothing any more, so that closing it waits for ever."""

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)


async def test_unread_answers_behind_half_a_request_end_in_time() -> None:
    """Without an end of the input the connection would wait for us, and no deadline would run."""
    counter = Counter(None)
    server = web.Server(counter.serve)  # type: ignore[arg-type]
    with shorter(UNREAD_WITHIN_S=0.05):
        fast_path = make_fast_path(counter, server, WaitingLine(counter.overload))  # type: ignore[arg-type]
        try:
            connection = Connection(fast_path)
            connection.connection_made(_NeverRead(connection, full=False))
            connection.data_received(TIME[:-2] + b"Content-Length: 9\r\n\r\nabc")
            connection.eof_received()
            await until(lambda: connection.lost, 2)
        finally:
            fast_path.waiting_line.close()
            await fast_path.close()
            await server.shutdown(0)


def test_connections_of_slow_or_idle_clients_end(world: World) -> None:
    bounds = {
        "HEAD_WITHIN_S": 0.3,
        "BODY_WITHIN_S": 0.3,
        "KEEPALIVE_S": 1.5,
        "UNREAD_WITHIN_S": 0.4,
    }
    spare_s = 1.0  # of a busy machine

    async def judge() -> None:
        loop = asyncio.get_running_loop()
        member = world.member()
        purchase, late = member.buy("sold-out"), member.buy("sold-out", WISH.ljust(400))

        async def lasts(side: Side, least_s: float, *first: bytes, drip: bytes = b"") -> Exchange:
            async with side.wire() as wire:
                began = loop.time()
                for number, piece in enumerate(first):
                    await wire.send(piece)
                    if number < len(first) - 1:
                        await wire.answers(number + 1)
                        await asyncio.sleep(0.05)
                        began = loop.time()
                for at in range(len(drip)):
                    if wire.closed.is_set():
                        break
                    await wire.send(drip[at : at + 1])
                    await asyncio.sleep(0.02)
                told = await wire.until_closed()
                took_s = loop.time() - began
                assert least_s - 0.05 <= took_s <= least_s + spare_s, (first, drip, took_s)
                return told

        async def unread(side: Side) -> None:
            async with side.wire(reads=False) as wire:
                wire.transport.write(PAGE * 100)
                (connection,) = side.fast_path.connections
                await until(lambda: connection._writing_paused)
                began = loop.time()
                await until(lambda: connection not in side.fast_path.connections)
                assert 0.3 <= loop.time() - began <= 0.4 + spare_s

        async with world.both() as (fast_path, aiohttp):
            await unread(fast_path)
            end = late.index(b"\r\n\r\n") + 4
            told = await asyncio.gather(
                lasts(fast_path, 0.3),
                lasts(fast_path, 0.3, purchase[:60]),
                lasts(fast_path, 0.3, b"P", drip=purchase[1:]),
                lasts(fast_path, 0.3, b"\r", drip=b"\r" * 200),  # aiohttp's, for good
                lasts(fast_path, 1.5, purchase),
                lasts(fast_path, 1.5, purchase, purchase),
                lasts(fast_path, 1.5, TIME),
                lasts(fast_path, 1.5, TIME, purchase, TIME),
                lasts(fast_path, 0.3, purchase, purchase[:60]),
                lasts(fast_path, 0.3, TIME, purchase[:60]),
                lasts(fast_path, 0.3, late[: end + 5]),
                lasts(fast_path, 0.3, late[: end + 5], drip=late[end + 5 : -300]),
                lasts(fast_path, 0.3, purchase, late[: end + 5]),
            )
            assert [len(each.answers) for each in told] == [0, 0, 0, 0, 1, 2, 1, 3, 1, 1, 1, 1, 2]
            async with aiohttp.wire() as wire:  # which closes later: it lingers for the rest
                await wire.send(late[: end + 5])
                told.append(await wire.answers(1))
            one, dripped, second, theirs = (each.answers[-1].told for each in told[-4:])
            assert one == dripped == second == theirs
            assert one[2]["field"] == "body"
            assert not fast_path.fast_path.connections

    with shorter(**bounds):
        world.run(judge())


@pytest.mark.parametrize("fast_path", [True, False])
def test_connections_over_the_maximum_are_closed(world: World, fast_path: bool) -> None:
    async def judge() -> None:
        async with world.side(fast_path=fast_path, connections_max=3) as side:
            wires = []
            for _ in range(5):  # one after the other, so that it is known who is too many
                wires.append(await side.connect())
                await until(lambda: side.engine.overload.connections >= min(len(wires), 3))
            for wire in wires[3:]:
                told = await wire.until_closed()
                assert not told.rest
                if fast_path:  # aiohttp's handler alone says nothing
                    (answer,) = told.answers
                    headers = dict(answer.headers)
                    assert (answer.status.split()[1], headers["Connection"]) == ("503", "close")
                    assert 1 <= int(headers["Retry-After"]) <= 60
                    assert answer.body["code"] == "overloaded"
            assert side.engine.overload.connections == 3
            for wire in wires[:3]:
                await wire.send(world.member().buy())
                assert (await wire.answers(1)).statuses == [201]
            wires[0].transport.abort()
            await until(lambda: side.engine.overload.connections == 2)
            assert (await side.ask(TIME)).statuses == [200, 200]
            for wire in wires:
                wire.transport.abort()
            await until(lambda: side.engine.overload.connections == 0)

    world.run(judge())


# The end of a process.


@pytest.mark.parametrize("fast_path", [True, False])
def test_drain_answers_requests_and_closes_kept_connections(world: World, fast_path: bool) -> None:
    async def judge() -> dict[str, Exchange]:
        loop = asyncio.get_running_loop()
        async with world.side(fast_path=fast_path) as side, contextlib.AsyncExitStack() as stack:
            names = (
                "under way",
                "behind it",
                "purchase",
                "other",
                "half a body",
                "half a head",
                "idle",
            )
            wires = {name: await stack.enter_async_context(side.wire()) for name in names}
            for name in names[2:]:
                await wires[name].send(TIME if name == "other" else world.member().buy("sold-out"))
                assert len((await wires[name].answers(1)).answers) == 1
                wires[name].told.clear()
            rest = world.member().buy("sold-out")
            head = rest.index(b"\r\n\r\n") + 4
            with world.service.stopped("redis"):
                await wires["under way"].send(world.member().buy())
                await wires["behind it"].send(world.member().buy() + TIME)
                await wires["half a body"].send(rest[: head + 3])
                await wires["half a head"].send(rest[:50])
                await asyncio.sleep(0.05)
                assert wires["under way"].transport.is_closing() is False
                draining = loop.create_task(side.api.drain())
                await asyncio.sleep(0.05)
                await wires["purchase"].send(world.member().buy())
                await wires["other"].send(TIME.replace(b"/api/v1/time", b"/healthz"))
                await wires["half a body"].send(rest[head + 3 :])
                await wires["half a head"].send(rest[50:])
                await asyncio.sleep(0.05)
            await draining
            await side.api.close()
            told = {}
            for name, wire in wires.items():
                if name != "idle" or fast_path:  # aiohttp's own are closed by its runner, later
                    told[name] = await wire.until_closed()
            return told

    told = world.run(judge())

    assert told["under way"].statuses == [201]
    assert told["behind it"].statuses in ([201], [201, 503])
    assert told["other"].statuses == [200]
    for name in ("purchase", "half a body", "half a head"):
        assert told[name].statuses == [503], name
        assert told[name].answers[0].body["code"] == "unavailable"
    for name, each in told.items():
        if each.answers:
            assert dict(each.answers[-1].headers).get("Connection") == "close", name
    if fast_path:
        assert not told["idle"].answers


@pytest.mark.parametrize("fast_path", [True, False])
def test_drain_refuses_waiters_without_time(world: World, fast_path: bool) -> None:
    async def judge() -> tuple[Exchange, float]:
        loop = asyncio.get_running_loop()
        async with world.side(fast_path=fast_path) as side, side.wire() as wire:
            overload = side.engine.overload
            with mock.patch.multiple(
                overload,
                overloaded=lambda *_, **__: QUEUE,
                has_room=lambda _: False,
                may_refuse=lambda _: False,
            ):
                await wire.send(world.member().buy())
                await until(lambda: overload.waiters == 1)
                began = loop.time()
                draining = loop.create_task(side.api.drain())
                told = await wire.answers(1)
                took_s = loop.time() - began
                await draining
            return told, took_s

    told, took_s = world.run(judge())
    assert told.statuses == [503]
    assert took_s < WAIT_S / 2


# Private state of aiohttp.


async def test_aiohttp_handler_turns_busy_and_idle_as_expected() -> None:
    """The private state that ``aiohttp_handler`` reads: its names, and what they mean."""
    source = inspect.getsource(aiohttp_handler)
    classes = (Handler, InnerHandler, LoneHandler)
    overridden = {"_pause_transport_reading", "_resume_transport_reading"}
    assert overridden <= vars(InnerHandler).keys()
    names = {name for each in classes for name in vars(each) if name[:2] != "__"}
    ours = names.union(*(each.__slots__ for each in classes)) - overridden
    theirs = {*web.RequestHandler.__slots__, *BaseProtocol.__slots__}
    used = set(re.findall(r"self\.(_\w+)", source)) - ours
    assert {"_waiter", "_messages", "_request_in_progress", "_reading_paused"} <= used
    assert all(name in theirs or hasattr(web.RequestHandler, name) for name in used | overridden)
    assert not any(name in theirs for name in ours)

    begun, go_on, told = asyncio.Event(), asyncio.Event(), list[tuple[bool, bool]]()

    async def serve(request: web.BaseRequest) -> web.Response:
        begun.set()
        await go_on.wait()
        await request.read()
        return web.Response(text="done")

    server = web.Server(serve)  # type: ignore[arg-type]
    handlers: list[InnerHandler] = []

    def make() -> InnerHandler:
        handler = InnerHandler(
            server,
            refusals=mock.Mock(),
            draining=lambda: False,
            answered=lambda: told.append((handler.busy, handler.idle)),
            reading=lambda _: None,
            keepalive_timeout=75.0,
        )
        handlers.append(handler)
        return handler

    listener = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    try:
        await until(lambda: bool(handlers))
        (handler,) = handlers
        await until(lambda: handler.idle)
        for turn in range(1, 4):
            assert (handler.busy, handler.idle) == (False, True)
            handler.data_received(TIME)
            assert (handler.busy, handler.idle) == (True, False), "parsed, not begun"
            await begun.wait()
            assert (handler.busy, handler.idle) == (True, False), "under way"
            go_on.set()
            await reader.readuntil(b"done")
            assert told == [(True, False)] * turn, "told once, before it is idle"
            await until(lambda: handler.idle)
            begun.clear()
            go_on.clear()
        handler.data_received(TIME[:20])
        assert (handler.busy, handler.idle) == (False, True), "half a head is nothing yet"
        handler.data_received(TIME[20:] + TIME)
        go_on.set()
        await until(lambda: len(told) == 5)
        assert told[3] == (True, False), "another waits behind it"
        await until(lambda: handler.idle)
    finally:
        writer.close()
        await writer.wait_closed()
        listener.close()
        await server.shutdown(1)
        await listener.wait_closed()
    assert (handler.busy, handler.idle) == (False, False), "what is lost waits for nothing"


def test_mixed_connection_keeps_its_attribute_layout(world: World) -> None:
    async def judge() -> None:
        async with world.side(fast_path=True) as side, side.wire() as one, side.wire() as other:
            with mock.patch.object(request_head, "LEARN_EVERY_S", 0.0):
                side.fast_path.heads._learn_at = 0.0
                member, told = world.member(), {one: 0, other: 0}
                for wire, extra in ((one, b"A: b"), (other, b"C: d")) * 10:
                    await wire.send(member.buy("sold-out", WISH, extra))
                    told[wire] += 1
                    await wire.answers(told[wire])
                await one.send(TIME)
                await one.answers(11)
            raw = member.buy("sold-out", WISH, b"A: b")
            mine = [
                each for each in side.fast_path.connections if each._shape.read(raw) is not None
            ]
            assert len(mine) == 1
            assert mine[0]._delegation is not None

    world.run(judge())
