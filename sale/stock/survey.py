"""Reads the same fields of many hashes in few calls, for jobs that look at all campaigns.

With redis-py, one command for each campaign costs the client more than all that it does with the
replies; ``lua/survey.lua`` has the figures.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final

from redis.exceptions import ResponseError

KEYS_A_CALL: Final = 64
"""So that a member's purchase waits for a fraction of a millisecond."""


def add_reads(pipe: Any, keys: Sequence[str], fields: Sequence[str] = ()) -> None:  # noqa: ANN401 - redis-py's pipeline
    """Add the calls to a pipeline: one for each ``KEYS_A_CALL`` hashes begun."""
    for at in range(0, len(keys), KEYS_A_CALL):
        some = keys[at : at + KEYS_A_CALL]
        pipe.eval(_SCRIPT, len(some), *some, *fields)


def replies_by_key(replies: Sequence[Any], count: int) -> list[Any]:
    """Give the reply for each of ``count`` keys, from the replies to the calls of ``add_reads``.

    If a whole call failed, each of its keys has its error.
    """
    found: list[Any] = []
    for reply in replies:
        some = min(KEYS_A_CALL, count - len(found))
        found += [reply] * some if isinstance(reply, Exception) else reply
    return found


def is_wrong_type(error: object) -> bool:
    """Whether a key is of another type, which is a fault of its campaign alone."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


_SCRIPT: Final = (files(__package__) / "lua" / "survey.lua").read_text("utf-8")
