"""Metrics of the ledger writer."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class LedgerMetrics:
    """The writer's metrics, registered in ``registry``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.active = Gauge(
            "sale_writer_active",
            "1 if this writer is active, 0 if it is a standby.",
            registry=registry,
        )
        self.lag_events = Gauge(
            "sale_ledger_lag_events",
            "Events that PostgreSQL does not have yet.",
            ["campaign"],
            registry=registry,
        )
        self.lag_seconds = Gauge(
            "sale_ledger_lag_seconds",
            "Age of the oldest event that PostgreSQL does not have yet; 0 if it has all.",
            ["campaign"],
            registry=registry,
        )
        self.written = Counter(
            "sale_ledger_written",
            "Events written to PostgreSQL.",
            registry=registry,
        )
        self.expired = Counter(
            "sale_expired",
            "Orders written whose hold ended unpaid.",
            registry=registry,
        )
        self.cancelled_tickets = Counter(
            "sale_cancelled_tickets",
            "Tickets written that were given back.",
            registry=registry,
        )
        self.conflicts = Counter(
            "sale_ledger_conflicts",
            "Events that PostgreSQL refused to apply.",
            ["campaign"],
            registry=registry,
        )
        self.conflict_rows = Gauge(
            "sale_ledger_conflict_rows",
            "Rows of table conflict: those found when this writer started, and those it added.",
            ["campaign"],
            registry=registry,
        )
        self.stuck = Gauge(
            "sale_ledger_stuck",
            "1 if a campaign's ledger cannot be applied: a gap, a broken chain.",
            ["campaign"],
            registry=registry,
        )

    def forget_lag(self) -> None:
        """Clear the values that only the active writer knows."""
        self.lag_events.clear()
        self.lag_seconds.clear()
        self.stuck.clear()
        self.conflict_rows.clear()
