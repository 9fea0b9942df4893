"""The requests of a run and their moments: bytes, built when they are sent.

Only offsets into the tokens file are kept, eight bytes a card; the file itself is mapped, so many
processes share it. The same load gives the same asks in every process, and again after the run,
when the answers are compared with PostgreSQL.
"""

import mmap
import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from loadtest.members import QUANTITY_SHARES, Ask, Mint, member_of, minted_card
from loadtest.rush import arrivals
from sale.files import UnreadableFile, opened_regular
from sale.identity import SigningKey

MIXED: Final = 0
"""Quantity of a plan that mixes them as families do."""

DUPLICATE_WITHIN: Final = 50
_MIX: Final = 2_654_435_761
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
        self._wishes = _wishes(load.showings, load.quantity, load.order_max)
        head = f"POST /api/v1/campaigns/{load.campaign}/orders HTTP/1.1\r\nHost: {load.address}\r\n"
        self._head = f"{head}Authorization: Bearer "
        self._tails = [_tail(quantity, showing) for quantity, showing in self._wishes]
        self._line(0)
        self._line(self.cards - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def raw(self, member: int) -> bytes:
        """Bytes of a member's purchase."""
        starts, card = self._starts, member % self.cards
        token = self._decode(self._lines[starts[card] : starts[card + 1]]).token
        tail = self._tails[member * _MIX % 4_294_967_291 % len(self._tails)]
        head = f"{self._head}{token}\r\nIdempotency-Key: {self._load.salt}-{member:x}"
        return f"{head}{tail}".encode("ascii")

    def token(self, member: int) -> str:
        """A member's token."""
        return self._line(member % self.cards).token

    def ask(self, member: int) -> Ask:
        """The same purchase, as it is compared with the books."""
        quantity, showing = self._wishes[member * _MIX % 4_294_967_291 % len(self._wishes)]
        card = member_of(self._line(member % self.cards).token)
        return Ask(card, f"{self._load.salt}-{member:x}", showing, quantity)

    def _line(self, card: int) -> _Line:
        try:
            return self._decode(self._lines[self._starts[card] : self._starts[card + 1]])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise AsksError(f"tokens file {self._load.tokens}, line {card + 1}: {error}") from None


def write_minted(file: Path, key: SigningKey, *, first: int, count: int) -> None:
    """Write tokens of ``count`` synthetic members, as ``sale tokens`` does, signed with the key."""
    mint = Mint(key.secret)
    file.touch(mode=0o600)
    with file.open("w", encoding="ascii", buffering=1 << 20) as stream:
        for number in range(first, first + count):
            card = minted_card(number)
            token = mint.token(card)
            stream.write(f'{{"card_no":"{card}","token":"{token}","union":"district"}}\n')


def _line_starts(lines: mmap.mmap, most: int) -> "array[int]":
    starts, at, end = array("Q", [0]), 0, len(lines)
    while at < end and (not most or len(starts) <= most):
        found = lines.find(b"\n", at)
        at = end if found < 0 else found + 1
        starts.append(at)
    return starts


def _wishes(showings: Sequence[str], quantity: int, order_max: int) -> list[tuple[int, str]]:
    if quantity != MIXED:
        return [(quantity, showing) for showing in showings]
    sizes = [size for size in QUANTITY_SHARES if size <= order_max]
    slots = [size for size in sizes for _ in range(round(QUANTITY_SHARES[size] * _SLOTS))]
    return [(size, showing) for size in slots for showing in showings]


def _tail(quantity: int, showing: str) -> str:
    content = f'{{"quantity":{quantity},"showing":"{showing}"}}'
    headers = f"Content-Type: application/json\r\nContent-Length: {len(content)}"
    return f"\r\n{headers}\r\n\r\n{content}"
