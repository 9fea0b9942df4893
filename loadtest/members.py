"""Members: their numbers and tokens, what they ask for, and tokens that are signed in numbers."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.wire import purchase_request
from sale.files import LARGE_MAX_BYTES, UnreadableFile, read_text, shown
from sale.identity import Member as Subject
from sale.identity import SigningKey, issue_member_token

QUANTITY_SHARES: Final = {1: 0.2, 2: 0.45, 3: 0.35}
"""How many tickets members ask for; families mostly want two or three."""

MINTED_FROM: Final = 10_000_000
MINTED_MAX: Final = 90_000_000
"""Minted members have eight digits, so that their tokens are equally long, and are in no roster."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member by number, and the token, as ``sale tokens`` writes it."""

    member_no: str
    token: str
    union: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One member's purchase under one key."""

    member_no: str
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
        return [Member(member_of(row["token"]), row["token"], row["union"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"tokens file {shown(path)}: {error!r}") from None


def member_of(token: str) -> str:
    """Number of the member whom a token speaks for. Raises ValueError, KeyError, TypeError."""
    return str(json.loads(_unpad(token.split(".")[1]))["sub"])


class Mint:
    """Signs many member tokens quickly, after the pattern of one that the engine issued.

    The benchmark needs a million of them, for members who are in no roster (a token is checked
    without I/O). Only the member changes, so that all tokens are equally long.
    """

    def __init__(self, signing_key: bytes, union: str = "district") -> None:
        member = Subject(MINTED_FROM, union)
        pattern = issue_member_token(SigningKey(signing_key), member, now_s=int(time.time()))
        self.head, claims, _ = pattern.split(".")
        self.claims = _unpad(claims)
        self.member = f'"{MINTED_FROM}"'.encode()
        self.key = signing_key
        if self.claims.count(self.member) != 1:
            raise ValueError("the pattern does not name its member once")

    def token(self, member: str) -> str:
        """Token for a member's number."""
        claims = _pad(self.claims.replace(self.member, f'"{member}"'.encode()))
        signed = f"{self.head}.{claims}"
        return f"{signed}.{_pad(hmac.digest(self.key, signed.encode(), hashlib.sha256))}"

    def requests(
        self, host: str, campaign: str, showing: str, numbers: Iterable[int]
    ) -> Iterator[bytes]:
        """Purchases of one ticket by the given members (below MINTED_MAX), all equally long."""
        for number in numbers:
            token, key = self.token(minted_no(number)), minted_key(number)
            yield purchase_request(host, campaign, token, key, 1, showing)


def minted_no(number: int) -> str:
    """Member number of a number in `Mint.requests`."""
    return str(MINTED_FROM + number)


def minted_key(number: int) -> str:
    """Key under which it asks."""
    return f"k{number:012d}"


def _pad(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unpad(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
