"""The fast path: plain purchases without aiohttp, on the same port and the same connections.

Every connection is ours (``Connection``). It looks at each request where it begins: a purchase of
the one plain shape is parsed here (by llhttp, as aiohttp does), checked, queued, and answered
straight from the batch's result; there is no task, future, request or response object for it.
Every other request is given, whole and alone, to an aiohttp handler that the connection keeps
inside, and when that has answered, the next request is looked at again: phones and balancers mix
both on one connection. What cannot be cut out for certain (chunked, ``Expect``, ``Upgrade``,
HTTP/1.0, ``Connection: close``, whatever llhttp refuses) goes to aiohttp with all that follows, for
good. So a request that two parsers might see differently is never cut by one and read by the other.

Which of the two answers changes nothing in the answer: both check by ``exchange``, ask by
``PurchaseDesk`` and word by ``order_answer`` (``tests/test_fast_path.py`` compares them). Why it is
built so, and what was rejected, stands in ADR 0012.

Bounds of a connection: ``HEAD_MAX`` bytes of a head and ``HEAD_WITHIN_S`` for it to come whole,
``BODY_MAX`` and ``BODY_WITHIN_S`` for a purchase's body, one purchase under way or among the crowd
(``crowd.py``), ``HELD_MAX`` bytes that wait behind it, ``KEEPALIVE_S`` between requests,
``UNREAD_WITHIN_S`` for a client that does not read its answers. All of them together hold about
``HELD_BY_ALL_MAX``.

A client that shuts down its sending side gets the answers to all that it sent whole; then its
connection is closed. One that has left looks the same until it is written to. So what it has under
way is answered, but out of the crowd, where nothing is done for it yet, it is refused at once.
"""

import asyncio
import time
from typing import Final, cast

import structlog
from aiohttp import web

from sale.api.aiohttp_handler import KEEPALIVE_S, UNREAD_WITHIN_S, InnerHandler
from sale.api.charge import CHARGED, charge
from sale.api.fast_path_answers import FastPathAnswers, FastPathPurchase, overloaded_answers
from sale.api.fast_path_head import HEAD_MAX, Head, HeadReader
from sale.api.member import ORDER_REQUEST
from sale.api.problems import problem_answer
from sale.api.request import (
    BODY_MAX,
    BODY_WITHIN_S,
    BodyLate,
    bearer_token,
    check_media_type,
    checked_key,
    decode_body,
)
from sale.api.routing import refused_by
from sale.background import keep_running
from sale.bootstrap import Engine
from sale.domain.campaign import Campaign
from sale.domain.problem import Problem, Refused
from sale.http.client_address import first_of
from sale.http.overload import LATE, TURN
from sale.http.request_ids import named, request_id
from sale.http.waiting_line import WaitingLine
from sale.http.wire import rendered
from sale.members.rate import TooFast

HELD_MAX: Final = 64 * 1024
HELD_BY_ALL_MAX: Final = 64 * 1024 * 1024
"""Bytes that wait on all connections of a process, beyond which none that holds more than
``HELD_FREELY`` is read on. A thousand that hold their most are this many, and 50,000 that hold a
purchase or two are fewer; 50,000 that hold their most would be 3 GB. What each brings by its last
read comes on top: up to 256 KiB, of who sends more than it waits for answers to."""

HELD_FREELY: Final = 8 * 1024
"""More than a purchase of ours has: a token, a key and a short body are under 1 KiB."""

HEAD_WITHIN_S: Final = 10.0
SWEEP_S: Final = 1.0
PURCHASE: Final = b"POST /api/v1/campaigns/"
NEVER: Final = float("inf")
INNER_KEEPALIVE_S: Final = 1e8
"""aiohttp's own timer would end a connection on which only the lane is busy: ours goes instead."""
INNER_LOOKS: Final = 5
INNER_PAUSE_S: Final = 0.001

log = structlog.get_logger()


class FastPath:
    """The connections of one API process, and what they share."""

    def __init__(self, engine: Engine, server: web.Server, waiting_line: WaitingLine) -> None:
        self.engine = engine
        self.desk = engine.desk
        self.known = engine.desk.known
        self.overload = engine.overload
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.heads = HeadReader()
        self.connections: set[Connection] = set()
        self.draining = False
        self.held = 0
        """Bytes that wait on all connections."""
        self.unread: dict[Connection, None] = {}
        """Those that are not read on because all together hold too much, in their order."""
        self._reads_on = False
        self.now = self.loop.time()
        """The loop's clock, to the second: deadlines need no better."""
        self._sweeper = self.loop.create_task(keep_running(self._sweep))
        self.waiting_line = waiting_line
        self.answers = FastPathAnswers(engine.desk, self.is_draining)
        self.overloaded = overloaded_answers()
        """What is answered beyond capacity, by its Retry-After; made anew each second."""

    def hold(self, more: int) -> None:
        """Count bytes that wait on a connection, or no longer do."""
        self.held += more
        if self.unread and not self._reads_on and self.held < HELD_BY_ALL_MAX:
            self._reads_on = True
            self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        """Let some be read on; the others when it is known what these bring."""
        self._reads_on = False
        room = HELD_BY_ALL_MAX - self.held
        while self.unread and room > 0:
            next(iter(self.unread)).bound_what_is_held()
            room -= HELD_MAX
        self.hold(0)

    def drain(self) -> None:
        """Make each answer its connection's last from now on."""
        self.answers.send()  # what was worded before does not say that it is the last
        self.draining = True

    def is_draining(self) -> bool:
        """Whether each answer must be its connection's last."""
        return self.draining

    async def close(self) -> None:
        """Close every connection that is left; whose the crowd is has closed that before."""
        self._sweeper.cancel()
        self.answers.send()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        for connection in list(self.connections):
            connection.close()

    async def _sweep(self) -> None:
        """End connections that are past their deadline: one look a second at all of them.

        A timer a connection would be moved with every request.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.now = self.loop.time()
            self.overloaded = overloaded_answers()
            for connection in [each for each in self.connections if each.deadline < now]:
                try:
                    connection.expire()
                except Exception:
                    log.exception("connection.not_ended")
                    self.connections.discard(connection)


class Connection(asyncio.Protocol):
    """One connection: cuts requests, serves purchases, lends the rest to aiohttp."""

    __slots__ = (
        "_admitted",
        "_answered",
        "_awaited",
        "_counted",
        "_ended",
        "_fast_path",
        "_for_good",
        "_held",
        "_inner",
        "_inner_full",
        "_inner_left",
        "_lent",
        "_looks",
        "_reading_paused",
        "_request_id",
        "_shape",
        "_stands",
        "_transport",
        "_unended",
        "_unsettled",
        "_writing_paused",
        "deadline",
        "purchase",
    )  # fmt: skip

    def __init__(self, fast_path: FastPath) -> None:
        self._fast_path = fast_path
        self._transport: asyncio.Transport | None = None
        self.deadline = NEVER
        """When it has waited too long, by the lane's clock; NEVER while the next move is ours."""
        self._held = b""
        self._counted = 0
        """How much of it the lane's sum has."""
        self._awaited: tuple[Campaign, Head] | None = None
        self.purchase: FastPathPurchase | None = None
        """The one that is under way."""
        self._request_id: str | None = None
        """The name of the request that is served now, as it was given or once it was made."""
        self._inner: InnerHandler | None = None
        self._shape = fast_path.heads.shape
        self._inner_left = 0
        self._inner_full = False
        self._unended = 0
        self._looks = 0
        self._lent = self._answered = self._for_good = False
        self._reading_paused = self._writing_paused = self._stands = False
        self._admitted = self._ended = False
        self._unsettled = False
        """Whether there is more to do when all is served: to count, to read on, or to close."""

    @property
    def lost(self) -> bool:
        """Whether the client has gone."""
        return self._transport is None

    @property
    def busy(self) -> bool:
        """Whether a request is under way here."""
        if self.purchase is not None or self._stands:
            return True
        return self._inner is not None and self._inner.busy

    @property
    def request_id(self) -> str:
        """The name of the request that is served now."""
        name = self._request_id = request_id(self._request_id)
        return name

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the first request has as long as any head."""
        self._transport = cast("asyncio.Transport", transport)
        self.deadline = self._fast_path.now + HEAD_WITHIN_S
        self._admitted = self._fast_path.overload.take_connection()
        if self._admitted:
            self._fast_path.connections.add(self)
            return
        wait_s = self._fast_path.overload.retry_after(time.monotonic())
        refused = Refused(Problem.OVERLOADED, retry_after_s=wait_s)
        self._answer(rendered(*problem_answer(refused), last=True), last=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """End. A purchase that is under way goes on: its order stands (HOLES.md row 23)."""
        self._transport = None
        self._held = b""
        self.bound_what_is_held()
        if self._admitted:
            self._fast_path.connections.discard(self)
            self._fast_path.overload.release_connection()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Look at nothing more until the client has read its answers; it has not for ever."""
        self._writing_paused = True
        self.deadline = self._fast_path.now + UNREAD_WITHIN_S
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Go on."""
        self._writing_paused = False
        self.deadline = NEVER if self.busy else self._fast_path.now + KEEPALIVE_S
        if self._inner is not None:
            self._inner.resume_writing()
        self._advance()

    def data_received(self, data: bytes) -> None:
        """Take in what has come, and look at it if nothing else is under way."""
        inner = self._inner
        if self._for_good and inner is not None:
            inner.data_received(data)
            self._bound_what_does_not_end(inner, len(data))
            return
        if self._inner_left and inner is not None:
            inner.data_received(data[: self._inner_left])
            data, left = data[self._inner_left :], self._inner_left - len(data)
            self._inner_left = max(left, 0)
        before, self._held = self._held, self._held + data
        if not before and self._fast_path.overload.waiters and self._joins(data):
            self._wait(time.monotonic())
        elif self._awaited is None or len(self._held) >= self._awaited[1].whole:
            self._advance()
        else:
            self.bound_what_is_held()

    def eof_received(self) -> bool:
        """Serve what has come whole, then close; the transport is to stay open until then."""
        if not self._ended:
            self._ended = self._unsettled = True
            if self._inner is not None:
                self._inner.client_ended = True
            if self._stands and not self._fast_path.draining:
                self._leave_waiting_line()
            self._advance()
        return True

    # The way of a request.

    def _advance(self, *, since: float | None = None) -> None:
        """Serve what is held, as far as it can be served now.

        ``since``: the first of it has stood in the crowd since then, and is answered now.
        """
        fast_path = self._fast_path
        while (held := self._held) and self._ready():
            head = self._shape.read(held)
            if head is None or fast_path.draining:
                head = self._look(held)
                if head is None:
                    break
            campaign = fast_path.known(head.campaign_id)
            whole = head.whole
            if campaign is None:
                self._delegate_request(whole)
            elif whole - head.end > BODY_MAX:
                self._delegate_connection()
                break
            elif len(held) < whole:
                self._awaited = campaign, head
                self.deadline = fast_path.now + BODY_WITHIN_S
                break
            else:
                now = time.monotonic()
                reason = fast_path.overload.overloaded(now, called=since is not None)
                if reason and since is None and self._should_wait(reason, now):
                    break
                asked_at, since = since or now, None
                self._held, self._awaited = held[whole:], None
                self._request_id = head.request_id
                if reason:
                    self._turn_away(campaign, fast_path.overload.refuse(reason, now))
                else:
                    self._buy(campaign, head, held[head.end : whole], asked_at, now)
        if self._held or self._unsettled:
            self._settle()

    def _look(self, held: bytes) -> Head | None:
        """Read a head that is not of the usual shape.

        None: it is not whole yet, or it was handed over.
        """
        fast_path = self._fast_path
        end = held.find(b"\r\n\r\n") + 4
        if end < 4 and _may_become_a_head(held):
            self.deadline = min(self.deadline, fast_path.now + HEAD_WITHIN_S)
            return None
        head = fast_path.heads.read(held, end) if end >= 4 else None
        if head is None or fast_path.draining:
            self._delegate_connection()
            return None
        if head.campaign_id:
            self._shape = fast_path.heads.shape
        return head

    def _joins(self, data: bytes) -> bool:
        """Whether what has just come may stand among the crowd without being read any further."""
        return data.startswith(PURCHASE) and self._ready()

    def _should_wait(self, reason: str, now: float) -> bool:
        """Whether to stand among the crowd rather than be refused now; then it does."""
        if self._ended or (reason != TURN and self._fast_path.overload.may_refuse(now)):
            return False
        self._awaited = None
        self._wait(now)
        return True

    def _wait(self, now: float) -> None:
        """Wait among the crowd; what else comes here waits behind it."""
        self._stands = True
        self.deadline = NEVER
        self.bound_what_is_held()
        self._fast_path.waiting_line.join(self, now)

    def _leave_waiting_line(self) -> None:
        """Be refused: most who send no more while they stand have left, and would be sold to."""
        self._stands = False
        held, fast_path = self._held, self._fast_path
        head = self._shape.read(held) or self._look(held)
        if head is None or head.whole > min(len(held), head.end + BODY_MAX):
            return
        campaign = fast_path.known(head.campaign_id)
        if campaign is not None:
            self._held = held[head.whole :]
            self._request_id = head.request_id
            self._turn_away(campaign, fast_path.overload.refuse(LATE, time.monotonic()))

    def called(self, since: float) -> None:
        """Be looked at, and either queued or refused; it has stood ``since`` then."""
        if not self._stands:
            return
        self._stands = False
        if self._transport is None:
            return
        if not self._writing_paused:
            self.deadline = self._fast_path.now + KEEPALIVE_S
        try:
            self._advance(since=since)
        except Exception:
            log.exception("connection.not_served", request_id=self.request_id)
            self.close()

    def _ready(self) -> bool:
        """Whether the next request may be looked at; what a closed one has held is dropped."""
        if self._transport is None or self._transport.is_closing():
            self._held = b""
            return False
        if self._for_good or self._writing_paused or self._stands or self.purchase is not None:
            return False
        return not self._lent or self._taken_back()

    def _taken_back(self) -> bool:
        """Take the connection back from aiohttp if it is done; if it is about to be, look again."""
        if not self._answered or self._inner_left or self._inner is None:
            return False
        if self._inner.idle:
            self._lent = False
            return True
        # Its answer is out, and it is about to wait for more: some turns later, unless it waits for
        # the rest of a body that it does not want.
        self._answered, self._looks = False, self._looks + 1
        if self._looks <= INNER_LOOKS:
            self._fast_path.loop.call_soon(self._inner_answered)
        else:
            self._fast_path.loop.call_later(INNER_PAUSE_S, self._inner_answered)
        return False

    def _buy(
        self, campaign: Campaign, head: Head, body: bytes, asked_at: float, now: float
    ) -> None:
        """Check a purchase and queue it, or answer at once why not."""
        desk = self._fast_path.desk
        try:
            check_media_type(head.content_type or "")
            wish = decode_body(body, ORDER_REQUEST)
            key, token = checked_key(head.key), bearer_token(head.authorization or "")
            checked = desk.check(campaign, wish.quantity, wish.showing, key, token, now)
            purchase = FastPathPurchase(self._fast_path.answers, self, campaign, checked, asked_at)
            desk.submit(campaign, purchase)
        except Exception as error:  # noqa: BLE001 - told by what it is
            path = f"/api/v1/campaigns/{campaign.id}/orders"
            refused = refused_by(error, path, self.request_id)
            self._refuse(campaign, head, refused)
        else:
            self.purchase = purchase
            self.deadline = NEVER

    def send(self, wire: bytes) -> None:
        """Send the answer to the purchase that is under way; what waits behind it comes next."""
        self.purchase = None
        self._answer(wire, last=self._fast_path.draining)
        if self._held or self._ended:
            self._fast_path.loop.call_soon(self._advance)

    def _refuse(
        self, campaign: Campaign, head: Head, refused: Refused, *, last: bool = False
    ) -> None:
        """Answer a purchase that was not queued."""
        self._fast_path.desk.count_refused(campaign.id, refused.problem)
        if refused.problem in CHARGED:
            token = bearer_token(head.authorization or "")
            limited = charge(
                self._fast_path.engine, refused.problem, token, self._peer(), head.forwarded_for
            )
            if limited is not None:
                refused = TooFast(limited)
        last = last or self._fast_path.draining
        self._answer(rendered(*problem_answer(refused), last=last), last=last)

    def _turn_away(self, campaign: Campaign, wait_s: int) -> None:
        """Refuse before anything is done, at the least cost."""
        self._fast_path.desk.count_refused(campaign.id, Problem.OVERLOADED)
        self._answer(self._fast_path.overloaded[wait_s], last=False)

    def _answer(self, wire: bytes, *, last: bool) -> None:
        if self._transport is None:
            return
        self._transport.write(named(wire, self._request_id))
        self._request_id = None
        if last:
            self._transport.close()
        elif not self._writing_paused:
            self.deadline = self._fast_path.now + KEEPALIVE_S

    def _peer(self) -> str:
        transport = self._transport
        return first_of(None if transport is None else transport.get_extra_info("peername"))

    # What aiohttp serves.

    def _delegate_request(self, length: int) -> None:
        """Give the next ``length`` bytes, a whole request or its beginning, to aiohttp."""
        part, self._held = self._held[:length], self._held[length:]
        self._inner_left = length - len(part)
        self._lent, self._answered, self._looks = True, False, 0
        self._awaited = None  # its campaign may have gone since
        self.deadline = NEVER
        self._with_inner().data_received(part)

    def _delegate_connection(self) -> None:
        """Give all that is held and all that follows to aiohttp, for good."""
        part, self._held = self._held, b""
        self._for_good, self._awaited = True, None
        self.deadline = self._fast_path.now + HEAD_WITHIN_S
        inner = self._with_inner()
        inner.data_received(part)
        self.bound_what_is_held()
        self._bound_what_does_not_end(inner, len(part))

    def _with_inner(self) -> InnerHandler:
        if self._inner is None:
            self._inner = InnerHandler(
                self._fast_path.server,
                engine=self._fast_path.engine,
                draining=self._fast_path.is_draining,
                answered=self._inner_answered,
                reading=self._inner_reads,
                keepalive_timeout=INNER_KEEPALIVE_S,
            )
            assert self._transport is not None  # noqa: S101 - nothing is read from a lost one
            self._inner.connection_made(self._transport)
            self._inner.client_ended = self._ended
            if self._writing_paused:
                self._inner.pause_writing()
        return self._inner

    def _inner_answered(self) -> None:
        self._answered = True
        if not self._writing_paused:
            self.deadline = self._fast_path.now + KEEPALIVE_S
        if self._held or self._ended:
            self._fast_path.loop.call_soon(self._advance)

    def _inner_reads(self, on: bool) -> None:  # noqa: FBT001 - aiohttp's handler calls it
        self._inner_full = not on
        self.bound_what_is_held()
        if on and self._ended:
            self._fast_path.loop.call_soon(self._advance)

    def _settle(self) -> None:
        """See to what is held when no more of it can be served now, and to the end."""
        self.bound_what_is_held()
        if self._ended:
            self._end()

    def _end(self) -> None:
        """Close, if nothing that came whole is left to serve: the client sends no more."""
        transport = self._transport
        if self._ready() and transport is not None:
            if self._held and self._awaited is None:
                # Half a head: aiohttp may know already that it will be none.
                self._delegate_connection()
            else:
                transport.close()
        inner = self._inner
        if inner is not None and (self._for_good or self._inner_left) and not self._inner_full:
            inner.eof_received()
        if transport is not None and transport.is_closing():
            self.deadline = self._fast_path.now + UNREAD_WITHIN_S

    # Bounds.

    def bound_what_is_held(self) -> None:
        """Read no more while too much waits behind a request that is under way, or in all."""
        fast_path, held = self._fast_path, len(self._held)
        if held != self._counted:
            more, self._counted = held - self._counted, held
            fast_path.hold(more)
        transport = self._transport
        if transport is None or self._ended:  # there is nothing more to read
            fast_path.unread.pop(self, None)
            return
        much = held > HELD_FREELY and fast_path.held > HELD_BY_ALL_MAX
        if much:
            fast_path.unread[self] = None
        elif fast_path.unread:
            fast_path.unread.pop(self, None)
        paused = much or self._inner_full or held > HELD_MAX
        self._unsettled = paused or held > 0
        if paused != self._reading_paused:
            self._reading_paused = paused
            if paused:
                transport.pause_reading()
            else:
                transport.resume_reading()

    def _bound_what_does_not_end(self, inner: InnerHandler, length: int) -> None:
        """End what sends a head without an end: aiohttp bounds its lines, and takes many."""
        self._unended = self._unended + length if inner.idle else 0
        if self._unended > HELD_MAX and self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        """End a connection that has waited too long, or give it longer."""
        if self._transport is None:
            return
        if self._writing_paused or self._transport.is_closing():
            self._transport.abort()  # what a client does not read is never flushed
        elif self._inner is not None and self._inner.busy:
            self.deadline = self._fast_path.now + KEEPALIVE_S
        else:
            if self._awaited is not None:
                self._request_id = self._awaited[1].request_id
                self._refuse(*self._awaited, BodyLate(), last=True)
            self._transport.close()
            self.deadline = self._fast_path.now + UNREAD_WITHIN_S  # for what is still to be read

    def close(self) -> None:
        """Close it, whatever is under way."""
        if self._transport is not None:
            self._transport.close()


def _may_become_a_head(held: bytes) -> bool:
    """Whether what has come so far is worth waiting for; aiohttp refuses the rest at once."""
    return len(held) <= HEAD_MAX and held[:1].isupper() and b"\n\n" not in held
