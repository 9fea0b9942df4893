"""Rules of ``--fail-if``: how they are read, what they are held against; a rush that was none."""

import re

import pytest

from loadtest.record import Percentile, Record
from loadtest.thresholds import RuleError, by_member, judge, missed, not_played, read_rules


def run(**changes: object) -> Record:
    """1,000 members in 10 s: 600 sold, 380 sold out, 20 without a decision."""
    told: dict[str, object] = {
        "name": "r", "campaign": "c", "started_at": "2026-01-01T00:00:00Z", "duration_s": 10.0,
        "offered": 1_000, "offered_rate": 100.0, "achieved_rate": 99.0,
        "outcomes": {"sold": 590, "replayed": 10, "sold-out": 380, "no-answer": 5, "HTTP 502": 10,
                     "overloaded": 5},
        "latency": [Percentile(share=0.5, ms=10), Percentile(share=0.99, ms=201),
                    Percentile(share=1.0, ms=900)],
    }  # fmt: skip
    return Record(**(told | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "misses", "got"),
    [
        ("p99>200ms", True, "201.0 ms"),
        ("p99>0.2s", True, "201.0 ms"),
        (" p99 >= 201 ", True, "201.0 ms"),
        ("p99>201ms", False, "201.0 ms"),
        ("p50>9999us", True, "10.0 ms"),
        ("p99.9>1s", False, "900.0 ms"),
        ("max<1s", True, "900.0 ms"),
        ("errors>=2%", True, "2.000%"),
        ("errors>0.02", False, "2.000%"),
        ("unanswered>0.5%", False, "0.500%"),
        ("unanswered>0%", True, "0.500%"),
        ("sold<600", False, "600"),
        ("sold/s<61", True, "60.0"),
        ("settled/s<=99", True, "99.0"),
        ("offered/s>100", False, "100.0"),
    ],
)
def test_rule_is_held_against_the_run(rule: str, misses: bool, got: str) -> None:
    (judged,) = judge(read_rules([rule]), run())
    assert (judged.rule, judged.missed, judged.got) == (rule.strip(), misses, got)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("p98>1ms", "no figure 'p98'; there are p50, p90"),
        ("P99>1ms", "no figure 'P99'"),
        ("p99", "is no rule"),
        ("", "is no rule"),
        ("p99=1ms", "is no rule"),
        ("p99>1ms errors", "is no rule"),
        ("p99>x", "'' is not a number"),
        ("p99>-1ms", "'-1' is not a number"),
        ("p99>1e400", "'e400' is no unit"),
        ("p99>1h", "'h' is no unit of time"),
        ("errors>1", "a share is written 1% or 0.01"),
        ("errors>101%", "a share is written"),
        ("sold/s<3ms", "takes no unit"),
    ],
)
def test_bad_rule_is_refused_with_its_reason(rule: str, says: str) -> None:
    with pytest.raises(RuleError, match=re.escape(says)) as refused:
        read_rules(["p50>1ms", rule])
    assert repr(rule) in str(refused.value)


def test_several_rules_are_judged_each() -> None:
    record = run()
    record.thresholds = judge(read_rules(["p99>1s,errors>1%", "sold<1"]), record)
    assert [each.missed for each in record.thresholds] == [False, True, False]
    assert missed(record) == ["threshold missed: errors>1%: it was 2.000%"]


def test_figure_that_was_not_measured_is_missed() -> None:
    withheld = run(latency=[], bottleneck="late")
    judged = judge(read_rules(["p99>1s", "sold/s<1", "settled/s<1"]), withheld)
    assert [(each.missed, each.got) for each in judged] == [(True, "not measured")] * 3
    assert judge(read_rules(["errors>50%"]), run(outcomes={}))[0].missed


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ({"closed": 29_901, "sold": 99}, "29,901 of 30,000 members could not buy at all (closed"),
        ({"paused": 60, "sold": 40}, "60 of 100 members could not buy at all (paused 60)"),
        ({"unauthenticated": 100}, "could not buy at all (unauthenticated 100)"),
        ({"not-open": 30, "not-eligible": 30, "sold": 40}, "60 of 100 members could not buy"),
        ({"limit-exceeded": 999, "sold": 1}, "1 of 1,000 members got an order, though it was not"),
        ({"no-answer": 100}, "0 of 100 members got an order"),
        ({"HTTP 404": 100}, "0 of 100 members got an order"),
        ({}, "no member asked"),
        ({"sold": 5, "sold-out": 29_995}, ""),
        ({"sold-out": 100}, ""),
        ({"sold": 300, "overloaded": 29_700}, ""),
        ({"replayed": 50, "limit-exceeded": 50}, ""),
    ],
)
def test_rush_that_was_none_is_said_to_be(outcomes: dict[str, int], says: str) -> None:
    told = not_played(outcomes)
    assert told.startswith(says) if says.startswith(tuple("0123456789n")) else says in told
    assert bool(told) is bool(says)


def test_card_counts_once_with_its_best_outcome() -> None:
    told = [("a", "rate-limited"), ("a", "sold"), ("a", "closed"), ("b", "paused")]
    told.append(("b", "sold-out"))
    assert by_member(told) == {"sold": 1, "sold-out": 1}
