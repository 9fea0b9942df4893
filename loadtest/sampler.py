"""Looks at the engine twice a second while a load runs: its metrics, and its processes.

The processes are found again by name before each sample, so a process that dies leaves a gap and
its successor is followed. A process counts with its descendants (PostgreSQL's backends); their
shared pages count once. A thread reads ``/proc``, and looks only every ``FAMILY_S`` who descends
from whom, because that reads every process of the machine.
"""

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Self

import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtest.client import Client
from loadtest.record import ProcessSample, Sample
from loadtest.wire import ProtocolError, get_request
from sale.files import UnreadableFile, read_json

SCRAPE_TIMEOUT_S: Final = 2.0
SAMPLES_MAX: Final = 14_400
"""Two hours at two a second; beyond that every other sample is dropped, and fewer are taken."""

FAMILY_S: Final = 2.0
UNREAD: Final = -1
"""Stands for a figure that was not read, because the metrics did not answer in time."""

_FIGURES: Final = {
    "sale_ledger_lag_events": "lag_events",
    "sale_ledger_lag_seconds": "lag_s",
    "sale_purchases_waiting": "queue",
    "sale_connections": "connections",
}
_STOCK: Final = "sale_stock_remaining"

Pids = Callable[[], Mapping[str, int]]


class Sampler:
    """Samples while its block runs; ``samples`` holds them, oldest first.

    ``metrics`` is ``host:port`` or ``unix:/path``. ``pids`` gives names and process numbers, and is
    asked before each sample. The process that samples is added as ``generator-1`` (``generator``
    where that is taken). A sample whose metrics were not read has ``UNREAD`` for each figure and an
    empty ``stock``; a metric that the engine does not have is 0.
    """

    def __init__(self, metrics: str, campaign: str, pids: Pids, every_s: float = 0.5) -> None:
        self.samples: list[Sample] = []
        self.started = 0.0
        """``time.perf_counter()`` at the start; the samples' ``t`` count from here."""

        self._metrics = metrics
        self._campaign = campaign
        self._every_s = every_s
        self._processes = _Processes(pids)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._processes.read)  # CPU is told since the reading before
        self.started = time.perf_counter()
        self._task = asyncio.create_task(self._run(), name="sampler")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()

    def since(self, moment: float) -> list[Sample]:
        """The samples, ``t`` counted from a moment of ``time.perf_counter()``; negative before."""
        shift = self.started - moment
        return [msgspec.structs.replace(sample, t=sample.t + shift) for sample in self.samples]

    async def _run(self) -> None:
        due = self.started
        while True:
            due = max(due + self._every_s, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            t = round(time.perf_counter() - self.started, 3)
            figures, processes = await asyncio.gather(
                self._scrape(), asyncio.to_thread(self._processes.read)
            )
            self.samples.append(msgspec.structs.replace(figures, t=t, processes=processes))
            if len(self.samples) >= SAMPLES_MAX:
                del self.samples[1::2]
                self._every_s *= 2

    async def _scrape(self) -> Sample:
        with contextlib.suppress(OSError, TimeoutError, ProtocolError, ValueError):
            async with Client(self._metrics, timeout_s=SCRAPE_TIMEOUT_S) as client:
                answer = await client.request(get_request("engine", "/metrics"))
            if answer.status == 200:
                return read_metrics(answer.body.decode(), self._campaign)
        return msgspec.convert({"t": 0, **dict.fromkeys(_FIGURES.values(), UNREAD)}, Sample)


def read_metrics(text: str, campaign: str) -> Sample:
    """Read a campaign's figures from a metrics page, as a sample of time 0. Raises ValueError."""
    wanted = (line for line in text.splitlines() if line.startswith((_STOCK, *_FIGURES)))
    stock: dict[str, int] = {}
    found = dict.fromkeys(_FIGURES.values(), 0.0)
    for family in text_string_to_metric_families("\n".join(wanted) + "\n"):
        for name, labels, value, *_ in family.samples:
            if labels.get("campaign", campaign) != campaign or not math.isfinite(value):
                continue
            if name == _STOCK:
                stock[labels.get("showing", "")] = int(value)
            elif name in _FIGURES:
                found[_FIGURES[name]] += value
    return msgspec.convert({"t": 0, "stock": stock, **found}, Sample, strict=False)


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
                    times, memory = process.cpu_times(), process.memory_info()
                    self._cpu_s[process] = cpu_s = times.user + times.system
                    used_s += max(cpu_s - before.get(process, cpu_s), 0.0)
                    # Pages shared with others count only with the head of the family.
                    rss += max(memory.rss - memory.shared, 0) if seen else memory.rss
                    seen += 1
                if not seen:
                    break  # a family whose head is gone has no figure
            if seen:
                read[name] = ProcessSample(cpu=round(used_s / elapsed_s, 4), rss_bytes=rss)
        return read

    def _find(self, now: float) -> None:
        """Bring the families up to date: each name's process first, then its descendants."""
        named = dict(self._pids())
        if os.getpid() not in named.values():
            named["generator" if "generator-1" in named else "generator-1"] = os.getpid()
        whole = now - self._families_at >= FAMILY_S
        self._families_at = now if whole else self._families_at
        before, self._families = self._families, {}
        for name, pid in named.items():
            family = before.get(name)
            if not whole and family and family[0].pid == pid and family[0].is_running():
                self._families[name] = family
                continue
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                # The supervisor's descendants have names of their own, and so have ours.
                alone = name == "supervisor" or pid == os.getpid()
                more = [] if alone else process.children(recursive=True)
                self._families[name] = [process, *more]


class _Register(msgspec.Struct):
    supervisor: int = 0
    processes: dict[str, int] = {}
    metrics_listen: str = ""


def _register(data_dir: Path | None) -> _Register:
    """Read a data directory's register of processes; an empty one where there is none."""
    if data_dir is not None:
        with contextlib.suppress(UnreadableFile):
            found: _Register = read_json(data_dir / "run" / "processes.json", _Register)
            return found
    return _Register()


def discover_processes(data_dir: Path | None) -> dict[str, int]:
    """Processes of the ``sale up`` of a data directory; empty where none runs here.

    Names are those of its register (``serve-1``, ``writer``, ``redis`` …) and ``supervisor``.
    """
    found = _register(data_dir)
    return found.processes | ({"supervisor": found.supervisor} if found.supervisor else {})


def metrics_address(data_dir: Path | None) -> str:
    """Where the metrics of a ``sale up`` are, by its register; '' where it does not say."""
    return _register(data_dir).metrics_listen
