"""Makes one record of what members got, and judges the generator.

A run is refused as a measure of the server if the generator itself was the limit:

- *late*: the generator took members up, opened connections for them, or looked after itself so
  late that at p99 its own lateness is above ``LATE_MS`` and more than ``LATE_SHARE`` of the latency
  at p99. Below 3 ms it is a time slice of the kernel's, and of 200 ms even 20 ms are not the most.
- *busy*: a process used ``BUSY_CPU`` of a core in more than ``BUSY_SHARE`` of its seconds (and at
  least two), so answers lay unread.
- *not sent*: more than ``UNSENT_SHARE`` of the members never found a connection within the queue
  and patience that they were given: the offered load was not offered.

Then no rate and no latency is left in the record, and ``bottleneck`` says why. ``notes`` tell what
falls short of that: lateness that is more than ``LATE_TOLD`` of the latency at p99, and a run too
short for the second test.

Members that waited because all ``--connections`` were taken are no such case: they waited for the
server, and their latency counts. It is reported (``waited for a connection``), because the server
never saw more at once than there were connections.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from loadtest.record import NO_ANSWER, NOT_SENT, REPLAYED, SOLD, Percentile, Record, Second
from loadtest.record import withhold as withhold_figures
from loadtest.tally import Tally
from loadtest.thresholds import judge, not_played, read_rules
from loadtest.wire import UNNAMED

LATE_MS: Final = 3.0
LATE_SHARE: Final = 0.4
LATE_TOLD: Final = 0.1
BUSY_CPU: Final = 0.95
BUSY_SHARE: Final = 0.1
BUSY_LEAST: Final = 2
UNSENT_SHARE: Final = 0.001
SECONDS_MAX: Final = 14_400
TICKS_PER_HALF: Final = 4
TOLD_SHARES: Final = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


class Member(NamedTuple):
    """One arrival as it ended: intended time, latency (seconds; NaN: it has none), outcome."""

    offset: float
    latency_s: float
    code: str


def at_share(values: Iterable[float], share: float) -> float:
    """Value that a share of the values stay within; 0 for none."""
    return _ranked(sorted(values), share)


def _ranked(ranked: Sequence[float], share: float) -> float:
    place = max(math.ceil(share * len(ranked) - 1e-9) - 1, 0)
    return ranked[place] if ranked else 0.0


def percentiles(seconds: Iterable[float]) -> list[Percentile]:
    """Percentiles of latencies, ever denser towards 1, as they are drawn on a log scale."""
    ranked = sorted(seconds)
    shares, rest, step = set(TOLD_SHARES), 1.0, 0
    while rest * len(ranked) > 1:
        shares.add(1 - rest)
        step += 1
        rest = 0.5 ** (step / TICKS_PER_HALF)
    told = sorted(shares) if ranked else []
    return [Percentile(share=each, ms=round(_ranked(ranked, each) * 1e3, 3)) for each in told]


def count_members(
    record: Record,
    members: Iterable[Member],
    sent: Mapping[int, int],
    answered: Mapping[int, int],
) -> None:
    """Put members into a record: counts, outcomes, latencies, and all of these by the second.

    ``sent`` and ``answered`` count requests by second, repeats included.
    """
    by_second: dict[int, list[Member]] = defaultdict(list)
    for member in members:
        by_second[min(int(member.offset), SECONDS_MAX - 1)].append(member)
    last = min(max([*by_second, *sent, *answered], default=-1), SECONDS_MAX - 1)
    everything: list[float] = []
    orders: list[float] = []
    for t in range(last + 1):
        here = by_second.get(t, [])
        waited = sorted(each.latency_s for each in here if not math.isnan(each.latency_s))
        everything += waited
        orders += [each.latency_s for each in here if each.code in (SOLD, REPLAYED)]
        levels = (round(_ranked(waited, share) * 1e3, 3) for share in (0.5, 0.95, 0.99, 1.0))
        second = Second(t=t, offered=len(here), sent=sent.get(t, 0), answered=answered.get(t, 0))
        second.p50_ms, second.p95_ms, second.p99_ms, second.max_ms = levels
        second.outcomes = dict(Counter(each.code for each in here))
        record.seconds.append(second)
        record.outcomes = dict(Counter(record.outcomes) + Counter(second.outcomes))
    record.offered = sum(second.offered for second in record.seconds)
    record.sent, record.answered = sum(sent.values()), sum(answered.values())
    record.latency, record.latency_sold = percentiles(everything), percentiles(orders)


def fill(record: Record, tallies: Sequence[Tally], fail_if: Sequence[str] = ()) -> None:
    """Put what the generators counted into a record, and the judgement.

    ``fail_if``: the rules of thresholds. Raises RuleError.
    """
    sent, answered = Counter[int](), Counter[int]()
    for tally in tallies:
        sent.update(tally.sent)
        answered.update(tally.answered)
    members = (member for tally in tallies for member in _members(tally))
    count_members(record, members, sent, answered)
    record.duration_s = max(tally.duration_s for tally in tallies)
    told = record.offered - record.outcomes.get(NO_ANSWER, 0) - record.outcomes.get(NOT_SENT, 0)
    record.achieved_rate = told / record.duration_s
    record.plan |= _own_figures(tallies, record)
    late_ms = float(record.plan["generator lateness p99 ms"])
    p99_ms = next((each.ms for each in record.latency if each.share >= 0.99), 0.0)
    if all(tally.window for tally in tallies):
        record.notes = ["a closed loop: its latencies count from sending"]
    elif why := _bottleneck(record, tallies, late_ms, p99_ms):
        record.bottleneck = why
        withhold_figures(record)
    else:
        record.notes = _notes(tallies, late_ms, p99_ms)
    record.not_played = not_played(record.outcomes)
    foreign = {code: n for code, n in record.outcomes.items() if code.startswith(UNNAMED)}
    if foreign:
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(foreign.items()))
        record.notes.append(
            f"the last answer of {sum(foreign.values()):,} members was not the engine's but, for"
            f" instance, a balancer's ({codes}): they may have an order, or none"
        )
    record.thresholds = judge(read_rules(fail_if), record)


def judged(tally: Tally) -> Record:
    """A record of one generator alone, for its ``bottleneck`` and ``notes``."""
    record = Record(name="", campaign="", started_at="", duration_s=0.0)
    fill(record, [tally])
    return record


def _bottleneck(record: Record, tallies: Sequence[Tally], late_ms: float, p99_ms: float) -> str:
    unsent = record.outcomes.get(NOT_SENT, 0)
    if unsent > UNSENT_SHARE * record.offered:
        return (
            f"{unsent:,} of {record.offered:,} members were never sent: all connections were taken"
            " and the queue or their patience ended; raise --connections or --queue"
        )
    for number, tally in enumerate(tallies, start=1):
        busy = sum(share >= BUSY_CPU for share in tally.cpu)
        if busy >= max(BUSY_LEAST, BUSY_SHARE * len(tally.cpu)):
            return (
                f"generator {number} used all of its core in {busy} of {len(tally.cpu)} s;"
                " offer less or use more --processes"
            )
    if late_ms > LATE_MS and late_ms > LATE_SHARE * p99_ms:
        return (
            f"the generator itself was {late_ms:.1f} ms late at p99, of {p99_ms:.1f} ms measured;"
            " offer less, give it a core of its own, or run it again on a quieter host"
        )
    return ""


def _notes(tallies: Sequence[Tally], late_ms: float, p99_ms: float) -> list[str]:
    notes = []
    if late_ms > LATE_TOLD * p99_ms:
        notes.append(
            f"the generator's own lateness may be {late_ms:.1f} of the {p99_ms:.1f} ms at p99"
        )
    if min(len(tally.cpu) for tally in tallies) < BUSY_LEAST:
        notes.append(
            "too short to see whether the generator was short of CPU: only its lateness was judged"
        )
    return notes


def _own_figures(tallies: Sequence[Tally], record: Record) -> dict[str, str | int | float]:
    late = [sorted(each) for tally in tallies for each in (tally.late, tally.lags)]
    cpu_us = sum(tally.cpu_s for tally in tallies) / max(record.sent, 1) * 1e6
    most_cpu = max(max(tally.cpu, default=0.0) for tally in tallies)
    return {
        "generator lateness p99 ms": round(max(_ranked(each, 0.99) for each in late) * 1e3, 3),
        "generator lateness max ms": round(max(_ranked(each, 1.0) for each in late) * 1e3, 3),
        "generator CPU µs a request": round(cpu_us, 1),
        "generator CPU at most, of a core": round(most_cpu, 3),
        "generator rss MiB": round(max(tally.rss_bytes for tally in tallies) / 2**20, 1),
        "connections opened": sum(tally.connections for tally in tallies),
        "connections lost": sum(tally.lost_connections for tally in tallies),
        "asked again": sum(tally.retries for tally in tallies),
        "waited for a connection": sum(tally.pool_waits for tally in tallies),
    }


def _members(tally: Tally) -> Iterator[Member]:
    rows = zip(tally.offsets, tally.done_at, tally.outcome, strict=True)
    for offset, done_at, outcome in rows:
        code = tally.codes[outcome]
        # A member that was never answered waited at least until the end.
        until = tally.duration_s if math.isnan(done_at) else done_at
        yield Member(offset, math.nan if code == NOT_SENT else until - offset, code)
