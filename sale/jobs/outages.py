"""Logs when the writer loses a store, once for each kind of reason, and when the store is back."""

from typing import Final

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Outages:
    """The stores, and the trimming of streams, that fail at present."""

    def __init__(self) -> None:
        self._reasons: dict[str, set[str]] = {}

    def lost(self, what: str, why: str) -> None:
        """Log that ``what`` fails; its kind is the part of ``why`` before the colon."""
        kinds, kind = self._reasons.setdefault(what, set()), why.partition(":")[0]
        if kind not in kinds:
            kinds.add(kind)
            log.error(_LOST[what], why=why)

    def back(self, what: str) -> None:
        """Log that ``what`` works again, if it failed."""
        if self._reasons.pop(what, None) is not None:
            log.info(_BACK[what])


_LOST: Final = {
    "postgres": "ledger.postgres_lost",
    "redis": "ledger.redis_lost",
    "trim": "ledger.trim_failed",
}
_BACK: Final = {
    "postgres": "ledger.postgres_back",
    "redis": "ledger.redis_back",
    "trim": "ledger.trim_back",
}
