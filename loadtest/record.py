"""The record of a run, as JSON in ``run.json``: offered, sent, answered, latency, and the proof."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from sale.files import LARGE_MAX_BYTES, UnreadableFile, read_bytes

SOLD: Final = "sold"
REPLAYED: Final = "replayed"
NO_ANSWER: Final = "no-answer"
NOT_SENT: Final = "not-sent"
"""A member that never found a connection: the queue was full, or its patience ran out there."""

RECORD_NAME: Final = "run.json"
REPORT_NAME: Final = "report.html"
VERSION = 1


class RecordError(ValueError):
    """A run's record cannot be read or written; the message says which file and why."""


class Second(msgspec.Struct, kw_only=True):
    """One second of a run, by the second of the *intended* send time.

    ``outcomes`` and latencies (from the intended time) are of the last answers of its members.
    ``sent`` and ``answered`` count what was written and what came back within this second, repeats
    included; ``answered`` is None where it is withheld.
    """

    t: int
    offered: int = 0
    sent: int = 0
    answered: int | None = 0
    outcomes: dict[str, int] = msgspec.field(default_factory=dict)
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0


class ProcessSample(msgspec.Struct, kw_only=True):
    """One process at one moment: ``cpu`` is its share of one core since the sample before."""

    cpu: float
    rss_bytes: int


class Sample(msgspec.Struct, kw_only=True):
    """The engine at one moment, ``t`` seconds after the start.

    ``stock`` is what is left by showing, ``lag_*`` how far the ledger is behind, ``queue`` the
    purchases that wait.
    """

    t: float
    stock: dict[str, int] = msgspec.field(default_factory=dict)
    lag_events: int = 0
    lag_s: float = 0.0
    queue: int = 0
    connections: int = 0
    processes: dict[str, ProcessSample] = msgspec.field(default_factory=dict)


class Percentile(msgspec.Struct, kw_only=True):
    """``share`` (0 to 1) of the answers came within ``ms`` of their intended send time."""

    share: float
    ms: float


class Finding(msgspec.Struct, frozen=True):
    """One disagreement. ``kind`` is a fixed word; ``what`` is for people, cards masked."""

    kind: str
    what: str


class Proof(msgspec.Struct, kw_only=True):
    """The result of the books' check after the run.

    ``audit_clean`` is ``None`` where ``sale audit`` could not be run.
    """

    clean: bool
    findings: list[Finding] = msgspec.field(default_factory=list)
    audit_clean: bool | None = None
    orders: int = 0
    tickets: int = 0


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of ``--fail-if`` and what the run had: ``got`` in words, ``missed`` where it holds."""

    rule: str
    got: str
    missed: bool

    @property
    def sign(self) -> str:
        """Its verdict in a word."""
        return "missed" if self.missed else "met"


class Record(msgspec.Struct, kw_only=True):
    """One run.

    ``bottleneck`` is empty, or says why the generator itself was the limit: then neither rates nor
    latencies are the server's, and `withhold` has taken them out; sums stay, as the books are told
    beside them. ``notes`` say what a reader must know of a run that counts. A member that got no
    answer counts in ``latency`` with the time until it gave up: leaving it out would flatter.
    ``proof`` is ``None`` if nothing was proved; ``not_proved`` says why where it was tried in vain.
    ``offered`` counts the intended members, ``sent`` and ``answered`` what was written and came
    back, with repeats. ``offered_rate`` is members a second over the plan's time, ``achieved_rate``
    members with a last answer a second, until the last of these answers. ``latency_sold`` is of
    those who were told of an order, new or replayed. ``not_played`` says why a run was no rush at
    all (`loadtest.thresholds.not_played`), or is empty.
    """

    version: int = VERSION
    name: str
    campaign: str
    started_at: str
    duration_s: float
    plan: dict[str, str | int | float] = msgspec.field(default_factory=dict)
    offered: int = 0
    sent: int = 0
    answered: int = 0
    offered_rate: float = 0.0
    achieved_rate: float = 0.0
    bottleneck: str = ""
    notes: list[str] = msgspec.field(default_factory=list)
    outcomes: dict[str, int] = msgspec.field(default_factory=dict)
    latency: list[Percentile] = msgspec.field(default_factory=list)
    latency_sold: list[Percentile] = msgspec.field(default_factory=list)
    seconds: list[Second] = msgspec.field(default_factory=list)
    samples: list[Sample] = msgspec.field(default_factory=list)
    settings: dict[str, str] = msgspec.field(default_factory=dict)
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    machine: dict[str, str] = msgspec.field(default_factory=dict)
    proof: Proof | None = None
    not_proved: str = ""
    not_played: str = ""
    thresholds: list[Threshold] = msgspec.field(default_factory=list)


def latency_ms(points: Iterable[Percentile], share: float) -> float | None:
    """Milliseconds within which at least ``share`` of the answers came."""
    return min((point.ms for point in points if point.share >= share - 1e-9), default=None)


def withhold(record: Record) -> None:
    """Take out of a record whatever could be read as the server's rate or latency."""
    record.achieved_rate = 0.0
    record.latency, record.latency_sold = [], []
    for second in record.seconds:
        second.answered, second.outcomes = None, {}
        second.p50_ms = second.p95_ms = second.p99_ms = second.max_ms = 0.0


def encode(record: Record) -> bytes:
    """The record as JSON, for people as well: two spaces of indent."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode(raw: bytes) -> Record:
    """The record in JSON bytes. Raises `RecordError` where they are none, or of another version."""
    try:
        record = msgspec.json.decode(raw, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"no record of a run: {error}") from error
    if record.version != VERSION:
        raise RecordError(f"a record of version {record.version}; this kit reads version {VERSION}")
    if record.bottleneck:
        withhold(record)  # older ones told what was answered by the second
    return record


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_bytes(content)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder for records, and see that we may write there. Raises RecordError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecordError(f"--out {folder}: {error.strerror or error}") from None


def read(file: Path) -> Record:
    """Read a record from a file. Raises `RecordError`."""
    try:
        return decode(read_bytes(file, most=LARGE_MAX_BYTES))
    except UnreadableFile as error:
        raise RecordError(f"cannot read {error}") from error
    except RecordError as error:
        raise RecordError(f"{file}: {error}") from error.__cause__
