"""Plays a crowd against a running engine and keeps the book of every answer."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Self

from loadtest.books.answers import AnswerBook
from loadtest.books.ledger import progress
from loadtest.client import Client, RunResult, read_json
from loadtest.members import Attempt, WaitingLine
from loadtest.wire import Response, asks_again, get_request

ROUNDS_MAX: Final = 20
"""How often an unknown outcome is asked for again, under the same key."""

ROUND_PAUSE_S: Final = 0.25
LAG_SAMPLE_S: Final = 0.2


class LagError(Exception):
    """The writer did not catch up; the message is for people."""


@dataclass(slots=True)
class Rush:
    """What was offered and got, from the opening on. Times in seconds on this host's clock."""

    book: AnswerBook = field(default_factory=AnswerBook)
    opened_at: float = 0.0
    ended_at: float = 0.0
    asked_again: int = 0
    result: RunResult = field(default_factory=RunResult)


async def until_open(client: Client, opens_at: datetime, tick: Callable[[float], None]) -> None:
    """Sleep until the engine's own clock shows ``opens_at``; ``tick`` gets the seconds left."""
    while True:
        now = datetime.fromisoformat((await read_json(client, "/api/v1/time"))["now"])
        left_s = (opens_at - now).total_seconds()
        tick(max(left_s, 0.0))
        if left_s <= 0:
            return
        await asyncio.sleep(min(left_s, 0.2))


async def knock(client: Client, campaign: str, crowd: WaitingLine, rush: Rush) -> None:
    """Play those who come too early."""
    await client.run(_requests(client, campaign, crowd.early), rush.book.record)


async def play(
    client: Client,
    campaign: str,
    crowd: WaitingLine,
    rush: Rush,
    on_answer: Callable[[], None],
) -> None:
    """Play the rush; what has no certain answer is asked again with the same key."""
    again: list[Attempt] = []
    planned = list(_requests(client, campaign, crowd.rush))

    def record(attempt: Attempt, answer: Response) -> None:
        rush.book.record(attempt, answer)
        # Whoever fires at the very millisecond may be told "not yet" and simply presses again.
        if asks_again(answer.status) or b'"not-open"' in answer.body:
            again.append(attempt)
        else:
            on_answer()

    rush.opened_at = time.perf_counter()
    rush.result = await client.run(iter(planned), record)
    rush.ended_at = time.perf_counter()
    for _ in range(ROUNDS_MAX):
        if not again:
            return
        await asyncio.sleep(ROUND_PAUSE_S)
        attempts, again[:] = list(again), []
        rush.asked_again += len(attempts)
        await client.run(_requests(client, campaign, attempts), record)
        rush.ended_at = time.perf_counter()


def _requests(
    client: Client, campaign: str, attempts: list[Attempt]
) -> Iterator[tuple[bytes, Attempt]]:
    return ((attempt.raw(client.address, campaign), attempt) for attempt in attempts)


class LagWatch:
    """Samples the writer's lag while a rush goes on: from the metrics, and how far PostgreSQL is.

    ``written_at`` is when the last progress of PostgreSQL was seen, for the rate of durable orders.
    """

    def __init__(self, metrics_address: str, database_url: str, campaign: str) -> None:
        self.metrics_address = metrics_address
        self.database_url = database_url
        self.campaign = campaign
        self.written_at = 0.0
        self.most_events = 0.0
        self.most_seconds = 0.0
        self.samples = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._client = Client(self.metrics_address, 1)
        await self._client.__aenter__()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._follow())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def _watch(self) -> None:
        while True:
            await self.sample()
            await asyncio.sleep(LAG_SAMPLE_S)

    async def _follow(self) -> None:
        async for _ in progress(self.database_url, self.campaign):
            self.written_at = time.perf_counter()

    async def until_zero(self, within_s: float) -> None:
        """Wait until the metrics show no lag. Raises LagError."""
        deadline = time.perf_counter() + within_s
        while (lag := await self.sample()) != 0:
            if time.perf_counter() > deadline:
                raise LagError(f"the ledger lag is {lag} after {within_s:.0f} s")
            await asyncio.sleep(LAG_SAMPLE_S / 4)

    async def sample(self) -> float | None:
        """Lag in events at this moment, or None where the metrics do not tell."""
        answer = await self._client.request(get_request(self.metrics_address, "/metrics"))
        events = metric(answer.body, "sale_ledger_lag_events", self.campaign)
        seconds = metric(answer.body, "sale_ledger_lag_seconds", self.campaign)
        self.samples += events is not None
        self.most_events = max(self.most_events, events or 0.0)
        self.most_seconds = max(self.most_seconds, seconds or 0.0)
        return events


def metric(text: bytes, name: str, campaign: str) -> float | None:
    """Highest value of a metric for a campaign in a metrics page, or None."""
    label = f'campaign="{campaign}"'
    values = [
        float(line.rpartition(" ")[2])
        for line in text.decode("utf-8", "replace").splitlines()
        if line.startswith((name + "{", name + " ")) and label in line
    ]
    return max(values, default=None)
