"""One generating process of a run, and what it leaves for the process that leads.

It reads its `Job` (JSON, one line) on stdin, answers ``{"ready":true}``, reads the start time
(``time.monotonic()``, the same clock in all processes of a host), plays its share of the arrivals,
and leaves two files in the job's folder: its tally, and every answer. Progress goes to stdout, a
JSON line a second.
"""

import asyncio
import contextlib
import os
import resource
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from loadtest.books.answers import Answer, read_answer
from loadtest.generator import Generator
from loadtest.rush.asks import Asks, Load
from loadtest.tally import Bounds, Tally
from loadtest.wire import ProtocolError

PROGRESS_S: Final = 1.0
SPARE_FILES: Final = 200
_ROW: Final = struct.Struct("<IHBI")
_ARRAYS: Final = {
    "offsets": "d", "done_at": "d", "sent_at": "d", "outcome": "B", "late": "f", "lags": "f",
}  # fmt: skip


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One process's part: arrivals ``index``, ``index + processes``, … within its bounds."""

    load: Load
    bounds: Bounds
    index: int
    processes: int
    folder: str

    def tally(self) -> Tally:
        """Counts of the process."""
        told = msgspec.msgpack.decode((Path(self.folder) / f"tally-{self.index}").read_bytes())
        for name, kind in _ARRAYS.items():
            told[name] = array(kind, told[name])
        for name in ("sent", "answered", "told_to_wait"):
            told[name] = Counter(told[name])
        return Tally(**told)

    def answers(self) -> Iterator[Answer]:
        """Every answer that the process got, in the order in which they came."""
        members = self.load.members(len(self.load.offsets()))[self.index :: self.processes]
        with Asks(self.load) as asks, self.spool.open("rb", buffering=1 << 20) as stream:
            while row := stream.read(_ROW.size):
                number, status, replayed, size = _ROW.unpack(row)
                body = stream.read(size)
                yield read_answer(asks.ask(members[number]), status, body, replayed=bool(replayed))

    @property
    def spool(self) -> Path:
        """File of the answers."""
        return Path(self.folder) / f"answers-{self.index}"


class Line(msgspec.Struct, omit_defaults=True):
    """The report that a process writes to stdout."""

    ready: bool = False
    done: bool = False
    error: str = ""
    offered: int = 0
    sent: int = 0
    answered: int = 0


async def work(job: Job) -> None:
    """Play one job; the start time comes on stdin. Raises what `Generator.run` does."""
    offsets = job.load.offsets()
    members = job.load.members(len(offsets))[job.index :: job.processes]
    _allow_files(job.bounds.connections)
    with Asks(job.load) as asks, job.spool.open("wb", buffering=1 << 20) as stream:
        write, pack, raw = stream.write, _ROW.pack, asks.raw

        def spool(number: int, status: int, replayed: bool, body: bytes) -> None:  # noqa: FBT001
            write(pack(number, status, replayed, len(body)) + body)

        generator = Generator(
            job.load.address, offsets[job.index :: job.processes],
            lambda number: raw(members[number]), spool, job.bounds,
        )  # fmt: skip
        _tell(Line(ready=True))
        start = float(sys.stdin.buffer.readline())
        progress = asyncio.create_task(_progress(generator))
        try:
            tally = await generator.run(start)
        finally:
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
    tally.rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = {each.name: getattr(tally, each.name) for each in fields(tally)}
    packed = msgspec.msgpack.encode(told, enc_hook=bytes)
    (Path(job.folder) / f"tally-{job.index}").write_bytes(packed)
    _tell(_line(generator, done=True))


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


def _line(generator: Generator, *, done: bool = False) -> Line:
    sent, answered = generator.tally.sent.total(), generator.tally.answered.total()
    return Line(done=done, offered=generator.offered, sent=sent, answered=answered)


async def _progress(generator: Generator) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        _tell(_line(generator))


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
