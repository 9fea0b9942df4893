"""The port to payment providers: what the engine asks of one, and what it hears from one.

Every call may be repeated under the same number, and may fail with an exception: what happened then
is unknown, and the keeper asks.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Protocol

import msgspec


class Paid(StrEnum):
    """What a provider knows of a payment."""

    NO = "no"
    """Nothing has come in yet, and something still may."""
    YES = "yes"
    CLOSED = "closed"
    """Nothing has come in, and nothing can any more."""


class Returned(StrEnum):
    """What a provider says of a refund."""

    PENDING = "pending"
    """Accepted: it is not there yet."""
    DONE = "done"
    FAILED = "failed"
    """It was refused, or is not known: it may be asked for again under the same number."""


class Status(msgspec.Struct, frozen=True):
    """A payment at its provider; ``amount_fen`` and ``ref`` (its own number) once it is paid."""

    paid: Paid
    amount_fen: int = 0
    ref: str = ""


class Notice(msgspec.Struct, frozen=True):
    """A verified notice of a provider about one of our payments."""

    payment_no: str
    status: Status


class BadNotice(Exception):  # noqa: N818 - says what came
    """A notice that its provider did not send, or that cannot be read."""


class ProviderError(Exception):
    """A provider did not do what it was asked; whether it did is unknown."""


PROVIDER_TIMEOUT_S: Final = 5.0
"""For each call to a provider."""


class Provider(Protocol):
    """A payment provider. Each call raises ProviderError, OSError or TimeoutError."""

    name: str

    async def create(
        self, payment_no: str, amount_fen: int, expires_at_ms: int, return_to: str
    ) -> str:
        """Begin a payment, or find it; give the address where it is paid."""

    async def query(self, payment_no: str) -> Status:
        """Ask what has become of a payment."""

    async def close(self, payment_no: str) -> Status:
        """Let nothing come in any more, also where it is not known; YES where it was paid."""

    async def refund(
        self, payment_no: str, refund_no: str, amount_fen: int, total_fen: int
    ) -> Returned:
        """Send money back. A repeat under the same number sends nothing twice."""

    async def query_refund(self, refund_no: str) -> Returned:
        """Ask what has become of a refund."""

    def verify(self, headers: Mapping[str, str], body: bytes) -> Notice:
        """Read a notice. Raises BadNotice for what this provider did not send."""


Providers = Mapping[str, Provider]
"""Providers of a deployment, by name."""
