"""Members: their cards and tokens, what they ask for, and tokens that are signed in numbers."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.wire import purchase_request
from sale.files import LARGE_MAX_BYTES, UnreadableFile, read_text, shown

QUANTITY_SHARES: Final = {1: 0.2, 2: 0.45, 3: 0.35}
"""How many tickets members ask for; families mostly want two or three."""


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
