"""A generating process of a run: its share of the arrivals, its counts, and every answer.

The leading process has a `Worker` for each. They talk over a pipe: the process says that it is
ready, gets the start (``time.monotonic()``, one clock for all processes of a host), tells its
progress each second, and sends its tally. Its answers lie in a file of the job's folder.
"""

import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
import struct
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import uvloop

from loadtest.books.answers import Answer, read_answer
from loadtest.generator import Generator
from loadtest.rush.asks import Asks, Load
from loadtest.rush.plan import RushError
from loadtest.tally import Bounds, Tally
from loadtest.wire import ProtocolError

if TYPE_CHECKING:
    from array import array

PROGRESS_S: Final = 1.0
SPARE_FILES: Final = 200
STOP_S: Final = 20.0
_ROW: Final = struct.Struct("<IHBI")
_SPAWN: Final = multiprocessing.get_context("spawn")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One process's part: arrivals ``index``, ``index + processes``, … within its bounds."""

    load: Load
    bounds: Bounds
    index: int
    processes: int
    folder: str

    def arrivals(self) -> tuple["array[float]", "array[int]"]:
        """Offsets and members of its part."""
        offsets, part = self.load.offsets(), slice(self.index, None, self.processes)
        return offsets[part], self.load.members(len(offsets))[part]

    def answers(self) -> Iterator[Answer]:
        """Every answer that the process got, in the order in which they came."""
        _, members = self.arrivals()
        with Asks(self.load) as asks, self.spool.open("rb", buffering=1 << 20) as stream:
            while row := stream.read(_ROW.size):
                number, status, replayed, size = _ROW.unpack(row)
                body = stream.read(size)
                yield read_answer(asks.ask(members[number]), status, body, replayed=bool(replayed))

    @property
    def spool(self) -> Path:
        """File of the answers."""
        return Path(self.folder) / f"answers-{self.index}"


class Progress(NamedTuple):
    """How far a process is."""

    offered: int = 0
    sent: int = 0
    answered: int = 0


class Worker:
    """A generating process, as the leading one sees it. ``tally`` is set when it is done."""

    def __init__(self, job: Job) -> None:
        self.name = f"generator-{job.index + 1}"
        self.progress = Progress()
        self.tally: Tally | None = None
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_generate, args=(job, theirs), daemon=True)
        with theirs:
            self._process.start()

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid or 0

    def start(self, moment: float) -> None:
        """Tell it the moment of offset 0."""
        self._pipe.send(moment)

    async def hear(self, within_s: float) -> None:
        """Take in its next word. Raises RushError."""
        loop, come, pipe = asyncio.get_running_loop(), asyncio.Event(), self._pipe.fileno()
        loop.add_reader(pipe, come.set)
        try:
            async with asyncio.timeout(within_s):
                await come.wait()
        except TimeoutError:
            raise RushError(f"{self.name} is silent") from None
        finally:
            loop.remove_reader(pipe)
        os.set_blocking(pipe, True)  # uvloop has changed that, and a tally comes in many pieces
        try:
            word = self._pipe.recv()
        except (EOFError, OSError):
            raise RushError(f"{self.name} ended before it was done") from None
        match word:
            case str():
                raise RushError(word)
            case Progress():
                self.progress = word
            case Tally():
                self.tally = word

    async def done(self, within_s: float) -> Tally:
        """Take in its words up to the last, the tally. Raises RushError, TimeoutError."""
        async with asyncio.timeout(within_s):
            while self.tally is None:
                await self.hear(within_s)
        return self.tally

    async def stop(self) -> None:
        """End it: SIGTERM, a bounded wait, then SIGKILL."""
        self._process.terminate()
        await asyncio.to_thread(self._process.join, STOP_S)
        self._process.kill()
        self._pipe.close()


def _generate(job: Job, pipe: Connection) -> None:
    """Play a job in a process of its own. The leading process ends it, not Ctrl-C."""
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):  # the leading process is gone
        try:
            pipe.send(uvloop.run(_play(job, pipe)))
        except (OSError, ProtocolError, ValueError, TimeoutError) as error:
            pipe.send(str(error) or type(error).__name__)


async def _play(job: Job, pipe: Connection) -> Tally:
    offsets, members = job.arrivals()
    _allow_files(job.bounds.connections)
    with Asks(job.load) as asks, job.spool.open("wb", buffering=1 << 20) as stream:
        write, pack, raw = stream.write, _ROW.pack, asks.raw

        def spool(number: int, status: int, replayed: bool, body: bytes) -> None:  # noqa: FBT001
            write(pack(number, status, replayed, len(body)) + body)

        generator = Generator(
            job.load.address, offsets, lambda number: raw(members[number]), spool, job.bounds
        )
        pipe.send(True)  # noqa: FBT003 - ready
        start = pipe.recv()
        progress = asyncio.create_task(_tell_progress(generator, pipe))
        try:
            tally = await generator.run(start)
        finally:
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
    tally.rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(_progress(generator))
    return tally


def _progress(generator: Generator) -> Progress:
    tally = generator.tally
    return Progress(generator.offered, tally.sent.total(), tally.answered.total())


async def _tell_progress(generator: Generator, pipe: Connection) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        try:
            pipe.send(_progress(generator))
        except OSError:
            os._exit(1)  # the leading process is gone: nobody wants the rest


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
