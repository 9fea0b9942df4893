"""Accounts: made, given a token, disabled; all of it in the audit log."""

from typing import Any

import pytest

from sale.domain.problem import Problem, Refused
from sale.identity import operator_token_hash
from sale.operators.accounts import (
    add_operator,
    authenticate_operator,
    disable_operator,
    give_token,
    list_operators,
)

UNIONS = frozenset({"district", "longtan"})


async def add(pool: Any, name: str, **changes: Any) -> None:
    values = {"role": "operator", "union": None} | changes
    await add_operator(
        pool, name, values["role"], union=values["union"], unions=UNIONS, actor="cli:test"
    )


async def test_token_belongs_to_its_account(pool: Any) -> None:
    await add(pool, "ann", role="clerk", union="longtan")
    token = await give_token(pool, "ann", actor="cli:test")
    operator = await authenticate_operator(pool, token)
    assert (operator.name, operator.role, operator.union_code) == ("ann", "clerk", "longtan")
    assert await pool.fetchval("select token_hash from operator") == operator_token_hash(token)
    assert token not in str(await pool.fetch("select * from operator")) + str(
        await pool.fetch("select * from audit_log")
    )


async def test_new_token_ends_the_old_one(pool: Any) -> None:
    await add(pool, "ann")
    old = await give_token(pool, "ann", actor="cli:test")
    new = await give_token(pool, "ann", actor="cli:test")
    with pytest.raises(Refused, match="unauthenticated"):
        await authenticate_operator(pool, old)
    assert (await authenticate_operator(pool, new)).name == "ann"


async def test_disabled_account_has_no_token(pool: Any) -> None:
    await add(pool, "ann")
    token = await give_token(pool, "ann", actor="cli:test")
    await disable_operator(pool, "ann", actor="boss")
    await disable_operator(pool, "ann", actor="boss")
    with pytest.raises(Refused, match="unauthenticated"):
        await authenticate_operator(pool, token)
    with pytest.raises(Refused, match="wrong-state"):
        await give_token(pool, "ann", actor="cli:test")
    assert [(entry.name, entry.disabled) for entry in await list_operators(pool)] == [("ann", True)]


async def test_every_action_stands_in_the_audit_log(pool: Any) -> None:
    await add(pool, "ann")
    await give_token(pool, "ann", actor="boss")
    await disable_operator(pool, "ann", actor="boss")
    rows = await pool.fetch("select actor, action, target from audit_log order by id")
    assert [tuple(row) for row in rows] == [
        ("cli:test", "operator.add", "operator ann"),
        ("boss", "operator.token", "operator ann"),
        ("boss", "operator.disable", "operator ann"),
    ]


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("", {}, "name"),
        ("a b", {}, "name"),
        ("a\n", {}, "name"),
        ("x" * 65, {}, "name"),
        ("ann", {"role": "king"}, "role"),
        ("ann", {"union": "atlantis"}, "union"),
    ],
)
async def test_invalid_input_names_the_field(
    pool: Any, name: str, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(Refused) as caught:
        await add(pool, name, **changes)
    assert caught.value.problem is Problem.INVALID_REQUEST
    assert caught.value.members["field"] == field
    assert await pool.fetchval("select count(*) from audit_log") == 0


async def test_taken_or_unknown_name_is_refused(pool: Any) -> None:
    await add(pool, "ann")
    with pytest.raises(Refused, match="already"):
        await add(pool, "ann")
    for call in (give_token, disable_operator):
        with pytest.raises(Refused, match="no operator 'bob'"):
            await call(pool, "bob", actor="cli:test")


async def test_names_that_look_alike_are_one_account(pool: Any) -> None:
    await add(pool, "ａｎｎ")
    await add(pool, "Rene\u0301")
    assert [entry.name for entry in await list_operators(pool)] == ["Ren\xe9", "ann"]
    for twin in ("ann", "ａnn", "Ren\xe9", "Rene\u0301"):
        with pytest.raises(Refused, match="already"):
            await add(pool, twin)
        assert await give_token(pool, twin, actor="cli:test")
    await disable_operator(pool, "ａｎｎ", actor="cli:test")
    targets = await pool.fetch("select distinct target from audit_log order by 1")
    assert [row["target"] for row in targets] == ["operator Ren\xe9", "operator ann"]


async def test_account_from_before_the_rule_is_still_disabled(pool: Any) -> None:
    await pool.execute("insert into operator (name, role) values ('ａｎｎ', 'operator')")
    await add(pool, "ann")
    await disable_operator(pool, "ａｎｎ", actor="cli:test")
    found = {entry.name: entry.disabled for entry in await list_operators(pool)}
    assert found == {"ann": False, "ａｎｎ": True}
