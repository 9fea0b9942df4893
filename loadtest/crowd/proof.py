"""What Locust has done by processes of their own, because asyncio and gevent do not share a loop.

``probe`` says before the run whether the books could be checked after it, ``watch`` looks at the
engine while the run goes on, ``prove`` compares every answer with PostgreSQL and writes the record
and the report. Exit status of ``prove``: 0 clean, 1 with findings, 3 where it cannot be checked.
"""

import asyncio
import contextlib
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Final

import asyncpg
import msgspec
import psutil

from loadtest.books.answers import Answer, read_answers
from loadtest.books.ledger import BooksError, must_know
from loadtest.books.proof import prove
from loadtest.crowd.programs import CANNOT, Errand
from loadtest.engine import EngineError
from loadtest.record import REPORT_NAME, Finding, Proof, Record, Sample
from loadtest.summary import SECONDS_MAX, Member, count_members
from loadtest.thresholds import by_member, judge, missed, not_played, read_rules
from sale.cli.terminal import take_any_character
from sale.db.pool import connect
from sale.files import LARGE_MAX_BYTES, read_json
from sale.host.embedded import EmbeddedError

SHOWN_MAX: Final = 20
CONNECT_S: Final = 10.0


class Seen(msgspec.Struct):
    """Samples of ``watch``; ``started_at`` is when its samples begin, in seconds of Unix time."""

    started_at: float = 0.0
    samples: list[Sample] = []
    settings: dict[str, str] = {}
    versions: dict[str, str] = {}
    machine: dict[str, str] = {}


def measured(answers: Sequence[Answer], errand: Errand) -> Record:
    """Make the record of what clients saw. Latency counts from a wish's first try to its answer.

    The loop is closed: a user who waits for an answer asks for nothing else meanwhile, so the
    latencies leave out what an open loop would have made wait. The record's plan says so.
    """

    def wish(answer: Answer) -> tuple[str, str]:
        return answer.member_no, answer.key

    def second(moment: float) -> int:
        return min(max(int(moment - start), 0), SECONDS_MAX - 1)

    start, members = errand.started_at, []
    for _, each in groupby(sorted(answers, key=lambda a: (wish(a), a.sent_at)), wish):
        tries = list(each)
        first, last = tries[0], tries[-1]
        latency_s = last.received_at - first.sent_at if last.status else math.nan
        members.append(Member(max(first.sent_at - start, 0.0), latency_s, last.outcome))
    duration_s = max(errand.ended_at - start, 1e-3)
    known = sum(not math.isnan(member.latency_s) for member in members)
    record = Record(
        name=errand.name,
        campaign=errand.campaign,
        started_at=datetime.fromtimestamp(start, UTC).isoformat(timespec="milliseconds"),
        duration_s=round(duration_s, 3),
        plan={"loop": "closed", "latency": "from the first try", **errand.plan},
        offered_rate=round(len(members) / duration_s, 1),
        achieved_rate=round(known / duration_s, 1),
    )
    sent = Counter(second(answer.sent_at) for answer in answers)
    answered = Counter(second(answer.received_at) for answer in answers if answer.status)
    count_members(record, members, sent, answered)
    return record


async def proven(answers: Sequence[Answer], errand: Errand) -> Proof:
    """Compare the answers with the books, and add what the users found.

    Raises BooksError and EngineError where they cannot be compared.
    """
    proof = await prove(answers, errand.campaign, errand.where, alone=errand.alone)
    proof.findings = [*errand.findings, *proof.findings]
    if not any(answer.sold or answer.refused for answer in answers):
        what = f"of {len(answers):,} purchases that were asked for, not one got a sure answer"
        proof.findings.append(Finding("no-answers", what))
    proof.clean = proof.clean and not proof.findings
    return proof


async def prove_run(errand: Errand) -> int:
    """Prove a run, print what came of it, and write record and report; give the exit status."""
    answers = read_answers(Path(errand.answers))
    record = measured(answers, errand)
    # By the member, not by the wish: bots ask a thousand times, always under another key.
    record.not_played = not_played(by_member((each.member_no, each.outcome) for each in answers))
    record.thresholds = judge(read_rules(errand.fail_if), record)
    record.proof = proof = await proven(answers, errand)
    told = ", ".join(f"{name} {number:,}" for name, number in sorted(record.outcomes.items()))
    print(f"outcomes: {told or 'none'}")
    print(f"books: {proof.orders:,} orders, {proof.tickets:,} tickets in PostgreSQL")
    for finding in proof.findings[:SHOWN_MAX]:
        print(f"{finding.kind}: {finding.what}")
    if len(proof.findings) > SHOWN_MAX:
        print(f"… and {len(proof.findings) - SHOWN_MAX:,} more")
    if proof.audit_clean is not None:
        print(f"audit: {'clean' if proof.audit_clean else 'NOT clean'}")
    if record.not_played:
        print(f"the release did not happen: {record.not_played}")
    for each in record.thresholds:
        print(f"fail if {each.rule}: {each.got}, {each.sign.replace('missed', 'MISSED')}")
    print("books: clean" if proof.clean else f"books: {len(proof.findings):,} findings")
    if errand.out:
        _keep(record, Path(errand.out), Path(errand.seen))
    return 0 if proof.clean and not record.not_played and not missed(record) else 1


def _keep(record: Record, out: Path, seen_file: Path) -> None:
    """Write ``run.json`` and the report beside the answers. Raises OSError."""
    from loadtest.report.page import keep

    if seen_file.is_file():
        seen: Seen = read_json(seen_file, Seen, most=LARGE_MAX_BYTES)
        shift = seen.started_at - datetime.fromisoformat(record.started_at).timestamp()
        record.samples = [
            msgspec.structs.replace(sample, t=round(sample.t + shift, 3)) for sample in seen.samples
        ]
        record.settings, record.versions = seen.settings, seen.versions
        record.machine = seen.machine
    keep(out, record)
    print(f"report: {out / REPORT_NAME}")


async def _probe(errand: Errand) -> int:
    """Whether PostgreSQL answers and, where one is named, knows the campaign."""
    url = errand.where.books_url()
    connection = await connect(url, name="sale loadtest", timeout_s=CONNECT_S)
    await connection.close(timeout=CONNECT_S)
    if errand.campaign:
        await must_know(url, errand.campaign, "--host", errand.within_s)
    return 0


async def _watch(errand: Errand) -> int:
    """Sample until SIGTERM, or until whoever started us has closed our standard input."""
    from loadtest.sampler import Sampler, discover_processes
    from loadtest.surroundings import describe

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(sys.stdin, stop.set)
    data_dir = Path(errand.where.data_dir) if errand.where.data_dir else None
    settings, versions, machine = await describe(data_dir)
    # Locust's processes here: its workers, or the one that started us; and ourselves.
    parent = psutil.Process(os.getppid())
    workers = [child.pid for child in parent.children() if child.pid != os.getpid()]
    names = {f"locust-{number}": pid for number, pid in enumerate(workers, 1)}
    ours = (names or {"locust": parent.pid}) | {"watch": os.getpid()}
    async with Sampler(
        errand.metrics, errand.campaign, lambda: discover_processes(data_dir) | ours
    ) as sampler:
        began_at = datetime.now(UTC).timestamp()
        await stop.wait()
    seen = Seen(began_at, sampler.samples, settings, versions, machine)
    Path(errand.seen).write_bytes(msgspec.json.encode(seen))  # noqa: ASYNC240 - a small local file
    return 0


def main() -> None:
    """Run the errand that stands on standard input; see the module."""
    take_any_character()
    errand = msgspec.json.decode(sys.stdin.buffer.readline(), type=Errand)
    work = {"probe": _probe, "prove": prove_run, "watch": _watch}[errand.what]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            sys.exit(asyncio.run(work(errand)))
    except _ERRORS as error:
        print(f"books: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(CANNOT)


_ERRORS: Final = (
    *(BooksError, EngineError, EmbeddedError, ValueError, OSError),
    *(asyncpg.PostgresError, asyncpg.InterfaceError),
)

if __name__ == "__main__":
    main()
