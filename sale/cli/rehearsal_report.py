"""The outcome of a rehearsal: the generator's record and our own audit, in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from sale.cli.terminal import echo_fields, echo_table

if TYPE_CHECKING:
    from loadtest.rehearsal import Record
    from sale.trust.audit import CampaignAudit

RECORD: Final = "run.json"
FINDINGS_SHOWN: Final = 20
_SHARES: Final = ((0.5, "p50"), (0.99, "p99"), (0.999, "p99.9"))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A rehearsal as ``--json`` shows it.

    ``clean``: the generator compared every answer with the books, nothing was wrong, and the audit
    of the rehearsal and of the real campaign has no finding. ``bottleneck`` says why the generator
    was the limit, or is ''; ``failed`` that there was no rush, or which thresholds were missed;
    ``notes`` what else must be known of its figures. ``real_untouched`` is
    false where the real campaign has had an event meanwhile, be it an operator's. ``purged``: its
    data is gone.
    """

    rehearsal: str
    of: str
    clean: bool
    offered: int = 0
    answered: int = 0
    offered_rate: float = 0.0
    achieved_rate: float = 0.0
    outcomes: dict[str, int] = {}
    latency_ms: dict[str, float] = {}
    bottleneck: str = ""
    failed: list[str] = []
    notes: list[str] = []
    orders: int = 0
    tickets: int = 0
    findings: list[str] = []
    audit_clean: bool = False
    real_untouched: bool = False
    generator_status: int = 0
    out: str = ""
    report: str | None = None
    purged: bool = False

    @classmethod
    def of_run(
        cls,
        identifier: str,
        of: str,
        out: Path,
        record: "Record",
        *,
        audits: Sequence["CampaignAudit"],
        untouched: bool,
    ) -> "Outcome":
        """Put together what is known. A run without a proof is not clean."""
        from loadtest.rehearsal import missed

        proof = record.proof
        findings = [
            f"{each.id}: {finding.invariant}: {finding.what}"
            for each in audits
            for finding in each.findings
        ]
        audited = len(audits) == 2 and all(each.clean for each in audits)
        if proof is None:
            why = record.not_proved or "it does not know where PostgreSQL is"
            findings.append(
                f"the load generator could not compare its answers with PostgreSQL: {why}"
            )
        else:
            findings += [f"{finding.kind}: {finding.what}" for finding in proof.findings]
        found = [f"the rush did not happen: {record.not_played}"] if record.not_played else []
        failed = found + missed(record)
        pages = sorted(out.glob("*.html"))
        return cls(
            rehearsal=identifier,
            of=of,
            clean=audited and proof is not None and proof.clean and not findings,
            offered=record.offered,
            answered=record.answered,
            offered_rate=record.offered_rate,
            achieved_rate=record.achieved_rate,
            outcomes=record.outcomes,
            latency_ms=_latency(record),
            bottleneck=record.bottleneck,
            failed=failed,
            notes=record.notes,
            orders=proof.orders if proof else 0,
            tickets=proof.tickets if proof else 0,
            findings=findings,
            audit_clean=audited,
            real_untouched=untouched,
            generator_status=int(bool(record.bottleneck or failed or findings)),
            out=str(out),
            report=str(pages[0]) if pages else None,
        )


def show(outcome: Outcome) -> None:
    """Print it for people."""
    rows = sorted(outcome.outcomes.items(), key=lambda each: -each[1])
    echo_table(("outcome", "members"), rows)
    latency = ", ".join(f"{name} {ms:,.1f} ms" for name, ms in outcome.latency_ms.items())
    achieved = "–" if outcome.bottleneck else f"{outcome.achieved_rate:,.0f}/s"
    rates = f"{outcome.offered_rate:,.0f}/s offered, {achieved} answered"
    echo_fields(
        [
            ("rehearsal", f"{outcome.rehearsal} of {outcome.of}"),
            ("members", f"{outcome.offered:,} ({rates})"),
            ("latency", latency or "not measured"),
            ("generator", outcome.bottleneck or "kept up"),
            *(("failed", why) for why in outcome.failed),
            *(("note", note) for note in outcome.notes),
            ("orders", f"{outcome.orders:,} with {outcome.tickets:,} tickets"),
            ("audit", "clean" if outcome.audit_clean else "NOT CLEAN"),
            (
                "real campaign",
                "untouched" if outcome.real_untouched else "has had events meanwhile",
            ),
            ("report", outcome.report or outcome.out),
            ("its data", "removed; the audit log stays" if outcome.purged else "kept"),
        ]
    )
    for finding in outcome.findings[:FINDINGS_SHOWN]:
        click.echo(finding)
    click.echo("clean: every answer matches PostgreSQL" if outcome.clean else "NOT CLEAN")
    if outcome.bottleneck:
        click.echo("but the generator was the limit, so it was no rehearsal of that rate")


def _latency(record: "Record") -> dict[str, float]:
    """Give the latency that so large a share of the answers did not pass."""
    found = {}
    for share, name in _SHARES:
        for each in record.latency:
            if each.share >= share:
                found[name] = each.ms
                break
    return found
