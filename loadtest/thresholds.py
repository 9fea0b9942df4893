"""Makes a run fail beside its books: by the rules of ``--fail-if``, or as a rush that was none.

A rule names a figure, a comparison and a value: ``p99>200ms``. The run fails where the rule holds.
Percentiles are those that the record tells, of all members and from the intended moment. A figure
that a run does not have (no answer came, or the generator itself was the limit) misses its rule:
nobody has seen that it was kept.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.record import NO_ANSWER, NOT_SENT, REPLAYED, SOLD, Record, Threshold, latency_ms
from loadtest.wire import UNNAMED

ORDERED: Final = (SOLD, REPLAYED)
DECIDED: Final = (*ORDERED, "sold-out", "limit-exceeded")
"""Outcomes of a release that is open, for cards that may buy in it."""

OPEN: Final = (NO_ANSWER, NOT_SENT, "unavailable", "overloaded", "rate-limited")
"""Outcomes that are no decision about the member's wish; answers of a balancer are none either."""

ORDERS_LEAST: Final = 0.01
MOST: Final = 0.5

_LATENCY: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
_SHARES: Final = ("errors", "unanswered")
_NUMBERS: Final = ("sold/s", "settled/s", "offered/s", "sold")
NAMES: Final = (*_LATENCY, *_SHARES, *_NUMBERS)
RULES_HELP: Final = (
    "the run fails where this holds, as 'p99>200ms' or 'errors>=1%%'; several are allowed;"
    f" figures: {', '.join(NAMES)}"
)
_FORMATS: Final = {
    **dict.fromkeys(_LATENCY, "{:,.1f} ms"), **dict.fromkeys(_SHARES, "{:.3%}"), "sold": "{:,.0f}",
}  # fmt: skip
_MS: Final = {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3}
_COMPARES: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_RULE: Final = re.compile(
    r"\s*(?P<name>[^\s<>=!]*)\s*(?P<compare>[<>=!]+)\s*(?P<number>[^\s%a-zµ]*)\s*(?P<unit>\S*)\s*"
)
_NUMBER: Final = re.compile(r"\d{1,12}(\.\d{1,9})?", re.ASCII)


class RuleError(ValueError):
    """A rule that cannot be read; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``value`` is in ms, a share from 0 to 1, a rate a second, or a count."""

    text: str
    name: str
    compare: str
    value: float

    def judge(self, record: Record) -> Threshold:
        """Give the run's figure, and whether the rule holds."""
        got, said = _figure(record, self.name), "not measured"
        if got is not None:
            said = _FORMATS.get(self.name, "{:,.1f}").format(got)
        missed = got is None or _COMPARES[self.compare](got, self.value)
        return Threshold(rule=self.text, got=said, missed=missed)


def read_rules(texts: Iterable[str]) -> list[Rule]:
    """Read rules; a text may hold several, separated by commas. Raises RuleError."""
    return [_read(part) for text in texts for part in text.split(",")]


def judge(rules: Sequence[Rule], record: Record) -> list[Threshold]:
    """Each rule held against a run."""
    return [rule.judge(record) for rule in rules]


def missed(record: Record) -> list[str]:
    """The thresholds that a run missed, a line each."""
    return [
        f"threshold missed: {each.rule}: it was {each.got}"
        for each in record.thresholds
        if each.missed
    ]


def told_outcome(code: str) -> str:
    """An outcome for people: whether the member knows, and who said so."""
    if code in ORDERED:
        return code
    if code == NO_ANSWER:
        return "outcome unknown: no answer"
    if code.startswith(UNNAMED):
        known = "outcome unknown" if code.startswith(f"{UNNAMED}5") else "not sold"
        return f"{known}: {code}, not the engine's answer"
    return f"{'outcome unknown' if code == 'unavailable' else 'not sold'}: {code}"


def by_member(told: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Outcomes of members, from (member, outcome) of all that they asked for: each one's best."""
    best: dict[str, str] = {}
    for member_no, code in told:
        best[member_no] = min(best.get(member_no, code), code, key=_rank)
    return dict(Counter(best.values()))


def _rank(code: str) -> int:
    return 0 if code in ORDERED else 1 if code in DECIDED else 2


def not_played(outcomes: Mapping[str, int]) -> str:
    """Say why a run was no rush, or nothing.

    It was none where more than half of the members were refused for another reason than stock and
    their limit (closed, paused, not open, not eligible, a wrong token …), or where less than one in
    a hundred got an order and stock was not the reason: fewer than half were told "sold out".
    """
    members = sum(outcomes.values())
    if not members:
        return "no member asked for anything"
    open_or_decided = {*DECIDED, *filter(_undecided, outcomes)}
    shut = {code: count for code, count in outcomes.items() if code not in open_or_decided}
    orders = sum(outcomes.get(code, 0) for code in ORDERED)
    if sum(shut.values()) > MOST * members:
        return f"{sum(shut.values()):,} of {members:,} members could not buy at all ({_told(shut)})"
    if orders < ORDERS_LEAST * members and outcomes.get("sold-out", 0) < MOST * members:
        others = {code: count for code, count in outcomes.items() if code not in ORDERED}
        return (
            f"{orders:,} of {members:,} members got an order, though it was not sold out"
            f" ({_told(others)})"
        )
    return ""


def _undecided(code: str) -> bool:
    return code in OPEN or code.startswith(UNNAMED)


def _told(outcomes: Mapping[str, int]) -> str:
    most = sorted(outcomes.items(), key=lambda each: -each[1])[:3]
    return ", ".join(f"{code} {count:,}" for code, count in most)


def _read(text: str) -> Rule:
    found = _RULE.fullmatch(text)
    if found is None or found["compare"] not in _COMPARES:
        raise RuleError(f"{text!r} is no rule: write FIGURE>VALUE, as p99>200ms (or >=, <, <=)")
    name, unit = found["name"], found["unit"]
    if name not in NAMES:
        raise RuleError(f"{text!r}: no figure {name!r}; there are {', '.join(NAMES)}")
    if not _NUMBER.fullmatch(found["number"]):
        raise RuleError(f"{text!r}: {found['number']!r} is not a number")
    number = float(found["number"])
    if name in _LATENCY:
        if unit not in _MS:
            raise RuleError(f"{text!r}: {unit!r} is no unit of time; there are ms, s and us")
        number *= _MS[unit]
    elif name in _SHARES:
        if unit == "%" and number <= 100:
            number /= 100
        elif unit or number >= 1:
            raise RuleError(f"{text!r}: a share is written 1% or 0.01")
    elif unit:
        raise RuleError(f"{text!r}: {name} takes no unit, {unit!r} is not understood")
    return Rule(text.strip(), name, found["compare"], number)


def _figure(record: Record, name: str) -> float | None:
    """Give the run's figure; None where it tells none."""
    if name in _LATENCY:
        return latency_ms(record.latency, _LATENCY[name])
    outcomes = record.outcomes
    if name in _SHARES:
        failed = {NO_ANSWER, NOT_SENT}
        if name == "errors":
            failed |= {code for code in outcomes if _undecided(code)}
        members = sum(outcomes.values())
        return sum(outcomes.get(code, 0) for code in failed) / members if members else None
    orders = sum(outcomes.get(code, 0) for code in ORDERED)
    if name in ("sold", "offered/s"):
        return orders if name == "sold" else record.offered_rate
    if record.bottleneck or not record.duration_s:
        return None
    return orders / record.duration_s if name == "sold/s" else record.achieved_rate
