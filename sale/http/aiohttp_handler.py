"""aiohttp's side of a connection: its own refusals are problem documents, and it can be drained.

It stands alone where the fast path is off (``LoneHandler``), and inside a connection of the fast
path where it is on (``InnerHandler``). This is the one module that depends on aiohttp's private
state (what ``busy``, ``idle`` and ``_end`` look at); ``tests/test_fast_path_connections.py`` fails
where a new version has changed it, and the version is pinned.

aiohttp by itself closes a connection at the client's end of file, and whoever shuts down only the
sending side gets no answer. Ours answers what came whole, and closes then.

aiohttp by itself forgets what it has parsed of a read of which a later part cannot be, and drops
what follows an upgrade that it does not know. Ours is given a read piece by piece
(``_piece_end``), so that no piece has two requests in it, and takes no upgrade at all.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, Protocol, cast

import structlog
from aiohttp import HttpVersion, HttpVersion11, hdrs, web
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from multidict import CIMultiDict, CIMultiDictProxy

from sale.http.bounds import ENDED_WITHIN_S, KEEPALIVE_S, UNREAD_WITHIN_S
from sale.http.head_rules import HeadFault, fault_of_head, fault_of_unreadable
from sale.http.overload import Overload
from sale.http.request_ids import HEADER, REQUEST_ID, name_request, named
from sale.http.wire import SERVER

HEAD_END: Final = b"\r\n\r\n"
LINE_MAX: Final = 8_192
"""Of a head, what is kept while it comes: aiohttp takes no longer first line."""

log = structlog.get_logger()


class Refusals(Protocol):
    """Answers what is refused before a route is found."""

    def of_head(self, request: web.BaseRequest, fault: HeadFault | None) -> web.Response:
        """Answer a request whose head is refused; None: it cannot be read."""

    def of_status(self, request: web.BaseRequest, status: int) -> web.Response:
        """Answer a request that aiohttp itself refuses with a status."""

    def of_failure(self) -> web.Response:
        """Answer a fault of ours."""

    def of_crowding(self, wait_s: int) -> bytes:
        """Give the bytes that a connection beyond the bound is answered, as its last."""


class Handler(web.RequestHandler):
    """aiohttp's handler of one connection.

    ``draining`` tells whether each answer must be the connection's last.
    """

    __slots__ = (
        "_before",
        "_body",
        "_body_left",
        "_broken",
        "_done_with",
        "_draining",
        "_ended",
        "_line",
        "_refusals",
        "_rest",
        "_unreadable",
        "client_ended",
    )  # fmt: skip

    def __init__(
        self,
        server: web.Server,
        *,
        refusals: Refusals,
        draining: Callable[[], bool],
        keepalive_timeout: float = KEEPALIVE_S,
    ) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # as aiohttp itself passes it
            keepalive_timeout=keepalive_timeout,
            auto_decompress=False,  # packed bodies are refused: see request.is_plain
        )
        self._refusals = refusals
        self._draining = draining
        self._rest = b""
        """Bytes that are still to be parsed: while there are any, no more is read."""
        self._before = b""
        """The last bytes that were parsed."""
        self._line = b""
        """How the head that is not whole yet begins: at least its first line."""
        self._body_left = 0
        """How much of the body that is being parsed is still to come, where its length is known."""
        self._unreadable = False
        """Whether something came that is no request; what follows is none either."""
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
        """Parse what has come, a piece at a time, as far as there is room for it."""
        if not data:
            self._parse(b"")  # what the parser itself has kept
        data, self._rest = self._rest + data, b""
        at = 0
        while at < len(data) and not (self._unreadable or self._close or self._force_close):
            if self._reading_paused or len(self._messages) >= self._max_msg_queue_size:
                self._rest = data[at:]
                break
            in_body = self._body_left > 0
            end = self._piece_end(data, at)
            self._parse(data[at:end])
            last = self._before + data[max(end - len(HEAD_END), 0) : end]
            if in_body or last.endswith(HEAD_END):
                self._line = b""
            at = end
        self._before = (self._before + data[:at])[-len(HEAD_END) + 1 :]

    def _piece_end(self, data: bytes, at: int) -> int:
        """Find the end of what may be parsed in one go: a body, or all up to the end of a head."""
        if self._body_left:
            end = min(at + self._body_left, len(data))
            self._body_left -= end - at
            return end
        if not at:  # the end of a head may have begun in the read before
            over = (self._before + data[: len(HEAD_END) - 1]).find(HEAD_END)
            if over >= 0:
                return over + len(HEAD_END) - len(self._before)
        end = data.find(HEAD_END, at)
        return len(data) if end < 0 else end + len(HEAD_END)

    def _parse(self, piece: bytes) -> None:
        """Parse one piece; whether its last body is whole is asked at the end."""
        body, count = self._body, self._request_count
        line = self._line = self._line + piece[: LINE_MAX - len(self._line)]
        super().data_received(piece)
        if self._upgraded and self._parser is not None:  # nobody takes it: requests go on
            self._parser.set_upgraded(False)
            self._upgraded = False
        if self._request_count > count and self._messages:
            message = self._messages[-1][0]
            if isinstance(message, RawRequestMessage):
                length = message.headers.get(hdrs.CONTENT_LENGTH, "").lstrip("0")
                self._body_left = int(length or 0)
                # llhttp reads RTSP/1.0 as 1.0 too.
                if line and b" HTTP/" not in line.lstrip(b"\r\n").partition(b"\n")[0]:
                    unknown = message._replace(version=_NO_VERSION)
                    self._messages[-1] = unknown, self._messages[-1][1]
            else:
                self._unreadable = True
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
        if waiting > cut_off or self._rest:
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

    def _handle_request(
        self,
        request: web.BaseRequest,
        start_time: float | None,
        request_handler: Callable[[Any], Awaitable[web.StreamResponse]],
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Name a request, and have it served unless its head alone is refused."""
        message = request._message  # noqa: SLF001 - the version is wanted as it was sent
        # For bytes that are no request, aiohttp makes a message with a plain dict.
        is_none = isinstance(cast("object", message.headers), dict)
        if is_none:
            request._headers = _NO_HEADERS  # noqa: SLF001
        name_request(request)
        fault = fault_of_head(message)
        if fault is not None:
            request_handler = partial(self._refuse, fault)
        if fault is not None or is_none:
            request._version = HttpVersion11  # noqa: SLF001 - that of the answer
        return super()._handle_request(request, start_time, request_handler)

    async def _refuse(self, fault: HeadFault, request: web.BaseRequest) -> web.StreamResponse:
        response = self._refusals.of_head(request, fault)
        response.force_close()
        return response

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Send an answer; the connection's last while draining, or to what could not be read."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = self._refusals.of_status(request, resp.status)
        resp.headers[HEADER] = request.get(REQUEST_ID) or name_request(request)
        resp.headers[hdrs.SERVER] = SERVER
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
        message: str | None = None,  # noqa: ARG002 - it may quote the client
    ) -> web.StreamResponse:
        """Answer in fixed words: nothing of what was sent comes back."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if status >= 500:
            name = request.get(REQUEST_ID, "")
            log.error("request.failed", path=request.path, request_id=name, exc_info=exc)
            response = self._refusals.of_failure()
        else:
            response = self._refusals.of_head(request, fault_of_unreadable(exc))
        response.force_close()
        return response


_NO_VERSION: Final = HttpVersion(0, 0)
_NO_HEADERS: Final = CIMultiDictProxy[str](CIMultiDict())


class InnerHandler(Handler):
    """aiohttp's side of a connection of the fast path.

    ``answered`` is called behind every answer, when it has been written and before the handler is
    idle again; ``reading`` with whether it wants to read on, which the connection around decides:
    aiohttp by itself resumes the transport at the end of every body.
    """

    __slots__ = ("_answered", "_reading")

    def __init__(
        self,
        server: web.Server,
        *,
        refusals: Refusals,
        draining: Callable[[], bool],
        answered: Callable[[], None],
        reading: Callable[[bool], None],
        keepalive_timeout: float,
    ) -> None:
        super().__init__(
            server, refusals=refusals, draining=draining, keepalive_timeout=keepalive_timeout
        )
        self._answered = answered
        self._reading = reading

    def _answer_is_out(self) -> None:
        self._answered()

    def _pause_transport_reading(self) -> None:
        self._reading(False)  # noqa: FBT003 - it is what the callback is about

    def _resume_transport_reading(self) -> None:
        self._reading(True)  # noqa: FBT003


class LoneHandler(Handler):
    """A connection that aiohttp has alone: the fast path is off.

    ``overload`` counts it; beyond the bound it is told so and closed at once.
    """

    __slots__ = ("_admitted", "_end_by", "_overload", "_unread")

    def __init__(
        self,
        server: web.Server,
        *,
        refusals: Refusals,
        draining: Callable[[], bool],
        overload: Overload,
    ) -> None:
        super().__init__(server, refusals=refusals, draining=draining)
        self._overload = overload
        self._admitted = False
        self._end_by: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many."""
        self._admitted = self._overload.take_connection()
        if not self._admitted:
            wire = self._refusals.of_crowding(self._overload.retry_after(time.monotonic()))
            cast("asyncio.Transport", transport).write(named(wire, None))
            transport.close()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End."""
        if self._admitted:
            self._admitted = False
            self._overload.release_connection()
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
