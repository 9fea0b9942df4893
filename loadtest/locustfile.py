"""Members at a release, with Locust.

Start ``sale up``, create a campaign that opens soon, write tokens, then:

    sale tokens --cards 5000 --out tokens.jsonl
    LOADTEST_TOKENS=tokens.jsonl CAMPAIGN=five-yuan-films LOADTEST_DATA_DIR=.sale \
        locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 \
        --headless -u 5000 -r 1000 -t 60s

Each user is one member with one card: looks at the campaign and the clock, waits for the opening,
asks once, asks again under the same key where the outcome is unknown, and looks at its order. When
the test stops, every answer is compared with PostgreSQL (LOADTEST_DATA_DIR of a ``sale up``, or
LOADTEST_DATABASE_URL), and the exit status is 1 for any finding. One Locust process only: with
several, the answers would lie in several memories. It offers some thousands of requests a second a
core; the benchmark's client offers ten times that.
"""

import os
import random
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import gevent
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtest.answers import Answer, read_answer, write_answers
from loadtest.members import Member, read_members

TRIES_MAX: Final = 8
PAUSE_S: Final = 0.3
OPENING_MAX_S: Final = 600.0
CHECK_S: Final = 180.0
AGAIN: Final = frozenset({0, 429, 503})


@dataclass(frozen=True, slots=True)
class Wish:
    """What a member asks for, under one key."""

    card: str
    key: str
    showing: str
    quantity: int


class Release:
    """What all members of this process share."""

    def __init__(self) -> None:
        self.campaign = os.environ.get("CAMPAIGN", "five-yuan-films")
        self.waiting: deque[Member] = deque()
        self.answers: list[Answer] = []


RELEASE: Final = Release()


def _prepare(environment: Environment, **_: object) -> None:
    if isinstance(environment.runner, MasterRunner | WorkerRunner):
        sys.exit("loadtest: run one Locust process, the books are checked in its memory")
    file = os.environ.get("LOADTEST_TOKENS")
    if not file:
        sys.exit("loadtest: set LOADTEST_TOKENS to the file that `sale tokens` wrote")
    try:
        RELEASE.waiting.extend(read_members(Path(file)))
    except ValueError as error:
        sys.exit(f"loadtest: {error}")


class MemberUser(FastHttpUser):
    """One member of the union on a phone."""

    connection_timeout = 10.0
    network_timeout = 10.0

    def on_start(self) -> None:
        """Take the next card; without one there is nobody to play."""
        self.member = RELEASE.waiting.popleft() if RELEASE.waiting else None

    @task
    def release(self) -> None:
        """Look, wait, grab, look again; then stay on the page."""
        if self.member is None:
            gevent.sleep(5)
            return
        campaign = self._get(f"/api/v1/campaigns/{RELEASE.campaign}")
        if campaign is None:
            gevent.sleep(PAUSE_S)
            return
        self._wait_for(campaign.get("opens_at"))
        wish = Wish(
            card=self.member.card,
            key=f"{random.getrandbits(80):020x}",
            showing=random.choice(campaign["showings"])["id"],
            quantity=random.randint(1, campaign["order_max"]),
        )
        order_no = self._grab(wish)
        if order_no:
            self._get(f"/api/v1/orders/{order_no}", name="/api/v1/orders/[order]")
        self.member = None

    def _wait_for(self, opens_at: str | None) -> None:
        """Wait by the server's clock, not by the phone's."""
        now = self._get("/api/v1/time")
        if opens_at and now:
            left = datetime.fromisoformat(opens_at) - datetime.fromisoformat(now["now"])
            gevent.sleep(min(max(left.total_seconds(), 0.0), OPENING_MAX_S))

    def _grab(self, wish: Wish) -> str:
        """Ask until the outcome is known, always under the same key; the order's number or ''."""
        path = f"/api/v1/campaigns/{RELEASE.campaign}/orders"
        for _ in range(TRIES_MAX):
            headers = self._headers() | {"Idempotency-Key": wish.key}
            body = {"quantity": wish.quantity, "showing": wish.showing}
            with self.client.post(
                path, json=body, headers=headers, catch_response=True, name="purchase"
            ) as response:
                replayed = (response.headers or {}).get("Idempotency-Replayed") == "true"
                content = response.content or b""
                answer = read_answer(wish, response.status_code, content, replayed=replayed)
                RELEASE.answers.append(answer)
                # A refusal is a right answer; only what leaves the outcome open is a failure.
                if answer.sold or answer.refused:
                    response.success()
            if answer.status not in AGAIN and answer.code != "not-open":
                return answer.order_no
            gevent.sleep(PAUSE_S)
        return ""

    def _get(self, path: str, name: str | None = None) -> Any:  # noqa: ANN401 - JSON
        response = self.client.get(path, headers=self._headers(), name=name)
        return response.json() if response.status_code == 200 else None

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.member.token}"} if self.member else {}


def _check_books(environment: Environment, **_: object) -> None:
    """Compare every answer with the books, in a process of its own: asyncio and gevent differ."""
    with tempfile.TemporaryDirectory(prefix="sale-locust-") as folder:
        file = Path(folder) / "answers.jsonl"
        write_answers(RELEASE.answers, file)
        command = [sys.executable, "-m", "loadtest.books", "--answers", str(file)]
        command += ["--campaign", RELEASE.campaign, *_where()]
        try:
            status = subprocess.run(command, timeout=CHECK_S, check=False).returncode  # noqa: S603
        except subprocess.TimeoutExpired:
            status = 3
    print(f"loadtest: {len(RELEASE.answers):,} answers compared, exit {status}")
    if status:
        environment.process_exit_code = 1


def _where() -> list[str]:
    url = os.environ.get("LOADTEST_DATABASE_URL")
    return (
        ["--database-url", url]
        if url
        else ["--data-dir", os.environ.get("LOADTEST_DATA_DIR", ".sale")]
    )


_EVENTS: Final[Any] = events
_EVENTS.init.add_listener(_prepare)
_EVENTS.test_stop.add_listener(_check_books)
