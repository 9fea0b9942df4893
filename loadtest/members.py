"""The crowd at a release: who asks for what, when, and how often.

A seed gives the same crowd again. The shares are ours (no record tells how many press twice); they
are meant to bring every way of asking into each rush, not to be a forecast.
"""

import base64
import hashlib
import hmac
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from loadtest.wire import purchase_request
from sale.files import LARGE_MAX_BYTES, UnreadableFile, read_text, shown

QUANTITY_SHARES: Final = {1: 0.2, 2: 0.45, 3: 0.35}
"""How many tickets members ask for; families mostly want two or three."""

RETRY_SHARE: Final = 0.08
PAST_LIMIT_SHARE: Final = 0.06
EARLY_SHARE: Final = 0.04
TWO_PHONES_SHARE: Final = 0.05
RETRY_WITHIN: Final = 4_000
"""A retry follows its first try within so many requests of the crowd."""


class Kind(StrEnum):
    """Why a request is made."""

    ORDINARY = "ordinary"
    RETRY = "retry with the same key"
    PAST_LIMIT = "past the limit"
    EARLY = "too early"
    SUSPENDED = "suspended card"
    TWO_PHONES = "two phones at once"


@dataclass(frozen=True, slots=True)
class Member:
    """A card and its token, as ``sale tokens`` writes them."""

    card: str
    token: str
    union: str


@dataclass(frozen=True, slots=True)
class Ask:
    """What one member asks for under one key."""

    card: str
    key: str
    showing: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of a member: so many tickets of a showing under a key."""

    member: Member
    key: str
    showing: str
    quantity: int
    kind: Kind

    @property
    def card(self) -> str:
        """Card number of the asker."""
        return self.member.card

    def raw(self, host: str, campaign: str) -> bytes:
        """Bytes of the purchase."""
        return purchase_request(
            host, campaign, self.member.token, self.key, self.quantity, self.showing
        )


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """What is sent before the opening, and what is sent at it, each in order."""

    early: list[Attempt]
    rush: list[Attempt]


def read_members(path: Path) -> list[Member]:
    """Read what ``sale tokens`` wrote. Raises ValueError in words."""
    try:
        text = read_text(path, most=LARGE_MAX_BYTES)
    except UnreadableFile as error:
        raise ValueError(f"tokens file {error}") from None
    try:
        rows = [json.loads(line) for line in text.splitlines() if line]
        return [Member(row["card_no"], row["token"], row["union"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"tokens file {shown(path)}: {error!r}") from None


def gather(
    active: Sequence[Member],
    suspended: Sequence[Member],
    *,
    showings: Sequence[str],
    card_limit: int,
    order_max: int,
    seed: int = 2015,
) -> WaitingLine:
    """Make the crowd: each member comes once, some of them more often or in a wrong way."""
    rng = random.Random(seed)
    early: list[Attempt] = []
    placed: list[tuple[float, int, Attempt]] = []

    def place(at: float, attempt: Attempt) -> None:
        placed.append((at, len(placed), attempt))

    for member in active:
        at = rng.random() * len(active)
        first = Attempt(
            member,
            _key(rng),
            rng.choice(showings),
            _quantity(rng, min(order_max, card_limit)),
            Kind.ORDINARY,
        )
        place(at, first)
        dice = rng.random()
        if dice < RETRY_SHARE:
            place(at + rng.random() * RETRY_WITHIN, _again(first, Kind.RETRY))
        elif dice < RETRY_SHARE + PAST_LIMIT_SHARE:
            for _ in range(card_limit // first.quantity):
                at += rng.random() * RETRY_WITHIN
                place(at, _again(first, Kind.PAST_LIMIT, _key(rng)))
        elif dice < RETRY_SHARE + PAST_LIMIT_SHARE + EARLY_SHARE:
            early.append(_again(first, Kind.EARLY))
        elif dice < RETRY_SHARE + PAST_LIMIT_SHARE + EARLY_SHARE + TWO_PHONES_SHARE:
            place(at, _again(first, Kind.TWO_PHONES, _key(rng)))
    for member in suspended:
        attempt = Attempt(member, _key(rng), rng.choice(showings), 1, Kind.SUSPENDED)
        place(rng.random() * len(active), attempt)
    placed.sort(key=lambda step: step[:2])
    return WaitingLine(early, [attempt for _, _, attempt in placed])


def _again(first: Attempt, kind: Kind, key: str = "") -> Attempt:
    return Attempt(first.member, key or first.key, first.showing, first.quantity, kind)


def _key(rng: random.Random) -> str:
    return f"{rng.getrandbits(80):020x}"


def _quantity(rng: random.Random, most: int) -> int:
    sizes = [size for size in QUANTITY_SHARES if size <= most]
    return rng.choices(sizes, [QUANTITY_SHARES[size] for size in sizes])[0]


class Mint:
    """Signs many member tokens quickly, after the pattern of one that the engine issued.

    The benchmark needs a million of them, for cards that are in no roster (a token is checked
    without I/O). Only the card changes, so that all tokens are equally long.
    """

    def __init__(self, pattern: str, card_no: str, signing_key: bytes) -> None:
        self.head, claims, signature = pattern.split(".")
        self.claims = _unpad(claims)
        self.card = card_no.encode()
        self.key = signing_key
        if self.claims.count(self.card) != 1:
            raise ValueError("the pattern does not name its card once")
        if self.token(card_no).rpartition(".")[2] != signature:
            raise ValueError("the pattern was not signed with this key")

    def token(self, card_no: str) -> str:
        """Token for another card."""
        claims = _pad(self.claims.replace(self.card, card_no.encode()))
        signed = f"{self.head}.{claims}"
        return f"{signed}.{_pad(hmac.digest(self.key, signed.encode(), hashlib.sha256))}"

    def requests(
        self, host: str, campaign: str, showing: str, cards: Iterable[int], *, salt: str = "k"
    ) -> Iterator[bytes]:
        """Purchases of one ticket by the given cards (numbers below 10^12), all equally long."""
        for number in cards:
            card_no = minted_card(number)
            key = minted_key(number, salt)
            yield purchase_request(host, campaign, self.token(card_no), key, 1, showing)


def minted_card(number: int) -> str:
    """Card of a number in `Mint.requests`."""
    return f"6222{number:012d}"


def minted_key(number: int, salt: str = "k") -> str:
    """Key under which it asks."""
    return f"{salt}{number:012d}"


def _pad(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unpad(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
