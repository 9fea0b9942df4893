"""One generating process of an open-loop run, and what it hands back.

It reads its job (`Job`, JSON, one line) on stdin, answers ``{"ready":true}``, reads the start
moment (``time.monotonic()``, the same clock in all processes of a host), plays its share of the
arrivals, and leaves two files in the job's folder: what it counted, and every answer. Progress goes
to stdout, a JSON line a second.
"""

import asyncio
import contextlib
import os
import resource
import struct
import sys
from array import array  # noqa: TC003 - msgspec and readers alike look at the annotations
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from loadtest.books.answers import Answer, read_answer
from loadtest.latency import HIGHEST_US, new_histogram
from loadtest.record import NOT_SENT, REPLAYED, SOLD
from loadtest.rush import arrivals
from loadtest.rush.asks import Asks, members_of
from loadtest.rush.loop import OpenLoop
from loadtest.rush.tally import Bounds, Tally
from loadtest.wire import ProtocolError

PROGRESS_S: Final = 1.0
SPARE_FILES: Final = 200
_ROW: Final = struct.Struct("<IHBI")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests, and when: the same in all processes of a run."""

    address: str
    campaign: str
    tokens: str
    salt: str
    showings: tuple[str, ...]
    order_max: int
    arrivals: str = "constant"
    rate: float = 100.0
    seconds: float = 10.0
    seed: int = 1
    cards: int = 0
    quantity: int = 1
    duplicate_share: float = 0.0

    def offsets(self) -> "array[float]":
        """Intended moments of all processes together. Raises ArrivalsError."""
        return arrivals.make(self.arrivals, self.rate, self.seconds, self.seed)

    def members(self, count: int) -> "array[int]":
        """Member of each arrival."""
        return members_of(count, self.duplicate_share, self.seed)

    def asks(self) -> Asks:
        """The requests. Raises AsksError."""
        return Asks(
            Path(self.tokens),
            host=self.address,
            campaign=self.campaign,
            salt=self.salt,
            showings=self.showings,
            quantity=self.quantity,
            order_max=self.order_max,
            cards=self.cards,
        )


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One process's part: arrivals ``index``, ``index + processes``, … within its bounds."""

    load: Load
    bounds: Bounds
    index: int
    processes: int
    folder: str


class Line(msgspec.Struct, omit_defaults=True):
    """What a process tells on stdout."""

    ready: bool = False
    done: bool = False
    error: str = ""
    offered: int = 0
    sent: int = 0
    answered: int = 0


class Part(msgspec.Struct, kw_only=True):
    """What one process counted. Arrays are the bytes of their native items; see `Tally`."""

    offsets: bytes
    done_at: bytes
    outcome: bytes
    late: bytes
    lags: bytes
    codes: list[str]
    sent: dict[int, int]
    answered: dict[int, int]
    cpu: list[float]
    cpu_s: float
    retries: int
    pool_waits: int
    connections: int
    lost_connections: int
    duration_s: float
    rss_bytes: int
    latency: bytes
    latency_sold: bytes


def read_part(folder: Path, index: int) -> Part:
    """What process ``index`` left in the folder."""
    return msgspec.msgpack.decode((folder / f"part-{index}").read_bytes(), type=Part)


def read_spool(job: Job) -> Iterator[Answer]:
    """Every answer that the job's process got, in the order in which they came."""
    count = len(job.load.offsets())
    members = job.load.members(count)[job.index :: job.processes]
    with job.load.asks() as asks, _spool_file(job).open("rb", buffering=1 << 20) as stream:
        while row := stream.read(_ROW.size):
            number, status, replayed, size = _ROW.unpack(row)
            body = stream.read(size)
            yield read_answer(asks.ask(members[number]), status, body, replayed=bool(replayed))


async def work(job: Job) -> None:
    """Play one job; the start moment comes on stdin. Raises what `OpenLoop.run` does."""
    offsets = job.load.offsets()
    mine, members = offsets[job.index :: job.processes], job.load.members(len(offsets))
    members = members[job.index :: job.processes]
    _allow_files(job.bounds.connections)
    with job.load.asks() as asks, _spool_file(job).open("wb", buffering=1 << 20) as stream:
        write, pack, raw = stream.write, _ROW.pack, asks.raw

        def spool(number: int, status: int, replayed: bool, body: bytes) -> None:  # noqa: FBT001
            write(pack(number, status, replayed, len(body)) + body)

        loop = OpenLoop(
            job.load.address, mine, lambda number: raw(members[number]), spool, job.bounds
        )
        _tell(Line(ready=True))
        start = float(sys.stdin.buffer.readline())
        progress = asyncio.create_task(_progress(loop))
        try:
            tally = await loop.run(start)
        finally:
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
    part = summed_up(mine, tally)
    (Path(job.folder) / f"part-{job.index}").write_bytes(msgspec.msgpack.encode(part))
    _tell(_line(loop, done=True))


def summed_up(offsets: "array[float]", tally: Tally) -> Part:
    """A process's counts, with its latencies put into histograms (in bulk: the run is over)."""
    everything, sold = new_histogram(), new_histogram()
    bought = {tally.codes.index(code) for code in (SOLD, REPLAYED)}
    unsent = tally.codes.index(NOT_SENT)
    for offset, done_at, outcome in zip(offsets, tally.done_at, tally.outcome, strict=True):
        if outcome == unsent:
            continue
        # NaN: never answered, so it waited at least until the end.
        until = done_at if done_at == done_at else tally.duration_s
        us = min(max(round((until - offset) * 1e6), 1), HIGHEST_US)
        everything.record_value(us)
        if outcome in bought:
            sold.record_value(us)
    return Part(
        offsets=offsets.tobytes(),
        done_at=tally.done_at.tobytes(),
        outcome=tally.outcome.tobytes(),
        late=tally.late.tobytes(),
        lags=tally.lags.tobytes(),
        codes=tally.codes,
        sent=dict(tally.sent),
        answered=dict(tally.answered),
        cpu=tally.cpu,
        cpu_s=tally.cpu_s,
        retries=tally.retries,
        pool_waits=tally.pool_waits,
        connections=tally.connections,
        lost_connections=tally.lost_connections,
        duration_s=tally.duration_s,
        rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        latency=everything.encode(),
        latency_sold=sold.encode(),
    )


def _allow_files(connections: int) -> None:
    """Raise our limit of open files as far as we may and need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise OSError(
                f"{connections:,} connections need {wanted:,} open files, {hard:,} are allowed:"
                " fewer --connections, or more --processes"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _spool_file(job: Job) -> Path:
    return Path(job.folder) / f"answers-{job.index}"


def _line(loop: OpenLoop, *, done: bool = False) -> Line:
    tally = loop.tally
    return Line(
        done=done,
        offered=loop.offered,
        sent=tally.sent.total(),
        answered=tally.answered.total(),
    )


async def _progress(loop: OpenLoop) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        _tell(_line(loop))


def _tell(line: Line) -> None:
    os.write(1, msgspec.json.encode(line) + b"\n")


def main() -> None:
    """Run one job from stdin; exit status 0 done, 1 with an ``error`` line."""
    os.umask(0o077)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    try:
        uvloop.run(work(job))
    except (OSError, ProtocolError, ValueError, TimeoutError) as error:
        _tell(Line(error=str(error) or type(error).__name__))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
