"""What Locust has done by processes of their own, because asyncio and gevent do not share a loop.

``probe`` says before the run whether the books could be checked after it, ``watch`` looks at the
engine while the run goes on, ``prove`` compares every answer with PostgreSQL and writes the record
and the report. Exit status of ``prove``: 0 clean, 1 with findings, 3 where it cannot be checked.
"""

import argparse
import asyncio
import contextlib
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Final

import asyncpg
import msgspec
import psutil

from loadtest.books.answers import Answer, read_answers
from loadtest.books.ledger import BooksError, wait_applied
from loadtest.books.proof import Where, prove
from loadtest.crowd.programs import CANNOT, About
from loadtest.engine import EngineError
from loadtest.record import REPORT_NAME, Finding, Proof, Record, Sample
from loadtest.summary import SECONDS_MAX, Member, count_members
from loadtest.thresholds import by_card, judge, missed, not_played, read_rules
from sale.cli.terminal import take_any_character
from sale.db.pool import connect
from sale.files import LARGE_MAX_BYTES, read_json
from sale.host.embedded import EmbeddedError

_LOOP: Final[dict[str, str | int | float]] = {"loop": "closed", "latency": "from the first try"}
SHOWN_MAX: Final = 20
CONNECT_S: Final = 10.0


class Seen(msgspec.Struct):
    """Samples of ``watch``; ``started_at`` is when its samples begin, in seconds of Unix time."""

    started_at: float = 0.0
    samples: list[Sample] = []
    settings: dict[str, str] = {}
    versions: dict[str, str] = {}
    machine: dict[str, str] = {}


def measured(answers: Sequence[Answer], about: About) -> Record:
    """Make the record of what clients saw. Latency counts from a wish's first try to its answer.

    The loop is closed: a user who waits for an answer asks for nothing else meanwhile, so the
    latencies leave out what an open loop would have made wait. The record's plan says so.
    """
    start = about.started_at
    ordered = sorted(answers, key=lambda answer: (answer.card, answer.key, answer.sent_at))
    members = []
    for _, told in groupby(ordered, lambda answer: (answer.card, answer.key)):
        wish = list(told)
        first, last = wish[0], wish[-1]
        latency_s = last.received_at - first.sent_at if last.status else math.nan
        members.append(Member(max(first.sent_at - start, 0.0), latency_s, last.outcome))
    duration_s = max(about.ended_at - start, 1e-3)
    record = Record(
        name=about.name,
        campaign=about.campaign,
        started_at=datetime.fromtimestamp(start, UTC).isoformat(timespec="milliseconds"),
        duration_s=round(duration_s, 3),
        plan=_LOOP | about.plan,
        offered_rate=round(len(members) / duration_s, 1),
    )
    sent = Counter(_second(answer.sent_at - start) for answer in answers)
    answered = Counter(_second(each.received_at - start) for each in answers if each.status)
    count_members(record, members, sent, answered)
    known = sum(not math.isnan(member.latency_s) for member in members)
    record.achieved_rate = round(known / duration_s, 1)
    return record


def _second(offset: float) -> int:
    return min(max(int(offset), 0), SECONDS_MAX - 1)


async def proven(answers: Sequence[Answer], about: About, where: Where) -> Proof:
    """Compare the answers with the books, and add what the users found.

    Raises BooksError and EngineError where they cannot be compared.
    """
    proof = await prove(answers, about.campaign, where, alone=about.alone)
    proof.findings = [*about.findings, *proof.findings]
    if not any(answer.sold or answer.refused for answer in answers):
        what = f"of {len(answers):,} purchases that were asked for, not one got a sure answer"
        proof.findings.append(Finding("no-answers", what))
    proof.clean = proof.clean and not proof.findings
    return proof


async def _prove(options: argparse.Namespace) -> int:
    about: About = read_json(options.about, About)
    answers = read_answers(options.answers)
    record = measured(answers, about)
    # By the card, not by the wish: bots ask a thousand times, always under another key.
    record.not_played = not_played(by_card((each.card, each.outcome) for each in answers))
    record.thresholds = judge(read_rules(about.fail_if), record)
    record.proof = await proven(answers, about, _where(options))
    _tell(record, record.proof)
    if options.out:
        _keep(record, options.out, options.seen)
    return 0 if record.proof.clean and not record.not_played and not missed(record) else 1


def _where(options: argparse.Namespace) -> Where:
    return Where(
        data_dir=options.data_dir,
        database_url=options.database_url,
        redis_url=options.redis_url,
    )


def _tell(record: Record, proof: Proof) -> None:
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
        print(f"fail if {each.rule}: {each.got}, {'MISSED' if each.missed else 'met'}")
    print("books: clean" if proof.clean else f"books: {len(proof.findings):,} findings")


def _keep(record: Record, out: Path, seen_file: Path | None) -> None:
    """Write ``run.json`` and the report beside the answers. Raises OSError."""
    from loadtest.report.page import keep

    if seen_file is not None and seen_file.exists():
        seen: Seen = read_json(seen_file, Seen, most=LARGE_MAX_BYTES)
        shift = seen.started_at - datetime.fromisoformat(record.started_at).timestamp()
        record.samples = [
            msgspec.structs.replace(sample, t=round(sample.t + shift, 3)) for sample in seen.samples
        ]
        record.settings, record.versions = seen.settings, seen.versions
        record.machine = seen.machine
    keep(out, record)
    print(f"report: {out / REPORT_NAME}")


async def _probe(options: argparse.Namespace) -> int:
    """Whether PostgreSQL answers and, where one is named, knows the campaign."""
    url = _where(options).books_url()
    connection = await connect(url, name="sale loadtest", timeout_s=CONNECT_S)
    await connection.close(timeout=CONNECT_S)
    if options.campaign:
        try:
            # A campaign that was made this moment may still be on its way to PostgreSQL.
            await wait_applied(url, options.campaign, 1, within_s=options.within)
        except BooksError:
            raise BooksError(
                f"PostgreSQL does not know campaign {options.campaign!r}: are these the books of"
                " the engine at --host?"
            ) from None
    return 0


async def _watch(options: argparse.Namespace) -> int:
    """Sample until SIGTERM, or until whoever started us has closed our standard input."""
    from loadtest.sampler import Sampler, discover_processes
    from loadtest.surroundings import describe

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(sys.stdin, stop.set)
    data_dir = Path(options.data_dir) if options.data_dir else None
    where = data_dir or options.metrics
    settings, versions, machine = await describe(data_dir, pids=discover_processes(where))
    generators = _generators()

    def processes() -> Mapping[str, int]:
        return discover_processes(where) | generators

    async with Sampler(options.metrics, options.campaign, processes) as sampler:
        began_at = datetime.now(UTC).timestamp()
        await stop.wait()
    seen = Seen(began_at, sampler.samples, settings, versions, machine)
    options.out.write_bytes(msgspec.json.encode(seen))
    return 0


def _generators() -> dict[str, int]:
    """Locust's processes here: its workers, or the one that started us; and ourselves."""
    parent = psutil.Process(os.getppid())
    workers = [child.pid for child in parent.children() if child.pid != os.getpid()]
    names = {f"locust-{number}": pid for number, pid in enumerate(workers, 1)}
    return (names or {"locust": parent.pid}) | {"watch": os.getpid()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    what = parser.add_subparsers(dest="what", required=True)
    probe = what.add_parser("probe", help="can the books be checked?")
    probe.add_argument("--campaign", default="", help="that must be in the books")
    probe.add_argument("--within", type=float, default=5.0, help="seconds")
    prover = what.add_parser("prove", help="compare answers with PostgreSQL, write the report")
    prover.add_argument("--answers", type=Path, required=True, help="JSON lines, one an answer")
    prover.add_argument("--about", type=Path, required=True, help="JSON, what was played")
    prover.add_argument("--seen", type=Path, help="JSON that `watch` wrote")
    prover.add_argument("--out", type=Path, help="folder for record and report")
    watch = what.add_parser("watch", help="sample the engine until standard input is closed")
    watch.add_argument("--campaign", required=True)
    watch.add_argument("--metrics", required=True, help="host:port of the engine's metrics")
    watch.add_argument("--out", type=Path, required=True, help="file for what was seen")
    for one in (probe, prover, watch):
        one.add_argument("--data-dir", default="", help="of a running sale up")
        one.add_argument("--database-url", default="")
        one.add_argument("--redis-url", default="")
    return parser


def main() -> None:
    """Run one of the three; see the module."""
    take_any_character()
    options = _parser().parse_args()
    work = {"probe": _probe, "prove": _prove, "watch": _watch}[options.what]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            sys.exit(asyncio.run(work(options)))
    except _ERRORS as error:
        print(f"books: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(CANNOT)


_ERRORS: Final = (
    *(BooksError, EngineError, EmbeddedError, ValueError, OSError),
    *(asyncpg.PostgresError, asyncpg.InterfaceError),
)

if __name__ == "__main__":
    main()
