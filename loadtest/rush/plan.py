"""The plan of an open-loop run, and how one can end that was not played."""

import asyncio

import msgspec

from loadtest.books.ledger import WAIT_S
from loadtest.books.proof import Where


class RushError(Exception):
    """The rush could not be played; the message is for people."""


class Stopped(asyncio.CancelledError):
    """Cancelled after the start. Its arguments: how many were offered and answered by then."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """An open-loop run. ``target`` is ``host:port``.

    ``fail_if``: rules of thresholds, see `loadtest.thresholds`.

    ``arrivals``: see `loadtest.rush.arrivals.make`. Tokens come from a file as ``sale tokens``
    writes it, or (``tokens`` empty) are minted for ``cards`` synthetic cards with the key in
    ``key_file``, or else the key that the engine's settings name (``config``: their file).
    ``cards`` 0: all of the file. ``quantity`` 0 mixes one to three. ``showing`` empty: all
    showings in turn. Bounds are of all processes together. ``alone``: see
    `loadtest.books.proof.prove`. ``warm`` connections are opened before the start; 0: as many as
    come in the busiest tenth of a second.
    """

    target: str
    campaign: str
    name: str = "rush"
    arrivals: str = "poisson"
    rate: float = 100.0
    seconds: float = 10.0
    seed: int = 1
    tokens: str = ""
    key_file: str = ""
    config: str = ""
    cards: int = 0
    first_card: int = 1
    quantity: int = 1
    showing: str = ""
    duplicate_share: float = 0.0
    connections: int = 2_000
    warm: int = 0
    queue: int = 200_000
    processes: int = 1
    timeout_s: float = 10.0
    retries: int = 5
    give_up_s: float = 30.0
    at_opening: bool = False
    alone: bool = False
    proof: bool = True
    ledger_within_s: float = WAIT_S
    metrics: str = ""
    fail_if: tuple[str, ...] = ()
    books: Where = msgspec.field(default_factory=Where)

    def told(self) -> dict[str, str | int | float]:
        """The plan for the record; files and URLs are nobody's business."""
        hidden = ("tokens", "key_file", "config", "books", "name", "campaign", "fail_if")
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name not in hidden}
        return {name: int(v) if isinstance(v, bool) else v for name, v in shown.items()}
