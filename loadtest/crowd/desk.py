"""Cards out, answers in: one desk where the test is led, one booth in each process with users.

The desk holds the cards and hands them out one for each user that asks, so no card is played by two
processes however Locust spreads its users. The booths send their answers to it twice a second, at
most ``BATCH`` in a message, and say at the end how many there were: an answer that went astray is a
finding like any other. With one Locust process, desk and booth call each other directly.
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import gevent
import msgspec
from gevent.event import Event
from gevent.queue import Empty, Queue

from loadtest.books.answers import Answer
from loadtest.members import Member
from loadtest.record import Finding

BATCH: Final = 500
"""Answers, or cards, in one message."""

CARD_WAIT_S: Final = 10.0
TICK_S: Final = 0.05
FLUSH_S: Final = 0.5
FINDINGS_MAX: Final = 200
ANSWERS_MAX: Final = 1_000_000
"""The check holds all answers in memory at once; a longer run would have to be proven in parts."""


class Setting(msgspec.Struct, frozen=True):
    """The plan of a run for every process; sent to the workers before their users."""

    run: int
    campaign: str
    showings: tuple[str, ...] = ()
    order_max: int = 1
    tail_s: float = 0.0
    raise_tickets: int = 0
    raises: int = 0
    pauses: int = 0
    operator_token: str = ""


class Account(msgspec.Struct):
    """A booth's count of requests sent, at its end."""

    run: int
    answers: int
    without_card: int
    findings: tuple[Finding, ...] = ()


class Booth:
    """Shared by the users of one process. ``want`` asks the desk for so many cards."""

    def __init__(self) -> None:
        self.want: Callable[[int], None] = lambda _: None
        self.send: Callable[[bytes, int], None] = lambda *_: None
        self._ticker: Any = None
        self._forget(Setting(0, ""))

    def _forget(self, setting: Setting) -> None:
        self.setting = setting
        self._cards: Queue = Queue()
        self._kept: list[Answer] = []
        self._findings: list[Finding] = []
        self._wanted = self._sent = self._without = 0
        self._flushed_at = 0.0

    def begin(self, setting: Setting) -> None:
        """Forget the run before; cards and answers of this one follow."""
        self.stop()
        self._forget(setting)
        self._ticker = gevent.spawn(self._tick)

    def stop(self) -> None:
        """Stop asking and sending."""
        if self._ticker is not None:
            self._ticker.kill()
            self._ticker = None

    def card(self) -> Member | None:
        """Wait for a card of one's own; None where the desk has no more."""
        self._wanted += 1
        card: Member | None = None
        with contextlib.suppress(Empty):
            card = self._cards.get(timeout=CARD_WAIT_S)
        self._without += card is None
        return card

    def give(self, cards: Iterable[Member], dry: int) -> None:
        """Take in what the desk gives; ``dry`` askers get nothing."""
        for card in (*cards, *[None] * dry):
            self._cards.put(card)

    def record(self, answer: Answer) -> None:
        """Record what a member was told."""
        self._kept.append(answer)

    def find(self, kind: str, what: str) -> None:
        """Report what should not be."""
        if len(self._findings) < FINDINGS_MAX:
            self._findings.append(Finding(kind, what))

    def account(self) -> Account:
        """Send what is left, and say how much there was."""
        self.stop()
        self._flush()
        return Account(self.setting.run, self._sent, self._without, tuple(self._findings))

    def _tick(self) -> None:
        while True:
            gevent.sleep(TICK_S)
            if self._wanted:
                number, self._wanted = self._wanted, 0
                self.want(number)
            if time.monotonic() - self._flushed_at >= FLUSH_S:
                self._flushed_at = time.monotonic()
                self._flush()

    def _flush(self) -> None:
        while self._kept:
            batch, self._kept = self._kept[:BATCH], self._kept[BATCH:]
            self._sent += len(batch)
            self.send(b"".join(msgspec.json.encode(each) + b"\n" for each in batch), len(batch))


class Desk:
    """Where the test is led: cards, the file of all answers, and who owes an account."""

    def __init__(self) -> None:
        self._file: Any = None
        self._forget()

    def _forget(self) -> None:
        self.cards: deque[Member] = deque()
        self.received: Counter[str] = Counter()
        self.accounts: dict[str, Account] = {}
        self._changed = Event()

    @property
    def answers(self) -> int:
        """How many came."""
        return self.received.total()

    def open(self, cards: Iterable[Member], file: Path) -> None:
        """Begin a run. The file is readable by the owner alone: it names members."""
        self._forget()
        self.cards.extend(cards)
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        self._file = file.open("wb")

    def take(self, number: int) -> tuple[list[Member], int]:
        """Hand out cards; the second value is how many askers go without."""
        given = [self.cards.popleft() for _ in range(min(number, len(self.cards)))]
        return given, number - len(given)

    def receive(self, booth: str, lines: bytes, number: int) -> None:
        """Write down a batch of answers; what is past ``ANSWERS_MAX`` is only counted."""
        if self._file is None or self._file.closed:
            return
        self.received[booth] += number
        if self.answers <= ANSWERS_MAX:
            self._file.write(lines)

    def close_account(self, booth: str, account: Account) -> None:
        """Take a booth's word for what it sent."""
        self.accounts[booth] = account
        self._changed.set()

    def wait(self, booths: Iterable[str], within_s: float) -> None:
        """Wait until all these have given account, for so long at most."""
        owing, deadline = set(booths), time.monotonic() + within_s
        while owing - self.accounts.keys() and time.monotonic() < deadline:
            self._changed.clear()
            self._changed.wait(timeout=0.2)

    def close(self) -> list[Finding]:
        """End the run: what users found, and where answers are missing."""
        if self._file is not None:
            self._file.close()
        accounts = self.accounts.values()
        found = [finding for account in accounts for finding in account.findings][:FINDINGS_MAX]
        for booth in sorted(self.received.keys() | self.accounts.keys()):
            got, account = self.received[booth], self.accounts.get(booth)
            if account is None:
                found.append(Finding("no-account", f"process {booth}: ended without an account"))
            elif account.answers != got:
                what = f"process {booth}: sent {account.answers} answers, {got} came"
                found.append(Finding("answers-missing", what))
        if without := sum(account.without_card for account in accounts):
            what = f"{without} users found no card left; the file of tokens is too short"
            found.append(Finding("without-card", what))
        if self.answers > ANSWERS_MAX:
            what = f"{self.answers:,} answers, at most {ANSWERS_MAX:,} can be compared"
            found.append(Finding("too-many-answers", what))
        return found
