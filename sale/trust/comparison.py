"""Compares a campaign in Redis with the fold of its ledger, for the audit and the recovery.

While sales go on, Redis is read in chunks, each in one atomic step with the current event number.
Orders change, so each chunk is compared while the fold stands at exactly its number.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from redis.asyncio import Redis

from sale.db import roster
from sale.domain.campaign import Campaign
from sale.domain.campaign_view import CampaignNow
from sale.ledger.fold import CampaignState, OrderRecord
from sale.stock.catalogue import read_campaign
from sale.stock.head import ROSTER, RULES, SEQ, rules_of, unpacked_rules
from sale.stock.keys import campaign_keys
from sale.stock.records import parse_records
from sale.trust.history import QUERY_TIMEOUT_S

SCAN_COUNT: Final = 1_000
PER_INVARIANT_MAX: Final = 10
INVARIANTS: Final = tuple(f"INV-{number}" for number in range(1, 12))
INVARIANT_OF_RULE: Final = {"card_limit": "INV-2", "order_max": "INV-2", "unions": "INV-9"}
"""The invariant that is broken if a rule differs in Redis; INV-5 for the other rules."""


class Finding(msgspec.Struct, frozen=True, order=True):
    """One breach: the invariant, and a description."""

    invariant: str
    what: str


class Findings:
    """Collects breaches, at most ten of each invariant, so that none hides the others."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] = {}

    def add(self, invariant: str, what: str) -> None:
        """Record a breach."""
        found = self._found.setdefault(invariant, set())
        if len(found) < PER_INVARIANT_MAX:
            found.add(what)

    @property
    def full(self) -> bool:
        """Whether a comparison of members may stop, because no further breach would be recorded."""
        return len(self._found.get("INV-3", ())) + len(self._found.get("INV-5", ())) >= (
            2 * PER_INVARIANT_MAX
        )

    def all(self) -> list[Finding]:
        """All recorded breaches, in the order of the invariants."""
        return [
            Finding(invariant, what)
            for invariant in INVARIANTS
            for what in sorted(self._found.get(invariant, ()))
        ]


class Gone(Exception):  # noqa: N818 - the name states what happened
    """A campaign ceased to exist in Redis while it was read: it was purged, or lost."""


class Chunk(NamedTuple):
    """Members' values, and the number of the last event when they were read."""

    seq: int
    members: dict[int, bytes]


class RedisView(msgspec.Struct):
    """What Redis held: ``chunks`` of members in the order of their reading.

    ``held_at`` is the number at which ``holds`` was read. ``rules`` and ``revoked`` are None where
    they changed during the reading: the next audit compares them.
    """

    now: CampaignNow
    rules: Mapping[str, Any] | None
    held_at: int
    holds: dict[str, int]
    chunks: list[Chunk]
    operations: dict[str, str]
    revoked: set[int] | None
    highest: int


async def read_redis(redis: Redis, campaign_id: str) -> RedisView | None:
    """Read a campaign; None if there is no head.

    Raises Gone if it ceases to exist meanwhile, and one of DAMAGED for a damaged value.
    """
    keys = campaign_keys(campaign_id)
    before = await RULES.read(redis, campaign_id)
    now = await read_campaign(redis, campaign_id)
    if now is None:
        return None
    rules = await RULES.read(redis, campaign_id)
    operations: dict[Any, Any] = await redis.hgetall(keys.operations)
    async with redis.pipeline(transaction=True) as pipe:
        pipe.hget(keys.head, SEQ)
        pipe.zrange(keys.holds, 0, -1, withscores=True)
        number, holds = await pipe.execute()
    if number is None:
        raise Gone(campaign_id)
    held_at = highest = int(number)
    chunks: list[Chunk] = []
    cursor = 0
    while True:
        async with redis.pipeline(transaction=True) as pipe:
            pipe.hget(keys.head, SEQ)
            pipe.hscan(keys.members, cursor, count=SCAN_COUNT)
            number, (cursor, chunk) = await pipe.execute()
        if number is None:
            raise Gone(campaign_id)
        seq = int(number)
        highest = max(highest, seq)
        chunks.append(Chunk(seq, {int(field): value for field, value in chunk.items()}))
        if int(cursor) == 0:
            break
    revoked: set[int] = set()
    async for member_no in redis.sscan_iter(keys.revoked, count=SCAN_COUNT):
        revoked.add(int(member_no))
    after = (await ROSTER.read(redis, campaign_id)).roster_rev
    return RedisView(
        now=now,
        rules=unpacked_rules(rules.rules) if rules == before else None,
        held_at=held_at,
        holds={name.decode(): int(ms) for name, ms in holds},
        chunks=chunks,
        operations={op.decode(): what.decode() for op, what in operations.items()},
        revoked=revoked if after == now.roster_rev else None,
        highest=highest,
    )


def compare_state(now: CampaignNow, books: CampaignState, findings: Findings) -> None:
    """Compare head and stock with the fold at the same number."""
    for number, showing in enumerate(now.campaign.showings):
        for says, held, expected in (
            ("left", now.remaining[number], books.remaining.get(number)),
            ("in stock", now.tickets[number], books.tickets.get(number)),
            ("in holds", now.held[number], books.held.get(number)),
        ):
            if held != expected:
                findings.add(
                    "INV-1",
                    f"showing {showing.id}: Redis has {held} {says}, the ledger says {expected}",
                )
    if (books.opens_at_ms, books.closes_at_ms) != (now.opens_at_ms, now.closes_at_ms):
        findings.add("INV-7", "Redis has another window than the ledger says")
    if books.state != now.recorded.value:
        findings.add("INV-7", f"Redis says {now.recorded.value}, the ledger says {books.state}")
    if now.epoch != books.epoch:
        findings.add("INV-5", f"epoch {now.epoch} in Redis, {books.epoch} in the ledger")
    if books.config and now.campaign != msgspec.convert(books.config, Campaign):
        findings.add("INV-5", "Redis has another configuration than the ledger says")
    if now.config_seq != books.config_seq:
        findings.add(
            "INV-5",
            f"Redis has the configuration of event {now.config_seq}, "
            f"the ledger that of {books.config_seq}",
        )


def compare_rules(
    rules: Mapping[str, Any] | None, books: CampaignState, findings: Findings
) -> None:
    """Compare the settings that the scripts decide by with the ledger's configuration."""
    if rules is None or not books.config:
        return
    expected = rules_of(msgspec.convert(books.config, Campaign))
    for name in sorted({*expected, *rules}):
        if rules.get(name) != expected.get(name):
            invariant = INVARIANT_OF_RULE.get(name, "INV-5")
            findings.add(invariant, f"Redis has another {name} than the ledger says")


class FoldComparison:
    """Compares what was read with a fold, while the fold stands at the number of each reading."""

    def __init__(self, view: RedisView, findings: Findings) -> None:
        self._view = view
        self._findings = findings
        self._waiting = sorted(view.chunks, key=lambda chunk: chunk.seq, reverse=True)
        self._stops = {view.now.seq, view.held_at, *(chunk.seq for chunk in view.chunks)}
        self._left: set[int] = set()
        self.compared = False
        """Whether the fold has come to the number at which head and stock were read."""

    def at(self, books: CampaignState) -> None:
        """Compare what was read at the number at which the fold stands now."""
        if books.seq not in self._stops:
            return
        if books.seq == self._view.now.seq:
            compare_state(self._view.now, books, self._findings)
            compare_rules(self._view.rules, books, self._findings)
            self._left = set(books.members)
            self.compared = True
        if books.seq == self._view.held_at:
            self._compare_holds(books)
        while self._waiting and self._waiting[-1].seq == books.seq:
            self._compare_members(self._waiting.pop(), books)

    def finish(self, books: CampaignState) -> None:
        """Compare what was read at a number that the fold did not come to, and who was not met."""
        while self._waiting and not self._findings.full:
            self._compare_members(self._waiting.pop(), books)
        # A member whom the scan did not meet had no order when it began.
        for member_no in self._left:
            if self._findings.full:
                return
            _add_differences(member_no, [], books.members[member_no], self._findings)

    def _compare_members(self, chunk: Chunk, books: CampaignState) -> None:
        self._left -= chunk.members.keys()
        for member_no, value in chunk.members.items():
            if self._findings.full:
                return
            try:
                held = parse_records(value)
            except ValueError as error:
                self._findings.add("INV-3", f"member {member_no}: the orders in Redis: {error}")
                continue
            expected = books.members.get(member_no, [])
            if held != expected:
                _add_differences(member_no, held, expected, self._findings)

    def _compare_holds(self, books: CampaignState) -> None:
        held, expected = self._view.holds, books.holds
        for name in sorted(held.keys() | expected.keys()):
            if held.get(name) != expected.get(name):
                self._findings.add(
                    "INV-6",
                    f"hold {name} (order:member): Redis says {held.get(name)}, "
                    f"the ledger {expected.get(name)}",
                )


def _add_differences(
    member_no: int, held: list[OrderRecord], expected: list[OrderRecord], findings: Findings
) -> None:
    name = f"member {member_no}"
    counts = [sum(record.live for record in records) for records in (held, expected)]
    if counts[0] != counts[1]:
        findings.add("INV-2", f"{name}: Redis counts {counts[0]} tickets, the ledger {counts[1]}")
    if lacking := _beyond(expected, held):
        findings.add("INV-3", f"{name}: Redis lacks event {lacking}")
    if unfounded := _beyond(held, expected):
        findings.add("INV-5", f"{name}: Redis has {unfounded} without such an event")
    if {record.key_hash for record in held} != {record.key_hash for record in expected}:
        findings.add("INV-4", f"{name}: Redis knows other keys than the ledger says")
    by_number = {record.seq: record for record in expected}
    for record in held:
        if record != by_number.get(record.seq, record):
            findings.add("INV-6", f"{name}: Redis has another state of order {record.seq}")


def _beyond(these: Iterable[OrderRecord], those: list[OrderRecord]) -> str:
    known = {record.seq for record in those}
    return ", ".join(str(record.seq) for record in these if record.seq not in known)


def compare_operations(view: RedisView, books: CampaignState, findings: Findings) -> None:
    """Compare the operators' steps in Redis with the fold."""
    known = {op: what for op, what in books.operations.items() if _number(what) <= view.now.seq}
    for op in sorted(known.keys() - view.operations.keys()):
        findings.add("INV-4", f"Redis has forgotten the step of event {_number(known[op])}")
    for op, what in view.operations.items():
        if books.operations.get(op) != what and _number(what) <= view.highest:
            findings.add("INV-4", f"Redis remembers a step {what.split(':')[0]} that was not taken")


def _number(what: str) -> int:
    return int(what.partition(":")[0])


def compare_revoked(view: RedisView, revoked: set[int], findings: Findings) -> None:
    """Compare the set of members who may not buy with the roster at the same revision.

    A campaign whose set is not loaded sells nothing, so there is nothing to compare.
    """
    if view.revoked is None:
        return
    for member_no in sorted(revoked - view.revoked):
        findings.add("INV-9", f"member {member_no} is not active and may buy")
    for member_no in sorted(view.revoked - revoked):
        findings.add("INV-9", f"member {member_no} is active and may not buy")


async def revoked_at(connection: Any, rev: int) -> set[int]:  # noqa: ANN401 - asyncpg's proxy
    """Members who were not active at a revision of the roster."""
    inactive = await roster.inactive_members(connection, 0, None, rev, QUERY_TIMEOUT_S)
    return set(inactive)
