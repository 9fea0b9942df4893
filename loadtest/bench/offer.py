"""Offers requests from a file to a server for some seconds: with wrk where it is there, else ours.

wrk is C and costs a fifth of what our client costs a request, so it leaves more of its core to
PostgreSQL and the writer. Both are closed loops over the same number of connections.
"""

import asyncio
import math
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import msgspec

from loadtest.generator import closed
from loadtest.record import NO_ANSWER
from loadtest.summary import at_share

GRACE_S: Final = 30.0
CHUNK_REQUESTS: Final = 512
RATE_MAX: Final = 200_000
"""More requests a second than our own client can send."""


class OfferError(Exception):
    """The load could not be offered as meant; the figure would be wrong."""


class Feed(msgspec.Struct, frozen=True):
    """Equally long requests in a file. ``cycle``: begin anew at its end, else it must suffice."""

    file: Path
    size: int
    count: int
    cycle: bool = False


class Offer(msgspec.Struct, frozen=True):
    """The result of an offer. ``client_s``: the client's CPU time; ``refused``: 4xx and 5xx."""

    requests: int
    duration_s: float
    refused: int
    latency_ms: tuple[float, float, float]
    client_s: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.requests / self.duration_s


class _WrkResult(msgspec.Struct):
    requests: int
    duration_us: int
    refused: int
    lost: int
    ended: int
    p50_us: int
    p95_us: int
    p99_us: int


def write_feed(file: Path, requests: Iterable[bytes], *, cycle: bool = False) -> Feed:
    """Write a feed. Raises OfferError where the requests are not equally long."""
    size = count = 0
    with file.open("wb", buffering=1 << 20) as stream:
        for raw in requests:
            if size not in (0, len(raw)):
                raise OfferError(f"requests of {size} and {len(raw)} bytes in one feed")
            size = len(raw)
            count += 1
            stream.write(raw)
    return Feed(file, size, count, cycle)


def wrk() -> str | None:
    """Path of wrk, or None."""
    return shutil.which("wrk")


async def offer(
    feed: Feed, address: str, seconds: int, connections: int, *, program: str | None
) -> Offer:
    """Offer a feed for some seconds; ``program`` is wrk, or None for our own client.

    Raises:
        OfferError: requests were lost, or the feed came to its end.

    """
    if program is None:
        got = await _offer_ours(feed, address, seconds, connections)
    else:
        got = await _offer_wrk(feed, address, seconds, connections, program)
    if not got.requests:
        raise OfferError(f"nothing was answered at {address} in {seconds} s")
    return got


async def _offer_wrk(
    feed: Feed, address: str, seconds: int, connections: int, program: str
) -> Offer:
    before = _children_s()
    with as_file(files("loadtest.bench").joinpath("wrk", "feed.lua")) as script:
        load = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
        how = [str(feed.file), str(feed.size), "cycle" if feed.cycle else "once"]
        process = await asyncio.create_subprocess_exec(
            *(program, *load, "-s", str(script), f"http://{address}/", "--", *how),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(seconds + GRACE_S):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    _, found, line = out.partition(b"RESULT ")
    if process.returncode or not found:
        raise OfferError(f"wrk: {out.decode('utf-8', 'replace')[-500:]}")
    result = msgspec.json.decode(line, type=_WrkResult)
    if result.lost or result.ended:
        raise OfferError(f"wrk: {result.lost} lost, {result.ended} past the end of the feed")
    return Offer(
        requests=result.requests,
        duration_s=result.duration_us / 1e6,
        refused=result.refused,
        latency_ms=(result.p50_us / 1e3, result.p95_us / 1e3, result.p99_us / 1e3),
        client_s=_children_s() - before,
    )


async def _offer_ours(feed: Feed, address: str, seconds: int, connections: int) -> Offer:
    refused, ran_out, deadline = Counter[bool](), False, math.inf
    raws = _repeated(feed) if feed.cycle else read_feed(feed)

    def take(number: int) -> bytes:
        nonlocal ran_out, deadline
        if not number:  # the connections are open now
            deadline = time.perf_counter() + seconds
        if time.perf_counter() > deadline:
            return b""
        raw = next(raws, b"")
        ran_out = ran_out or not raw
        return raw

    def count(_number: int, status: int, *_: object) -> None:
        refused[status >= 400] += 1

    most = seconds * RATE_MAX if feed.cycle else feed.count + 1
    tally = await closed(address, take, most, connections, spool=count, limit_s=seconds + GRACE_S)
    if ran_out:
        raise OfferError(f"the feed of {feed.count} requests came to its end")
    if lost := tally.outcomes()[NO_ANSWER]:
        raise OfferError(f"{lost} requests were lost")
    took_ms = sorted(tally.took_ms(sent=True))
    p50, p95, p99 = (at_share(took_ms, share) for share in (0.5, 0.95, 0.99))
    requests = tally.sent.total()
    return Offer(requests, tally.duration_s, refused[True], (p50, p95, p99), tally.cpu_s)


def _repeated(feed: Feed) -> Iterator[bytes]:
    while True:
        yield from read_feed(feed)


def read_feed(feed: Feed) -> Iterator[bytes]:
    """The requests of a feed, once."""
    with feed.file.open("rb") as stream:
        while chunk := stream.read(feed.size * CHUNK_REQUESTS):
            yield from (chunk[at : at + feed.size] for at in range(0, len(chunk), feed.size))


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
