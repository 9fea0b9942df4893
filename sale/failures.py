"""One wording for why a store is away: our reason, and what the store said itself."""

from collections.abc import Sequence
from typing import TypeAlias

Reasons: TypeAlias = Sequence[tuple[type[Exception], str]]
"""Kinds of errors and the reason of each; the first kind that fits counts."""


def in_words(error: Exception, reasons: Reasons) -> str:
    """Say in one line why a store is away."""
    said = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    for kind, reason in reasons:
        if isinstance(error, kind):
            return f"{reason}: {said}"
    return f"{type(error).__name__}: {said}"
