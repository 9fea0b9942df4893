"""Statements on operators' accounts, and the log of what operators did (INV-10).

Each takes a connection: an action and its line in the log belong into one transaction.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from sale.db.queries import load


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """An account. Only the hash of its token is stored."""

    name: str
    role: str
    union_code: str
    has_token: bool
    disabled: bool
    created_at: datetime


async def add(connection: Any, name: str, role: str, union: str) -> Operator | None:  # noqa: ANN401
    """Make an account without a token; None where the name is taken."""
    return _operator(await connection.fetchrow(_SQL["add"], name, role, union))


async def all_operators(connection: Any) -> list[Operator]:  # noqa: ANN401
    """Every account, by name."""
    return [Operator(**dict(row)) for row in await connection.fetch(_SQL["all"])]


async def lock(connection: Any, name: str) -> Operator | None:  # noqa: ANN401
    """One account, held until the commit, or None."""
    return _operator(await connection.fetchrow(_SQL["lock"], name))


async def disable(connection: Any, name: str) -> None:  # noqa: ANN401
    """Disable an account and take its token away."""
    await connection.execute(_SQL["disable"], name)


async def set_token(connection: Any, name: str, token_hash: bytes) -> None:  # noqa: ANN401
    """Give an account a token; the one before ends here."""
    await connection.execute(_SQL["set_token"], name, token_hash)


async def by_token(connection: Any, token_hash: bytes) -> Operator | None:  # noqa: ANN401
    """The account of a token that was not taken away, or None."""
    return _operator(await connection.fetchrow(_SQL["by_token"], token_hash))


async def write_audit(
    connection: Any,  # noqa: ANN401
    *,
    actor: str,
    action: str,
    target: str,
    reason: str | None = None,
    data: Mapping[str, object] | None = None,
) -> None:
    """Write one row of the audit log, in the transaction of the action."""
    encoded = msgspec.json.encode(data or {}).decode()
    await connection.execute(_SQL["write_audit"], actor, action, target, reason, encoded)


def _operator(row: Mapping[str, Any] | None) -> Operator | None:
    return None if row is None else Operator(**dict(row))


_SQL: Final = load("operators")
