"""The requests of a run and their moments: bytes, built when they are sent.

Only offsets into the tokens file are kept, eight bytes a card; the file itself is mapped, so many
processes share it. The same load gives the same asks in every process, and again after the run,
when the answers are compared with PostgreSQL.
"""

import mmap
import random
from array import array
from pathlib import Path
from typing import Final, Self

import msgspec

from loadtest.members import QUANTITY_SHARES, Ask, Mint, member_of, minted_no
from loadtest.rush import arrivals
from loadtest.wire import purchase_request
from sale.files import UnreadableFile, opened_regular
from sale.identity import SigningKey

MIXED: Final = 0
"""Quantity of a plan that mixes them as families do."""

DUPLICATE_WITHIN: Final = 50
_MIX: Final = 2_654_435_761
_PRIME: Final = 4_294_967_291
_SLOTS: Final = 20


class AsksError(ValueError):
    """The requests cannot be made; the message is for people."""


class _Line(msgspec.Struct):
    card_no: str
    token: str


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The requests and their moments: the same in all processes of a run."""

    address: str
    campaign: str
    tokens: str
    salt: str
    showings: tuple[str, ...]
    order_max: int
    arrivals: str = "constant"
    rate: float = 100.0
    seconds: float = 10.0
    seed: int = 1
    cards: int = 0
    quantity: int = 1
    duplicate_share: float = 0.0

    def offsets(self) -> "array[float]":
        """Intended times of all processes together. Raises ArrivalsError."""
        return arrivals.make(self.arrivals, self.rate, self.seconds, self.seed)

    def members(self, count: int) -> "array[int]":
        """Member of each arrival: mostly a new one, else one of the last few asking again."""
        if not self.duplicate_share:
            return array("L", range(count))
        rng, made, new = random.Random(self.seed ^ 0xD0B1), array("L"), 0
        for _ in range(count):
            if new and rng.random() < self.duplicate_share:
                made.append(new - 1 - rng.randrange(min(new, DUPLICATE_WITHIN)))
            else:
                made.append(new)
                new += 1
        return made

    def wishes(self) -> list[tuple[int, str]]:
        """Quantities and showings that members ask for, each as often as it is wanted."""
        if self.quantity != MIXED:
            return [(self.quantity, showing) for showing in self.showings]
        sizes = [size for size in QUANTITY_SHARES if size <= self.order_max]
        slots = [size for size in sizes for _ in range(round(QUANTITY_SHARES[size] * _SLOTS))]
        return [(size, showing) for size in slots for showing in self.showings]


class Asks:
    """Requests by the member's number. Member ``n`` has card ``n % cards``; keys are its own."""

    def __init__(self, load: Load) -> None:
        try:
            with opened_regular(Path(load.tokens)) as stream:
                self._lines = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except UnreadableFile as error:
            raise AsksError(f"tokens file {error}") from None
        except (OSError, ValueError) as error:
            raise AsksError(f"tokens file {load.tokens}: {error}") from None
        self._load = load
        self._starts = _line_starts(self._lines, load.cards)
        self.cards = len(self._starts) - 1
        if self.cards < max(load.cards, 1):
            raise AsksError(
                f"tokens file {load.tokens}: {self.cards:,} cards, {load.cards:,} are wanted"
            )
        self._decode = msgspec.json.Decoder(_Line).decode
        self._wishes = load.wishes()
        self.token(0)
        self.token(self.cards - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def raw(self, member: int) -> bytes:
        """Bytes of a member's purchase."""
        load, starts, card = self._load, self._starts, member % self.cards
        token = self._decode(self._lines[starts[card] : starts[card + 1]]).token
        quantity, showing = self._wishes[member * _MIX % _PRIME % len(self._wishes)]
        key = f"{load.salt}-{member:x}"
        return purchase_request(load.address, load.campaign, token, key, quantity, showing)

    def token(self, member: int) -> str:
        """A member's token. Raises AsksError."""
        card = member % self.cards
        try:
            return self._decode(self._lines[self._starts[card] : self._starts[card + 1]]).token
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise AsksError(f"tokens file {self._load.tokens}, line {card + 1}: {error}") from None

    def ask(self, member: int) -> Ask:
        """The same purchase, as it is compared with the books."""
        quantity, showing = self._wishes[member * _MIX % _PRIME % len(self._wishes)]
        key = f"{self._load.salt}-{member:x}"
        return Ask(member_of(self.token(member)), key, showing, quantity)


def write_minted(file: Path, key: SigningKey, *, first: int, count: int) -> None:
    """Write tokens of ``count`` synthetic members, as ``sale tokens`` does, signed with the key."""
    mint = Mint(key.secret)
    file.touch(mode=0o600)
    with file.open("w", encoding="ascii", buffering=1 << 20) as stream:
        for number in range(first, first + count):
            member_no = minted_no(number)
            token = mint.token(member_no)
            stream.write(f'{{"card_no":"{member_no}","token":"{token}","union":"district"}}\n')


def _line_starts(lines: mmap.mmap, most: int) -> "array[int]":
    starts, at, end = array("Q", [0]), 0, len(lines)
    while at < end and (not most or len(starts) <= most):
        found = lines.find(b"\n", at)
        at = end if found < 0 else found + 1
        starts.append(at)
    return starts
