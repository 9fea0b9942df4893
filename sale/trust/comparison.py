"""Compares a campaign in Redis with the fold of its ledger, for the audit and the recovery.

While sales go on, Redis is read in chunks, each in one atomic step with the current event number. A
member's records hold event numbers, so a fold to the end gives the member's orders at any earlier
number. Only head and stock have to be compared with the fold at exactly the number at which they
were read.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from sale.db import roster
from sale.domain.campaign import Campaign
from sale.domain.campaign_view import CampaignNow
from sale.ledger.fold import CampaignState, SaleRecord
from sale.stock.catalogue import read_campaign
from sale.stock.head import ROSTER, RULES, SEQ, rules_of, unpacked_rules
from sale.stock.keys import campaign_keys
from sale.stock.records import parse_records
from sale.trust.history import QUERY_TIMEOUT_S, Steps

SCAN_COUNT: Final = 1_000
PER_INVARIANT_MAX: Final = 10
INVARIANTS: Final = tuple(f"INV-{number}" for number in range(1, 11))
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


class RedisView(msgspec.Struct):
    """A campaign as it was read from Redis.

    ``members`` are raw records, each with the event number at which it was read. ``rules`` and
    ``revoked`` are None if they changed during the reading; the next audit compares them.
    """

    now: CampaignNow
    rules: Mapping[str, Any] | None
    members: dict[int, tuple[int, bytes]]
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
    members: dict[int, tuple[int, bytes]] = {}
    cursor, highest = 0, now.seq
    while True:
        async with redis.pipeline(transaction=True) as pipe:
            pipe.hget(keys.head, SEQ)
            pipe.hscan(keys.members, cursor, count=SCAN_COUNT)
            number, (cursor, chunk) = await pipe.execute()
        if number is None:
            raise Gone(campaign_id)
        seq = int(number)
        highest = max(highest, seq)
        members.update((int(field), (seq, value)) for field, value in chunk.items())
        if int(cursor) == 0:
            break
    revoked: set[int] = set()
    async for member_no in redis.sscan_iter(keys.revoked, count=SCAN_COUNT):
        revoked.add(int(member_no))
    after = (await ROSTER.read(redis, campaign_id)).roster_rev
    return RedisView(
        now=now,
        rules=unpacked_rules(rules.rules) if rules == before else None,
        members=members,
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


async def compare_members(view: RedisView, books: CampaignState, findings: Findings) -> None:
    """Compare each member's orders with the fold, up to the number they were read at."""
    steps = Steps()
    for member_no, (at, value) in view.members.items():
        await steps.done()
        try:
            held = parse_records(value)
        except ValueError as error:
            findings.add("INV-3", f"member {member_no}: the orders in Redis: {error}")
            continue
        expected = [record for record in books.members.get(member_no, ()) if record.seq <= at]
        if held != expected:
            _add_differences(member_no, held, expected, findings)
        if findings.full:
            return
    for member_no, records in books.members.items():
        await steps.done()
        # A member whom the scan did not return had no order when the scan began.
        if member_no not in view.members and (
            expected := [record for record in records if record.seq <= view.now.seq]
        ):
            _add_differences(member_no, [], expected, findings)
        if findings.full:
            return


def _add_differences(
    member_no: int, held: list[SaleRecord], expected: list[SaleRecord], findings: Findings
) -> None:
    name = f"member {member_no}"
    counts = [sum(record.quantity for record in records) for records in (held, expected)]
    if counts[0] != counts[1]:
        findings.add("INV-2", f"{name}: Redis counts {counts[0]} tickets, the ledger {counts[1]}")
    if lacking := _beyond(expected, held):
        findings.add("INV-3", f"{name}: Redis lacks event {lacking}")
    if unfounded := _beyond(held, expected):
        findings.add("INV-5", f"{name}: Redis has {unfounded} without such an event")
    if {record.key_hash for record in held} != {record.key_hash for record in expected}:
        findings.add("INV-4", f"{name}: Redis knows other keys than the ledger says")


def _beyond(these: Iterable[SaleRecord], those: list[SaleRecord]) -> str:
    return ", ".join(str(record.seq) for record in these if record not in those)


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
