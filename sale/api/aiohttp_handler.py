"""aiohttp's side of a connection: its own refusals are problem documents, and it can be drained.

It stands alone where the fast lane is off (``LoneHandler``), and inside a ``lane.Connection`` where
it is on (``InnerHandler``). This is the one module that leans on aiohttp's private state (what
``busy``, ``idle`` and ``_end`` look at); ``tests/test_lane_connections.py`` fails where a new
version has changed it, and the version is pinned.

aiohttp by itself closes a connection at the client's end of file, and whoever shuts down only the
sending side gets no answer. Ours answers what came whole, and closes then.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from sale.api.lane_wire import rendered
from sale.api.problems import problem_answer, problem_response
from sale.domain import Problem, Refused
from sale.usecases.admission import Admission

KEEPALIVE_S: Final = 75.0
UNREAD_WITHIN_S: Final = 30.0
"""How long a client may leave unread what has been written to it."""

ENDED_WITHIN_S: Final = 75.0
"""How long a client that sends no more may wait for its answers, and take to read them."""


class Handler(web.RequestHandler):
    """aiohttp's handler of one connection.

    ``draining`` tells whether each answer must be the connection's last.
    """

    __slots__ = ("_body", "_broken", "_done_with", "_draining", "_ended", "client_ended")

    def __init__(
        self,
        server: web.Server,
        *,
        draining: Callable[[], bool],
        keepalive_timeout: float = KEEPALIVE_S,
    ) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # as aiohttp itself passes it
            keepalive_timeout=keepalive_timeout,
        )
        self._draining = draining
        self._body: StreamReader = EMPTY_PAYLOAD
        """That of the request that came last."""
        self._done_with: StreamReader = EMPTY_PAYLOAD
        """That of the request that was answered last."""
        self._broken: StreamReader = EMPTY_PAYLOAD
        """One of which a later part could not be read: nothing follows it."""
        self._ended = False
        self.client_ended = False
        """Whether the client sends no more; most who do so have left."""

    def data_received(self, data: bytes) -> None:
        """Parse what has come; whether its last body is whole is asked at the end."""
        body = self._body
        super().data_received(data)
        self._keep_body()
        if self._body is not body and not body.is_eof() and body.exception() is None:
            # Only its parser's error comes behind a body that is not whole. aiohttp would let
            # whoever reads that body wait for the rest.
            self._broken = body
            if body is not self._done_with:
                body.set_exception(web.RequestPayloadError("a chunk cannot be read"))
            body.feed_eof()

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp never keeps it open
        """Answer what has come whole, then close: the client sends no more, and may still read.

        Who has left altogether looks the same; the answer then goes nowhere.
        """
        self._ended = self.client_ended = True
        self._end()
        return self.transport is not None

    def _keep_body(self) -> None:
        if self._messages:
            self._body = self._messages[-1][1]

    def _end(self) -> None:
        """Close, unless a request that is whole has still to begin: behind its answer then."""
        self._keep_body()
        waiting = len(self._messages)
        cut_off = not self._body.is_eof() and self._body.exception() is None
        if waiting > cut_off or self._message_tail:
            return
        # aiohttp waits for nothing, and has taken up what came: the last of that is under way.
        begun = self._waiter is None and self._request_count > waiting
        if begun and waiting == cut_off:
            self.close()  # when that is answered
            return
        if cut_off:
            self._body.set_exception(web.RequestPayloadError("the client sends no more"))
        self.force_close()

    @property
    def busy(self) -> bool:
        """Whether a request is under way here."""
        return self._request_in_progress or bool(self._messages)

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do until a further request comes."""
        waiter = self._waiter
        return waiter is not None and not waiter.done() and not self.busy

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Send an answer; the connection's last while draining, or to what could not be read."""
        broken = self._broken is not EMPTY_PAYLOAD and request.content is self._broken
        if broken or self._draining():
            resp.force_close()
        return self._then(request.content, super().finish_response(request, resp, start_time))

    async def _then(
        self, body: StreamReader, sending: Coroutine[Any, Any, tuple[web.StreamResponse, bool]]
    ) -> tuple[web.StreamResponse, bool]:
        sent = await sending
        self._done_with = body
        self._keep_body()  # what came behind an upgrade is parsed by now
        self._answer_is_out()
        if self._ended:
            self._end()
        return sent

    def _answer_is_out(self) -> None:
        """Take note that an answer is written; the handler is not idle yet."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer in fixed words: nothing of what was sent comes back."""
        super().handle_error(request, status, exc, message)  # logs, and sees that nothing was sent
        problem = Problem.UNAVAILABLE if status >= 500 else Problem.INVALID_REQUEST
        response = problem_response(Refused(problem, "this is not a request that can be read"))
        response.force_close()
        return response


class InnerHandler(Handler):
    """aiohttp's side of a connection that the lane has.

    ``answered`` is called behind every answer, when it has been written and before the handler is
    idle again; ``reading`` with whether it wants to read on, which the connection around decides:
    aiohttp by itself resumes the transport at the end of every body.
    """

    __slots__ = ("_answered", "_reading")

    def __init__(
        self,
        server: web.Server,
        *,
        draining: Callable[[], bool],
        answered: Callable[[], None],
        reading: Callable[[bool], None],
        keepalive_timeout: float,
    ) -> None:
        super().__init__(server, draining=draining, keepalive_timeout=keepalive_timeout)
        self._answered = answered
        self._reading = reading

    def _answer_is_out(self) -> None:
        self._answered()

    def _pause_transport_reading(self) -> None:
        self._reading(False)  # noqa: FBT003 - it is what the callback is about

    def _resume_transport_reading(self) -> None:
        self._reading(True)  # noqa: FBT003


class LoneHandler(Handler):
    """A connection that aiohttp has alone: the fast lane is off.

    ``admission`` counts it; beyond the bound it is told so and closed at once.
    """

    __slots__ = ("_admission", "_end_by", "_unread")

    def __init__(
        self, server: web.Server, *, draining: Callable[[], bool], admission: Admission
    ) -> None:
        super().__init__(server, draining=draining)
        self._admission: Admission | None = admission
        self._end_by: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many."""
        if self._admission is not None and not self._admission.take_connection():
            wait_s = self._admission.retry_after(time.monotonic())
            self._admission = None
            refused = Refused(Problem.OVERLOADED, retry_after_s=wait_s)
            cast("asyncio.Transport", transport).write(
                rendered(*problem_answer(refused), last=True)
            )
            transport.close()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End."""
        if self._admission is not None:
            self._admission.release_connection()
            self._admission = None
        for timer in (self._end_by, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what has come whole, then close; not for ever."""
        open_still = super().eof_received()
        if self.transport is not None and self._end_by is None:
            self._end_by = self._loop.call_later(ENDED_WITHIN_S, self.transport.abort)
        return open_still

    def pause_writing(self) -> None:
        """Wait until the client has read its answers: aiohttp would for ever."""
        super().pause_writing()
        if self.transport is not None:
            self._unread = self._loop.call_later(UNREAD_WITHIN_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
