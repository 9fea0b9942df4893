"""Operators' accounts: add, list, disable, give a token, and find the account of a token.

A token is shown once and stored as a hash. A new one ends the one before; a disabled account has
none. Accounts are never deleted, because the audit log names them.
"""

import contextlib
from typing import Any, Final

from sale.db import operators as table
from sale.db.operators import Operator
from sale.domain.problem import Problem, Refused
from sale.domain.text import account_name
from sale.domain.unions import DISTRICT
from sale.identity import new_operator_token, operator_token_hash

ROLES: Final = ("admin", "operator", "clerk", "auditor")


async def add_operator(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    name: str,
    role: str,
    *,
    union: str | None = None,
    unions: frozenset[str],
    actor: str,
) -> Operator:
    """Make an account; without ``union`` it acts for the district.

    Raises:
        Refused: INVALID_REQUEST with ``field``; WRONG_STATE where the name is taken.

    """
    union = DISTRICT if union is None else union
    try:
        name = account_name(name)
    except ValueError as wrong:
        raise Refused(Problem.INVALID_REQUEST, str(wrong), field="name") from None
    if role not in ROLES:
        raise Refused(Problem.INVALID_REQUEST, f"a role is one of {', '.join(ROLES)}", field="role")
    if union not in unions:
        raise Refused(Problem.INVALID_REQUEST, f"{union!r} is not a known union", field="union")
    async with pool.acquire() as connection, connection.transaction():
        operator = await table.add(connection, name, role, union)
        if operator is None:
            raise Refused(Problem.WRONG_STATE, f"there is an operator {name!r} already")
        await table.write_audit(
            connection,
            actor=actor,
            action="operator.add",
            target=f"operator {name}",
            data={"role": role, "union": union},
        )
    return operator


async def list_operators(pool: Any) -> list[Operator]:  # noqa: ANN401 - an asyncpg pool
    """Every account, by name."""
    async with pool.acquire() as connection:
        return await table.all_operators(connection)


async def disable_operator(pool: Any, name: str, *, actor: str) -> None:  # noqa: ANN401
    """Disable an account at once, its token too; may be repeated. Raises Refused (NOT_FOUND)."""
    async with pool.acquire() as connection, connection.transaction():
        operator = await _locked(connection, name)
        await table.disable(connection, operator.name)
        await table.write_audit(
            connection, actor=actor, action="operator.disable", target=f"operator {operator.name}"
        )


async def give_token(pool: Any, name: str, *, actor: str) -> str:  # noqa: ANN401
    """Give an account a new token and return it, this once; the one before ends here.

    Raises:
        Refused: NOT_FOUND; WRONG_STATE where the account is disabled.

    """
    new = new_operator_token()
    async with pool.acquire() as connection, connection.transaction():
        operator = await _locked(connection, name)
        if operator.disabled:
            raise Refused(Problem.WRONG_STATE, f"operator {operator.name!r} is disabled")
        await table.set_token(connection, operator.name, new.token_hash)
        await table.write_audit(
            connection, actor=actor, action="operator.token", target=f"operator {operator.name}"
        )
    return new.token


async def authenticate_operator(pool: Any, token: str) -> Operator:  # noqa: ANN401
    """Give the account of a token. Raises Refused (UNAUTHENTICATED) for an unknown one."""
    async with pool.acquire() as connection:
        operator = await table.by_token(connection, operator_token_hash(token))
    if operator is None:
        raise Refused(Problem.UNAUTHENTICATED, "the token is not valid")
    return operator


async def _locked(connection: Any, name: str) -> Operator:  # noqa: ANN401
    """Lock an account, whose name may be older than the rules for names. Raises Refused."""
    names = [name] if name.isprintable() else []
    with contextlib.suppress(ValueError):
        names.append(account_name(name))
    for written in names:
        operator = await table.lock(connection, written)
        if operator is not None:
            return operator
    raise Refused(Problem.NOT_FOUND, f"there is no operator {name!r}")
