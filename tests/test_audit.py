"""The audit: clean while sales go on, and every invariant that is broken by hand is found."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from money_maker import Till, open_till
from redis.asyncio import Redis
from service import command
from shop import Shop, open_shop
from stock_maker import CAMPAIGN, NONCE, Bid, campaign, key, member

from sale.domain.problem import Problem, Refused
from sale.stock.keys import CAMPAIGNS, campaign_keys
from sale.stock.records import pack_records, parse_records
from sale.stock.scripts import CallReply, Decision, Scripts
from sale.trust import audit as audit_module
from sale.trust.audit import CouldNotCheck
from sale.trust.revocation import sync_all

KEYS = campaign_keys(CAMPAIGN)
FULL_CARDS = f"WHERE member_no = {member(1)}"
Damage = Callable[[Shop], Awaitable[object]]


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    """A campaign that has been paused once, of which cards 1 (twice), 2 and 3 have bought."""
    await shop.add_cards(1, 2, 3)
    await shop.add_cards(9, status="suspended")
    await shop.create(campaign(10, 5, unions=["donghuamen"]))
    await shop.step("open")
    await shop.step("pause")
    await shop.step("resume")
    await _buy(shop, 1, quantity=2)
    await _buy(shop, 1, key_no=2)
    await _buy(shop, 2)
    await _buy(shop, 3)
    await shop.applied()
    return shop


async def _buy(shop: Shop, n: int, key_no: int = 1, quantity: int = 1) -> None:
    (told,) = await shop.stock.buy(Bid(member(n), key(key_no), quantity, 0, "donghuamen"))
    assert told.decision is Decision.SOLD


def in_redis(*words: Any) -> Damage:
    """One Redis command."""
    return lambda shop: shop.redis.execute_command(*words)


def in_postgres(*statements: str) -> Damage:
    """Statements that no trigger sees."""
    return lambda shop: shop.damage(*statements)


async def _card_gets_a_ticket_more(shop: Shop) -> None:
    value = await shop.redis.hget(KEYS.members, member(1))
    *others, last = parse_records(value)
    more = msgspec.structs.replace(last, live=last.live + 1)
    await shop.redis.hset(KEYS.members, member(1), pack_records([*others, more]))


async def _card_gets_another_key(shop: Shop) -> None:
    value = await shop.redis.hget(KEYS.members, member(2))
    await shop.redis.hset(KEYS.members, member(2), b"f" * 16 + value[16:])


async def _card_gets_an_order_of_nowhere(shop: Shop) -> None:
    value = await shop.redis.hget(KEYS.members, member(2))
    await shop.redis.hset(KEYS.members, member(7), value)


async def _stream_loses_an_entry(shop: Shop) -> None:
    rows = await shop.redis.xrange(KEYS.stream)
    await shop.redis.xdel(KEYS.stream, rows[3][0])


async def _stream_is_forged(shop: Shop) -> None:
    rows = await shop.redis.xrange(KEYS.stream)
    await shop.redis.delete(KEYS.stream)
    for entry_id, fields in rows:
        forged = fields | {b"d": fields[b"d"].replace(b"0000001", b"0000008")}
        await shop.redis.xadd(KEYS.stream, forged, id=entry_id)


async def _redis_goes_back(shop: Shop) -> None:
    copy = {name: await shop.redis.dump(name) for name in KEYS}
    await _buy(shop, 3, key_no=7)
    await shop.applied()
    for name, value in copy.items():
        await shop.redis.delete(name)
        if value is not None:
            await shop.redis.restore(name, 0, value)


async def _was_revoked_before(shop: Shop) -> None:
    await shop.pool.execute(
        "UPDATE member SET status = 'cancelled' WHERE member_no = $1", member(2)
    )
    await sync_all(shop.redis, shop.scripts, shop.pool)
    await shop.damage("UPDATE member_change SET at = at - interval '1 hour'")


async def _roster_is_not_followed(shop: Shop) -> None:
    await shop.pool.execute(
        "UPDATE member SET status = 'cancelled' WHERE member_no = $1", member(2)
    )
    await shop.damage("UPDATE member_change SET at = at - interval '3 seconds'")


async def _belongs_to_another_union(shop: Shop) -> None:
    await shop.damage(
        "UPDATE member SET union_code = 'hepingli', updated_at = now() - interval '1 hour'"
    )


def _rule_is_altered(**rules: Any) -> Damage:
    return lambda shop: shop.stock.alter_rules(**rules)


BREACHES = [
    ("INV-1", "stock-left", in_redis("HINCRBY", KEYS.stock, "r0", 1)),
    ("INV-1", "stock-total", in_redis("HINCRBY", KEYS.stock, "t1", 1)),
    ("INV-1", "oversold", in_postgres("UPDATE showing SET stock = 1, live = 1")),
    ("INV-1", "ledger-oversold", in_postgres("UPDATE event SET quantity = 11 WHERE quantity = 2")),
    ("INV-2", "card-forgotten", in_redis("HDEL", KEYS.members, member(1))),
    ("INV-2", "card-altered", _card_gets_a_ticket_more),
    ("INV-2", "limit-altered", _rule_is_altered(card_limit=4)),
    ("INV-5", "price-altered", _rule_is_altered(price_fen=1)),
    ("INV-5", "rule-of-nowhere", _rule_is_altered(colour=1)),
    ("INV-5", "other-configuration", in_redis("HSET", KEYS.head, "config_seq", 2)),
    ("INV-2", "order-over", in_postgres(f"UPDATE orders SET quantity = 5, live = 5 {FULL_CARDS}")),
    ("INV-3", "order-gone-from-redis", in_redis("DEL", KEYS.members)),
    ("INV-3", "card-torn", in_redis("HSET", KEYS.members, member(1), "torn")),
    ("INV-3", "order-gone", in_postgres(f"DELETE FROM orders {FULL_CARDS}")),
    ("INV-3", "order-altered", in_postgres(f"UPDATE orders SET price_fen = 1 {FULL_CARDS}")),
    (
        "INV-3",
        "order-of-nowhere",
        in_postgres(
            "INSERT INTO orders (seq, created_at, showing_no, quantity, price_fen, campaign_id,"
            f" member_no, key_hash, live) VALUES (1, now(), 0, 1, 500, '{CAMPAIGN}', {member(8)},"
            f" '{key(1)}', 1)"
        ),
    ),
    ("INV-4", "key-altered", _card_gets_another_key),
    ("INV-4", "step-forgotten", in_redis("DEL", KEYS.operations)),
    ("INV-4", "step-of-nowhere", in_redis("HSET", KEYS.operations, "abc", "2:def")),
    ("INV-4", "key-twice", in_postgres(f"UPDATE event SET key_hash = '{key(1)}' {FULL_CARDS}")),
    ("INV-5", "event-gone", in_postgres("DELETE FROM event WHERE seq = 3")),
    ("INV-5", "last-event-gone", in_postgres("DELETE FROM event WHERE key_hash = (SELECT key_hash"
     " FROM event ORDER BY seq DESC LIMIT 1) AND seq = (SELECT max(seq) FROM event)")),
    ("INV-5", "other-chain", in_postgres(f"UPDATE campaign SET chain = '{'1' * 40}'")),
    ("INV-5", "head-chain", in_redis("HSET", KEYS.head, "chain", "1" * 40)),
    ("INV-5", "stream-gap", _stream_loses_an_entry),
    ("INV-5", "stream-gone", in_redis("DEL", KEYS.stream)),
    ("INV-5", "stream-forged", _stream_is_forged),
    ("INV-5", "order-of-nowhere-in-redis", _card_gets_an_order_of_nowhere),
    ("INV-5", "price", in_postgres("UPDATE event SET price_fen = 1 WHERE kind = 'sold'")),
    ("INV-5", "unregistered", in_redis("SREM", CAMPAIGNS, CAMPAIGN)),
    (
        "INV-5",
        "conflict",
        in_postgres(
            "INSERT INTO conflict (campaign_id, seq, at, why, event)"
            f" VALUES ('{CAMPAIGN}', 5, now(), 'refused', '{{}}')"
        ),
    ),
    ("INV-6", "counter-of-card", in_postgres("UPDATE member_use SET live = 0")),
    ("INV-6", "counter-of-showing", in_postgres("UPDATE showing SET live = 0")),
    (
        "INV-6",
        "cancelled-unsaid",
        in_postgres(
            f"UPDATE orders SET state = 'cancelled', live = 0, changed_by = 99 {FULL_CARDS}"
        ),
    ),
    ("INV-6", "hold-of-nowhere", in_redis("ZADD", KEYS.holds, 1, f"3:{member(1)}")),
    ("INV-7", "window-altered", in_redis("HSET", KEYS.head, "opens_at", 1)),
    ("INV-7", "state-altered", in_redis("HSET", KEYS.head, "state", "paused")),
    ("INV-7", "state-in-postgres", in_postgres("UPDATE campaign SET state = 'closed'")),
    (
        "INV-7",
        "sold-before",
        in_postgres("UPDATE event SET at = at - interval '1 day' WHERE kind = 'sold'"),
    ),
    (
        "INV-7",
        "sold-while-paused",
        in_postgres("UPDATE event SET kind = 'paused' WHERE kind = 'resumed'"),
    ),
    ("INV-8", "lost", in_redis("DEL", *KEYS)),
    ("INV-8", "went-back", _redis_goes_back),
    ("INV-8", "recovering", in_redis("HSET", KEYS.head, "recovering", "by hand")),
    ("INV-8", "not-whole", in_redis("HDEL", KEYS.head, "chain")),
    ("INV-8", "unreadable", in_redis("HSET", KEYS.head, "config", "{")),
    ("INV-8", "epoch", in_postgres("UPDATE event SET epoch = 2 WHERE seq = 4")),
    ("INV-9", "revoked-forgotten", in_redis("DEL", KEYS.revoked)),
    ("INV-9", "revoked-too-many", in_redis("SADD", KEYS.revoked, member(1))),
    ("INV-9", "unions-altered", _rule_is_altered(unions="*")),
    ("INV-9", "sold-to-revoked", _was_revoked_before),
    ("INV-9", "not-followed", _roster_is_not_followed),
    ("INV-9", "sold-to-others", _belongs_to_another_union),
    ("INV-10", "step-untold", in_postgres("DELETE FROM audit_log WHERE action LIKE '%paused'")),
    ("INV-10", "other-actor", in_postgres("UPDATE audit_log SET actor = 'nobody'")),
    ("INV-10", "no-why", in_postgres("UPDATE event SET reason = NULL WHERE kind = 'paused'")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("invariant", "damage"), [(each[0], each[2]) for each in BREACHES],
    ids=[f"{each[0]}-{each[1]}" for each in BREACHES],
)  # fmt: skip
async def test_audit_finds_each_breach(shop: Shop, invariant: str, damage: Damage):
    assert (await shop.audit()).clean
    await damage(shop)
    report = await shop.audit(applied_wait_s=0.2)
    assert not report.clean
    (found,) = report.campaigns
    assert not found.clean
    assert invariant in {finding.invariant for finding in found.findings}, found.findings


@pytest.fixture
async def till(redis: Redis, redis_url: str, database_url: str) -> AsyncIterator[Till]:
    """Four members have paid; one gave its order back, another one a ticket; the fifth holds."""
    async with open_shop(redis_url, database_url) as shop:
        await shop.start_writer()
        till = await open_till(shop)
        await till.sell(1, 2, 3, 4, quantity=2)
        await till.hold(5)
        await till.give_back(2)
        await till.give_back(3, tickets=(1,))
        yield till


PAID = "order_seq = (SELECT min(order_seq) FROM payment WHERE state = 'paid')"
UNNAMED = "outcome = NULL, event_seq = NULL"
MONEY = [
    (
        "not-presented",
        f"UPDATE payment SET {UNNAMED}, paid_at = now() - interval '61 seconds' WHERE {PAID}",
    ),
    ("refund-gone", "DELETE FROM refund WHERE amount_fen = 1000"),
    ("refund-of-a-part-gone", "DELETE FROM refund WHERE amount_fen = 500"),
    ("refund-too-small", "UPDATE refund SET amount_fen = amount_fen - 1"),
    ("refund-of-nothing", "UPDATE refund SET amount_fen = amount_fen + 1 WHERE amount_fen = 500"),
    ("payment-gone", f"DELETE FROM payment WHERE {PAID}"),
    ("never-came-in", f"UPDATE payment SET state = 'open', {UNNAMED}, paid_fen = 0 WHERE {PAID}"),
    (
        "paid-unpaid",
        "UPDATE orders SET paid = true, state = 'confirmed', changed_by = 1 WHERE state = 'held'",
    ),
    ("other-outcome", f"UPDATE payment SET outcome = 'returned' WHERE {PAID}"),
]


@pytest.mark.parametrize("damage", [each[1] for each in MONEY], ids=[each[0] for each in MONEY])
async def test_audit_finds_money_that_is_unaccounted_for(till: Till, damage: str):
    assert (await till.shop.audit()).clean
    await till.shop.damage(damage)
    (found,) = (await till.shop.audit()).campaigns
    assert "INV-11" in {finding.invariant for finding in found.findings}, found.findings


async def test_money_may_wait_a_minute_for_the_ledger(till: Till):
    await till.hold(6)
    await till.take_money(6)
    await till.shop.damage(
        "UPDATE payment SET paid_at = now() - interval '50 seconds' WHERE event_seq IS NULL"
    )
    assert (await till.shop.audit()).clean


@pytest.mark.parametrize(("days", "clean"), [(0, True), (29, True), (31, False)])
async def test_sale_with_an_older_union_token_is_no_breach(shop: Shop, days: int, clean: bool):
    await shop.pool.execute("UPDATE member SET union_code = 'hepingli'")
    await shop.damage(
        "UPDATE member SET updated_at = now() - interval '1 hour'",
        f"UPDATE member_union_change SET at = at - interval '{days} days'",
    )
    report = await shop.audit()
    assert report.clean == clean, report


async def test_audit_lists_ten_breaches_of_each_invariant(shop: Shop):
    await shop.step("stock", showing="s0", add=500)
    bids = [Bid(member(n), key(1), 1, 0, "donghuamen") for n in range(100, 300)]
    await shop.stock.buy(*bids)
    await shop.applied()
    await shop.redis.delete(KEYS.members)
    await shop.damage("DELETE FROM audit_log")
    report = await shop.audit()
    found = [finding.invariant for finding in report.campaigns[0].findings]
    assert {name: found.count(name) for name in set(found)} == {
        "INV-2": 10, "INV-3": 10, "INV-4": 10, "INV-10": 5,
    }  # fmt: skip


async def test_audit_during_a_rush_is_clean(shop: Shop):
    await shop.stop_writer()
    await shop.start_writer(ledger_retention_events=0, ledger_retention_s=0)
    await shop.step("stock", showing="s0", add=100_000)
    going = True

    async def sell(process: str) -> int:
        for call in itertools.count(1):
            first = call * 100 + (50_000 if process == "b" else 0)
            bids = [
                Bid(member(first + n % 40), key(n), 1 + n % 2, 0, "donghuamen") for n in range(80)
            ]
            await shop.stock.call(*bids, process=process, call=call)
            await asyncio.sleep(0.01)
            if not going:
                return call
        return 0

    async def operate() -> None:
        while going:
            await shop.step("pause")
            await shop.step("stock", showing="s1", add=1)
            await shop.step("resume")
            draft = campaign(3, 3, 3, campaign_id="draft")
            await shop.create(draft)
            await shop.take("delete", "draft", reason="no")
            await shop.create(campaign(7, campaign_id="draft"))
            await shop.take("delete", "draft", reason="no")

    async def revoke() -> None:
        for n in itertools.count():
            status = ("cancelled", "active")[n % 2]
            await shop.pool.execute(
                "UPDATE member SET status = $2 WHERE member_no = $1", member(3), status
            )
            await sync_all(shop.redis, shop.scripts, shop.pool)
            await asyncio.sleep(0.02)
            if not going:
                return

    working = [asyncio.create_task(work) for work in (sell("a"), sell("b"), operate(), revoke())]
    try:
        for _ in range(12):
            report = await shop.audit()
            assert report.clean, report
    finally:
        going = False
        await asyncio.gather(*working)
    await shop.applied()
    assert (await shop.audit()).clean
    sold = await shop.pool.fetchval("SELECT count(*) FROM orders")
    assert sold > 1_000


async def test_audit_of_openings_by_the_clock_is_clean(shop: Shop):
    now = int((await shop.redis.time())[0]) * 1_000
    short = campaign(5, campaign_id="short", opens_at_ms=now - 2_000, closes_at_ms=now - 1_000)
    await shop.create(short)
    assert (await shop.audit(campaign_id="short")).clean  # nobody's call has crossed either yet
    await shop.scripts.tick("short")
    assert (await shop.audit(campaign_id="short")).clean


async def test_audit_cannot_check_without_a_writer(shop: Shop):
    await shop.stop_writer()
    await _buy(shop, 3, key_no=9)
    with pytest.raises(CouldNotCheck, match="is the writer running"):
        await shop.audit(applied_wait_s=0.1)


async def test_audit_reports_a_lagging_and_a_broken_campaign(shop: Shop):
    await shop.create(campaign(5, campaign_id="green-gift"))
    await shop.applied()
    await shop.audit()
    await shop.stop_writer()
    await _buy(shop, 3, key_no=9)
    await shop.redis.hset(campaign_keys("green-gift").stock, "r0", 99)
    report = await shop.audit(applied_wait_s=0.1)
    assert not report.clean
    assert [each.id for each in report.campaigns] == [CAMPAIGN, "green-gift"]
    assert "could not check" in report.campaigns[0].findings[0].what
    assert report.campaigns[1].findings[0].invariant == "INV-1"


async def test_stream_that_cannot_be_applied_is_a_finding(shop: Shop):
    await shop.stop_writer()
    await _buy(shop, 3, key_no=9)
    (lost,) = await shop.redis.xrevrange(KEYS.stream, count=1)
    await _buy(shop, 2, key_no=9)
    await shop.redis.xdel(KEYS.stream, lost[0])
    report = await shop.audit(applied_wait_s=0.1)
    assert {finding.invariant for finding in report.campaigns[0].findings} == {"INV-5"}


async def test_audit_of_an_unknown_id_is_refused(shop: Shop):
    with pytest.raises(Refused) as refused:
        await shop.audit(campaign_id="no-such")
    assert refused.value.problem is Problem.NOT_FOUND


async def test_audit_reads_a_redis_with_a_foreign_nonce(shop: Shop):
    foreign = Scripts(shop.redis, NONCE)
    assert (await foreign.tick(CAMPAIGN)).reply is CallReply.UNVERIFIED
    assert (await shop.audit()).clean


async def test_exit_status_of_the_audit_command(
    shop: Shop, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SALE_REDIS_URL", redis_url)
    monkeypatch.setenv("SALE_DATABASE_URL", shop.database_url)

    def run(*words: str) -> Any:
        return asyncio.to_thread(command, *words)

    clean = await run("audit", "--json")
    assert clean.status == 0
    assert clean.json().keys() == {"clean", "checked_at", "campaigns"}
    assert clean.json()["campaigns"] == [{"id": CAMPAIGN, "clean": True, "findings": []}]
    assert (await run("audit", "no-such")).status == 2
    assert (await run("recover", "no-such")).status == 1
    assert "nothing is wrong" in (await run("recover", CAMPAIGN)).out

    await shop.redis.hset(KEYS.stock, "r0", 9)
    found = await run("audit", "--json")
    assert found.status == 1
    assert [each["invariant"] for each in found.json()["campaigns"][0]["findings"]] == ["INV-1"]
    assert "INV-1" in (await run("audit", CAMPAIGN)).out
    shown = await run("recover", CAMPAIGN, "--dry-run")
    assert (shown.status, "would be rebuilt" in shown.out) == (0, True)
    assert (await run("audit")).status == 1
    assert (await run("recover", CAMPAIGN, "--json")).json()["changed"]
    assert (await run("audit")).status == 0

    await shop.stop_writer()
    await _buy(shop, 3, key_no=8)
    monkeypatch.setattr(audit_module, "APPLIED_WAIT_S", 0.1)
    lagging = await run("audit")
    assert (lagging.status, "is the writer running" in lagging.err) == (3, True)
    monkeypatch.setenv("SALE_DATABASE_URL", "postgresql:///nowhere?host=/nowhere")
    away = await run("audit", "--json")
    assert (away.status, away.out, away.err.count("\n")) == (3, "", 1)
    monkeypatch.setenv("SALE_DATABASE_URL", shop.database_url)
    monkeypatch.setenv("SALE_REDIS_URL", "unix:///nowhere/redis.sock")
    assert (await run("audit")).status == 3


async def test_audit_says_what_went_away_while_it_was_read(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    await shop.create(campaign(5, campaign_id="green-gift"))
    await shop.step("close")
    read = audit_module.read_redis

    async def read_and_lose(redis: Redis, campaign_id: str) -> object:
        view = await read(redis, campaign_id)
        if campaign_id == CAMPAIGN:
            await redis.unlink(*KEYS)
        return view

    monkeypatch.setattr(audit_module, "read_redis", read_and_lose)
    # When
    report = await shop.audit()
    # Then
    told = {each.id: [finding.invariant for finding in each.findings] for each in report.campaigns}
    assert told == {CAMPAIGN: ["INV-8"], "green-gift": []}


async def test_audit_goes_on_past_one_it_cannot_check(
    shop: Shop, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    await shop.create(campaign(5, campaign_id="green-gift"))
    await shop.applied()
    await shop.audit()
    await shop.stop_writer()
    await _buy(shop, 3, key_no=9)
    monkeypatch.setenv("SALE_REDIS_URL", redis_url)
    monkeypatch.setenv("SALE_DATABASE_URL", shop.database_url)
    monkeypatch.setattr(audit_module, "APPLIED_WAIT_S", 0.1)
    # When
    ran = await asyncio.to_thread(command, "audit", "--json")
    # Then
    assert ran.status == 3
    first, second = ran.json()["campaigns"]
    assert (first["id"], first["clean"], first["checked"]) == (CAMPAIGN, False, False)
    assert second == {"id": "green-gift", "clean": True, "findings": []}
