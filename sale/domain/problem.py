"""Why a request is not done."""

from enum import StrEnum
from typing import Final

from sale.domain.text import Text

DAMAGED: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What Python raises for a stored value that is not what the engine writes there."""


class Problem(StrEnum):
    """Why a request was not done: the ``code`` of the answer (RFC 9457)."""

    INVALID_REQUEST = "invalid-request"
    MISSING_IDEMPOTENCY_KEY = "missing-idempotency-key"
    UNAUTHENTICATED = "unauthenticated"
    NOT_ELIGIBLE = "not-eligible"
    CARD_REVOKED = "card-revoked"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    NOT_OPEN = "not-open"
    PAUSED = "paused"
    CLOSED = "closed"
    SOLD_OUT = "sold-out"
    LIMIT_EXCEEDED = "limit-exceeded"
    TOO_MANY_ORDERS = "too-many-orders"
    WRONG_STATE = "wrong-state"
    IDEMPOTENCY_MISMATCH = "idempotency-mismatch"
    PAYLOAD_TOO_LARGE = "payload-too-large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type"
    RATE_LIMITED = "rate-limited"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"


class Refused(Exception):  # noqa: N818 - the domain's word
    """A request that is not done, with the code and the members of the problem document.

    ``detail`` is one sentence for people, in English; one that is given in both languages is in
    ``detail_zh`` too. ``members`` are the extra fields of the contract
    (``remaining``, ``card_remaining``, ``opens_at``, ``field`` …); ``retry_after_s`` becomes the
    header.
    """

    def __init__(
        self,
        problem: Problem,
        detail: str | Text = "",
        *,
        retry_after_s: int | None = None,
        **members: object,
    ) -> None:
        self.problem = problem
        self.detail_zh, self.detail = detail if isinstance(detail, Text) else ("", detail)
        super().__init__(f"{problem.value}: {self.detail}" if self.detail else problem.value)
        self.retry_after_s = retry_after_s
        self.members = members
