"""Reads of all campaigns at once, for those who look at each of them some times a second.

By redis-py a command a campaign costs the client more than everything else that it does with the
answers; figures in ``lua/survey.lua``.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final

from redis.exceptions import ResponseError

KEYS_A_CALL: Final = 64
"""So that a member's purchase waits for a fraction of a millisecond."""


def ask(pipe: Any, keys: Sequence[str], fields: Sequence[str] = ()) -> None:  # noqa: ANN401 - redis-py's pipeline
    """Put the question into a pipeline: one reply for each ``KEYS_A_CALL`` hashes begun."""
    for at in range(0, len(keys), KEYS_A_CALL):
        some = keys[at : at + KEYS_A_CALL]
        pipe.eval(_SCRIPT, len(some), *some, *fields)


def told(replies: Sequence[Any], count: int) -> list[Any]:
    """Give what was told of each of ``count`` keys, by the replies to ``ask``.

    Where a whole call failed, each of its keys has its error.
    """
    found: list[Any] = []
    for reply in replies:
        some = min(KEYS_A_CALL, count - len(found))
        found += [reply] * some if isinstance(reply, Exception) else reply
    return found


def is_wrong_type(error: object) -> bool:
    """Whether Redis said that a key is of another type: the trouble of its campaign alone."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


_SCRIPT: Final = (files(__package__) / "lua" / "survey.lua").read_text("utf-8")
