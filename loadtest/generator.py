"""The load generator of one process: each request at its intended time, whatever the server does.

The times stand before the run. A kernel timer wakes the event loop for those that are due; each
goes out on a free keep-alive connection. If none is free the pool grows to its bound, and then
members wait in a bounded queue. Latency counts from the *intended* time to the member's last
answer, repeats and all waiting included: a server that stalls is not spared the members that would
have come meanwhile (coordinated omission). There is no task and no future per request.

A closed loop (`closed`) is the same with a window: all requests are due at once, and each of so
many connections sends the next when it has an answer.

A member asks again under its key after no answer, 429 and any 5xx (a balancer's 502 or 504 leaves
the outcome open), as Retry-After says and a jitter later, a bounded number of times. The generator
records its own lateness (`late`, `lags`), so that a slow generator is not reported as a slow
server. Sending, refusals and connections stand in one room of more than 400 lines, because each
answer goes through all three.
"""

import asyncio
import gc
import heapq
import math
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, cast

from loadtest.pacer import Pacer
from loadtest.record import NO_ANSWER, NOT_SENT, REPLAYED, SOLD
from loadtest.tally import Bounds, Spool, Tally
from loadtest.wire import (
    UNKNOWN,
    ProtocolError,
    ResponseParser,
    Unreachable,
    asks_again,
    closes,
    open_connection,
    problem_code,
    retry_after_s,
)

TICK_S: Final = 0.0002
BATCH: Final = 128
BEAT_S: Final = 0.05
OPENING_MAX: Final = 16
"""Connections being opened at once: each costs the event loop as much as ten requests."""

CONNECT_S: Final = 10.0
BACKOFF_S: Final = 0.25
BACKOFF_MAX_S: Final = 4.0
RETRY_AFTER_MAX_S: Final = 30.0
JITTER: Final = 0.5
EARLY_PAUSE_S: Final = 0.05
EARLY_WITHIN_S: Final = 2.0
"""A member that gets "not open" so soon after the opening came a moment early, and asks again."""

CLOSED_MAX_S: Final = 600.0
AWAY_S: Final = 10.0
CLOSING: Final = b"\r\nConnection: close"
_NAN: Final = float("nan")


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way; ``number`` -1 is none."""

    __slots__ = ("loop", "number", "parser", "sent_at", "transport")

    def __init__(self, loop: "Generator") -> None:
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.parser = ResponseParser()
        self.number = -1
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        # A whole answer in one piece, as it mostly comes, needs no copies into a parser.
        end = data.find(b"\r\n\r\n")
        at = data.find(b"\r\nContent-Length: ", 0, end)
        if self.parser.idle and at > 0 and data.startswith(b"HTTP/1.1 ") and data[9] != 49:
            stop = data.find(b"\r", at + 18)
            if int(data[at + 18 : stop]) == len(data) - end - 4 and self.number >= 0:
                return self.loop.answered(self, int(data[9:12]), data[:end], data[end + 4 :])
        if self.number < 0 and self.transport is not None:
            return self.transport.abort()  # told before it asked: that there are too many of us
        try:
            answers = self.parser.feed(data, most=1)
        except ProtocolError as error:
            if error.status >= 500:  # a balancer's page: its framing is not ours to choose
                return self.loop.answered(self, error.status, CLOSING, b"")
            return self.loop.fail(error)
        for answer in answers:
            self.loop.answered(self, answer.status, answer.head, answer.body)
        return None

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        self.loop.lost(self)


class Generator:
    """Plays arrivals against one server (``host:port`` or ``unix:PATH``) and tells what came of it.

    ``offsets`` are seconds from the start, rising; ``raw(n)`` gives the bytes of arrival ``n``. It
    must give the same bytes each time: a repeat sends them again, under the same key. b"" ends the
    run: what has not been sent by then is not asked for.
    """

    def __init__(
        self,
        address: str,
        offsets: "array[float]",
        raw: Callable[[int], bytes],
        spool: Spool,
        bounds: Bounds | None = None,
    ) -> None:
        self.address = address
        self.offsets = offsets
        self.raw = raw
        self.spool = spool
        self.bounds = bounds or Bounds()
        count = len(offsets)
        nan = array("d", [_NAN])
        outcome = array("B", [3]) * count  # not sent, until something else is known
        self.tally = Tally(offsets, nan * count, outcome, array("f", [0.0]) * count)
        self.tally.sent_at = nan * count
        self._index = {code: number for number, code in enumerate(self.tally.codes)}
        self._tries = array("B", bytes(count))
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[int] = deque()
        self._again: list[tuple[float, int]] = []
        self._told: dict[int, str] = {}
        """The last answer of each request that is asked again."""
        self._live: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._next = 0
        self._left = count
        self._ended = False
        self._start = self._seen_at = 0.0
        self._done: asyncio.Event = asyncio.Event()
        self._error: Exception | None = None
        self._why = ""
        self._rng = random.Random()
        self._pacer: Pacer | None = None

    async def run(self, start: float | None = None) -> Tally:
        """Play it all; ``start`` is the time of offset 0 on ``time.monotonic()``, None: when warm.

        It ends when all members have their last answer, or have given up. Raises Unreachable where
        not one connection could be made before the start, ProtocolError.
        """
        self._start = time.monotonic() if start is None else start
        await asyncio.sleep(max(self._start - self.bounds.warm_s - time.monotonic(), 0))
        try:
            await self._warm()
            gc.collect()
            gc.freeze()
            if start is None:
                self._start = time.monotonic()
            self._pacer = Pacer(self._tick)
            self._pacer.at(self._start + self.offsets[0])
            beats = asyncio.create_task(self._beat())
            try:
                await self._finished()
            finally:
                beats.cancel()
                await asyncio.gather(beats, return_exceptions=True)
                self._pacer.close()
        finally:
            await self._close()
            gc.unfreeze()
        if self._error:
            raise self._error
        return self.tally

    @property
    def offered(self) -> int:
        """Arrivals taken up so far."""
        return self._next

    # The hot path ------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Send what is due, a bounded batch at a time so that answers are read between."""
        offsets, late, last = self.offsets, self.tally.late, len(self.offsets)
        number = self._next
        for _ in range(BATCH):
            now = time.monotonic() - self._start
            if self._ended or number >= last or (offset := offsets[number]) > now:
                break
            if self.bounds.window and not self._idle:
                break
            late[number] = now - offset
            self._next = number = number + 1
            self._dispatch(number - 1, now)
        again, now = self._again, time.monotonic() - self._start
        for _ in range(BATCH):
            if not again or again[0][0] > now:
                break
            self._dispatch(heapq.heappop(again)[1], now)
        self._arm(now)

    def _arm(self, now: float) -> None:
        more = self._next < len(self.offsets) and not self.bounds.window
        due = self.offsets[self._next] if more else None
        if self._again and (due is None or self._again[0][0] < due):
            due = self._again[0][0]
        if due is not None and self._pacer is not None:
            self._pacer.at(self._start + max(due, now + TICK_S))

    def _dispatch(self, number: int, now: float) -> None:
        idle = self._idle
        while idle:
            connection = idle.popleft()
            if connection.transport is not None:
                return self._send(connection, number, now)
        if len(self._waiting) >= self.bounds.queue:
            return self._settle(number, self._told.get(number, NOT_SENT), now)
        self._waiting.append(number)
        if len(self._live) >= self.bounds.connections:
            self.tally.pool_waits += 1
        return self._grow()

    def _send(self, connection: _Connection, number: int, now: float) -> None:
        raw = self.raw(number)
        if not raw:
            return self._end(connection)
        connection.number = number
        connection.sent_at = self.tally.sent_at[number] = now
        self._tries[number] += 1
        self.tally.sent[int(now)] += 1
        connection.transport.write(raw)  # type: ignore[union-attr]
        return None

    def _end(self, connection: _Connection) -> None:
        """Send nothing more but repeats of what was sent."""
        self._ended = True
        self._idle.append(connection)
        self._waiting = deque(number for number in self._waiting if self._tries[number])
        under_way = sum(each.number >= 0 for each in self._live)
        self._left = under_way + len(self._waiting) + len(self._again)
        if not self._left:
            self._done.set()

    def _free(self, connection: _Connection, now: float) -> None:
        """Use a free connection for the member that has waited longest, or keep it."""
        if not self._waiting:
            more = self._next < len(self.offsets) and not self._ended
            if self.bounds.window and more and self._pacer is not None:
                self._next += 1
                return self._send(connection, self._next - 1, now)
            return self._idle.append(connection)
        number = self._waiting.popleft()
        # With room in the pool it was our own opening of connections that was waited for.
        if not self._tries[number] and len(self._live) < self.bounds.connections:
            self.tally.late[number] = now - self.offsets[number]
        return self._send(connection, number, now)

    def answered(self, connection: _Connection, status: int, head: bytes, body: bytes) -> None:
        """Take in an answer: settle its member, or have it ask again; use the connection anew."""
        now = time.monotonic() - self._start
        number, connection.number = connection.number, -1
        self.tally.answered[int(now)] += 1
        replayed = status == 201 and b"\r\nIdempotency-Replayed: true" in head
        self.spool(number, status, replayed, body)
        if status == 201:
            self._settle(number, REPLAYED if replayed else SOLD, now)
        else:
            self._refused(number, status, head, body, now)
        if b"close" in head and closes(head):
            if connection.transport is not None:
                connection.transport.abort()
        elif connection.transport is not None:
            self._free(connection, now)

    def _settle(self, number: int, code: str, now: float) -> None:
        index = self._index.get(code)
        if index is None:
            index = self._index[code] = len(self.tally.codes)
            self.tally.codes.append(code)
        self.tally.outcome[number] = index
        self.tally.done_at[number] = now
        self._left -= 1
        if not self._left:
            self._done.set()

    # Refusals, repeats -------------------------------------------------------------------------

    def _refused(self, number: int, status: int, head: bytes, body: bytes, now: float) -> None:
        code = problem_code(status, body) or NO_ANSWER
        early = self.bounds.early_again and code == "not-open" and now < EARLY_WITHIN_S
        if not early and not asks_again(status):
            return self._settle(number, code, now)
        tries = self._tries[number]
        if early:
            wait_s = EARLY_PAUSE_S
        else:
            backoff_s = min(BACKOFF_S * 2 ** (tries - 1), BACKOFF_MAX_S)
            told_s = retry_after_s(head)
            if status == 503:
                self.tally.told_to_wait[told_s] += 1
            wait_s = min(told_s or backoff_s, RETRY_AFTER_MAX_S)
        wait_s *= 1 + JITTER * self._rng.random()
        left_s = self.bounds.give_up_s - (now - self.offsets[number])
        if tries > self.bounds.retries or wait_s > left_s:
            return self._settle(number, code, now)
        self.tally.retries += 1
        self._told[number] = code
        heapq.heappush(self._again, (now + wait_s, number))
        return self._arm(now)

    def lost(self, connection: _Connection) -> None:
        """Take note of a lost connection; a member whose request was on it does not know."""
        if connection not in self._live:
            return
        self._live.discard(connection)
        number, connection.number = connection.number, -1
        self.tally.lost_connections += 1
        if number >= 0:
            self.spool(number, UNKNOWN, False, b"")  # noqa: FBT003 - the Spool's own order
            self._refused(number, UNKNOWN, b"", b"", time.monotonic() - self._start)

    def fail(self, error: Exception) -> None:
        """End the run: the server sends what cannot be read, or is gone."""
        self._error = self._error or error
        self._done.set()

    # Connections -------------------------------------------------------------------------------

    async def _warm(self) -> None:
        """Open some connections before the start: at least one must come."""
        left = min(self.bounds.warm, self.bounds.connections)
        while left > 0:
            for _ in range(min(left, OPENING_MAX)):
                self._open()
            before = len(self._live)
            await asyncio.wait(self._opening, timeout=CONNECT_S)
            left = left - OPENING_MAX if len(self._live) > before else 0
        if not self._live:
            raise Unreachable(f"{self.address}: {self._why or 'no connection'}")

    def _grow(self) -> None:
        """Open as many connections as members wait, or as the window has, within the bounds."""
        wanted = OPENING_MAX if self.bounds.window else min(len(self._waiting), OPENING_MAX)
        wanted -= len(self._opening)
        room = self.bounds.connections - len(self._live) - len(self._opening)
        for _ in range(min(wanted, room)):
            self._open()

    def _open(self) -> None:
        task = asyncio.get_running_loop().create_task(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                made = await open_connection(self.address, lambda: _Connection(self))
        except (OSError, TimeoutError) as error:  # the next beat tries again
            self._why = str(error) or "no connection in time"
            return
        self._live.add(made)
        self.tally.connections = max(self.tally.connections, len(self._live))
        if made.transport is None:
            self.lost(made)
        else:
            self._free(made, time.monotonic() - self._start)

    async def _close(self) -> None:
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        live, self._live = list(self._live), set()
        for connection in live:
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(0)

    # Beside the hot path -----------------------------------------------------------------------

    async def _finished(self) -> None:
        """Wait for the last member, bounded; those that are left then got no answer."""
        patience_s = self.bounds.give_up_s + 2 * self.bounds.timeout_s
        until = self._start + self.offsets[-1] + patience_s
        before = time.process_time()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._done.wait()
        except TimeoutError:
            for connection in self._live:
                if connection.number >= 0:
                    self.spool(connection.number, UNKNOWN, False, b"")  # noqa: FBT003
        under_way = [each.number for each in self._live if each.number >= 0]
        waiting = [number for number in self._waiting if self._tries[number]]
        for number in (*under_way, *waiting, *(number for _, number in self._again)):
            self.tally.outcome[number] = self._index[NO_ANSWER]
        self.tally.cpu_s = time.process_time() - before
        self.tally.duration_s = time.monotonic() - self._start
        if self.bounds.window:  # nothing was intended before it could be sent
            sent = (0.0 if math.isnan(at) else at for at in self.tally.sent_at)
            self.tally.offsets, self.tally.window = array("d", sent), True
            self.tally.late = array("f", bytes(4 * len(self.offsets)))

    async def _beat(self) -> None:
        """Look after timeouts and connections, and at our own lag and CPU time."""
        due, looked, cpu = time.monotonic() + BEAT_S, time.monotonic(), time.process_time()
        self._seen_at = looked
        while True:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            moment = time.monotonic()
            now = moment - self._start
            if now > 0:
                self.tally.lags.append(moment - due)
            else:  # nothing is asked yet: its seconds begin with the first
                looked, cpu = moment, time.process_time()
            due = max(due + BEAT_S, moment)
            if moment - looked >= 1.0:
                used = time.process_time()
                self.tally.cpu.append((used - cpu) / (moment - looked))
                looked, cpu = moment, used
            self._time_out(now)
            if self._waiting or self.bounds.window:
                self._grow()
            if self._live:
                self._seen_at = moment
            elif moment - self._seen_at > self.bounds.away_s:
                self.fail(Unreachable(f"{self.address}: {self._why or 'no connection'}"))

    def _time_out(self, now: float) -> None:
        for connection in list(self._live):
            overdue = now - connection.sent_at > self.bounds.timeout_s
            if connection.number >= 0 and overdue and connection.transport is not None:
                connection.transport.abort()
        while self._waiting:
            number = self._waiting[0]
            if now - self.offsets[number] <= self.bounds.give_up_s:
                break
            self._waiting.popleft()
            self._settle(number, self._told.get(number, NOT_SENT), now)


async def closed(
    address: str,
    raw: Callable[[int], bytes] | Sequence[bytes],
    count: int,
    connections: int,
    *,
    spool: Spool = lambda *_: None,
    retries: int = 0,
    early_again: bool = False,
    limit_s: float = CLOSED_MAX_S,
) -> Tally:
    """Play ``count`` requests in a closed loop: each connection asks again when it is answered.

    Raises:
        ProtocolError: the server sent what is not understood.
        Unreachable: no connection could be made, or made again within ``AWAY_S``.

    """
    bounds = Bounds(
        connections=connections, warm=connections, warm_s=0, queue=count, retries=retries,
        give_up_s=limit_s, early_again=early_again, window=True, away_s=AWAY_S,
    )  # fmt: skip
    take = raw if callable(raw) else raw.__getitem__
    return await Generator(address, array("d", bytes(8 * count)), take, spool, bounds).run()
