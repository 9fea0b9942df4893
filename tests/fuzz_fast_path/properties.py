"""Properties of a head and of a connection that hold for any input."""

import asyncio
import contextlib
import random
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import structlog
from aiohttp import web
from aiohttp.log import server_logger
from aiohttp.streams import EMPTY_PAYLOAD
from fast_path_rig import bounds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from sale.api import fast_purchase
from sale.api.fast_reads import FastReads
from sale.api.fast_routes import fast_routes, make_fast_path
from sale.domain.campaign import Campaign, Showing, State
from sale.http import bounds as http_bounds
from sale.http import request_head
from sale.http import waiting_line as waiting_line_module
from sale.http.connection import Connection
from sale.http.fast_path import FastPath
from sale.http.overload import LATE, QUEUE, TURN, Overload
from sale.http.request_head import UNKNOWN, HeadReader, Shape
from sale.http.waiting_line import WaitingLine
from sale.identity import Member
from sale.members.purchase import PurchaseDesk
from sale.metrics import PurchaseMetrics
from sale.stock.answers import Answer
from sale.stock.catalogue import CampaignNow
from sale.stock.scripts import Decision

from .oracle import Request, oracle, parsed
from .sent import ANY, CAMPAIGN, CUTS, ORDERS, READS, SOUND, STREAMS, WITH_DAMAGE, pieces_of

NEXT = b"GET /next HTTP/1.1\r\nHost: sale\r\n\r\n"
SMALL_HELD_MAX = 512
SHAPES_MAX = 64
QUIET_TURNS = 12
TURNS_MAX = 3_000
ANSWERED = re.compile(rb"HTTP/\d\.\d \d{3} ")
FILMS = Campaign(
    id=CAMPAIGN,
    title="五元看大片",
    category="culture",
    price_fen=500,
    payment="counter",
    card_limit=3,
    order_max=3,
    unions=("*",),
    owner="district",
    showings=(Showing(id="general", title="通用券", tickets=1),),
)


FILMS_NOW = CampaignNow(
    campaign=FILMS, config_seq=1, state=State.OPEN, recorded=State.OPEN, opens_at_ms=1,
    closes_at_ms=None, recovering="", seq=1, chain="", epoch=1, roster_rev=0, tickets=(1,),
    remaining=(1,), held=(0,), as_of_ms=1,
)  # fmt: skip
_SERVE = FastReads.serve
ROUTES = fast_routes(SimpleNamespace(desk=None, public_campaigns=None))  # type: ignore[arg-type]


def check_head(loop: asyncio.AbstractEventLoop, reader: HeadReader, data: bytes) -> None:
    """A head that is read as plain is one request to aiohttp, and ends at the same byte."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return
    head = reader.read(data, end)
    assert head == HeadReader(ROUTES).read(data, end), "what came before changes nothing"
    if head is None:
        return
    assert head.whole >= head.end == end
    if head.whole > len(data) + 65_536:
        return
    whole = data[: head.whole].ljust(head.whole, b"b")
    for pieces in ([whole + NEXT], [whole[at : at + 1] for at in range(len(whole))] + [NEXT]):
        found, refused = parsed(loop, pieces)
        if refused and head.handler is None:
            continue  # delegated to aiohttp, which refuses it and closes
        assert not refused, "the fast path accepts a request that aiohttp refuses"
        assert len(found) == 2, found
        (message, payload), (following, _) = found
        assert following.path == "/next"
        assert payload.is_eof()
        assert not message.should_close
        assert not message.upgrade
        assert not message.chunked
        assert message.compression is None
        body = b"" if payload is EMPTY_PAYLOAD else payload.read_nowait()
        assert body == whole[end:]
        if head.handler is not None:
            start = f"{message.method} {message.path}"
            assert ROUTES.resolve(start) == (head.handler, head.name)
            assert head.handler.takes_body or not body
            for ours, name in (
                (head.authorization, "Authorization"),
                (head.key, "Idempotency-Key"),
                (head.content_type, "Content-Type"),
                (head.forwarded_for, "X-Forwarded-For"),
                (head.request_id, "X-Request-Id"),
                (head.if_none_match, "If-None-Match"),
            ):
                assert ours == message.headers.get(name), name


def check_shape(reader: HeadReader, shapes: list[Shape], data: bytes) -> None:
    """A shape takes nothing but what llhttp calls plain, and takes it for the same.

    ``reader`` learns at the first sight of a purchase; ``shapes`` gathers what it learned.
    """
    end = data.find(b"\r\n\r\n") + 4
    head = HeadReader(ROUTES).read(data, end) if end >= 4 else None
    for shape in shapes:
        assert shape.read(data) in (None, head), "a shape sees what llhttp does not"
    if head is not None and head.handler is not None:
        with mock.patch.object(request_head, "LEARN_EVERY_S", 0.0):
            reader.read(data, end)
        if reader.shape not in shapes:
            shapes.append(reader.shape)
            del shapes[1:-SHAPES_MAX]
        assert reader.shape.read(data) in (None, head)


class Wire(asyncio.Transport):
    """A transport that keeps what is written; ``full`` makes every write one too many."""

    def __init__(self, connection: Connection, *, full: bool) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False
        self.reading = True
        self.paused_writing = False
        self._connection = connection
        self._full = full

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        assert not self.closing, "an answer on a connection that is closed"
        self.written += data
        if self._full and not self.paused_writing:
            self.paused_writing = True
            self._connection.pause_writing()
            asyncio.get_running_loop().call_later(0, self._drained)

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def _drained(self) -> None:
        if self.paused_writing:
            self.paused_writing = False
            self._connection.resume_writing()

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    abort = close

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading


class Rush(Overload):
    """Admits and refuses at random; a refused purchase is recorded as None."""

    def __init__(self, seen: list[Request | None], seed: int, **bounds: Any) -> None:
        super().__init__(**bounds)
        self._seen, self._dice = seen, random.Random(seed)

    def overloaded(self, now: float, *, called: bool = False) -> str:
        return self._dice.choice(["", "", TURN, QUEUE, LATE])

    def turn_is_over(self, now: float) -> str:
        return self._dice.choice(["", "", TURN])

    def has_room(self, now: float) -> bool:
        return self._dice.random() < 0.5

    def may_refuse(self, now: float) -> bool:
        return self._dice.random() < 0.5

    def refuse(self, reason: str, now: float) -> int:
        self._seen.append(None)
        return super().refuse(reason, now)


class Counter:
    """The engine behind the fast path: it sells nothing and records the requests."""

    def __init__(self, rush: int | None) -> None:
        self.seen: list[Request | None] = []
        self.under_way = 0
        self.halted = ""
        self._body, self._key = b"", None
        bounds = {"connections_max": 10, "turn_max_s": 0, "waiting_max": 0, "wait_max_s": 0}
        self.admission = Overload(**bounds) if rush is None else Rush(self.seen, rush, **bounds)
        whoever: Any = self
        self.desk = PurchaseDesk(
            whoever, whoever, whoever, whoever, PurchaseMetrics(), whoever, whoever, self.admission
        )
        self.overload, self.limits, self.addresses = self.admission, self, self
        self.public_campaigns = self

    # These replace the fast path's own checks: any body and key will do.

    def body(self, body: bytes, _: Any) -> Any:
        self._body = body
        return SimpleNamespace(quantity=1, showing=None)

    def key(self, key: str | None) -> str:
        self._key = key
        return key or ""

    # The parts that the desk calls: tokens, catalogue, batcher.

    def known(self, campaign_id: str) -> Any:
        return FILMS if campaign_id == CAMPAIGN else None

    def was_for_sale(self, campaign_id: str) -> bool:
        return campaign_id == CAMPAIGN

    def doubt(self, _: str) -> None:
        """A known configuration stays."""

    def fresh(self, campaign_id: str) -> Any:
        return FILMS_NOW if campaign_id == CAMPAIGN else None

    def read(self, handler: FastReads, *asked: Any) -> bytes:
        """Takes the place of ``FastReads.serve``."""
        path = READS[0] if handler._max_age_s else READS[1]
        self.seen.append(Request("GET", path, b"", asked[2].key))
        return _SERVE(handler, *asked)

    def verify(self, *_: Any) -> Member:
        return Member(7, "district")

    def spend(self, *_: Any) -> None:
        """No limits."""

    def spend_address(self, *_: Any) -> None:
        """Nor for addresses."""

    def vouches(self, *_: Any) -> bool:
        return False

    def of(self, *_: Any) -> "Counter":
        return self

    def submit(self, purchase: Any) -> bool:
        assert not self.under_way, "two purchases of one connection at a time"
        self.seen.append(Request("POST", ORDERS, self._body, self._key))
        self.under_way += 1
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._settle, purchase)
        return True

    def _settle(self, purchase: Any) -> None:
        self.under_way -= 1
        purchase.settle(Answer(Decision.SOLD_OUT))

    async def serve(self, request: web.BaseRequest) -> web.Response:
        """The rest of the engine, as aiohttp calls it."""
        body = await request.read()
        key = request.headers.get("Idempotency-Key")
        self.seen.append(Request(request.method, request._message.path, body, key))
        return web.Response(text="said aiohttp")


async def check_connection(
    pieces: list[bytes],
    *,
    full: bool,
    ends: bool,
    rush: int | None = None,
    held_max: int = http_bounds.HELD_MAX,
    held_by_all_max: int = http_bounds.HELD_BY_ALL_MAX,
) -> None:
    """A connection serves exactly the requests that aiohttp's parser sees, each once, in order.

    It never reads on while more than ``held_max`` waits, nor ``held_by_all_max`` on all. In a
    ``rush`` some are refused. Where the client ``ends``, it is served all the same, then closed.
    """
    loop = asyncio.get_running_loop()
    troubles: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, trouble: troubles.append(trouble))
    data = b"".join(pieces)
    wanted, refused = oracle(loop, data)
    counter, ended = Counter(rush), False
    server = web.Server(counter.serve)  # type: ignore[arg-type]
    waiting_line = mock.patch.multiple(waiting_line_module, CALL_S=0.0002, WAIT_S=0.001)
    with (
        waiting_line,
        mock.patch.multiple(
            fast_purchase,
            decode_body=counter.body,
            checked_key=counter.key,
            check_media_type=lambda _: None,
        ),
        mock.patch.object(FastReads, "serve", lambda *asked: counter.read(*asked)),  # noqa: PLW0108 - binds
        bounds(PAUSE_S=0, HELD_MAX=held_max, HELD_BY_ALL_MAX=held_by_all_max, HELD_FREELY=0),
        mock.patch.object(request_head, "LEARN_EVERY_S", 0.0),
    ):
        fast_path = make_fast_path(counter, server, WaitingLine(counter.overload))  # type: ignore[arg-type]
        fast_path.heads = HeadReader(fast_path.routes, learned_after=1)
        connection = Connection(fast_path)
        wire = Wire(connection, full=full)
        connection.connection_made(wire)
        for number, piece in enumerate(pieces):
            if not await _reads(wire, connection):
                break
            assert len(connection._held) <= min(held_max, held_by_all_max), "it reads on"
            connection.data_received(piece)
            assert fast_path.held == len(connection._held), "what it holds is counted"
            if number % 3:
                await asyncio.sleep(0)
        else:
            if ended := ends and await _reads(wire, connection):
                assert connection.eof_received(), "what is under way is still to be written"
        await _quiet(counter, wire, fast_path)
        answers = len(ANSWERED.findall(wire.written))
        closed, held = wire.closing, connection._held
        assert closed or not ended, "nothing else would ever close it"
        wire.close()
        await asyncio.sleep(0)
        assert (fast_path.held, fast_path.unread) == (0, {})
        fast_path.waiting_line.close()
        await fast_path.close()
        await server.shutdown(0)
        await asyncio.sleep(0)
    assert not troubles, troubles
    served = len(counter.seen)
    took = zip(counter.seen, wanted, strict=False)
    assert all(mine in (None, theirs) for mine, theirs in took), (counter.seen, wanted)
    assert served == len(wanted), (counter.seen, wanted)
    if refused:
        # The fast path reads a head when it is whole, or its time is over.
        assert closed or b"\r\n\r\n" not in held, "what cannot be read ends the connection"
    assert served <= answers <= served + refused, wire.written
    assert counter.admission.connections == 0


async def _reads(wire: Wire, connection: Connection) -> bool:
    """Wait until it takes more; not where it is closed, or aiohttp alone and for good stops it."""
    for turn in range(TURNS_MAX):
        if wire.reading or wire.closing:
            return not wire.closing
        # aiohttp stops reading where a chunk cannot be read and its handler waits for more.
        if connection._for_good and turn > QUIET_TURNS:
            return False
        await asyncio.sleep(0)
    raise AssertionError("it hangs")


async def _quiet(counter: Counter, wire: Wire, fast_path: FastPath) -> None:
    """Wait until the connection has nothing left to do."""
    still, before = 0, None
    for _ in range(TURNS_MAX):
        now = (len(counter.seen), len(wire.written), wire.closing, wire.paused_writing)
        still = (
            still + 1 if now == before and not (counter.under_way or fast_path.waiting_line) else 0
        )
        before = now
        if still > QUIET_TURNS:
            return
        await asyncio.sleep(0)
    raise AssertionError("it never comes to rest")


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Log nothing of wrong requests."""
    kept = structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with mock.patch.object(server_logger, "disabled", new=True):
        try:
            yield
        finally:
            structlog.configure(**kept)


def properties(runner: asyncio.Runner, examples: int, seed: int) -> list[Callable[[], None]]:
    """The properties, each as a function that tries so many examples of this seed."""
    how = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    reader = HeadReader(ROUTES)

    @seeded(seed)
    @how
    @given(data=ANY)
    def heads(data: bytes) -> None:
        check_head(runner.get_loop(), reader, data)

    learning, shapes = HeadReader(ROUTES, learned_after=1), [UNKNOWN]

    @seeded(seed)
    @how
    @given(requests=WITH_DAMAGE, other=ANY)
    def shapes_of_heads(requests: tuple[bytes, bytes], other: bytes) -> None:
        for data in (*requests, other):
            check_shape(learning, shapes, data)

    @seeded(seed)
    @how
    @given(data=STREAMS, cuts=CUTS, full=st.booleans(), ends=st.booleans())
    def connections(data: bytes, cuts: list[float] | int, full: bool, ends: bool) -> None:
        runner.run(check_connection(pieces_of(data, cuts), full=full, ends=ends))

    @seeded(seed)
    @how
    @given(
        sound=st.lists(SOUND, min_size=2, max_size=12),
        full=st.booleans(),
        ends=st.booleans(),
        bound=st.sampled_from(["held_max", "held_by_all_max"]),
    )
    def bounds(sound: list[bytes], full: bool, ends: bool, bound: str) -> None:
        runner.run(check_connection(sound, full=full, ends=ends, **{bound: SMALL_HELD_MAX}))

    @seeded(seed)
    @how
    @given(data=STREAMS, cuts=CUTS, rush=st.integers(0, 2**16), ends=st.booleans())
    def rushes(data: bytes, cuts: list[float] | int, rush: int, ends: bool) -> None:
        runner.run(check_connection(pieces_of(data, cuts), full=False, rush=rush, ends=ends))

    return [heads, shapes_of_heads, connections, bounds, rushes]
