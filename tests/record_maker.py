"""Plausible records of runs, made up, for the tests of the report and for looking at it."""

import math
import random

from loadtest.record import Finding, Percentile, ProcessSample, Proof, Record, Sample, Second
from loadtest.report.charts import OUTCOME_COLOURS

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0)
OUTCOMES = tuple(OUTCOME_COLOURS)


def made_up(
    name: str = "release", *, seed: int = 1, seconds: int = 40, capacity: int = 6_000
) -> Record:
    """A release: quiet, the second of opening, sold out after some time, a long tail."""
    chance = random.Random(seed)
    rows, samples, left, lag, total = [], [], 60_000, 0, dict.fromkeys(OUTCOMES, 0)
    for t in range(seconds):
        offered = int(400 if t < 5 else 11_000 * math.exp(-(t - 5) / 9) + 300)
        offered += chance.randint(0, 60)
        counts = _counts(t, offered, capacity, left, chance)
        left -= counts["sold"]
        for outcome, number in counts.items():
            total[outcome] += number
        busy = min(offered / capacity, 1.4)
        p50 = 1.6 + 9 * busy**4 + chance.random()
        rows.append(
            Second(
                t=t,
                offered=offered,
                sent=offered + counts["overloaded"] // 3,
                answered=offered - counts["no-answer"],
                outcomes={outcome: number for outcome, number in counts.items() if number},
                p50_ms=p50,
                p95_ms=p50 * 2.4,
                p99_ms=p50 * (3.5 + chance.random()),
                max_ms=p50 * (9 + 8 * chance.random()),
            )
        )
        lag = max(0, lag + counts["sold"] - 4_200)
        samples += [_sample(t + half / 2, left, lag, busy, chance) for half in (0, 1)]
    offered = sum(row.offered for row in rows)
    return Record(
        name=name,
        campaign="five-yuan-films",
        started_at="2026-05-01T09:00:00+08:00",
        duration_s=seconds + 0.4,
        plan={"arrivals": "poisson", "cards": 120_000, "connections": 400, "processes": 2},
        offered=offered,
        sent=sum(row.sent for row in rows),
        answered=sum(row.answered for row in rows),
        offered_rate=offered / seconds,
        achieved_rate=offered / (seconds + 0.4),
        outcomes={outcome: number for outcome, number in total.items() if number},
        latency=_percentiles(1.1 * 6_000 / capacity),
        latency_sold=_percentiles(1.9 * 6_000 / capacity),
        seconds=rows,
        samples=samples,
        settings={"batch_max": "256", "durability": "fsync", "workers": "2", "seed": str(seed)},
        versions={"python": "CPython 3.11.7", "sale": "0.2.0", "redis server": "Valkey 9.1.2"},
        machine={"cores": "2", "memory": "23.5 GiB", "load average before": "0.39 0.39 0.77"},
        proof=Proof(clean=True, audit_clean=True, orders=total["sold"], tickets=total["sold"]),
    )


def unbalanced(record: Record) -> Record:
    """The same, but the generator was the limit and the books do not balance."""
    record.bottleneck = "generator-1 used 0.99 of its core, and sent 412 requests over 50 ms late"
    record.proof = Proof(
        clean=False,
        findings=[Finding(kind="oversold", what="general: 60,001 of 60,000")]
        + [
            Finding(kind="unknown-order", what=f"order {n} was told, and is nowhere")
            for n in range(30)
        ],
        audit_clean=False,
        orders=60_001,
        tickets=60_001,
    )
    return record


def _counts(
    t: int, offered: int, capacity: int, left: int, chance: random.Random
) -> dict[str, int]:
    counts = dict.fromkeys(OUTCOMES, 0)
    if t < 5:
        return counts | {"not-open": offered}
    shed = max(0, offered - capacity)
    lost = chance.randint(0, 30) if shed else 0
    served = offered - shed - lost
    for outcome, share in (("replayed", 0.04), ("limit-exceeded", 0.03), ("not-eligible", 0.01)):
        counts[outcome] = int(served * share)
    wanted = served - sum(counts.values())
    counts["sold"] = min(wanted, left)
    counts["sold-out"] = wanted - counts["sold"]
    counts["rate-limited"], counts["unavailable"] = shed // 5, shed // 40
    counts["overloaded"], counts["no-answer"] = shed - shed // 5 - shed // 40, lost
    return counts


def _sample(t: float, left: int, lag: int, busy: float, chance: random.Random) -> Sample:
    def process(cpu: float, mib: float) -> ProcessSample:
        return ProcessSample(cpu=cpu * (0.95 + chance.random() / 10), rss_bytes=int(mib * 2**20))

    busy = min(busy, 1.0)
    processes = {
        "serve-1": process(0.9 * busy, 80 + t),
        "serve-2": process(0.85 * busy, 78 + t),
        "redis": process(0.45 * busy, 20 + t * 2),
        "writer": process(0.5 * busy, 95),
        "scheduler": process(0.03, 64),
        "postgresql": process(0.4 * busy, 140),
        "supervisor": process(0.02, 62),
        "generator-1": process(0.7 * busy, 120),
        "generator-2": process(0.7 * busy, 118),
    }
    if 15 <= t < 17:
        del processes["serve-2"]  # it died, and came back
    return Sample(
        t=t,
        stock={"evening": left // 2, "general": left - left // 2},
        lag_events=lag,
        lag_s=lag / 5_000,
        queue=int(900 * busy**6),
        connections=420,
        processes=processes,
    )


def _percentiles(base_ms: float) -> list[Percentile]:
    return [
        Percentile(share=share, ms=base_ms * (1 + (1 / max(1 - share, 1e-6)) ** 0.42))
        for share in SHARES
    ]
