"""The audit: every invariant, across Redis, the ledger and PostgreSQL, while sales go on too.

1. Redis is read in chunks, each in one atomic step with the event number it was read at.
2. The writer is given time to apply as far as the highest of those numbers.
3. PostgreSQL is read in one snapshot: its ledger is folded by ``events.Books``, which shares no
   code with the scripts; window, limit and stock are checked after each event; the orders and
   counters are compared with what the ledger says.
4. What Redis held at each number must be what the fold says for that number.

A card's records carry event numbers, so one fold to the end tells what the card held at any number
before; only the stock needs the fold at exactly the number it was read at.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.db import queries
from sale.domain import CampaignState, Problem, Refused, mask_card, rfc3339, to_ms
from sale.events import SOLD, Books, CorruptLedger, Event, SaleRecord, check_chain, parse_entry
from sale.stock.catalogue import CampaignNow, campaign_ids, read_campaign, redis_now_ms
from sale.stock.connection import durability_faults
from sale.stock.keys import campaign_keys
from sale.stock.records import parse_records

SCAN_COUNT: Final = 1_000
EVENTS_CHUNK: Final = 20_000
STREAM_CHUNK: Final = 200
APPLIED_WAIT_S: Final = 20.0
FINDINGS_MAX: Final = 100
INVARIANTS: Final = tuple(f"INV-{number}" for number in range(1, 11))


class CouldNotCheck(Exception):  # noqa: N818 - says what happened
    """The audit could not be done; nothing is said about the books."""


class Finding(msgspec.Struct, frozen=True, order=True):
    """One breach: which invariant, and what was found. No card number in full."""

    invariant: str
    what: str


class CampaignAudit(msgspec.Struct, frozen=True):
    """What was found in one campaign, at most 100 findings."""

    id: str
    clean: bool
    findings: list[Finding]


class AuditReport(msgspec.Struct, frozen=True):
    """The whole audit, as ``sale audit --json`` prints it."""

    clean: bool
    checked_at: str
    campaigns: list[CampaignAudit]


class RedisView(msgspec.Struct):
    """What Redis held: ``cards`` with the number each was read at."""

    now: CampaignNow
    cards: dict[str, tuple[int, list[SaleRecord]]]
    revoked: set[str]
    highest: int


async def audit(redis: Redis, pool: asyncpg.Pool, campaign_id: str | None = None) -> AuditReport:
    """Check one campaign or all. Raises CouldNotCheck, and Refused for an unknown ID."""
    try:
        async with pool.acquire() as connection:
            stored = [row[0] for row in await connection.fetch("SELECT campaign_id FROM campaign")]
        ids = sorted({*await campaign_ids(redis), *stored})
        if campaign_id is not None:
            if campaign_id not in ids:
                raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
            ids = [campaign_id]
        faults = [Finding("INV-3", fault) for fault in await durability_faults(redis)]
        audits = [await _audit_campaign(redis, pool, each, faults) for each in ids]
        checked_at = rfc3339(await redis_now_ms(redis))
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise CouldNotCheck(f"{type(error).__name__}: {error}") from None
    done = [each for each in audits if each is not None]
    return AuditReport(all(each.clean for each in done), checked_at, done)


async def _audit_campaign(
    redis: Redis, pool: asyncpg.Pool, campaign_id: str, faults: list[Finding]
) -> CampaignAudit | None:
    findings = list(faults)
    view = await _read_redis(redis, campaign_id, findings)
    if view is None:
        async with pool.acquire() as connection:
            applied = await connection.fetchval(
                "SELECT applied FROM campaign WHERE campaign_id = $1 AND state <> 'deleted'",
                campaign_id,
            )
        if applied is None:
            return None
        lost = Finding("INV-8", f"Redis does not hold it, PostgreSQL has {applied} events")
        return CampaignAudit(campaign_id, clean=False, findings=[lost])
    await _wait_applied(pool, campaign_id, view.highest)
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        await connection.execute("SET LOCAL statement_timeout = '300s'")
        position = await connection.fetchrow(_SQL["applied"], campaign_id)
        await _check_chain(redis, campaign_id, position, findings)
        books = await _fold(connection, campaign_id, view, findings)
        await _check_postgres(connection, campaign_id, view.now, findings)
        revoked = {row[0] for row in await connection.fetch(_SQL["revoked_at"], view.now.roster_rev)}
    _compare_cards(view, books, findings)
    _compare_revoked(view, revoked, findings)
    kept = sorted(set(findings))[:FINDINGS_MAX]
    return CampaignAudit(campaign_id, clean=not kept, findings=kept)


async def _read_redis(redis: Redis, campaign_id: str, findings: list[Finding]) -> RedisView | None:
    now = await read_campaign(redis, campaign_id)
    if now is None:
        return None
    keys = campaign_keys(campaign_id)
    last = await redis.xrevrange(keys.stream, count=1)
    head_seq = int(await redis.hget(keys.head, "seq") or 0)
    # Read after each other, so the stream may only be behind what the head says later.
    if not last or not now.seq <= int(last[0][0].split(b"-")[0]) <= max(head_seq, now.seq):
        findings.append(Finding("INV-5", f"head says event {now.seq}, the stream ends elsewhere"))
    cards: dict[str, tuple[int, list[SaleRecord]]] = {}
    cursor, highest = 0, now.seq
    while True:
        async with redis.pipeline(transaction=True) as pipe:
            pipe.hget(keys.head, "seq")
            pipe.hscan(keys.cards, cursor, count=SCAN_COUNT)
            seq, (cursor, chunk) = await pipe.execute()
        highest = max(highest, int(seq))
        for card, value in chunk.items():
            try:
                cards[card.decode()] = (int(seq), parse_records(value))
            except (ValueError, UnicodeDecodeError) as error:
                findings.append(Finding("INV-5", f"a card's value in Redis is damaged: {error}"))
        if int(cursor) == 0:
            break
    revoked = {card.decode() async for card in redis.sscan_iter(keys.revoked, count=SCAN_COUNT)}
    after = await read_campaign(redis, campaign_id)
    if after is None or after.roster_rev != now.roster_rev:
        revoked = set()  # it moved meanwhile: the next audit compares it
    return RedisView(now, cards, revoked, highest)


async def _wait_applied(pool: asyncpg.Pool, campaign_id: str, seq: int) -> None:
    deadline = asyncio.get_running_loop().time() + APPLIED_WAIT_S
    while True:
        async with pool.acquire() as connection:
            position = await connection.fetchrow(_SQL["applied"], campaign_id)
        applied = 0 if position is None else position["applied"]
        if applied >= seq:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise CouldNotCheck(
                f"{campaign_id}: PostgreSQL has applied {applied} of {seq} events: "
                "is the writer running?"
            )
        await asyncio.sleep(0.05)


async def _check_chain(
    redis: Redis, campaign_id: str, position: Mapping[str, Any], findings: list[Finding]
) -> None:
    """Check that what the stream still holds is one chain that passes through PostgreSQL's."""
    after: tuple[int, str] | None = None
    start, met = "-", False
    stream = campaign_keys(campaign_id).stream
    while rows := await redis.xrange(stream, start, "+", count=STREAM_CHUNK):
        try:
            for entry_id, fields in rows:
                entry = parse_entry(entry_id, fields)
                after = check_chain([entry], *after) if after else (entry.last, entry.chain)
                if entry.last == position["applied"]:
                    met = entry.chain == position["chain"]
                elif entry.first <= position["applied"] < entry.last:
                    met = True  # applied meanwhile in the middle of our reading: next time
        except CorruptLedger as error:
            findings.append(Finding("INV-5", f"the stream: {error}"))
            return
        start = f"({rows[-1][0].decode()}"
    if not met and after is not None:
        findings.append(
            Finding("INV-5", "the chain in Redis does not pass through PostgreSQL's position")
        )


async def _fold(
    connection: Any,  # noqa: ANN401 - asyncpg's connection proxy
    campaign_id: str,
    view: RedisView,
    findings: list[Finding],
) -> Books:
    """Fold PostgreSQL's ledger as far as Redis was read; check each event on the way."""
    books, compared = Books(), False
    rules = _Rules(findings)
    after = 0
    while rows := await connection.fetch(
        _SQL["events"], campaign_id, after, view.highest, EVENTS_CHUNK
    ):
        for row in rows:
            event = _event(row)
            try:
                rules.check(books, event)
                books.apply(event)
            except (CorruptLedger, KeyError) as error:
                findings.append(Finding("INV-5", f"PostgreSQL's ledger: {error}"))
                return books
            if event.seq == view.now.seq:
                _compare_state(view.now, books, findings)
                compared = True
        after = rows[-1]["seq"]
        await asyncio.sleep(0)
    if not compared:
        findings.append(Finding("INV-5", f"PostgreSQL's ledger does not reach {view.now.seq}"))
    return books


class _Rules:
    """What must hold after each event, written down anew: not a line is shared with the Lua."""

    def __init__(self, findings: list[Finding]) -> None:
        self._findings = findings
        self._sold: dict[str, int] = {}
        self._keys: set[tuple[str, str]] = set()
        self._clock_ms = 0

    def check(self, books: Books, event: Event) -> None:
        """Check an event against the books before it."""
        if event.at_ms < self._clock_ms:
            self._find("INV-7", f"event {event.seq}: the clock went back")
        self._clock_ms = max(self._clock_ms, event.at_ms)
        if event.kind != SOLD:
            if event.kind == "created":
                self._sold.clear()
                self._keys.clear()
            return
        card, quantity, key = event.card_no or "", event.quantity or 0, event.key_hash or ""
        if books.state != "open":
            self._find("INV-7", f"event {event.seq}: sold while {books.state or 'nothing'}")
        if (books.opens_at_ms is not None and event.at_ms < books.opens_at_ms) or (
            books.closes_at_ms is not None and event.at_ms >= books.closes_at_ms
        ):
            self._find("INV-7", f"event {event.seq}: sold outside the window")
        if books.remaining.get(event.showing or 0, 0) < quantity or quantity < 1:
            self._find("INV-1", f"event {event.seq}: {quantity} sold, fewer were left")
        self._sold[card] = self._sold.get(card, 0) + quantity
        if self._sold[card] > books.config.get("card_limit", 0):
            self._find("INV-2", f"event {event.seq}: card {mask_card(card)} passed its limit")
        if (card, key) in self._keys:
            self._find("INV-4", f"event {event.seq}: a key of {mask_card(card)} sold twice")
        self._keys.add((card, key))
        if event.price_fen != books.config.get("price_fen"):
            self._find("INV-5", f"event {event.seq}: not the campaign's price")

    def _find(self, invariant: str, what: str) -> None:
        if len(self._findings) < FINDINGS_MAX:
            self._findings.append(Finding(invariant, what))


def _compare_state(now: CampaignNow, books: Books, findings: list[Finding]) -> None:
    """Compare head and stock with the fold at the same number."""
    for number, showing in enumerate(now.campaign.showings):
        if books.remaining.get(number) != now.remaining[number]:
            findings.append(
                Finding(
                    "INV-1",
                    f"showing {showing.id}: Redis has {now.remaining[number]} left, "
                    f"the ledger says {books.remaining.get(number)}",
                )
            )
        if books.tickets.get(number) != now.tickets[number]:
            findings.append(
                Finding(
                    "INV-1",
                    f"showing {showing.id}: Redis has a stock of {now.tickets[number]}, "
                    f"the ledger says {books.tickets.get(number)}",
                )
            )
    window = (books.opens_at_ms, books.closes_at_ms)
    if window != (now.opens_at_ms, now.closes_at_ms):
        findings.append(Finding("INV-7", "Redis has another window than the ledger says"))
    if books.state != now.recorded.value:
        findings.append(
            Finding("INV-7", f"Redis says {now.recorded.value}, the ledger says {books.state}")
        )
    if now.epoch != books.epoch:
        findings.append(Finding("INV-5", f"epoch {now.epoch} in Redis, {books.epoch} in the ledger"))


def _compare_cards(view: RedisView, books: Books, findings: list[Finding]) -> None:
    """Compare each card's orders with the fold, up to the number the card was read at."""
    for card in view.cards.keys() | books.cards.keys():
        if len(findings) >= FINDINGS_MAX:
            return
        # A card that the scan did not meet had no order when it began.
        at, held = view.cards.get(card, (view.now.seq, []))
        told = [record for record in books.cards.get(card, []) if record.seq <= at]
        if held != told:
            missing, extra = _difference(told, held), _difference(held, told)
            if missing:
                findings.append(
                    Finding("INV-3", f"card {mask_card(card)}: Redis lacks event {missing}")
                )
            if extra:
                findings.append(
                    Finding("INV-5", f"card {mask_card(card)}: Redis has {extra} without an event")
                )


def _difference(these: Iterable[SaleRecord], those: list[SaleRecord]) -> str:
    return ", ".join(str(record.seq) for record in these if record not in those)


def _compare_revoked(view: RedisView, revoked: set[str], findings: list[Finding]) -> None:
    if view.now.roster_rev < 0:
        if view.now.state is CampaignState.OPEN:
            findings.append(Finding("INV-9", "it is open, and the revoked cards are not loaded"))
        return
    if not view.revoked and revoked:
        missing = revoked
    else:
        missing = revoked - view.revoked
    for card in sorted(missing)[:10]:
        findings.append(Finding("INV-9", f"card {mask_card(card)} is not active and may buy"))
    for card in sorted(view.revoked - revoked)[:10]:
        findings.append(Finding("INV-9", f"card {mask_card(card)} is active and may not buy"))


async def _check_postgres(
    connection: Any,  # noqa: ANN401 - asyncpg's connection proxy
    campaign_id: str,
    now: CampaignNow,
    findings: list[Finding],
) -> None:
    """Compare orders, counters, audit log and roster with the ledger, all in one snapshot."""

    async def each(invariant: str, query: str, says: str, *args: object) -> None:
        findings.extend(
            Finding(invariant, says.format(**row))
            for row in await connection.fetch(_SQL[query], campaign_id, *args)
        )

    for row in await connection.fetch(_SQL["showings"], campaign_id):
        if row["really"] > row["stock"]:
            findings.append(
                Finding(
                    "INV-1",
                    f"showing {row['showing_id']}: {row['really']} sold of {row['stock']}",
                )
            )
        if row["live"] != row["really"]:
            findings.append(
                Finding(
                    "INV-6",
                    f"showing {row['showing_id']}: counted {row['live']} live, "
                    f"orders add up to {row['really']}",
                )
            )
    limit = now.campaign.card_limit
    for row in await connection.fetch(_SQL["cards_miscounted"], campaign_id, limit):
        card = mask_card(row["card_no"])
        over = row["really"] > limit
        findings.append(
            Finding(
                "INV-2" if over else "INV-6",
                f"card {card}: orders add up to {row['really']}, counted {row['live']}, "
                f"limit {limit}",
            )
        )
    await each("INV-3", "sales_without_order", "event {seq}: sold, and no order like it")
    await each("INV-3", "orders_without_sale", "order {seq}: no sale in the ledger")
    await each("INV-5", "conflicts", "event {seq}: refused by PostgreSQL: {why}")
    await each("INV-9", "sold_to_revoked", "event {seq}: sold to a card that was not active")
    await each("INV-10", "steps_unaccounted", "event {seq} ({kind}): not in the audit log, or no why")
    if "*" not in now.campaign.unions:
        await each(
            "INV-9",
            "sold_to_others",
            "event {seq}: sold to a card of a union that may not buy",
            list(now.campaign.unions),
        )


def _event(row: Mapping[str, Any]) -> Event:
    return Event(
        seq=row["seq"],
        at_ms=to_ms(row["at"]),
        epoch=row["epoch"],
        kind=row["kind"],
        card_no=row["card_no"],
        showing=row["showing_no"],
        quantity=row["quantity"],
        key_hash=row["key_hash"],
        price_fen=row["price_fen"],
        data=msgspec.json.decode(row["data"]) if row["data"] else {},
    )


_SQL: Final = queries.load("audit")
