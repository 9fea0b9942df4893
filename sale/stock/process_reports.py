"""The roll: what each API process has seen of each campaign, as it reports it to Redis.

A Redis that went back in time cannot know it; who answered members can. Each process reports some
times a second, and says in each report which Redis it was talking to. Whoever verifies a Redis, or
builds a campaign anew, hears all of them first, with a bound: a process that is stopped or cut off
must not keep a sale shut, and is heard when it comes back.
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

from sale.stock.keys import ROLL, CampaignKeys

BEAT_S: Final = 0.25
ROLL_MIN_S: Final = 0.6
"""Two beats and a little: who is alive and well has reported by then, listed or not."""
ROLL_MAX_S: Final = 1.5
POLL_S: Final = 0.05
LIVE_MS: Final = 5_000
"""Who has reported within this before the last report of all is waited for."""
GONE_MS: Final = 600_000
LOOKING: Final = -1
"""How many a process misses that does not know yet."""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a process says of one campaign: epoch and number seen, and how many it misses here.

    ``lacks`` is LOOKING where it does not know yet. ``handed``: what it misses stands in
    PostgreSQL's ``handed_in`` by now.
    """

    epoch: int
    seq: int
    lacks: int
    handed: bool


class CampaignReport(msgspec.Struct, frozen=True, array_like=True):
    """One process's whole report; ``at_ms`` of Redis' clock, before it looked.

    ``place`` says where it runs (``own_place``), so that nobody on its host waits for it in vain.
    """

    at_ms: int
    identity: str
    campaigns: dict[str, Report]
    place: str = ""


class Identity(NamedTuple):
    """Which Redis this is, and its clock (ms)."""

    run_id: str
    replid: str
    now_ms: int

    def __str__(self) -> str:
        """``run_id:replid``, the beginning of an incarnation's name."""
        return f"{self.run_id}:{self.replid}"


@cache
def own_place() -> str:
    """Say where this process runs: boot, namespace of process numbers, number, and its start.

    '' where that is not to be seen.
    """
    started = _started(os.getpid())
    return f"{_host()} {os.getpid()} {started}" if _host() and started else ""


def is_gone(place: str) -> bool:
    """Whether a process has certainly ended: it ran here, and no process of its number and start
    does. Numbers are used again, and other hosts are not seen from here.
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
    """When a process that lives has started, in ticks since the boot; '' where it does not."""
    try:
        told = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
    except OSError:
        return ""
    state, *fields = told.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]


async def who_is_it(redis: Redis) -> Identity:
    """Ask a Redis for its identity. Raises redis-py's errors."""
    identity, _ = await identity_and_heads(redis, ())
    return identity


async def identity_and_heads(
    redis: Redis, campaigns: Sequence[CampaignKeys]
) -> tuple[Identity, list[dict[str, str] | None]]:
    """Read clock and identity, then what an API process needs of these heads; None where none."""
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    pipe.info("server")
    pipe.info("replication")
    for keys in campaigns:
        pipe.hmget(keys.head, list(HEAD_FIELDS))
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


def _head(fields: Any) -> dict[str, str] | None:  # noqa: ANN401 - Redis' reply
    if isinstance(fields, Exception) or fields[0] is None:
        return None
    return {
        name: (value or b"").decode(errors="replace")
        for name, value in zip(HEAD_FIELDS, fields, strict=True)
    }


async def report(redis: Redis, process: str, attendance: CampaignReport) -> None:
    """Write a process's report."""
    await redis.hset(ROLL, process, _ENCODER.encode(attendance))


async def sign_off(redis: Redis, process: str) -> None:
    """Take a process that ends off the roll."""
    await redis.hdel(ROLL, process)


async def read_reports(redis: Redis) -> dict[str, CampaignReport]:
    """Give the last report of each process; what cannot be read is not there."""
    found: dict[str, CampaignReport] = {}
    listed: dict[Any, Any] = await redis.hgetall(ROLL)
    for process, value in listed.items():
        try:
            found[process.decode()] = _DECODER.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return found


class Reports(msgspec.Struct, frozen=True):
    """Who was heard: their reports on this very Redis; and who was waited for in vain.

    ``listed`` are the last reports of all, also of those that have ended since, and of before.
    """

    identity: Identity
    heard: dict[str, CampaignReport]
    silent: list[str]
    listed: dict[str, CampaignReport] = {}

    def reports(self, campaign_id: str) -> dict[str, Report]:
        """What the processes say of one campaign."""
        return {
            process: attendance.campaigns[campaign_id]
            for process, attendance in self.heard.items()
            if campaign_id in attendance.campaigns
        }

    def highest(self, campaign_id: str, epoch: int) -> int:
        """Highest number that anyone has ever reported of a campaign, in ``epoch`` or later."""
        reports = [each.campaigns.get(campaign_id) for each in self.listed.values()]
        return max((told.seq for told in reports if told and told.epoch >= epoch), default=0)


async def collect_report(redis: Redis) -> Reports:
    """Look at the roll as it is: who has reported lately. Raises redis-py's errors.

    What a process that has died since had to say is not repeated for ever.
    """
    identity = await who_is_it(redis)
    return _collected(identity, await read_reports(redis), identity.now_ms - LIVE_MS)


async def collect_reports(redis: Redis) -> Reports:
    """Wait until every process that lives has looked at this Redis from now on, bounded.

    Raises redis-py's errors.
    """
    begun = await who_is_it(redis)
    started = time.monotonic()
    while True:
        await asyncio.sleep(POLL_S)
        reports = _collected(begun, await read_reports(redis), begun.now_ms)
        waited_s = time.monotonic() - started
        if waited_s > ROLL_MAX_S or (not reports.silent and waited_s > ROLL_MIN_S):
            return reports


def _collected(identity: Identity, listed: dict[str, CampaignReport], since_ms: int) -> Reports:
    heard = {
        process: attendance
        for process, attendance in listed.items()
        if attendance.identity == str(identity) and attendance.at_ms >= since_ms
    }
    newest = max((attendance.at_ms for attendance in listed.values()), default=0)
    silent = [
        process
        for process, attendance in listed.items()
        if process not in heard
        and attendance.at_ms > newest - LIVE_MS
        and not is_gone(attendance.place)
    ]
    return Reports(identity, heard, sorted(silent), listed)


async def forget_the_gone(redis: Redis) -> None:
    """Take off the roll who has not reported for ten minutes: it died without signing off."""
    listed, now_ms = await read_reports(redis), (await who_is_it(redis)).now_ms
    gone = [p for p, attendance in listed.items() if attendance.at_ms < now_ms - GONE_MS]
    if gone:
        await redis.hdel(ROLL, *gone)


HEAD_FIELDS: Final = ("seq", "epoch", "run_id", "replid", "recovering", "applied")
_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(CampaignReport)
