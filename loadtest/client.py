"""An HTTP client for single requests: raw bytes out, the whole answer back.

`loadtest.generator` offers load. An answer that did not come (timeout, connection lost) has
``status`` 0: the order may stand or not, and only a repeat under the same key can settle it.
"""

import asyncio
import time
from typing import Any, Final, Self, cast

from loadtest.wire import (
    UNKNOWN,
    ProtocolError,
    Response,
    ResponseParser,
    closes,
    get_request,
    open_connection,
    problem_code,
)

TIMEOUT_S: Final = 10.0


class AnswerError(Exception):
    """The server answered something else than was asked for; the message is for people."""


class _Connection(asyncio.Protocol):
    """A connection with at most one request under way."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.open = False
        self._parser = ResponseParser()
        self._answer: asyncio.Future[Response] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        try:
            for answer in self._parser.feed(data, most=0 if self._answer is None else 1):
                self._end(answer)
        except ProtocolError as error:
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        why = "connection lost" + (f": {error}" if error else "")
        self._end(Response(UNKNOWN, b"", b"", why))

    def _end(self, answer: Response | ProtocolError) -> None:
        waiting, self._answer = self._answer, None
        if isinstance(answer, ProtocolError) or closes(answer.head):
            self.abort()
        if waiting is None or waiting.done():
            return
        if isinstance(answer, ProtocolError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    def abort(self) -> None:
        self.open = False
        self.transport.abort()

    async def ask(self, raw: bytes, timeout_s: float) -> Response:
        self._answer = waiting = asyncio.get_running_loop().create_future()
        sent_at = time.perf_counter()
        self.transport.write(raw)
        try:
            async with asyncio.timeout(timeout_s):
                answer: Response = await waiting
        except TimeoutError:
            answer = Response(UNKNOWN, b"", b"", "no answer in time")
            self.abort()
        except asyncio.CancelledError:
            self.abort()
            raise
        answer.sent_at, answer.received_at = sent_at, time.perf_counter()
        return answer


class Client:
    """Up to ``connections`` keep-alive connections to one server; one request under way on each.

    ``address`` is ``host:port`` or ``unix:PATH``. ``async with Client(…) as client`` raises OSError
    if nobody listens there. ``source`` is the address of this machine that it connects from.
    """

    def __init__(
        self, address: str, connections: int = 1, *, timeout_s: float = TIMEOUT_S, source: str = ""
    ) -> None:
        self.address = address
        self._source = source
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []
        self._live: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        self._idle.append(await self._connect())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def open(self) -> int:
        """How many of its connections are open."""
        return sum(connection.open for connection in self._live)

    async def close(self) -> None:
        """Close all connections; what is under way ends as unknown."""
        for connection in self._live:
            connection.abort()
        self._idle.clear()
        self._live.clear()
        await asyncio.sleep(0)

    async def request(self, raw: bytes) -> Response:
        """Send one request and wait for its answer. Raises ProtocolError, OSError."""
        async with self._turns:
            self._idle = [kept for kept in self._idle if kept.open]
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                return await connection.ask(raw, self._timeout_s)
            finally:
                if connection.open:
                    self._idle.append(connection)
                else:
                    self._live.discard(connection)

    async def _connect(self) -> _Connection:
        async with asyncio.timeout(self._timeout_s):
            made = await open_connection(self.address, _Connection, self._source)
        self._live.add(made)
        return made


async def read_json(client: Client, path: str) -> Any:  # noqa: ANN401 - JSON
    """GET a JSON document. Raises AnswerError."""
    answer = await client.request(get_request(client.address, path))
    if answer.status != 200:
        why = problem_code(answer.status, answer.body) or answer.why
        raise AnswerError(f"{client.address}, GET {path}: {answer.status or 'no answer'}, {why}")
    return answer.json()
