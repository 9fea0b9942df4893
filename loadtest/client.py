"""An HTTP client that can really offer load.

Requests are bytes that were built before the run; a connection is one ``asyncio.Protocol`` that
writes them and cuts the answers out of the stream. There is no task, future or header object a
request: a full client library spends more on a request than the engine spends on a purchase, and
then the client is what is measured. Closed loop: a connection sends the next request when it has
the answer to the last one.

An answer that did not come (timeout, connection lost) is an outcome of its own, ``status`` 0: the
order may stand or not. Only the asker can settle it, by the same key.
"""

import asyncio
import math
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast

from loadtest.wire import (
    UNKNOWN,
    ProtocolError,
    Response,
    ResponseParser,
    get_request,
    problem_code,
)

TIMEOUT_S: Final = 10.0
RECONNECT_S: Final = 10.0
RECONNECT_PAUSE_S: Final = 0.05


class Unreachable(ConnectionError):  # noqa: N818 - says what it is
    """No connection to the server could be made, or made again, in time."""


class AnswerError(Exception):
    """The server answered something else than was asked for; the message is for people."""


@dataclass(slots=True)
class RunResult:
    """What a run offered and got. ``duration_s`` is wall time, first request to last answer."""

    duration_s: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: "array[float]" = field(default_factory=lambda: array("d"))

    @property
    def requests(self) -> int:
        """Requests that were sent, those without an answer included."""
        return self.statuses.total()

    @property
    def unknown(self) -> int:
        """Requests whose answer never came."""
        return self.statuses[UNKNOWN]

    @property
    def rate(self) -> float:
        """Answers a second."""
        return (self.requests - self.unknown) / self.duration_s if self.duration_s else 0.0

    def percentiles_ms(self, *shares: float) -> tuple[float, ...]:
        """Latency in ms that the given shares (0 to 1) of the answers stayed within."""
        ranked = sorted(self.latencies_s)
        places = [max(math.ceil(share * len(ranked)) - 1, 0) for share in shares]
        return tuple(ranked[place] * 1e3 if ranked else 0.0 for place in places)


Callback = Callable[[Any, Response], None]
_Job = tuple[bytes, Any, Callback]


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, client: "Client") -> None:
        self.client = client
        self.transport: asyncio.Transport | None = None
        self.parser = ResponseParser()
        self.job: _Job | None = None
        self.sent_at = 0.0
        self.why = "connection lost"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def send(self, job: _Job) -> None:
        if self.transport is None:
            raise Unreachable("the connection is not open")
        self.job = job
        self.sent_at = time.perf_counter()
        self.transport.write(job[0])

    def data_received(self, data: bytes) -> None:
        try:
            answers = self.parser.feed(data, most=0 if self.job is None else 1)
        except ProtocolError as error:
            self.client.fail(error)
            self.abort(str(error))
            return
        for answer in answers:
            self.settle(answer)
            if b"close" in answer.head and (answer.header("connection") or "").lower() == "close":
                self.abort("the server closes")
            else:
                self.client.next_for(self)

    def settle(self, answer: Response) -> None:
        job, self.job = self.job, None
        if job is not None:
            answer.sent_at = self.sent_at
            answer.received_at = time.perf_counter()
            job[2](job[1], answer)

    def abort(self, why: str) -> None:
        self.why = why
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        why = f"{self.why}: {error}" if error else self.why
        self.settle(Response(UNKNOWN, b"", b"", why))
        self.client.lost(self)


class Client:
    """N keep-alive connections to one server; one request under way on each.

    ``address`` is ``host:port`` or ``unix:PATH``. Use as ``async with Client(…) as client``.
    """

    def __init__(self, address: str, connections: int = 1, *, timeout_s: float = TIMEOUT_S) -> None:
        self.address = address
        self.connections = connections
        self.timeout_s = timeout_s
        self._live: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._queue: deque[_Job] = deque()
        self._plan: Iterator[tuple[bytes, Any]] | None = None
        self._on_answer: Callback = _ignore
        self._open = 0
        self._pending = 0
        self._done: asyncio.Event = asyncio.Event()
        self._error: Exception | None = None
        self._closing = False
        self._repairs: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(self._connect() for _ in range(self.connections)))
        except BaseException:
            await self.close()
            raise
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; what is under way ends as unknown."""
        self._closing = True
        tasks = [*self._repairs, *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._live):
            connection.abort("closed")
        for job in self._queue:
            job[2](job[1], Response(UNKNOWN, b"", b"", "closed"))
        self._queue.clear()
        await asyncio.sleep(0)

    async def request(self, raw: bytes) -> Response:
        """Send one request and wait for its answer. Raises ProtocolError, Unreachable."""
        if self._error:
            raise self._error
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._queue.append((raw, future, _resolve))
        self._kick(1)
        answer = await future
        if self._error:
            raise self._error
        return answer

    async def run(
        self,
        plan: Iterable[tuple[bytes, Any]],
        on_answer: Callback,
        *,
        limit_s: float = 600.0,
    ) -> RunResult:
        """Play a plan of (request, context) over all connections, as fast as they are answered.

        ``on_answer(context, response)`` is called for each, in the order of the answers. The plan
        is read as it is needed, so it may be a generator that ends when time is up.

        Raises:
            ProtocolError: the server sent what is not understood.
            Unreachable: the server went away for good.
            TimeoutError: the plan was not played within ``limit_s``.

        """
        if self._plan is not None:
            raise RuntimeError("one run at a time")
        if self._error:
            raise self._error
        result = RunResult()
        statuses, latencies = result.statuses, result.latencies_s

        def count(context: object, answer: Response) -> None:
            statuses[answer.status] += 1
            if answer.status:
                latencies.append(answer.received_at - answer.sent_at)
            self._pending -= 1
            on_answer(context, answer)

        self._plan, self._on_answer, self._pending = iter(plan), count, 0
        self._done.clear()
        start = time.perf_counter()
        try:
            self._kick(self.connections)
            async with asyncio.timeout(limit_s):
                await self._done.wait()
        finally:
            self._plan = None
        if self._error:
            raise self._error
        result.duration_s = time.perf_counter() - start
        return result

    def next_for(self, connection: _Connection) -> None:
        """Give a free connection its next request, or set it aside."""
        job = self._next_job()
        if job is None:
            self._idle.append(connection)
        else:
            connection.send(job)

    def lost(self, connection: _Connection) -> None:
        """Replace a connection that was lost."""
        if connection not in self._live:
            return
        self._live.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._end_if_done()
        if not self._closing and self._error is None:
            task = asyncio.create_task(self._repair())
            self._repairs.add(task)
            task.add_done_callback(self._repairs.discard)

    def fail(self, error: Exception) -> None:
        """End everything with this error: the run would not mean anything."""
        self._error = self._error or error
        self._done.set()
        for job in self._queue:
            job[2](job[1], Response(UNKNOWN, b"", b"", str(error)))
        self._queue.clear()

    def _end_if_done(self) -> None:
        if self._plan is None and not self._pending:
            self._done.set()

    def _next_job(self) -> _Job | None:
        if self._queue:
            return self._queue.popleft()
        step = next(self._plan, None) if self._plan is not None else None
        if step is None:
            self._plan = None
            self._end_if_done()
            return None
        self._pending += 1
        return (step[0], step[1], self._on_answer)

    def _kick(self, most: int) -> None:
        for _ in range(min(most, len(self._idle))):
            self.next_for(self._idle.pop(0))

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        if self.address.startswith("unix:"):
            _, made = await loop.create_unix_connection(
                lambda: _Connection(self), self.address.removeprefix("unix:")
            )
        else:
            host, _, port = self.address.rpartition(":")
            _, made = await loop.create_connection(
                lambda: _Connection(self), host.strip("[]"), int(port)
            )
        self._live.add(made)
        self.next_for(made)

    async def _repair(self) -> None:
        deadline = time.perf_counter() + RECONNECT_S
        while not self._closing:
            try:
                async with asyncio.timeout(RECONNECT_S):
                    return await self._connect()
            except OSError as error:
                if time.perf_counter() > deadline:
                    return self.fail(Unreachable(f"{self.address}: {error}"))
            await asyncio.sleep(RECONNECT_PAUSE_S)
        return None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(self.timeout_s / 4, 0.5))
            before = time.perf_counter() - self.timeout_s
            for connection in list(self._live):
                if connection.job is not None and connection.sent_at < before:
                    connection.abort("no answer in time")


async def read_json(client: Client, path: str) -> Any:  # noqa: ANN401 - JSON
    """GET a JSON document. Raises AnswerError."""
    answer = await client.request(get_request(client.address, path))
    if answer.status != 200:
        why = problem_code(answer.status, answer.body) or answer.why
        raise AnswerError(f"{client.address}, GET {path}: {answer.status or 'no answer'}, {why}")
    return answer.json()


def _ignore(_context: object, _answer: Response) -> None: ...


def _resolve(future: asyncio.Future[Response], answer: Response) -> None:
    if not future.done():
        future.set_result(answer)
