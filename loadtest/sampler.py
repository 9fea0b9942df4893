"""Looks at the engine twice a second while a load runs: its metrics, and its processes.

CPU and memory come from psutil, found again by name each time, so a process that dies leaves a gap
and its successor is followed. A process counts with its descendants (PostgreSQL's backends); their
pages that are shared count once. Readings of ``/proc`` go to a thread, and who descends from whom
is read only every ``FAMILY_S``, because that looks at every process of the machine.
"""

import asyncio
import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Self

import aiohttp
import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtest.record import ProcessSample, Sample
from sale.config import UNIX_PREFIX, split_address
from sale.files import UnreadableFile, read_json

SCRAPE_TIMEOUT_S: Final = 2.0
SCRAPE_MAX_BYTES: Final = 8 * 1024 * 1024
SAMPLES_MAX: Final = 14_400
"""Two hours at two a second; beyond that every other sample is dropped, and fewer are taken."""

FAMILY_S: Final = 2.0
SEARCH_S: Final = 5.0
UNREAD: Final = -1
"""Stands for a figure that was not read, because the metrics did not answer in time."""

_WANTED: Final = (
    "sale_stock_remaining",
    "sale_ledger_lag_events",
    "sale_ledger_lag_seconds",
    "sale_purchases_waiting",
    "sale_connections",
)

Pids = Mapping[str, int] | Callable[[], Mapping[str, int]]


class Sampler:
    """Samples while its block runs; ``samples`` holds them, oldest first.

    ``metrics_address`` is ``host:port`` or ``unix:/path``. ``pids`` maps names to process numbers,
    or is a function that does (asked before each sample, so that it can tell of successors);
    ``None`` looks for a ``sale up`` behind the metrics address. The process that samples is added
    under ``generator-1`` (``generator`` where that is taken).

    A sample whose metrics were not read has ``UNREAD`` for each figure and an empty ``stock``;
    a metric that the engine does not have is 0.
    """

    def __init__(
        self,
        metrics_address: str,
        campaign: str,
        pids: Pids | None = None,
        every_s: float = 0.5,
    ) -> None:
        self.samples: list[Sample] = []
        self.started: float = 0.0
        """``time.perf_counter()`` at the start; the samples' ``t`` count from here."""

        self._address = metrics_address
        self._campaign = campaign
        self._every_s = every_s
        self._processes = _Processes(_Search(metrics_address) if pids is None else pids)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        connector, self._url = _connector(self._address)
        self._session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
            )
        )
        await asyncio.to_thread(self._processes.read)  # CPU is told since the reading before
        self.started = time.perf_counter()
        self._task = asyncio.create_task(self._run(), name="sampler")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._stack.aclose()
        if not self._task.cancelled():
            self._task.result()

    def since(self, moment: float) -> list[Sample]:
        """The samples with ``t`` counted from a moment of ``time.perf_counter()``.

        Those before it have a negative ``t``.
        """
        shift = self.started - moment
        return [msgspec.structs.replace(sample, t=sample.t + shift) for sample in self.samples]

    async def _sample(self) -> None:
        now = time.perf_counter() - self.started
        figures, processes = await asyncio.gather(
            self._scrape(), asyncio.to_thread(self._processes.read)
        )
        self.samples.append(msgspec.structs.replace(figures, t=round(now, 3), processes=processes))
        if len(self.samples) >= SAMPLES_MAX:
            del self.samples[1::2]
            self._every_s *= 2

    async def _run(self) -> None:
        due = self.started
        while True:
            due = max(due + self._every_s, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            await self._sample()

    async def _scrape(self) -> Sample:
        try:
            async with self._session.get(self._url) as answer:
                answer.raise_for_status()
                body = b""
                while len(body) < SCRAPE_MAX_BYTES and (part := await answer.content.readany()):
                    body += part
            return read_metrics(body.decode(), self._campaign)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return Sample(t=0, lag_events=UNREAD, lag_s=UNREAD, queue=UNREAD, connections=UNREAD)


def read_metrics(text: str, campaign: str) -> Sample:
    """Read a campaign's figures from a metrics page, as a sample of time 0. Raises ValueError."""
    wanted = (line for line in text.splitlines() if line.startswith(_WANTED))
    stock: dict[str, int] = {}
    found: dict[str, float] = {}
    for family in text_string_to_metric_families("\n".join(wanted) + "\n"):
        for name, labels, value, *_ in family.samples:
            if labels.get("campaign", campaign) != campaign or not math.isfinite(value):
                continue
            if name == "sale_stock_remaining":
                stock[labels.get("showing", "")] = int(value)
            else:
                found[name] = found.get(name, 0.0) + value
    return Sample(
        t=0,
        stock=stock,
        lag_events=int(found.get("sale_ledger_lag_events", 0)),
        lag_s=found.get("sale_ledger_lag_seconds", 0.0),
        queue=int(found.get("sale_purchases_waiting", 0)),
        connections=int(found.get("sale_connections", 0)),
    )


def discover_processes(where: Path | str) -> dict[str, int]:
    """Processes of a ``sale up`` on this machine: by its data directory, or metrics ``host:port``.

    Names are those of its register (``serve-1``, ``writer``, ``redis`` …) and ``supervisor``. Empty
    where none runs here. A lone part (``sale serve``) is found by its address, under its own name.
    """
    return _registered(where) if isinstance(where, Path) else _Search(where)()


class _Search:
    """Finds the processes behind a metrics address, and keeps to the data directory it found."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._data_dir: Path | None = None
        self._last: dict[str, int] = {}
        self._again_at = 0.0

    def __call__(self) -> dict[str, int]:
        if self._data_dir is not None and (found := _registered(self._data_dir)):
            return found
        if time.monotonic() >= self._again_at:
            self._again_at = time.monotonic() + SEARCH_S
            self._last = {}
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                self._last = self._look()
        return self._last

    def _look(self) -> dict[str, int]:
        pid = _listener(self._address)
        if pid is None:
            return {}
        listener = psutil.Process(pid)
        for child in listener.children():
            with contextlib.suppress(psutil.Error):
                data_dir = child.environ().get("SALE_DATA_DIR")
                if data_dir is not None:
                    self._data_dir = Path(data_dir)
                    return _registered(self._data_dir)
        words = {"serve", "writer", "scheduler"}.intersection(listener.cmdline())
        return dict.fromkeys(words, pid)


class _Processes:
    """CPU and memory of processes by name, each with its descendants."""

    def __init__(self, pids: Pids) -> None:
        self._pids = pids
        self._cpu_s: dict[psutil.Process, float] = {}
        self._families: dict[str, list[psutil.Process]] = {}
        self._families_at = -math.inf
        self._read_at = time.perf_counter()

    def read(self) -> dict[str, ProcessSample]:
        """Read all of them; CPU is since the reading before, 0 for what was not seen then."""
        now = time.perf_counter()
        elapsed_s, self._read_at = max(now - self._read_at, 1e-3), now
        self._find(now)
        before, self._cpu_s = self._cpu_s, {}
        read = {}
        for name, family in self._families.items():
            used_s, rss, seen = 0.0, 0, 0
            for process in family:
                with contextlib.suppress(psutil.Error), process.oneshot():
                    if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                        continue
                    times, memory, head = process.cpu_times(), process.memory_info(), not seen
                    self._cpu_s[process] = cpu_s = times.user + times.system
                    used_s += max(cpu_s - before.get(process, cpu_s), 0.0)
                    # Pages shared with others count only with the head of the family.
                    rss += memory.rss if head else max(memory.rss - memory.shared, 0)
                    seen += 1
                if not seen:
                    break  # a family whose head is gone has no figure
            if seen:
                read[name] = ProcessSample(cpu=round(used_s / elapsed_s, 4), rss_bytes=rss)
        return read

    def _find(self, now: float) -> None:
        """Bring the families up to date: each name's process first, then its descendants."""
        named = dict(self._pids() if callable(self._pids) else self._pids)
        if os.getpid() not in named.values():
            named["generator" if "generator-1" in named else "generator-1"] = os.getpid()
        whole = now - self._families_at >= FAMILY_S
        self._families_at = now if whole else self._families_at
        families = {}
        for name, pid in named.items():
            family = self._families.get(name)
            if not whole and family and family[0].pid == pid and family[0].is_running():
                families[name] = family
                continue
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                # The supervisor's descendants have names of their own, and so have ours.
                alone = name == "supervisor" or pid == os.getpid()
                families[name] = [process, *([] if alone else process.children(recursive=True))]
        self._families = families


def _registered(data_dir: Path) -> dict[str, int]:
    """Read a data directory's register of processes; empty where there is none."""
    try:
        found = _register(data_dir)
    except UnreadableFile:
        return {}
    return {**found.processes, "supervisor": found.supervisor}


def metrics_address(data_dir: Path | None) -> str:
    """Where the metrics of a ``sale up`` are, by its register; '' where it does not say."""
    try:
        return "" if data_dir is None else _register(data_dir).metrics_listen
    except UnreadableFile:
        return ""


class _Register(msgspec.Struct):
    supervisor: int
    processes: dict[str, int]
    metrics_listen: str = ""


def _register(data_dir: Path) -> _Register:
    found: _Register = read_json(data_dir / "run" / "processes.json", _Register)
    return found


def _listener(address: str) -> int | None:
    """Process on this machine that listens on ``host:port``, if we may see it. Raises OSError."""
    if address.startswith(UNIX_PREFIX):
        return None
    host, port = split_address(address)
    targets = {found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not targets & set(_own_addresses()):
        return None
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            return int(connection.pid) if connection.pid else None
    return None


def _own_addresses() -> Iterator[str]:
    yield from ("0.0.0.0", "::")  # noqa: S104 - compared
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            yield each.address


def _connector(address: str) -> tuple[aiohttp.BaseConnector, str]:
    if address.startswith(UNIX_PREFIX):
        return aiohttp.UnixConnector(address.removeprefix(UNIX_PREFIX)), "http://engine/metrics"
    return aiohttp.TCPConnector(), f"http://{address}/metrics"
