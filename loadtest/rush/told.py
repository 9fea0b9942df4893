"""The outcome of a run, for people: why it does not count, its notes, and its table."""

from typing import Final

from rich.markup import escape
from rich.table import Table

from loadtest.books.check import so_many
from loadtest.record import Record, latency_ms
from loadtest.rush.arrivals import AT_ONCE
from loadtest.summary import TOLD_SHARES
from loadtest.tables import CLEAN, coloured, facts
from loadtest.tables import verdict as verdict_of
from loadtest.thresholds import missed, told_outcome

FINDINGS_SHOWN: Final = 20
WAITED_SHARE: Final = 0.01


def verdict(record: Record, *, proof_wanted: bool) -> list[str]:
    """Why a run does not count, a line each; none for a run that does."""
    why = []
    if record.not_played:
        why.append(f"the rush did not happen: {record.not_played}")
    if record.bottleneck:
        why.append(f"not reported, the generator itself was the limit: {record.bottleneck}")
    if record.not_proved:
        why.append(f"not proved: {record.not_proved}")
    elif proof_wanted and record.proof is None:
        why.append("not proved: give --data-dir or --database-url, or say --unproved to do without")
    if record.proof is not None and not record.proof.clean:
        why.append(f"the books do not balance: {so_many(record.proof.findings)}")
    return why + missed(record)


def remarks(record: Record) -> list[str]:
    """Notes on a run that counts all the same, a line each."""
    lines = list(record.notes)
    waited, bound = record.plan.get("waited for a connection", 0), record.plan.get("connections")
    if isinstance(waited, int) and waited > WAITED_SHARE * record.offered:
        lines.append(
            f"{waited:,} waits for a connection, all {bound:,} were taken: the server never had"
            " more requests at once, and the wait counts as latency; raise --connections to press"
            " harder"
        )
    return lines


def table(record: Record) -> Table:
    """The run for people. Latencies are left out where they are not the server's."""
    settled = ("members settled a second", f"{record.achieved_rate:,.0f}")
    counts = [
        ("members offered", f"{record.offered:,} ({record.offered_rate:,.0f}/s)"),
        ("requests sent, with repeats", f"{record.sent:,}"),
        ("answers", f"{record.answered:,}"),
        *([] if record.bottleneck else [settled]),
        ("from the start to the last answer", f"{record.duration_s:.2f} s"),
    ]
    ordered = sorted(record.outcomes.items(), key=lambda item: -item[1])
    closed = record.plan.get("arrivals") == AT_ONCE
    since = "sending" if closed else "the intended time"
    latencies = []
    for title, told in (("all", record.latency), ("sold", record.latency_sold)):
        shown = (f"p{share * 100:g} {latency_ms(told, share) or 0:.1f}" for share in TOLD_SHARES)
        latencies += [(f"ms from {since}, {title}", "  ".join(shown))] * bool(told)
    figures = [
        (name, f"{value:,}" if isinstance(value, int) else f"{value}")
        for name, value in record.plan.items()
        if " " in name
    ]
    lag = max((sample.lag_events for sample in record.samples), default=0)
    most = f"{lag:,} events" if lag > 0 else "none seen"
    figures += [("ledger lag, most seen", most)] * bool(record.samples)
    rules = [
        (f"fail if {each.rule}", f"{each.got}, {coloured(each.sign, good=not each.missed)}")
        for each in record.thresholds
    ]
    outcomes = [(told_outcome(code), f"{count:,}") for code, count in ordered]
    name = f"{record.name}: {record.campaign}"
    return facts(name, counts, outcomes, latencies, figures, rules, _books(record))


def _books(record: Record) -> list[tuple[str, str]]:
    proof = record.proof
    if proof is None:
        why = "not looked at" + " (--unproved)" * (record.plan.get("proof") == 0)
        why = f"not proved: {record.not_proved}" if record.not_proved else why
        return [("the books", escape(why))]
    words = CLEAN if proof.clean else so_many(proof.findings)
    audit = {True: verdict_of(CLEAN), False: verdict_of("findings"), None: "not run"}
    return [
        ("orders in the campaign, tickets", f"{proof.orders:,}, {proof.tickets:,}"),
        ("every answer compared with PostgreSQL", verdict_of(words)),
        ("sale audit", audit[proof.audit_clean]),
        *((f"[red]{each.kind}[/]", escape(each.what)) for each in proof.findings[:FINDINGS_SHOWN]),
    ]
