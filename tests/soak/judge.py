"""Checks the answers that members and operators got. Each finding names its first moment.

Four judges that share nothing: the check of the books, the engine's own audit, a small model of
what answers may follow each other, and a count of operators' steps in the ledger.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import asyncpg

from loadtest.books.answers import Answer
from loadtest.books.check import check, key_hash
from loadtest.books.ledger import Books, load_books
from loadtest.record import Finding
from sale.domain.order import parse_order_number
from soak.members import Stall
from soak.play import ActTold

HIDDEN_BY = frozenset(
    {
        *("unauthenticated", "card-revoked", "not-eligible"),
        *("unavailable", "overloaded", "rate-limited"),
    }
)
"""Answers that may take precedence over a replay, by the contract's order of checks."""


UNWITNESSED = frozenset(
    {
        "lost",
        "key-two-orders",
        "not-replayed",
        "tickets-changed",
        "replay-refused",
        "mismatch-passed",
        "step-count",
    }
)
"""Findings that are permitted if files are lost and every process that knew their content died."""


class Wrong(NamedTuple):
    """A finding; ``key`` names the purchase that shows it, if there is one."""

    campaign: str
    kind: str
    what: str
    key: str = ""


class Lost(NamedTuple):
    """The orders that the engine lists as lost: voided numbers; number and key of each conflict."""

    voided: frozenset[int]
    conflicts: frozenset[tuple[int, str]]
    recovered: bool = False

    def lists(self, answer: Answer) -> bool:
        """Whether the order of an answer is among them."""
        parsed = parse_order_number(answer.order_no)
        if parsed is None:
            return False
        number = parsed[1]
        return number in self.voided or (number, key_hash(answer.key)) in self.conflicts


async def judge_campaign(
    database_url: str,
    stall: Stall,
    acts: Sequence[ActTold],
    *,
    lossy: bool,
    witnessed: bool = True,
) -> tuple[list[Wrong], int]:
    """Check one campaign, its ledger being written; tell how much is listed as lost, too.

    ``lossy``: files were lost, so what is listed may be lost; where it was not ``witnessed``, what
    is not listed, too.
    """
    answers = list(stall.book)
    books = await load_books(database_url, stall.campaign)
    connection = await asyncpg.connect(database_url, timeout=10)
    try:
        lost = await _lost(connection, stall.campaign)
        only_falls = not lossy and not any(told.act.what == "stock" for told in acts)
        wrong = [
            *_books(answers, books, lost, lossy=lossy, only_falls=only_falls),
            *_replays(answers, lost if lossy else None),
            *await _steps(connection, stall.campaign, acts, lost if lossy else None),
        ]
    finally:
        await connection.close(timeout=10)
    if not lossy:
        if lost.voided or lost.conflicts or lost.recovered:
            listed = f"voided {sorted(lost.voided)}, in conflict {sorted(lost.conflicts)}"
            listed += ", it was recovered" if lost.recovered else ""
            wrong.append(("lost", f"no file was lost, and the engine lists {listed}", ""))
        wrong += _pauses(answers, acts)
    if lossy and not witnessed:
        wrong = [each for each in wrong if each[0] not in UNWITNESSED]
    listed = len(lost.voided) + len(lost.conflicts)
    return [Wrong(stall.campaign, *each) for each in wrong], listed


_Row = tuple[str, str, str]


def _books(
    answers: list[Answer], books: Books, lost: Lost, *, lossy: bool, only_falls: bool
) -> Iterator[_Row]:
    """Compare the answers with orders and stock."""
    told = answers
    if lossy:
        # An order that the engine lists as lost was told and is not there: that much is allowed.
        told = [each for each in answers if not (each.sold and lost.lists(each))]
    for finding in check(told, books, alone=True, only_falls=only_falls):
        yield finding.kind, finding.what, _key_of(finding)
    if not lossy:
        return
    orders = {order.order_no for order in books.orders}
    for each in answers:
        if each.sold and lost.lists(each) and each.order_no in orders:
            yield "void-but-there", f"order {each.order_no} is listed as lost and stands", each.key


def _key_of(finding: Finding) -> str:
    _, found, rest = finding.what.partition("key ")
    return rest.split(":")[0].split(" ")[0].rstrip(",") if found else ""


def _replays(answers: Iterable[Answer], lost: Lost | None) -> Iterator[_Row]:
    """After a 201, each answer to the same key is the same (INV-4)."""
    by_key: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        by_key[answer.member_no, answer.key].append(answer)
    for told in by_key.values():
        sold = [each for each in told if each.sold]
        if not sold or (lost and any(lost.lists(each) for each in sold)):
            continue
        first = min(sold, key=lambda each: each.received_at)
        content = (first.showing, first.quantity)
        for later in told:
            if later.sent_at <= first.received_at or later.code in HIDDEN_BY or not later.status:
                continue
            if (later.showing, later.quantity) == content and not later.sold:
                yield "replay-refused", f"{later.key}: {later.status} {later.code}", later.key
            if (later.showing, later.quantity) != content and later.status not in {422, 400}:
                yield "mismatch-passed", f"{later.key}: {later.status} {later.code}", later.key


def _pauses(answers: Iterable[Answer], acts: Sequence[ActTold]) -> Iterator[_Row]:
    """No sale happens between the answer to a pause and the first resume (INV-7)."""
    stops = [told.done_at for told in acts if told.act.what in {"pause", "close"}]
    starts = [
        sent
        for told in acts
        if told.act.what in {"resume", "reopen"}
        for sent, _, _ in told.tries[:1]
    ]
    new = [each for each in answers if each.status == 201 and not each.replayed]
    for stop in stops:
        if stop is None:
            continue
        # A repeat of the pause's own key may be told "done" after a resume: only the first counts.
        until = min((start for start in starts if start > stop), default=float("inf"))
        if any(start <= stop for start in starts):
            continue
        for each in new:
            if stop < each.sent_at and each.received_at < until:
                yield "sold-while-stopped", f"{each.order_no} of key {each.key}", each.key


async def _steps(
    connection: Any, campaign: str, acts: Sequence[ActTold], lost: Lost | None
) -> list[_Row]:
    """The ledger has each operator's step as often as it was acknowledged."""
    rows = await connection.fetch(
        "SELECT reason, kind, count(*) AS n, sum((data ->> 'add')::int) AS added FROM event"
        " WHERE campaign_id = $1 AND reason LIKE 'soak %' GROUP BY 1, 2",
        campaign,
    )
    times: dict[str, int] = defaultdict(int)
    for row in rows:
        times[row["reason"]] += row["n"]
    wrong = []
    for told in acts:
        if told.act.what in {"revoke", "restore"}:
            continue
        stands = times.pop(told.reason, 0)
        may = (0, 1) if told.uncertain else (1,) if told.done_at else (0,)
        # Processes hand in what members were told, not operators; a command lives too short for it.
        if lost and (lost.recovered or not told.act.key):
            may = (0, 1)
        if stands not in may:
            wrong.append(
                ("step-count", f"{told.act} was told {told.tries}, stands {stands} times", "")
            )
    return wrong + [
        ("step-unasked", f"{reason!r} stands {n} times", "") for reason, n in times.items()
    ]


async def _lost(connection: Any, campaign: str) -> Lost:
    """Read what the engine lists as lost."""
    events = await connection.fetch(
        "SELECT seq, kind FROM event WHERE campaign_id = $1 AND kind IN ('voided', 'recovered')",
        campaign,
    )
    conflicts = await connection.fetch(
        "SELECT seq, event ->> 'key_hash' AS key FROM conflict WHERE campaign_id = $1", campaign
    )
    return Lost(
        frozenset(row["seq"] for row in events if row["kind"] == "voided"),
        frozenset((row["seq"], row["key"] or "") for row in conflicts),
        any(row["kind"] == "recovered" for row in events),
    )


def history(stall: Stall, key: str, started_at: float) -> Iterator[str]:
    """Describe all answers to one key for the report."""
    for each in sorted(stall.book, key=lambda answer: answer.sent_at):
        if each.key == key or key_hash(each.key) == key:
            told = each.code or each.order_no or "no answer"
            yield (
                f"{each.sent_at - started_at:7.3f} to {each.received_at - started_at:7.3f} s"
                f"  {each.quantity} of {each.showing}: {each.status} {told}"
                + (" (replayed)" if each.replayed else "")
            )
