"""Buyers during a fault: a load in the background, and single phones.

Every answer goes into the campaign's book. Status 0 means that no answer came.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from answer_book import AnswerBook, Attempt

from loadtest.books.answers import Answer, read_answer
from loadtest.client import Client
from loadtest.members import Member
from loadtest.wire import UNKNOWN, Response, ResponseParser

AGAIN: Final = frozenset({UNKNOWN, 429, 503})
CONNECTIONS: Final = 32
UNDER_WAY_MAX: Final = 128
"""Most members that wait for an answer at a time; no further member comes then."""

TICK_S: Final = 0.02
ANSWER_S: Final = 3.0
ASK_AGAIN_S: Final = 20.0
"""How long after the load's end unknown outcomes are still retried."""

CONNECT_TRIES: Final = 40


class Load:
    """``rate`` members a second for ``seconds``.

    Most buy once. A member without an answer, or with 503, retries with the same key. Some send
    twice at once, some repeat a successful purchase, some use a key again for another purchase.
    """

    def __init__(
        self,
        address: str,
        campaign: str,
        members: Sequence[Member],
        book: AnswerBook,
        *,
        seconds: float,
        rate: float,
        seed: int,
        showings: Sequence[str] = ("general",),
        order_max: int = 3,
        quantity: int | None = None,
        odd: bool = True,
    ) -> None:
        self.address = address
        self.campaign = campaign
        self.book = book
        self.offered = 0
        self.held_back = 0
        """Members that did not come because too many were waiting."""
        self._members = members
        self._seconds = seconds
        self._rate = rate
        self._rng = random.Random(f"{seed} {campaign}")
        self._showings = showings
        self._order_max = order_max
        self._quantity = quantity
        self._odd = odd
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._under_way: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()
        self._until = asyncio.get_running_loop().time() + seconds + ASK_AGAIN_S
        self._task = asyncio.create_task(self._come())

    @property
    def answers(self) -> list[Answer]:
        """Every answer of the campaign so far."""
        return list(self.book)

    def sold(self) -> int:
        """Count the answers so far that reported an order."""
        return sum(row[1] == 201 for row in self.book._rows)

    async def over(self) -> None:
        """Wait until ``seconds`` have passed and each outcome is known, with a limit."""
        await self._task
        await self.stop()

    async def finish(self) -> None:
        """Stop the arrivals; wait until each outcome is known, with a limit."""
        loop = asyncio.get_running_loop()
        self._until = min(self._until, loop.time() + ASK_AGAIN_S)
        self._ending.set()
        await self._task
        await self.stop()

    async def stop(self) -> None:
        """End at once; outcomes without an answer stay unknown."""
        self._ending.set()
        for task in (self._task, *self._under_way):
            task.cancel()
        done = await asyncio.gather(self._task, *self._under_way, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
            self._client = None
        for error in done:
            if isinstance(error, Exception):
                raise error

    async def _come(self) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not self._ending.is_set() and loop.time() - started < self._seconds:
            due = int((loop.time() - started) * self._rate) - self.offered - self.held_back
            for _ in range(due):
                if len(self._under_way) >= UNDER_WAY_MAX:
                    self.held_back += 1
                    continue
                self.offered += 1
                task = loop.create_task(self._member(self._attempt()))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), TICK_S)
        await asyncio.gather(*self._under_way)

    def _attempt(self) -> Attempt:
        rng = self._rng
        return Attempt(
            rng.choice(self._members),
            f"{rng.getrandbits(80):020x}",
            rng.choice(self._showings),
            self._quantity or rng.randint(1, self._order_max),
        )

    async def _member(self, attempt: Attempt) -> None:
        dice, pause_s = self._rng.random(), self._rng.random()
        if not self._odd or dice > 0.2:
            await self._ask(attempt)
        elif dice < 0.06:
            await asyncio.gather(self._ask(attempt), self._ask(attempt))
        elif await self._ask(attempt):
            await asyncio.sleep(pause_s)
            other = attempt
            if dice < 0.1:  # the same key for another purchase
                quantity = attempt.quantity % self._order_max + 1
                other = Attempt(attempt.member, attempt.key, attempt.showing, quantity)
            await self._ask(other)

    async def _ask(self, attempt: Attempt) -> bool:
        """Retry until the outcome is known or time is up; return whether it is known."""
        loop = asyncio.get_running_loop()
        raw = attempt.raw(self.address, self.campaign)
        while True:
            answer = await self._request(raw)
            self.book.record(attempt, answer)
            if answer.status not in AGAIN:
                return True
            if loop.time() > self._until:
                return False
            await asyncio.sleep(0.1 + 0.2 * self._rng.random())

    async def _request(self, raw: bytes) -> Response:
        try:
            client = await self._connected()
            return await client.request(raw)
        except OSError as error:
            return Response(UNKNOWN, b"", b"", repr(error))

    async def _connected(self) -> Client:
        """Give the client, which reopens lost connections. Raises OSError."""
        async with self._connecting:
            if self._client is None:
                client = Client(self.address, CONNECTIONS, timeout_s=ANSWER_S)
                await client.__aenter__()
                self._client = client
            return self._client


class Phone:
    """One member with a connection of its own, if needed to a given API process."""

    def __init__(
        self,
        address: str,
        campaign: str,
        member: Member,
        book: AnswerBook,
        pid: Callable[[str], int],
        *,
        timeout_s: float = 10.0,
    ) -> None:
        self.address = address
        self.campaign = campaign
        self.member = member
        self.book = book
        self._pid = pid
        self._timeout_s = timeout_s

    def attempt(
        self, quantity: int = 1, *, key: str | None = None, showing: str = "general"
    ) -> Attempt:
        """Make a purchase, with a new key if none is given."""
        key = key or f"{random.getrandbits(80):020x}"
        return Attempt(self.member, key, showing, quantity)

    async def buy(
        self, quantity: int = 1, *, key: str | None = None, of: str | None = None
    ) -> Response:
        """Buy, from the API process ``of`` if one is named."""
        return await self.ask(self.attempt(quantity, key=key), of=of)

    async def ask(self, attempt: Attempt, *, of: str | None = None) -> Response:
        """Send a purchase, wait for the answer, and record it in the book."""
        answer = Response(UNKNOWN, b"", b"", "no answer in time")
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._exchange(attempt.raw(self.address, self.campaign), of)
        except (OSError, TimeoutError) as error:
            answer.why = repr(error)
        finally:
            self.book.record(attempt, answer)
        return answer

    def read(self, attempt: Attempt, answer: Response) -> Answer:
        """Describe the answer."""
        replayed = answer.header("idempotency-replayed") == "true"
        return read_answer(attempt, answer.status, answer.body, replayed=replayed)

    async def _exchange(self, raw: bytes, of: str | None) -> Response:
        reader, writer = await self._connect(of)
        try:
            writer.write(raw)
            parser = ResponseParser()
            while data := await reader.read(65_536):
                for answer in parser.feed(data):
                    return answer
            raise ConnectionResetError("the connection was closed before the answer")
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connect(self, of: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; if a process is named, repeat until that process accepted the connection."""
        host, _, port = self.address.rpartition(":")
        for _ in range(CONNECT_TRIES):
            reader, writer = await asyncio.open_connection(host, int(port))
            own_port = writer.get_extra_info("sockname")[1]
            if of is None or await _taken_by(self._pid(of), int(port), own_port):
                return reader, writer
            writer.transport.abort()
        raise ConnectionRefusedError(f"{of} takes no connection")


async def _taken_by(pid: int, port: int, from_port: int) -> bool:
    """Whether a process has accepted a loopback connection, according to the kernel."""
    for _ in range(20):
        inode = _inode(port, from_port)
        if inode not in {None, "0"}:
            return f"socket:[{inode}]" in _sockets(pid)
        await asyncio.sleep(0.01)
    return False


def _inode(port: int, from_port: int) -> str | None:
    for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]:
        fields = line.split()
        local, remote = (int(fields[column].rpartition(":")[2], 16) for column in (1, 2))
        if (local, remote) == (port, from_port):
            return fields[9]
    return None


def _sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(str(link.readlink()))
    return found
