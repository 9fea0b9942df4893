"""One connection of a client: cuts requests, has them served, delegates the rest to aiohttp.

It knows bytes: heads, bodies, their bounds and times, the waiting line, what waits behind a request
that is under way. What a request is about is known by the handler of its route
(``fast_routes.py``). ``fast_path.py`` says how the whole works and names the bounds.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Any, cast

import structlog

from sale.http.bounds import (
    BODY_MAX,
    BODY_WITHIN_S,
    HEAD_WITHIN_S,
    KEEPALIVE_S,
    UNENDED_MAX,
    UNREAD_WITHIN_S,
)
from sale.http.client import NEVER, ClientConnection
from sale.http.delegation import Delegation
from sale.http.fast_routes import FastBodyHandler, FastHandler, Head
from sale.http.overload import LATE, TURN
from sale.http.request_head import may_become_a_head

if TYPE_CHECKING:
    from sale.http.fast_path import FastPath

log = structlog.get_logger()


class Connection(ClientConnection):
    """One connection. See the module's docstring."""

    __slots__ = ("_awaited", "_for_good", "_shape", "_waits", "pending")

    def __init__(self, fast_path: "FastPath") -> None:
        super().__init__(fast_path)
        self._awaited: tuple[FastBodyHandler, Any, Head] | None = None
        """The request whose body is awaited: its handler, the handler's finding, its head."""
        self.pending: object = None
        """The work that answers the request under way."""
        self._shape = fast_path.heads.shape
        self._for_good = self._waits = False

    @property
    def busy(self) -> bool:
        """Whether a request is under way here."""
        if self.pending is not None or self._waits:
            return True
        return self._delegation is not None and self._delegation.handler.busy

    # Callbacks of the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the first request has as long as any head."""
        self._transport = cast("asyncio.Transport", transport)
        # Not the fast path's clock: it stands still while the process starts.
        self.deadline = self._fast_path.loop.time() + HEAD_WITHIN_S
        self._admitted = self._fast_path.overload.take_connection()
        if self._admitted:
            self._fast_path.connections.add(self)
            return
        wait_s = self._fast_path.overload.retry_after(time.monotonic())
        self._answer(self._fast_path.say_overloaded(wait_s, True), last=True)  # noqa: FBT003

    def connection_lost(self, exc: Exception | None) -> None:
        """End. A request that is under way goes on: its order stands (HOLES.md row 23)."""
        self._transport = None
        self._held = b""
        self.bound_what_is_held()
        if self._admitted:
            self._fast_path.connections.discard(self)
            self._fast_path.overload.release_connection()
        if self._delegation is not None:
            self._delegation.handler.connection_lost(exc)

    def pause_writing(self) -> None:
        """Look at nothing more until the client has read its answers; it has not for ever."""
        self._writing_paused = True
        self.deadline = self._fast_path.now + UNREAD_WITHIN_S
        if self._delegation is not None:
            self._delegation.handler.pause_writing()

    def resume_writing(self) -> None:
        """Go on."""
        self._writing_paused = False
        self.deadline = NEVER if self.busy else self._fast_path.now + KEEPALIVE_S
        if self._delegation is not None:
            self._delegation.handler.resume_writing()
        self._advance()

    def data_received(self, data: bytes) -> None:
        """Take in what has come, and look at it if nothing else is under way."""
        delegation = self._delegation
        if delegation is not None:
            if self._for_good:
                delegation.handler.data_received(data)
                self._bound_what_does_not_end(delegation, len(data))
                return
            if delegation.left:
                data = delegation.go_on(data)
        before, self._held = self._held, self._held + data
        if not before and self._fast_path.overload.waiters and self._joins(data):
            self._wait(time.monotonic())
        elif self._awaited is None or len(self._held) >= self._awaited[2].whole:
            self._advance()
        else:
            self.bound_what_is_held()

    def eof_received(self) -> bool:
        """Serve what has come whole, then close; the transport is to stay open until then."""
        if not self._ended:
            self._ended = self._unsettled = True
            if self._delegation is not None:
                self._delegation.handler.client_ended = True
            if self._waits and not self._fast_path.draining:
                self._leave_waiting_line()
            self._advance()
        return True

    # The way of a request.

    def _advance(self, *, since: float | None = None) -> None:
        """Serve what is held, as far as it can be served now.

        ``since``: the first of it has stood in the waiting line since then, and is answered now.
        """
        fast_path = self._fast_path
        while (held := self._held) and self._ready():
            head = self._shape.read(held)
            if head is None or fast_path.draining:
                head = self._look(held)
                if head is None:
                    break
            handler, whole = head.handler, head.whole
            found = None if handler is None else handler.find(head.name)
            if handler is None or found is None:
                self._delegate_request(whole)
            elif whole - head.end > BODY_MAX:
                self._delegate_connection()
                break
            elif len(held) < whole and isinstance(handler, FastBodyHandler):
                self._awaited = handler, found, head
                self.deadline = fast_path.now + BODY_WITHIN_S
                break
            elif self._serve(handler, found, head, since):
                since = None
            else:
                break
        if self._held or self._unsettled:
            self._settle()

    def _serve(self, handler: FastHandler, found: Any, head: Head, since: float | None) -> bool:  # noqa: ANN401
        """Serve or refuse the first request that is held, which is whole; False: it must wait."""
        overload, now, held = self._fast_path.overload, time.monotonic(), self._held
        if handler.waits:
            reason = overload.overloaded(now, called=since is not None)
            if reason and since is None and self._should_wait(reason, now):
                return False
        else:
            reason = overload.turn_is_over(now)
        whole = head.whole
        self._held, self._awaited = held[whole:], None
        self._request_id = head.request_id
        if reason:
            self._refuse(handler, found, reason, now)
            return True
        wire = handler.serve(self, found, head, held[head.end : whole], since or now, now)
        if wire is None:
            self.deadline = NEVER
        else:
            self._answer(wire, last=self._fast_path.draining)
        return True

    def _look(self, held: bytes) -> Head | None:
        """Read a head that is not of the usual shape.

        None: it is not whole yet, or the connection was delegated.
        """
        fast_path = self._fast_path
        end = held.find(b"\r\n\r\n") + 4
        if end < 4 and may_become_a_head(held):
            self.deadline = min(self.deadline, fast_path.now + HEAD_WITHIN_S)
            return None
        head = fast_path.heads.read(held, end) if end >= 4 else None
        if head is None or fast_path.draining:
            self._delegate_connection()
            return None
        if head.handler is not None:
            self._shape = fast_path.heads.shape
        return head

    def _joins(self, data: bytes) -> bool:
        """Whether what has just come may join the waiting line without being read any further."""
        return data.startswith(self._fast_path.routes.waiting_prefixes) and self._ready()

    def _should_wait(self, reason: str, now: float) -> bool:
        """Whether to join the waiting line rather than be refused now; then it does."""
        if self._ended or (reason != TURN and self._fast_path.overload.may_refuse(now)):
            return False
        self._awaited = None
        self._wait(now)
        return True

    def _wait(self, now: float) -> None:
        """Join the waiting line; what else comes here waits behind it."""
        self._waits = True
        self.deadline = NEVER
        self.bound_what_is_held()
        self._fast_path.waiting_line.join(self, now)

    def _leave_waiting_line(self) -> None:
        """Be refused: most clients that end their sending side while they wait have left."""
        self._waits = False
        held = self._held
        head = self._shape.read(held) or self._look(held)
        if head is None or head.whole > min(len(held), head.end + BODY_MAX):
            return
        found = None if head.handler is None else head.handler.find(head.name)
        if head.handler is not None and found is not None:
            self._held = held[head.whole :]
            self._request_id = head.request_id
            self._refuse(head.handler, found, LATE, time.monotonic())

    def called(self, since: float) -> None:
        """Be looked at, and either served or refused; it has stood ``since`` then."""
        if not self._waits:
            return
        self._waits = False
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
        if self._for_good or self._writing_paused or self._waits or self.pending is not None:
            return False
        delegation = self._delegation
        if delegation is None or not delegation.active:
            return True
        return delegation.is_over(self._delegate_answered)

    def post(self, wire: bytes) -> None:
        """Send the answer to the request that is pending soon, with the others of its batch.

        Each write wakes the client's side. Between two of them lies the wording of one answer, in
        which a quick client falls asleep again: written in one go, 256 answers wake it less often.
        """
        fast_path = self._fast_path
        if not fast_path.outbox:
            fast_path.loop.call_soon(fast_path.send_outbox)
        fast_path.outbox.append((self, wire))

    def send(self, wire: bytes) -> None:
        """Send the answer to the request that is pending; what waits behind it comes next."""
        self.pending = None
        self._answer(wire, last=self._fast_path.draining)
        if self._held or self._ended:
            self._fast_path.loop.call_soon(self._advance)

    def _refuse(self, handler: FastHandler, found: Any, reason: str, now: float) -> None:  # noqa: ANN401
        """Refuse for overload before anything is done, at the least cost."""
        wait_s = self._fast_path.overload.refuse(reason, now)
        handler.count_overloaded(found)
        self._answer(self._fast_path.overloaded[wait_s], last=False)

    # Requests that aiohttp serves.

    def _delegate_request(self, length: int) -> None:
        """Give the next ``length`` bytes, a whole request or its beginning, to aiohttp."""
        part, self._held = self._held[:length], self._held[length:]
        self._awaited = None  # what its path names may have gone since
        self.deadline = NEVER
        self._with_delegation().begin(part, length - len(part))

    def _delegate_connection(self) -> None:
        """Give all that is held and all that follows to aiohttp, for good."""
        part, self._held = self._held, b""
        self._for_good, self._awaited = True, None
        self.deadline = self._fast_path.now + HEAD_WITHIN_S
        delegation = self._with_delegation()
        delegation.handler.data_received(part)
        self.bound_what_is_held()
        self._bound_what_does_not_end(delegation, len(part))

    def _with_delegation(self) -> Delegation:
        if self._delegation is None:
            assert self._transport is not None  # noqa: S101 - nothing is read from a lost one
            self._delegation = Delegation(
                self._fast_path, answered=self._delegate_answered, reading=self._delegate_reads
            )
            self._delegation.open(
                self._transport, client_ended=self._ended, paused=self._writing_paused
            )
        return self._delegation

    def _delegate_answered(self) -> None:
        assert self._delegation is not None  # noqa: S101 - it calls this
        self._delegation.note_answer()
        if not self._writing_paused:
            self.deadline = self._fast_path.now + KEEPALIVE_S
        if self._held or self._ended:
            self._fast_path.loop.call_soon(self._advance)

    def _delegate_reads(self, on: bool) -> None:  # noqa: FBT001 - aiohttp's handler calls it
        assert self._delegation is not None  # noqa: S101 - it calls this
        self._delegation.full = not on
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
        delegation = self._delegation
        if delegation is not None and (self._for_good or delegation.left) and not delegation.full:
            delegation.handler.eof_received()
        if transport is not None and transport.is_closing():
            self.deadline = self._fast_path.now + UNREAD_WITHIN_S

    # Bounds.

    def _bound_what_does_not_end(self, delegation: Delegation, length: int) -> None:
        """End what sends a head without an end: aiohttp bounds its lines, and takes many."""
        if delegation.unended(length) > UNENDED_MAX and self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        """End a connection that has waited too long, or give it longer."""
        if self._transport is None:
            return
        if self._writing_paused or self._transport.is_closing():
            self._transport.abort()  # what a client does not read is never flushed
        elif self._delegation is not None and self._delegation.handler.busy:
            self.deadline = self._fast_path.now + KEEPALIVE_S
        else:
            if self._awaited is not None:
                handler, found, head = self._awaited
                self._request_id = head.request_id
                self._answer(handler.refuse_late_body(self, found, head), last=True)
            self._transport.close()
            self.deadline = self._fast_path.now + UNREAD_WITHIN_S  # for what is still to be read
