"""The plan of an open-loop run: each setting with its default, its bounds and its help, once.

The command line is made from it (`add_options`), and its bounds refuse what cannot be.
"""

import argparse
import asyncio
import math
from typing import Annotated, Any, Final, get_type_hints

import msgspec
from msgspec import Meta

from loadtest.books.ledger import WAIT_S
from loadtest.books.proof import Where
from loadtest.members import MINTED_MAX

_LEAST: Final = 0.001
_HIDDEN: Final = frozenset({
    "tokens", "signing_key_file", "config", "books", "name", "campaign", "fail_if",
})  # fmt: skip


class RushError(Exception):
    """The rush could not be played; the message is for people."""


class Stopped(asyncio.CancelledError):
    """Cancelled after the start. Its arguments: how many were offered and answered by then."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """An open-loop run. ``target`` is ``host:port``; bounds are of all processes together.

    Tokens come from a file as ``sale tokens`` writes it, or (``tokens`` empty) are minted for
    ``cards`` synthetic cards with the key in ``signing_key_file``, or else the key that the
    engine's settings name (``config``: their file). ``fail_if``: rules of `loadtest.thresholds`.
    """

    target: str
    campaign: str
    name: str = "rush"
    showing: Annotated[str, Meta(description="default: all in turn")] = ""
    quantity: Annotated[int, Meta(description="tickets; 0 mixes 1 to 3")] = 1
    tokens: Annotated[str, Meta(description="file, as `sale tokens` writes it")] = ""
    cards: Annotated[
        int, Meta(ge=0, description="distinct cards; default: all of the file, or minted")
    ] = 0
    signing_key_file: Annotated[str, Meta(description="mint tokens (no --tokens)")] = ""
    first_card: Annotated[
        int, Meta(ge=0, lt=MINTED_MAX, description="count minted cards from here")
    ] = 1
    duplicate_share: Annotated[
        float, Meta(ge=0, lt=1, description="share of members that send their request twice")
    ] = 0.0
    rate: Annotated[float, Meta(ge=_LEAST, description="members a second")] = 100.0
    seconds: Annotated[float, Meta(ge=_LEAST, description="how long members come")] = 10.0
    arrivals: Annotated[
        str,
        Meta(description="constant, poisson, release, or file:PATH (offsets, or CSV t,count)"),
    ] = "poisson"
    seed: Annotated[int, Meta(description="of all random choices")] = 1
    at_opening: Annotated[bool, Meta(description="start at the opening, by the engine's clock")] = (
        False
    )
    processes: Annotated[int, Meta(description="that generate load")] = 1
    connections: Annotated[int, Meta(ge=1, description="open at once")] = 2_000
    warm: Annotated[
        int, Meta(ge=0, description="opened before the start; default: the busiest 0.1 s")
    ] = 0
    queue: Annotated[int, Meta(ge=1, description="members that may wait for a connection")] = (
        200_000
    )
    timeout_s: Annotated[float, Meta(ge=_LEAST, description="seconds for an answer")] = 10.0
    retries: Annotated[int, Meta(ge=0, lt=101, description="of a member, 0 to 100")] = 5
    give_up_s: Annotated[
        float, Meta(ge=_LEAST, description="seconds after which a member gives up")
    ] = 30.0
    metrics: Annotated[str, Meta(description="host:port; default: by --data-dir")] = ""
    alone: Annotated[
        bool, Meta(description="nobody else buys and no ticket returns: check that too")
    ] = False
    ledger_within_s: Annotated[
        float, Meta(ge=_LEAST, description="seconds for PostgreSQL to have all orders")
    ] = WAIT_S
    proof: bool = True
    config: str = ""
    fail_if: tuple[str, ...] = ()
    books: Where = msgspec.field(default_factory=Where)

    def told(self) -> dict[str, str | int | float]:
        """The plan for the record; files and URLs are nobody's business."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        return {
            name: int(value) if isinstance(value, bool) else value
            for name, value in shown.items()
            if name not in _HIDDEN
        }


_HINTS: Final[dict[str, Any]] = get_type_hints(Plan, include_extras=True)


def option(name: str) -> str:
    """The option of a setting."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def add_options(group: Any, names: str) -> None:  # noqa: ANN401 - argparse's group
    """Add options for these settings of a plan."""
    default = Plan(target="", campaign="")
    for name in names.split():
        kind, (meta,) = _HINTS[name].__origin__, _HINTS[name].__metadata__
        how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        usual = getattr(default, name)
        words = meta.description + f" ({usual})" * bool(usual)
        group.add_argument(option(name), dest=name, default=usual, help=words, **how)


def check_bounds(options: argparse.Namespace) -> None:
    """Refuse a setting that is out of its bounds. Raises ValueError."""
    for name, hint in _HINTS.items():
        for meta in getattr(hint, "__metadata__", ()):
            given, below = getattr(options, name), math.inf if meta.lt is None else meta.lt
            if meta.ge is not None and not meta.ge <= given < below:
                most = f" and below {below:g}" if below < math.inf else ""
                raise ValueError(f"{option(name)} {given:g}: from {meta.ge:g}{most}")
