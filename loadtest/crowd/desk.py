"""Cards out, answers in: one desk where the test is led, one booth in each process with users.

They talk by Locust's own messages (``sale-…``), which a test in one process delivers to itself. To
a booth go the setting of the run, cards as it asks for them, so that no card is played by two
processes however Locust spreads its users, and the word to stop. From it come wants, answers in
batches, and at the end how many there were: an answer that went astray is a finding like any other.
Locust handles a process's messages in order, so its account is the last of its answers.
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterable
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

LOCAL: Final = "local"
"""How Locust names the sender of a message where there is one process."""


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
    """Shared by the users of one process: it has their cards, and keeps what they were told."""

    def __init__(self) -> None:
        self._runner: Any = None
        self._ticker: Any = None
        self._forget(Setting(0, ""))

    def _forget(self, setting: Setting) -> None:
        self.setting = setting
        self._cards: Queue = Queue()
        self._kept: list[Answer] = []
        self._findings: list[Finding] = []
        self._wanted = self._sent = self._without = 0
        self._flushed_at = 0.0

    def join(self, runner: Any) -> None:  # noqa: ANN401 - Locust's runner
        """Take what the desk sends."""
        self._runner = runner
        runner.register_message("sale-setting", self._begin)
        runner.register_message("sale-cards", self._give)

    def _begin(self, msg: Any, **_: object) -> None:  # noqa: ANN401 - Locust's message
        """Forget the run before; cards and answers of this one follow."""
        self._stop()
        self._forget(msgspec.convert(msg.data, Setting))
        self._ticker = gevent.spawn(self._tick)

    def _stop(self) -> None:
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

    def _give(self, msg: Any, **_: object) -> None:  # noqa: ANN401
        """Take in cards; ``dry`` askers get nothing."""
        for card in msg.data["cards"]:
            self._cards.put(Member(*card))
        for _each in range(msg.data["dry"]):
            self._cards.put(None)

    def record(self, answer: Answer) -> None:
        """Record what a member was told."""
        self._kept.append(answer)

    def find(self, kind: str, what: str) -> None:
        """Report what should not be."""
        if len(self._findings) < FINDINGS_MAX:
            self._findings.append(Finding(kind, what))

    def account(self) -> None:
        """Its users have stopped: send what is left, and say how much there was."""
        self._stop()
        self._flush()
        if self.setting.run:
            account = Account(self.setting.run, self._sent, self._without, tuple(self._findings))
            self._runner.send_message("sale-done", msgspec.to_builtins(account))

    def _tick(self) -> None:
        while True:
            gevent.sleep(TICK_S)
            if self._wanted:
                number, self._wanted = self._wanted, 0
                self._runner.send_message("sale-want", {"number": number})
            if time.monotonic() - self._flushed_at >= FLUSH_S:
                self._flushed_at = time.monotonic()
                self._flush()

    def _flush(self) -> None:
        while self._kept:
            batch, self._kept = self._kept[:BATCH], self._kept[BATCH:]
            self._sent += len(batch)
            lines = b"".join(msgspec.json.encode(each) + b"\n" for each in batch)
            told = {"run": self.setting.run, "lines": lines, "number": len(batch)}
            self._runner.send_message("sale-answers", told)


class Desk:
    """Where the test is led: cards, the file of all answers, and who owes an account.

    A booth is named by its number.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._runner: Any = None
        self._forget()

    def _forget(self) -> None:
        self._setting = Setting(0, "")
        self._booths: dict[str, str] = {}
        self.cards: deque[Member] = deque()
        self.received: Counter[str] = Counter()
        self.accounts: dict[str, Account] = {}
        self._changed = Event()

    def join(self, environment: Any) -> None:  # noqa: ANN401 - Locust's environment
        """Take what the booths send."""
        self._runner = environment.runner
        self._runner.register_message("sale-want", self._want)
        self._runner.register_message("sale-answers", self._receive)
        self._runner.register_message("sale-done", self._done)
        environment.events.worker_connect.add_listener(self._greet)

    @property
    def answers(self) -> int:
        """How many came."""
        return self.received.total()

    def open(self, setting: Setting, cards: Iterable[Member], file: Path) -> None:
        """Begin a run. The file is readable by the owner alone: it names members."""
        self._forget()
        self.cards.extend(cards)
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        self._file = file.open("wb")
        self._setting = setting
        for client_id in self._alive():
            self._tell(client_id)

    def _alive(self) -> list[str]:
        return list(getattr(self._runner, "clients", [LOCAL]))

    def _greet(self, client_id: str, **_: object) -> None:
        """A worker that comes late plays with the others."""
        if self._setting.run and client_id not in self._booths:
            self._tell(client_id)

    def _tell(self, client_id: str) -> None:
        number = 0 if client_id == LOCAL else self._runner.get_worker_index(client_id)
        booth = self._booths[client_id] = str(number + 1)
        self.received[booth] += 0
        self._runner.send_message("sale-setting", msgspec.to_builtins(self._setting), client_id)

    def _want(self, msg: Any, **_: object) -> None:  # noqa: ANN401 - Locust's message
        """Hand out cards; askers beyond them go without."""
        number = msg.data["number"]
        cards = [self.cards.popleft() for _ in range(min(number, len(self.cards)))]
        dry = number - len(cards)
        while cards or dry:
            batch, cards = cards[:BATCH], cards[BATCH:]
            plain = [[card.member_no, card.token, card.union] for card in batch]
            self._runner.send_message("sale-cards", {"cards": plain, "dry": dry}, msg.node_id)
            dry = 0

    def _receive(self, msg: Any, **_: object) -> None:  # noqa: ANN401
        """Write down a batch of answers; what is past ``ANSWERS_MAX`` is only counted."""
        booth = self._booths.get(msg.node_id)
        if booth and msg.data["run"] == self._setting.run and not self._file.closed:
            self.received[booth] += msg.data["number"]
            if self.answers <= ANSWERS_MAX:
                self._file.write(msg.data["lines"])

    def _done(self, msg: Any, **_: object) -> None:  # noqa: ANN401
        """Take a booth's word for what it sent."""
        account, booth = msgspec.convert(msg.data, Account), self._booths.get(msg.node_id)
        if booth and account.run == self._setting.run:
            self.accounts[booth] = account
            self._changed.set()

    def gather(self, within_s: float) -> None:
        """Wait until all that are alive have given account, for so long at most."""
        # A test that ends by itself tells the workers last: ask for the accounts before.
        owing = {c: booth for c, booth in self._booths.items() if booth not in self.accounts}
        for client_id in owing:
            self._runner.send_message("sale-stop", None, client_id)
        deadline, alive = time.monotonic() + within_s, self._alive()
        waited = {booth for client_id, booth in owing.items() if client_id in alive}
        while waited - self.accounts.keys() and time.monotonic() < deadline:
            self._changed.clear()
            self._changed.wait(timeout=0.2)

    def close(self) -> list[Finding]:
        """End the run: what users found, and where answers are missing."""
        self._file.close()
        self._setting = Setting(0, "")
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
