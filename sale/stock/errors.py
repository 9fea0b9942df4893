"""When Redis is away: not reached, or reached and unable to serve, for whatever reason.

Away is what concerns all campaigns and passes by itself, or by an operator's work on the server. A
ResponseError about one campaign's keys is that campaign's trouble alone (``survey.is_wrong_type``).
"""

from typing import Final

from redis import exceptions as redis_errors

from sale import failures

REDIS_AWAY: Final = (
    OSError,  # with it TimeoutError: no answer in time
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
)
"""Errors of a call while Redis is away."""

REDIS_ERRORS: Final = (redis_errors.RedisError, OSError)
"""Errors of a call while Redis is away or slow, or when it refuses it for another reason."""

_REASONS: Final[failures.Reasons] = (
    (redis_errors.BusyLoadingError, "it is loading its data"),
    (redis_errors.AuthenticationError, "it refuses the password"),
    (redis_errors.OutOfMemoryError, "it is out of memory"),
    (redis_errors.ReadOnlyError, "it is a replica, which is read-only"),
    (redis_errors.TimeoutError, "no answer in time"),
    (TimeoutError, "no answer in time"),
    (redis_errors.ConnectionError, "it cannot be reached"),
    (OSError, "it cannot be reached"),
)


def in_words(error: Exception) -> str:
    """Say in one line why Redis is away, and what it said itself."""
    return failures.in_words(error, _REASONS)
