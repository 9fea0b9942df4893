"""Between master and workers: who tells what, over Locust's own connection (``sale-…`` messages).

To a worker go the setting of the run, cards as it asks for them, and the word to stop; from it come
wants, answers in batches, and at the end its account. Locust handles a worker's messages in order,
so the account is the last of its answers.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from loadtest.crowd.desk import BATCH, Account, Booth, Desk, Setting
from loadtest.members import Member


def serve_users(environment: Any, booth: Booth) -> None:  # noqa: ANN401 - Locust's environment
    """Worker: let the booth ask and send, and take what the master sends."""
    runner = environment.runner
    booth.want = lambda number: runner.send_message("sale-want", {"number": number})
    booth.send = lambda lines, number: runner.send_message(
        "sale-answers", {"run": booth.setting.run, "lines": lines, "number": number}
    )

    def setting(msg: Any, **_: object) -> None:  # noqa: ANN401 - Locust's message
        booth.begin(msgspec.convert(msg.data, Setting))

    def cards(msg: Any, **_: object) -> None:  # noqa: ANN401
        booth.give([Member(*card) for card in msg.data["cards"]], msg.data["dry"])

    runner.register_message("sale-setting", setting)
    runner.register_message("sale-cards", cards)
    runner.register_message("sale-stop", lambda **_: runner.stop())
    # Registered after the runner's own, which says good-bye, and so called before it.
    environment.events.quitting.add_listener(lambda **_: runner.stop())


def give_account(environment: Any, booth: Booth) -> None:  # noqa: ANN401
    """Worker: its users have stopped; send the rest, and how much there was."""
    if booth.setting.run:
        account = msgspec.to_builtins(booth.account())
        environment.runner.send_message("sale-done", account)


class Workers:
    """Master: hands out cards, takes in answers and accounts. A booth is named by its number."""

    def __init__(self, environment: Any, desk: Desk) -> None:  # noqa: ANN401
        self._runner = environment.runner
        self._desk = desk
        self._setting = Setting(0, "")
        self._booths: dict[str, str] = {}
        self._runner.register_message("sale-want", self._want)
        self._runner.register_message("sale-answers", self._answers)
        self._runner.register_message("sale-done", self._done)
        environment.events.worker_connect.add_listener(self._greet)

    def begin(self, setting: Setting) -> None:
        """Tell all of a run that is about to start."""
        self._setting, self._booths = setting, {}
        for client_id in list(self._runner.clients):
            self._tell(client_id)

    def gather(self, patience_s: float) -> None:
        """Wait until all that are alive have given account, for so long at most."""
        # A test that ends by itself tells the workers last: ask for the accounts before.
        for client_id, booth in self._booths.items():
            if booth not in self._desk.accounts:
                self._runner.send_message("sale-stop", None, client_id)
        self._desk.wait(set(self._owing()), patience_s)
        self._setting = Setting(0, "")

    def _owing(self) -> Iterator[str]:
        for client_id, booth in self._booths.items():
            if booth in self._desk.accounts or client_id in self._runner.clients:
                yield booth

    def _greet(self, client_id: str, **_: object) -> None:
        """A worker that comes late plays with the others."""
        if self._setting.run and client_id not in self._booths:
            self._tell(client_id)

    def _tell(self, client_id: str) -> None:
        booth = str(self._runner.get_worker_index(client_id) + 1)
        self._booths[client_id] = booth
        self._desk.received[booth] += 0
        self._runner.send_message("sale-setting", msgspec.to_builtins(self._setting), client_id)

    def _want(self, msg: Any, **_: object) -> None:  # noqa: ANN401 - Locust's message
        cards, dry = self._desk.take(msg.data["number"])
        while cards or dry:
            batch, cards = cards[:BATCH], cards[BATCH:]
            plain = [[card.card, card.token, card.union] for card in batch]
            self._runner.send_message("sale-cards", {"cards": plain, "dry": dry}, msg.node_id)
            dry = 0

    def _answers(self, msg: Any, **_: object) -> None:  # noqa: ANN401
        if msg.data["run"] == self._setting.run and msg.node_id in self._booths:
            booth = self._booths[msg.node_id]
            self._desk.receive(booth, msg.data["lines"], msg.data["number"])

    def _done(self, msg: Any, **_: object) -> None:  # noqa: ANN401
        account = msgspec.convert(msg.data, Account)
        if account.run == self._setting.run and msg.node_id in self._booths:
            self._desk.close_account(self._booths[msg.node_id], account)
