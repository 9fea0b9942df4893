"""Makes one record of what the processes of an open-loop run counted, and judges the generator.

A run is refused as a measure of the server where the generator itself was the limit:

- *late*: the generator took members up, opened connections for them, or looked after itself so
  late that at p99 its own lateness is above ``LATE_MS`` and more than ``LATE_SHARE`` of the latency
  at p99. Below 3 ms it is a time slice of the kernel's, and of 200 ms even 20 ms are not the most.
- *busy*: a process used ``BUSY_CPU`` of a core in more than ``BUSY_SHARE`` of its seconds (and at
  least two), so answers lay unread.
- *not sent*: more than ``UNSENT_SHARE`` of the members never found a connection within the queue
  and patience that they were given: the offered load was not offered.

Then no rate and no latency is left in the record, and ``bottleneck`` says why.

What falls short of that is told in ``notes``: lateness that is more than ``LATE_TOLD`` of the
latency at p99, and a run too short for the second test.

Members that waited because all ``--connections`` were taken are no such case: they waited for the
server, and their latency counts. It is told (``waited for a connection``), because the server never
saw more at once than there were connections.
"""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from hdrh.histogram import HdrHistogram

from loadtest.latency import at_share, new_histogram, percentiles
from loadtest.record import NO_ANSWER, NOT_SENT, Record, Second, withhold
from loadtest.rush.worker import Part
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


@dataclass(slots=True)
class Member:
    """One arrival as it ended: intended moment, latency (seconds), outcome."""

    offset: float
    latency_s: float
    code: str


def fill(record: Record, parts: Sequence[Part], fail_if: Sequence[str] = ()) -> None:
    """Put what the processes counted into a record: counts, seconds, latencies, the judgement.

    ``fail_if``: the rules of thresholds. Raises RuleError.
    """
    _count(record, parts)
    record.not_played = not_played(record.outcomes)
    foreign = {code: n for code, n in record.outcomes.items() if code.startswith(UNNAMED)}
    if foreign:
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(foreign.items()))
        record.notes.append(
            f"the last answer of {sum(foreign.values()):,} members was not the engine's but, for"
            f" instance, a balancer's ({codes}): they may have an order, or none"
        )
    record.thresholds = judge(read_rules(fail_if), record)


def _count(record: Record, parts: Sequence[Part]) -> None:
    everything = _added(part.latency for part in parts)
    sold = _added(part.latency_sold for part in parts)
    record.seconds = _seconds(parts)
    record.offered = sum(second.offered for second in record.seconds)
    record.sent = sum(sum(part.sent.values()) for part in parts)
    record.answered = sum(sum(part.answered.values()) for part in parts)
    for second in record.seconds:
        record.outcomes = dict(Counter(record.outcomes) + Counter(second.outcomes))
    record.duration_s = max(part.duration_s for part in parts)
    record.plan |= _own_figures(parts, record)
    late_ms = float(record.plan["generator lateness p99 ms"])
    p99_ms = everything.get_value_at_percentile(99) / 1e3
    record.bottleneck = _bottleneck(record, parts, late_ms, p99_ms)
    if record.bottleneck:
        withhold(record)
        return
    record.notes = _notes(parts, late_ms, p99_ms)
    record.latency, record.latency_sold = percentiles(everything), percentiles(sold)
    told = record.offered - record.outcomes.get(NO_ANSWER, 0) - record.outcomes.get(NOT_SENT, 0)
    record.achieved_rate = told / record.duration_s


def _bottleneck(record: Record, parts: Sequence[Part], late_ms: float, p99_ms: float) -> str:
    unsent = record.outcomes.get(NOT_SENT, 0)
    if unsent > UNSENT_SHARE * record.offered:
        return (
            f"{unsent:,} of {record.offered:,} members were never sent: all connections were taken"
            " and the queue or their patience ended; raise --connections or --queue"
        )
    for number, part in enumerate(parts, start=1):
        busy = sum(share >= BUSY_CPU for share in part.cpu)
        if busy >= max(BUSY_LEAST, BUSY_SHARE * len(part.cpu)):
            return (
                f"generator {number} used all of its core in {busy} of {len(part.cpu)} s;"
                " offer less or use more --processes"
            )
    if late_ms > LATE_MS and late_ms > LATE_SHARE * p99_ms:
        return (
            f"the generator itself was {late_ms:.1f} ms late at p99, of {p99_ms:.1f} ms measured;"
            " offer less, give it a core of its own, or run it again on a quieter host"
        )
    return ""


def _notes(parts: Sequence[Part], late_ms: float, p99_ms: float) -> list[str]:
    notes = []
    if late_ms > LATE_TOLD * p99_ms:
        notes.append(
            f"the generator's own lateness may be {late_ms:.1f} of the {p99_ms:.1f} ms at p99"
        )
    if min(len(part.cpu) for part in parts) < BUSY_LEAST:
        notes.append(
            "too short to see whether the generator was short of CPU: only its lateness was judged"
        )
    return notes


def _own_figures(parts: Sequence[Part], record: Record) -> dict[str, str | int | float]:
    late = [_floats(raw, "f") for part in parts for raw in (part.late, part.lags)]
    waits = sum(part.pool_waits for part in parts)
    return {
        "generator lateness p99 ms": round(max(at_share(each, 0.99) for each in late) * 1e3, 3),
        "generator lateness max ms": round(max(max(each, default=0.0) for each in late) * 1e3, 3),
        "generator CPU µs a request": round(
            sum(part.cpu_s for part in parts) / max(record.sent, 1) * 1e6, 1
        ),
        "generator CPU at most, of a core": round(
            max(max(part.cpu, default=0.0) for part in parts), 3
        ),
        "generator rss MiB": round(max(part.rss_bytes for part in parts) / 2**20, 1),
        "connections opened": sum(part.connections for part in parts),
        "connections lost": sum(part.lost_connections for part in parts),
        "asked again": sum(part.retries for part in parts),
        "waited for a connection": waits,
    }


def _seconds(parts: Sequence[Part]) -> list[Second]:
    members: dict[int, list[Member]] = defaultdict(list)
    for part in parts:
        for member in _members(part):
            members[int(member.offset)].append(member)
    sent = _by_second(part.sent for part in parts)
    answered = _by_second(part.answered for part in parts)
    last = min(max([*members, *sent, *answered], default=0), SECONDS_MAX - 1)
    seconds = []
    for t in range(last + 1):
        here = members.get(t, [])
        waited = sorted(each.latency_s for each in here if each.code != NOT_SENT)
        second = Second(t=t, offered=len(here), sent=sent[t], answered=answered[t])
        second.outcomes = dict(Counter(each.code for each in here))
        second.p50_ms, second.p95_ms, second.p99_ms, second.max_ms = (
            round(at_share(waited, share) * 1e3, 3) for share in (0.5, 0.95, 0.99, 1.0)
        )
        seconds.append(second)
    return seconds


def _members(part: Part) -> Iterator[Member]:
    offsets, done = _floats(part.offsets, "d"), _floats(part.done_at, "d")
    for offset, done_at, outcome in zip(offsets, done, part.outcome, strict=True):
        until = part.duration_s if math.isnan(done_at) else done_at
        yield Member(offset, until - offset, part.codes[outcome])


def _by_second(counts: Iterable[dict[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for count in counts:
        total.update(count)
    return total


def _added(encoded: Iterable[bytes]) -> HdrHistogram:
    total = new_histogram()
    for each in encoded:
        total.add(HdrHistogram.decode(each))
    return total


def _floats(raw: bytes, kind: str) -> "array[float]":
    made: array[float] = array(kind)
    made.frombytes(raw)
    return made
