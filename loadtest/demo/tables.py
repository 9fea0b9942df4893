"""What a rush came to, as tables for people."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from rich.table import Table

from loadtest.books.answers import Outcome
from loadtest.books.ledger import Books
from loadtest.demo.play import LagWatch, Rush
from loadtest.engine import Engine
from loadtest.record import Finding

FINDINGS_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one rush. ``durable_rate``: orders in PostgreSQL a second, from the opening
    until the last of them was there.
    """

    told: Outcome
    tickets: int
    orders: int
    asked_again: int
    duration_s: float
    rate: float
    latency_ms: tuple[float, ...]
    durable_rate: float
    lag_events: int
    lag_s: float
    lag_zero_s: float

    @classmethod
    def of(
        cls, told: Outcome, rush: Rush, lag: LagWatch, books: Books, zero_at: float, tickets: int
    ) -> Self:
        """Work them out when the ledger has been written, at ``zero_at``."""
        return cls(
            told=told,
            tickets=tickets,
            orders=len(books.orders),
            asked_again=rush.asked_again,
            duration_s=rush.ended_at - rush.opened_at,
            rate=rush.result.rate,
            latency_ms=rush.result.percentiles_ms(0.5, 0.95, 0.99),
            durable_rate=len(books.orders) / max(lag.written_at - rush.opened_at, 1e-3),
            lag_events=int(lag.most_events),
            lag_s=lag.most_seconds,
            lag_zero_s=zero_at - rush.ended_at,
        )


def outcome_table(figures: Figures) -> Table:
    """Offered, sold, refused by reason, times."""
    told = figures.told
    table = Table(title="The rush", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("requests offered", f"{told.offered:,}")
    table.add_row("sold: orders", f"{told.sold_orders:,}")
    table.add_row("sold: tickets", f"{told.sold_tickets:,} of {figures.tickets:,}")
    table.add_row("replayed (same key again)", f"{told.replayed:,}")
    for code, count in sorted(told.refused.items(), key=lambda item: -item[1]):
        table.add_row(f"refused: {code}", f"{count:,}")
    table.add_row("no answer", f"{told.unknown:,}")
    table.add_row("asked again after 503, no answer or too early", f"{figures.asked_again:,}")
    table.add_section()
    table.add_row("from the opening to the last answer", f"{figures.duration_s:.2f} s")
    table.add_row("purchase requests answered a second", f"{figures.rate:,.0f}")
    for share, latency in zip(("p50", "p95", "p99"), figures.latency_ms, strict=True):
        table.add_row(f"answered within, {share}", f"{latency:.1f} ms")
    table.add_section()
    table.add_row("orders in PostgreSQL", f"{figures.orders:,}")
    table.add_row("durable orders a second, opening to last one", f"{figures.durable_rate:,.0f}")
    most = f"{figures.lag_events:,} events, {figures.lag_s:.2f} s"
    table.add_row("ledger lag, most seen", most)
    table.add_row("ledger lag zero after the last answer", f"{figures.lag_zero_s:.2f} s")
    return table


def books_table(findings: list[Finding], audit: dict[str, Any]) -> Table:
    """Both checks: ours of the answers, the engine's own of everything."""
    table = Table(title="The books", title_style="bold", show_header=False)
    table.add_column()
    table.add_column()
    verdict = "[green]clean[/]" if not findings else f"[red]{len(findings)} findings[/]"
    table.add_row("every answer compared with PostgreSQL", verdict)
    for finding in findings[:FINDINGS_SHOWN]:
        table.add_row(f"[red]{finding.kind}[/]", finding.what)
    table.add_row("sale audit", "[green]clean[/]" if audit["clean"] else "[red]findings[/]")
    for campaign in audit["campaigns"]:
        for finding in campaign["findings"][:FINDINGS_SHOWN]:
            table.add_row(f"[red]{finding['invariant']}[/]", finding["what"])
    return table


def look_next(engine: Engine, campaign: str) -> str:
    """Where to look while it stays up; lines that can be copied."""
    program = Path(sys.executable).with_name("sale")
    sale = _near(program) if program.exists() else "sale"
    where = f"--data-dir {_near(engine.data_dir)}"
    return (
        "[bold]Where to look next[/]\n"
        f"  page      {engine.url}/\n"
        f"  API       {engine.url}/api/v1/campaigns/{campaign}/availability\n"
        f"  metrics   http://{engine.metrics_address}/metrics\n"
        f"  commands  {sale} campaign show {campaign} {where}\n"
        f"            {sale} doctor {where}\n"
        f"            {sale} audit {where}\n"
        f"            {sale} campaign add-stock {campaign} general 100 --reason 'more' {where}"
    )


def _near(path: Path) -> str:
    """A path as it is best typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
