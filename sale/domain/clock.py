"""Moments: bounds, reading, wording. Stored times are UTC milliseconds."""

import re
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from typing import Final

from sale.domain.text import Text, Wrong

MOMENT_MIN: Final = datetime(2000, 1, 1, tzinfo=UTC)
MOMENT_MAX: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""Bounds of every moment that is given to the engine, both included.

Wide enough for any sale, so a moment outside is a typing error. Inside, nothing that handles a
moment can fail: every conversion to another time zone, its wording, and PostgreSQL's columns.
"""
MOMENT_FORM: Final = Text(
    "必须是带时区的日期和时间（RFC 3339），例如 2015-05-01T09:00:00+08:00",
    "must be a date and time with an offset (RFC 3339), as 2015-05-01T09:00:00+08:00",
)
LOCAL_ZONE: Final = timezone(timedelta(hours=8))
"""Beijing time: what members and operators read. Stored times are UTC milliseconds."""


def to_ms(moment: datetime) -> int:
    """UTC milliseconds of an aware datetime, exactly (no float on the way)."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def from_ms(ms: int) -> datetime:
    """Aware datetime in Beijing time of UTC milliseconds."""
    return (_EPOCH + timedelta(milliseconds=ms)).astimezone(LOCAL_ZONE)


def nearest(ms: float) -> int:
    """Give the nearest moment (UTC ms) that a datetime of any zone, and PostgreSQL, can hold.

    The ledger keeps its moment unchanged, however far away; it is shown and stored as this.
    """
    return int(min(max(ms, _NEAREST_MIN_MS), _NEAREST_MAX_MS))


@lru_cache(maxsize=4_096)
def rfc3339(ms: int) -> str:
    """RFC 3339 with offset and milliseconds, in Beijing time. A batch of sales shares one.

    Every number has a wording (``nearest``): one campaign must not spoil a list of all.
    """
    return from_ms(nearest(ms)).isoformat(timespec="milliseconds")


def in_bounds(ms: int) -> bool:
    """Whether a moment (UTC ms) is one that the engine would take today."""
    return to_ms(MOMENT_MIN) <= ms <= to_ms(MOMENT_MAX)


def parse_moment(value: object) -> datetime:
    """Read a moment, cut to the millisecond: an RFC 3339 date-time, or a datetime of TOML's.

    The only reader of times from outside. It takes what RFC 3339 defines and nothing else of
    ISO 8601, in upper or lower case, with up to nine digits of a second. It refuses the leap second
    (``:60``): the clock that decides openings has none. Raises Wrong.
    """
    if isinstance(value, str):
        match = _RFC3339.fullmatch(value)
        try:
            moment = datetime.fromisoformat(_isoformat(match)) if match else None
        except ValueError:  # 30 February, hour 24
            moment = None
    else:
        moment = value if isinstance(value, datetime) else None
    if moment is None or moment.tzinfo is None:
        raise Wrong(MOMENT_FORM)
    if not MOMENT_MIN <= moment <= MOMENT_MAX:
        low, high = f"{MOMENT_MIN:%Y-%m-%d}", f"{MOMENT_MAX:%Y-%m-%d}"
        raise Wrong(
            Text(f"必须在 {low} 到 {high} 之间（UTC）", f"must be from {low} to {high} (UTC)")
        )
    return moment.replace(microsecond=moment.microsecond // 1_000 * 1_000)


def _isoformat(match: re.Match[str]) -> str:
    """Word an RFC 3339 date-time as every Python from 3.11 reads it."""
    whole, fraction, offset = match.groups()
    return f"{whole.upper()}.{(fraction or '')[:3]:0<3}{offset.upper().replace('Z', '+00:00')}"


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NEAREST_MIN_MS: Final = to_ms(datetime(1, 1, 3, tzinfo=UTC))
_NEAREST_MAX_MS: Final = to_ms(datetime(9999, 12, 29, tzinfo=UTC))
_RFC3339: Final = re.compile(
    r"(\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)(?:\.(\d{1,9}))?"
    r"(Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII | re.IGNORECASE,
)
