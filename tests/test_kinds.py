"""The table of kinds of events, and all that must agree with it."""

import random
import re
from typing import Any

import asyncpg
import msgspec
import pytest
from ledger_maker import NOW_MS, Ledger, created, operation, sold
from stock_maker import CAMPAIGN

from sale.db import queries, read
from sale.db.apply import apply_entries
from sale.domain.clock import nearest, to_ms
from sale.ledger.chain import CorruptLedger
from sale.ledger.fold import CampaignState
from sale.ledger.kinds import KINDS, Transition

FAR_MS = (10**30, -(10**30), 253_402_041_599_999, -62_135_423_999_999, 10**12 + 1, 0, -1, None)


OF_ORDERS = {"created", "sold", "held", "expired", "paid", "cancelled"}
"""Kinds that follow from one another: ``test_order_life.py`` writes them at random."""


@pytest.fixture
async def conn(database_url: str) -> Any:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_constraint_lists_the_kinds_of_the_table(conn: Any) -> None:
    text = await conn.fetchval(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'event_kind_known'"
    )
    assert sorted(re.findall(r"'(\w+)'", text)) == sorted(KINDS)


async def test_statements_take_the_arguments_of_their_kind(conn: Any) -> None:
    statements = queries.load("apply")
    for kind in KINDS.values():
        for name in kind.apply:
            taken = (await conn.prepare(statements[name])).get_parameters()
            assert [each.name for each in taken[:4]] == ["text", "int8", "int8", "text"], name
            assert len(taken) == 4 + len(kind.arguments), name


@pytest.mark.parametrize("ms", FAR_MS)
async def test_moment_in_sql_is_the_nearest_one(conn: Any, ms: int | None) -> None:
    stored = await conn.fetchval("SELECT moment($1::jsonb)", msgspec.json.encode(ms).decode())
    assert (None if stored is None else to_ms(stored)) == (None if ms is None else nearest(ms))


def random_steps(rng: random.Random) -> list[list[Any]]:
    """Steps in runs of one kind, each with its own window or none."""
    steps: list[list[Any]] = [created(5, 5)]
    for _ in range(12):
        kind = rng.choice([name for name in KINDS if name not in OF_ORDERS])
        for _ in range(rng.randint(1, 4)):
            fields = msgspec.structs.fields(KINDS[kind].payload)
            data: dict[str, Any] = {
                each.name: rng.randint(0, 1) for each in fields if each.required
            }
            if "voided" in data:
                data["voided"] = []
            if KINDS[kind].payload is Transition:
                moments = {"opens_at": NOW_MS + rng.randint(0, 99), "closes_at": None}
                data = {name: ms for name, ms in moments.items() if rng.random() < 0.5}
            steps.append(operation(kind, **data))
        if rng.random() < 0.2:
            steps += [created(rng.randint(1, 9)), created(7, 8)]
            steps.append(sold(rng.randint(0, 99), key=len(steps)))
            steps.append(operation("voided"))
            steps.append(sold(rng.randint(0, 99), key=len(steps)))
            return steps
    return steps


@pytest.mark.parametrize("turn", range(8))
async def test_runs_of_steps_in_sql_give_what_the_fold_gives(
    conn: Any, rng: random.Random, turn: int
) -> None:
    # Given
    book, state = Ledger(), CampaignState()
    entry = book.entry(*random_steps(rng))
    # When
    done = await apply_entries(conn, CAMPAIGN, [entry])
    for event in entry.events():
        state.apply(event)
    # Then
    assert done.conflicts == []
    (stored,) = await read.campaigns(conn)
    assert stored.state == state.state
    assert (stored.opens_at_ms, stored.closes_at_ms) == (state.opens_at_ms, state.closes_at_ms)
    assert stored.config == state.config
    assert {each.showing_no: each.stock for each in stored.showings} == state.tickets
    left = {each.showing_no: each.stock - each.live for each in stored.showings}
    assert left == state.remaining


async def test_audit_log_holds_what_people_did(conn: Any) -> None:
    # Given
    clock = ["opened", {"actor": "clock"}]
    rows = [created(5), clock, sold(1), operation("paused"), operation("voided")]
    # When
    await apply_entries(conn, CAMPAIGN, [Ledger().entry(*rows)])
    # Then
    told = await read.audit_log(conn)
    assert [row.action for row in told] == ["campaign.paused", "campaign.created"]


def test_event_is_written_as_it_was_read() -> None:
    rows = [created(5), sold(1), operation("stock_added", showing=0, add=3), operation("voided")]
    assert [event.row() for event in Ledger().entry(*rows).events()] == rows


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (["moved", {}], "unknown kind 'moved'"),
        (["paused", []], r"Expected `object`"),
        (["paused", {}, 1], r"at most length"),
        ([], r"at least length"),
        ([["sold"]], r"Expected `str`"),
    ],
    ids=["unknown", "no object", "too long", "empty", "no name"],
)
def test_row_that_is_no_event_is_refused_with_why(row: list[Any], why: str) -> None:
    entry = Ledger().entry(row)
    with pytest.raises(CorruptLedger, match=why):
        entry.events()
