"""Reports of the API processes in Redis: what each has seen of each campaign.

A Redis restored from older files cannot know what it lost; the processes that answered members can.
Each process reports several times a second, and names in each report the Redis that it uses. The
verification and the recovery first collect the reports of all processes, for a bounded time: a
process that is suspended or cut off must not stop the sale. It reports when it continues.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from redis.asyncio import Redis

from sale.stock.head import REPORTED, Head
from sale.stock.keys import REPORTS, CampaignKeys

REPORT_EVERY_S: Final = 0.25
COLLECT_MIN_S: Final = 0.6
"""Two intervals and a little: every healthy process has reported by then, also a new one."""
COLLECT_MAX_S: Final = 1.5
POLL_S: Final = 0.05
RECENT_MS: Final = 5_000
"""A process whose last report is older than the newest one by more than this is not awaited."""
FORGET_AFTER_MS: Final = 600_000


class CampaignReport(msgspec.Struct, frozen=True, array_like=True):
    """A process's report on one campaign: the epoch and event number that it has seen.

    ``lacks``: this Redis lacks something that the process acknowledged, or the process has not
    checked it yet. ``handed``: its unapplied sales are in PostgreSQL's table ``handed_in``.
    """

    epoch: int
    seq: int
    lacks: bool
    handed: bool


class ProcessReport(msgspec.Struct, frozen=True, array_like=True):
    """One process's whole report; ``at_ms`` is Redis' clock before the process read the heads.

    ``place`` identifies the process (``this_process``): others on its host can see that it ended.
    """

    at_ms: int
    identity: str
    campaigns: dict[str, CampaignReport]
    place: str = ""


class Identity(NamedTuple):
    """The identity of a Redis, and its clock (ms)."""

    run_id: str
    replid: str
    now_ms: int

    def __str__(self) -> str:
        """``run_id:replid``, the first part of an incarnation's name."""
        return f"{self.run_id}:{self.replid}"


@cache
def this_process() -> str:
    """Identify this process by boot, pid namespace, pid and start time; '' without /proc."""
    started = _started(os.getpid())
    return f"{_host()} {os.getpid()} {started}" if _host() and started else ""


def has_ended(place: str) -> bool:
    """Whether a process has certainly ended: it ran on this host, and no process has its pid and
    start time now. The kernel reuses pids. Processes of other hosts are never known to have ended.
    """
    host, _, process = place.partition(" ")
    number, _, started = process.partition(" ")
    return bool(host) and host == _host() and _started(int(number)) != started


@cache
def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """Start time of a running process in ticks since the boot; '' if it does not run."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]


async def read_identity(redis: Redis) -> Identity:
    """Read a Redis' identity and clock. Raises redis-py's errors."""
    identity, _ = await identity_and_heads(redis, ())
    return identity


async def identity_and_heads(
    redis: Redis, campaigns: Sequence[CampaignKeys]
) -> tuple[Identity, list[Head | None]]:
    """Read identity and clock, then the REPORTED part of these heads (None for a missing head)."""
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    pipe.info("server")
    pipe.info("replication")
    for keys in campaigns:
        pipe.hmget(keys.head, REPORTED.fields)
    clock, server, replication, *values = await pipe.execute(raise_on_error=False)
    for reply in (clock, server, replication):
        if isinstance(reply, Exception):
            raise reply
    identity = Identity(
        str(server["run_id"]),
        str(replication["master_replid"]),
        clock[0] * 1_000 + clock[1] // 1_000,
    )
    return identity, [_head(fields) for fields in values]


def _head(values: Any) -> Head | None:  # noqa: ANN401 - Redis' reply
    if isinstance(values, Exception) or values[0] is None:
        return None
    return REPORTED.parse(values, lenient=True)


async def report(redis: Redis, process: str, sent: ProcessReport) -> None:
    """Write a process's report."""
    await redis.hset(REPORTS, process, _ENCODER.encode(sent))


async def sign_off(redis: Redis, process: str) -> None:
    """Remove the report of a process that ends."""
    await redis.hdel(REPORTS, process)


async def read_reports(redis: Redis) -> dict[str, ProcessReport]:
    """Give the last report of each process, without unreadable ones."""
    found: dict[str, ProcessReport] = {}
    listed: dict[Any, Any] = await redis.hgetall(REPORTS)
    for process, value in listed.items():
        try:
            found[process.decode()] = _DECODER.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return found


class Reports(msgspec.Struct, frozen=True):
    """Collected reports.

    ``current`` are recent reports on this very Redis. ``silent`` names the processes that were
    awaited and sent none. ``listed`` are the last reports of all processes, also of ended ones and
    on earlier incarnations.
    """

    identity: Identity
    current: dict[str, ProcessReport]
    silent: list[str]
    listed: dict[str, ProcessReport] = {}

    def reports(self, campaign_id: str) -> dict[str, CampaignReport]:
        """The current reports on one campaign, by process."""
        return {
            process: each.campaigns[campaign_id]
            for process, each in self.current.items()
            if campaign_id in each.campaigns
        }

    def highest(self, campaign_id: str, epoch: int) -> int:
        """Highest number that a process has reported of a campaign, in ``epoch`` or later."""
        reports = [each.campaigns.get(campaign_id) for each in self.listed.values()]
        return max((each.seq for each in reports if each and each.epoch >= epoch), default=0)


async def collect_report(redis: Redis) -> Reports:
    """Read the reports without waiting; those of the last RECENT_MS are current.

    A report counts no longer than that, because its process may have died. Raises redis-py's
    errors.
    """
    identity = await read_identity(redis)
    return _collected(identity, await read_reports(redis), identity.now_ms - RECENT_MS)


async def collect_reports(redis: Redis) -> Reports:
    """Wait until every live process has sent a new report on this Redis, at most COLLECT_MAX_S.

    Raises redis-py's errors.
    """
    begun = await read_identity(redis)
    started = time.monotonic()
    while True:
        await asyncio.sleep(POLL_S)
        reports = _collected(begun, await read_reports(redis), begun.now_ms)
        waited_s = time.monotonic() - started
        if waited_s > COLLECT_MAX_S or (not reports.silent and waited_s > COLLECT_MIN_S):
            return reports


def _collected(identity: Identity, listed: dict[str, ProcessReport], since_ms: int) -> Reports:
    current = {
        process: each
        for process, each in listed.items()
        if each.identity == str(identity) and each.at_ms >= since_ms
    }
    newest = max((each.at_ms for each in listed.values()), default=0)
    silent = [
        process
        for process, each in listed.items()
        if process not in current and each.at_ms > newest - RECENT_MS and not has_ended(each.place)
    ]
    return Reports(identity, current, sorted(silent), listed)


async def forget_dead_processes(redis: Redis) -> None:
    """Remove reports older than FORGET_AFTER_MS: their processes died without signing off."""
    listed, now_ms = await read_reports(redis), (await read_identity(redis)).now_ms
    dead = [process for process, each in listed.items() if each.at_ms < now_ms - FORGET_AFTER_MS]
    if dead:
        await redis.hdel(REPORTS, *dead)


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(ProcessReport)
