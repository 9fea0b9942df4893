"""The ledger in PostgreSQL: what it refuses by itself, and how batches are applied."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from ledger_maker import NOW_MS, Ledger, cancelled, created, operation, sold
from stock_maker import CAMPAIGN, member

from sale.db import apply, read
from sale.db.apply import Applied, PositionMoved, apply_entries
from sale.ledger.chain import GENESIS, CorruptLedger, Entry, Position

Refused = asyncpg.IntegrityConstraintViolationError


@pytest.fixture(scope="module")
async def shared_url(server_database_url: str, migrated_template: str) -> AsyncIterator[str]:
    """One database for this module: copying the template for each test takes most of a second."""
    server = await asyncpg.connect(server_database_url)
    await server.execute(f'CREATE DATABASE test_ledger TEMPLATE "{migrated_template}"')
    yield urlunsplit(urlsplit(server_database_url)._replace(path="/test_ledger"))
    await server.execute("DROP DATABASE test_ledger WITH (FORCE)")
    await server.close()


@pytest.fixture
async def conn(shared_url: str) -> AsyncIterator[Any]:
    """A connection whose work is rolled back after the test."""
    connection = await asyncpg.connect(shared_url)
    transaction = connection.transaction()
    await transaction.start()
    yield connection
    await transaction.rollback()
    await connection.close()


@pytest.fixture
async def book(conn: Any) -> Ledger:
    """A campaign of 10 and 2 tickets, opened, with one order of card 1; four events."""
    made = Ledger()
    first = made.entry(created(10, 2))
    await apply_entries(conn, CAMPAIGN, [first, made.entry(operation("opened"), sold(1))])
    return made


async def count(conn: Any, table: str) -> int:
    return await conn.fetchval(f"SELECT count(*) FROM {table}")


async def raw_event(conn: Any, seq: int, *, applied: int | None = None, **columns: Any) -> None:
    """Add a sale by hand, moving the position first as the writer would."""
    row = {
        "campaign_id": CAMPAIGN, "seq": seq, "epoch": 1, "kind": "sold", "member_no": member(1),
        "showing_no": 0, "quantity": 1, "price_fen": 500, "key_hash": "f" * 16, **columns,
    }  # fmt: skip
    await conn.execute("UPDATE campaign SET applied = $1", seq if applied is None else applied)
    marks = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    await conn.execute(
        f"INSERT INTO event ({', '.join(row)}, at) VALUES ({marks}, now())", *row.values()
    )


async def raw_order(conn: Any, seq: int, **columns: Any) -> None:
    """Add the order of a sale by hand, other than the sale says where ``columns`` differ."""
    row = {
        "campaign_id": CAMPAIGN, "seq": seq, "member_no": member(1), "showing_no": 0, "quantity": 1,
        "price_fen": 500, "key_hash": "f" * 16, **columns,
    }  # fmt: skip
    row = {"live": row["quantity"], **row}
    marks = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    await conn.execute(
        f"INSERT INTO orders ({', '.join(row)}, created_at) SELECT {marks}, max(at) FROM event"
        f" WHERE seq = {seq}",
        *row.values(),
    )


# Constraints, by raw SQL -------------------------------------------------------------------------


async def test_sale_and_order_in_raw_sql_are_counted(conn: Any, book: Ledger):
    await raw_event(conn, 4)
    await raw_order(conn, 4)
    assert await conn.fetchval("SELECT live FROM showing WHERE showing_no = 0") == 2
    assert await conn.fetchval("SELECT live FROM member_use") == 2


async def test_sql_refuses_more_than_the_tickets_inv_1(conn: Any, book: Ledger):
    await raw_event(conn, 4, showing_no=1, quantity=3, member_no=member(2))
    with pytest.raises(Refused, match="showing_never_oversold"):
        await raw_order(conn, 4, showing_no=1, quantity=3, member_no=member(2))


async def test_sql_refuses_more_than_the_limit_inv_2(conn: Any, book: Ledger):
    await raw_event(conn, 4, quantity=3)
    with pytest.raises(Refused, match="member_use_within_limit"):
        await raw_order(conn, 4, quantity=3)


async def test_sql_refuses_a_first_order_over_the_limit_inv_2(conn: Any, book: Ledger):
    await raw_event(conn, 4, quantity=4, member_no=member(2))
    with pytest.raises(Refused, match="member_use_within_limit"):
        await raw_order(conn, 4, quantity=4, member_no=member(2))


async def test_sql_refuses_a_second_order_under_one_key_inv_4(conn: Any, book: Ledger):
    await raw_event(conn, 4, key_hash=f"{1:016x}")
    with pytest.raises(asyncpg.UniqueViolationError):
        await raw_order(conn, 4, key_hash=f"{1:016x}")


@pytest.mark.parametrize(
    ("seq", "applied"),
    [(5, 5), (4, 5), (3, 3), (0, 0), (4, 3)],
    ids=["gap", "position ahead", "same number", "number 0", "position behind"],
)
async def test_sql_refuses_an_event_out_of_order_inv_5(
    conn: Any, book: Ledger, seq: int, applied: int
):
    with pytest.raises(Refused):
        await raw_event(conn, seq, applied=applied)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET quantity = 2",
        "DELETE FROM event",
        "TRUNCATE event",
        "UPDATE audit_log SET actor = 'nobody'",
        "DELETE FROM audit_log",
        "TRUNCATE audit_log",
        "DELETE FROM orders",
        "TRUNCATE orders",
        "UPDATE orders SET quantity = 2",
        "UPDATE orders SET member_no = 999",
        "UPDATE orders SET price_fen = 1",
        "UPDATE orders SET state = 'lost'",
        "UPDATE showing SET live = live + 1",
        "UPDATE showing SET stock = 0 WHERE showing_no = 0",
        "DELETE FROM showing WHERE showing_no = 0",
        "UPDATE member_use SET live = 0",
        "DELETE FROM member_use",
        "INSERT INTO member_use VALUES ('five-yuan-films', 999, 1, 3)",
        "INSERT INTO showing VALUES ('five-yuan-films', 7, 's7', 't', null, 5, 1)",
        "INSERT INTO deployment (ticket_secret) SELECT ticket_secret FROM deployment",
        "UPDATE campaign SET applied = -1",
    ],
)
async def test_sql_refuses_falsified_ledger_rows(conn: Any, book: Ledger, statement: str):
    with pytest.raises(Refused):
        await conn.execute(statement)


@pytest.mark.parametrize(
    "lie",
    [
        {"quantity": 2},
        {"member_no": member(2)},
        {"showing_no": 1},
        {"price_fen": 1},
        {"key_hash": "e" * 16},
        {"seq": 2},
        {"seq": 5},
    ],
    ids=str,
)
async def test_sql_refuses_an_order_unlike_its_sale(conn: Any, book: Ledger, lie: dict[str, Any]):
    await raw_event(conn, 4)
    with pytest.raises(Refused):
        await raw_order(conn, **{"seq": 4, **lie})


async def test_ended_order_gives_its_tickets_back_once(conn: Any, book: Ledger):
    order = {"order": 3, "member_no": member(1)}
    await apply_entries(conn, CAMPAIGN, [book.entry(cancelled(**order, tickets=[1]))])
    assert await conn.fetchval("SELECT live FROM showing WHERE showing_no = 0") == 0
    assert await conn.fetchval("SELECT live FROM member_use") == 0
    again = await apply_entries(conn, CAMPAIGN, [book.entry(cancelled(**order, tickets=[1]))])
    assert "ticket_pkey" in again.conflicts[0].why
    with pytest.raises(Refused, match="no order changes so"):
        await conn.execute("UPDATE orders SET state = 'confirmed', live = 1")


# Batches -----------------------------------------------------------------------------------------


async def test_position_of_an_unknown_campaign_is_genesis(conn: Any):
    assert await read.position(conn, CAMPAIGN) == (0, GENESIS)


async def test_applied_entries_make_events_orders_and_counters(conn: Any):
    book = Ledger()
    entries = [
        book.entry(created(2, 5)),
        book.entry(operation("opened", opens_at=NOW_MS), sold(1), sold(2, quantity=1)),
        book.entry(operation("stock_added", showing=0, add=3), sold(3, quantity=3)),
        book.entry(sold(1, key=2, showing=1), operation("paused"), at_ms=NOW_MS + 5),
    ]
    done = await apply_entries(conn, CAMPAIGN, entries)
    assert done == Applied(Position(8, book.chain), 8, [])
    assert await read.position(conn, CAMPAIGN) == (8, book.chain)
    assert await count(conn, "event") == 8
    assert await count(conn, "orders") == 4

    (campaign,) = await read.campaigns(conn)
    assert (campaign.state, campaign.applied, campaign.opens_at_ms) == ("paused", 8, NOW_MS)
    assert [(s.showing_id, s.stock, s.live) for s in campaign.showings] == [
        ("s0", 5, 5),
        ("s1", 5, 1),
    ]
    assert campaign.config["title"] == "五元看大片"

    log = await read.audit_log(conn, campaign=CAMPAIGN)
    assert [(row.action, row.data["seq"]) for row in log] == [
        ("campaign.paused", 8),
        ("campaign.stock_added", 5),
        ("campaign.opened", 2),
        ("campaign.created", 1),
    ]
    assert (log[0].actor, log[0].reason, log[0].at_ms) == ("cli:me", "wanted", NOW_MS + 5)
    assert await read.audit_log(conn, before_id=log[-1].id) == []


async def test_orders_are_read_by_pages_newest_first(conn: Any, book: Ledger):
    later = book.entry(sold(1, key=2), sold(9), sold(1, key=3, showing=1), at_ms=NOW_MS + 1)
    await apply_entries(conn, CAMPAIGN, [later])
    newest = await read.orders_of_member(conn, member(1), limit=2)
    assert [row.record.seq for row in newest] == [6, 4]
    rest = await read.orders_of_member(conn, member(1), before=newest[-1].cursor, limit=2)
    assert [row.record.seq for row in rest] == [3]
    one = await read.order(conn, CAMPAIGN, 6)
    assert one == newest[0]
    assert one is not None
    assert (one.showing_id, one.price_fen, one.record.state) == ("s1", 500, "confirmed")
    assert (one.record.at_ms, one.card_remaining) == (NOW_MS + 1, 0)
    assert await read.order(conn, CAMPAIGN, 2) is None


async def test_batch_applied_twice_raises_position_moved(conn: Any, book: Ledger):
    before = await read.position(conn, CAMPAIGN)
    entry = book.entry(sold(2))
    await apply_entries(conn, CAMPAIGN, [entry], after=before)
    for after in (before, None):
        with pytest.raises(PositionMoved):
            await apply_entries(conn, CAMPAIGN, [entry], after=after)
    assert await count(conn, "orders") == 2


async def test_one_of_two_concurrent_writers_applies(database_url: str):
    writers = [await asyncpg.connect(database_url) for _ in range(2)]
    book = Ledger()
    for entry in (book.entry(created(10), operation("opened")), book.entry(sold(2), sold(3))):
        before = await read.position(writers[0], CAMPAIGN)
        outcomes = await asyncio.gather(
            *(apply_entries(conn, CAMPAIGN, [entry], after=before) for conn in writers),
            return_exceptions=True,
        )
        assert sorted(type(done).__name__ for done in outcomes) == ["Applied", "PositionMoved"]
    assert await count(writers[0], "event") == 4
    for conn in writers:
        await conn.close()


async def test_fork_is_refused_by_its_chain(conn: Any, book: Ledger):
    position = await read.position(conn, CAMPAIGN)
    fork = Ledger()
    fork.seq, fork.chain = position.seq, "1" * 40
    with pytest.raises(CorruptLedger, match="chain breaks"):
        await apply_entries(conn, CAMPAIGN, [fork.entry(sold(2))])
    forked = Position(position.seq, "1" * 40)
    fork.seq, fork.chain = forked
    with pytest.raises(PositionMoved):
        await apply_entries(conn, CAMPAIGN, [fork.entry(sold(2))], after=forked)
    assert await count(conn, "event") == 3


@pytest.mark.parametrize(
    "row",
    [
        ["sold", 110101000000, 0, 1, "0" * 16, 500],
        ["sold", member(2), "0", 1, "0" * 16, 500],
        ["sold", member(2)],
        ["edited", {}],
    ],
    ids=str,
)
async def test_impossible_event_applies_nothing(conn: Any, book: Ledger, row: list[Any]):
    before = await read.position(conn, CAMPAIGN)
    with pytest.raises(CorruptLedger):
        await apply_entries(conn, CAMPAIGN, [book.entry(sold(5), row)])
    assert await read.position(conn, CAMPAIGN) == before
    assert await count(conn, "event") == 3


async def test_gap_applies_nothing(conn: Any, book: Ledger):
    book.entry(sold(2))
    with pytest.raises(CorruptLedger, match="event 4 is missing"):
        await apply_entries(conn, CAMPAIGN, [book.entry(sold(3))])


async def test_only_sales_refused_by_sql_become_conflicts(conn: Any, book: Ledger):
    rows = [sold(n) for n in range(2, 9)]
    rows[3] = sold(1, key=1)
    rows[5] = sold(20, quantity=4)
    rows += [sold(30, showing=9), operation("stock_added", showing=7, add=1), sold(31)]
    done = await apply_entries(
        conn, CAMPAIGN, [book.entry(*rows), book.entry(sold(32, quantity=0))]
    )
    assert [conflict.seq for conflict in done.conflicts] == [7, 9, 11, 12, 14]
    assert not any(str(member(1)) in conflict.why for conflict in done.conflicts)
    assert done.position == (14, book.chain)
    assert await count(conn, "event") == 14
    assert await count(conn, "orders") == 1 + 5 + 1
    assert await conn.fetchval("SELECT live FROM showing WHERE showing_no = 0") == 7
    assert await count(conn, "conflict") == 5
    assert list(await apply.conflicts_to_pause(conn)) == [CAMPAIGN]
    await apply.mark_paused(conn, CAMPAIGN)
    assert await apply.conflicts_to_pause(conn) == {}


async def test_recreated_draft_has_new_config_and_showings(conn: Any):
    book = Ledger()
    entry = book.entry(created(5, 5), operation("deleted"), created(7, card_limit=1))
    await apply_entries(conn, CAMPAIGN, [entry])
    (campaign,) = await read.campaigns(conn)
    assert (campaign.state, campaign.card_limit) == ("draft", 1)
    assert [showing.stock for showing in campaign.showings] == [7]


async def test_every_table_and_column_has_a_comment(conn: Any):
    bare = await conn.fetch(
        """SELECT c.relname, a.attname FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relkind = 'r' AND c.relname = ANY($1)
            AND (col_description(c.oid, a.attnum) IS NULL OR obj_description(c.oid) IS NULL)""",
        ["deployment", "campaign", "showing", "event", "orders", "member_use", "conflict",
         "audit_log"],
    )  # fmt: skip
    assert bare == []


async def test_batch_cost_is_constant_as_tables_grow(database_url: str):
    """Plans that the session keeps from when the tables were empty must not scan them later."""
    conn = await asyncpg.connect(database_url)
    book, position = Ledger(), Position(0, GENESIS)

    async def put(entries: list[Entry]) -> None:
        nonlocal position
        position = (await apply_entries(conn, CAMPAIGN, entries, after=position)).position

    await put([book.entry(created(1_000_000))])
    for n in range(8):
        await put([book.entry(sold(n))])
    for n in range(10):
        await put([book.entry(*(sold(100 + n * 1_000 + i) for i in range(1_000)))])
    await conn.execute("SELECT pg_stat_force_next_flush()")
    scanned = await conn.fetchval(
        "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'event'"
    )
    probed = await conn.fetchval(
        "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'event'"
    )
    await conn.close()
    assert scanned == 0
    assert 0 < probed < 3 * 10_100
