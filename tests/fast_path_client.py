"""A client that chooses the bytes of each write, and splits the received bytes into answers."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from waiting import until

from sale.http.request_ids import PATTERN

ANSWER_WITHIN_S = 10.0
UNREADABLE = "this is not a request that can be read"
"""The detail of the answer to bytes that are no request."""

T = TypeVar("T")


class Answer(NamedTuple):
    """An answer without the parts that differ by order or by the clock."""

    status: str
    headers: tuple[tuple[str, str], ...]
    body: Any
    raw: bytes

    @property
    def told(self) -> tuple[str, tuple[tuple[str, str], ...], Any]:
        """The parts that both paths must answer alike."""
        return self.status, self.headers, self.body

    @property
    def unreadable(self) -> bool:
        """Whether it says of bytes that they are no request."""
        return isinstance(self.body, dict) and self.body.get("detail_en") == UNREADABLE

    @property
    def interim(self) -> bool:
        """Whether it says only that there will be an answer."""
        return self.status.startswith("HTTP/1.1 1")


@dataclass
class Exchange:
    """The answers of an exchange, and how it ended."""

    answers: list[Answer] = field(default_factory=list)
    rest: bytes = b""
    closed: bool = False

    @property
    def statuses(self) -> list[int]:
        return [int(answer.status.split()[1]) for answer in self.answers]

    def alike(self) -> tuple[Any, ...]:
        """The parts that are compared."""
        return [answer.told for answer in self.answers], self.rest, self.closed


class Wire(asyncio.Protocol):
    """A client's end of a connection: it writes bytes and splits the received bytes into answers.

    ``heads`` tells which of the answers are to a HEAD, and come without their body.
    """

    def __init__(self) -> None:
        self.got = bytearray()
        self.heads: Sequence[bool] = ()
        self.told: list[Answer] = []
        self.closed = asyncio.Event()
        self._came = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        self._came.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._came.set()

    async def send(self, *pieces: bytes) -> None:
        """Write pieces so that each is read by itself."""
        for piece in pieces:
            if self.closed.is_set():
                return
            self.transport.write(piece)
            if len(pieces) > 1:
                for _ in range(2):
                    await asyncio.sleep(0)

    def end(self) -> None:
        """Send no more, and read on."""
        if not self.closed.is_set():
            self.transport.write_eof()

    async def answers(self, count: int) -> Exchange:
        """Wait until there are so many final answers, or the connection is closed."""
        ends_at = time.monotonic() + ANSWER_WITHIN_S
        while self._final() < count and not self.closed.is_set():
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), max(ends_at - time.monotonic(), 0.0))
            assert time.monotonic() < ends_at, f"no answer: {self.told} {self.got!r}"
        return self._taken()

    async def until_closed(self) -> Exchange:
        """Wait until the other side closes."""
        await until(self.closed.is_set)
        return self._taken()

    def _taken(self) -> Exchange:
        self._final()
        return Exchange(list(self.told), bytes(self.got), self.closed.is_set())

    def _final(self) -> int:
        """Cut what has come; give how many answers there are, but for those on the way to one."""
        final = sum(not answer.interim for answer in self.told)
        at = 0
        while (end := self.got.find(b"\r\n\r\n", at) + 4) > 3:
            status, *lines = self.got[at : end - 4].decode("latin-1").split("\r\n")
            headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
            named = {name.lower(): value for name, value in headers}
            interim = status.startswith("HTTP/1.1 1")
            to_head = final < len(self.heads) and self.heads[final]
            bodiless = interim or to_head
            stop = end + (0 if bodiless else int(named.get("content-length", 0)))
            if len(self.got) < stop:
                break
            assert re.match(r"HTTP/\d\.\d \d{3} ", status), status
            raw = bytes(self.got[at:stop])
            self.told.append(_answer(status, headers, raw[end - at :], raw))
            final += not interim
            at = stop
        del self.got[:at]
        return final


def _answer(status: str, headers: list[Any], body: bytes, raw: bytes) -> Answer:
    content: Any = body
    if body.startswith(b"{"):
        content = json.loads(body)
        if "order_no" in content:
            content["order_no"] = content["created_at"] = "…"
            for ticket in content["tickets"]:
                ticket["code"] = "…"
        for name in ("now", "as_of"):
            if name in content:
                content[name] = "…"
    # Headers of different names have no order.
    shown = tuple(sorted((name, _shown(name, value, body)) for name, value in headers))
    named = [value for name, value in shown if name in {"X-Request-Id", "Server"}]
    assert status.startswith("HTTP/1.1 1") or (len(named) == 2 and named[0] == "sale"), raw
    return Answer(status, shown, content, raw)


def _shown(name: str, value: str, body: bytes) -> str:
    match name:
        case "Date":
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", value)
            return "…"
        case "X-Request-Id":
            assert PATTERN.fullmatch(value)
            return "…" if re.fullmatch(r"[0-9a-f]{10}-\d+", value) else value
        case "Location":
            return re.sub(r"[^/]+$", "…", value)
        case "Content-Length" if body:
            assert int(value) == len(body)
            return "…" if body.startswith((b'{"order_no"', b'{"now"')) else value
        case _:
            return value


async def in_turn(work: Sequence[Awaitable[T]], at_once: int) -> list[T]:
    """Gather, so many at a time."""
    admission = asyncio.Semaphore(at_once)

    async def one(each: Awaitable[T]) -> T:
        async with admission:
            return await each

    return await asyncio.gather(*(one(each) for each in work))
