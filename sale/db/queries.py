"""Named SQL: ``sql/*.sql`` holds the statements, each under a line that names and describes it.

``-- name: find_card -- One card by its number.`` opens a block that ends before the next such line.
People and tools that know SQL can read these files; strings between Python lines hide it from both.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Final


@cache
def load(topic: str) -> Mapping[str, str]:
    """Read ``sql/<topic>.sql``: statement by name.

    Raises ValueError if a block has no name, no description or no statement, or if a name occurs
    twice, so that a broken file fails at import and not in the middle of a sale.
    """
    text = resources.files("sale.db").joinpath("sql", f"{topic}.sql").read_text("utf-8")
    head, *blocks = _BLOCK.split(text)
    if _without_comments(head):
        raise ValueError(f"{topic}.sql: a statement comes before the first name")
    statements: dict[str, str] = {}
    for name, body in zip(blocks[::2], blocks[1::2], strict=True):
        statement = body.strip().removesuffix(";")
        if not _without_comments(statement):
            raise ValueError(f"{topic}.sql: {name} has no statement")
        if name in statements:
            raise ValueError(f"{topic}.sql: {name} occurs twice")
        statements[name] = statement
    return MappingProxyType(statements)


def _without_comments(text: str) -> str:
    return re.sub(r"--[^\n]*", "", text).strip()


_BLOCK: Final = re.compile(r"^-- name: ([a-z_]+) -- \S[^\n]*$", re.MULTILINE)
