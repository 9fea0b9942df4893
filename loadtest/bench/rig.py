"""The benchmark's engine: its parts as separate processes, so that each can be pinned and measured.

API and Redis share one core; PostgreSQL, writer, scheduler and client have the other, until
``repin`` lets all of them run anywhere.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psutil
import redis.asyncio

from loadtest.client import Client
from loadtest.engine import EngineError, environment, free_address, sale, stop
from loadtest.members import Mint
from loadtest.wire import get_request
from sale.bootstrap import open_stores
from sale.config import Settings
from sale.db.pool import connect
from sale.domain.campaign_file import parse_campaign_toml
from sale.host.embedded import EmbeddedServers, running
from sale.host.embedded.child import launch_command
from sale.operators.campaigns import Actor, CampaignDesk
from sale.stock.keys import campaign_keys

READY_S: Final = 60.0
WRITTEN_S: Final = 120.0
POLL_S: Final = 0.01
BOOKS_NICE: Final = 10
SHOWING: Final = "general"
SIGNING_KEY: Final = "only-for-the-benchmark-" + "0" * 32
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_ON_SERVER_CORES: Final = ("serve", "redis")


@dataclass(slots=True)
class Rig:
    """Everything that runs, with process numbers."""

    folder: Path
    server_cores: set[int]
    client_cores: set[int]
    servers: EmbeddedServers
    redis: Any
    postgres: Any
    address: str = ""
    constant_address: str = ""
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def mint(self) -> Mint:
        """Signs member tokens of the key that the engine runs with."""
        return Mint(SIGNING_KEY.encode())

    def pid(self, name: str) -> int:
        """Process number of ``serve``, ``writer``, ``redis`` …"""
        return self.processes[name].pid if name in self.processes else self.servers.pids[name]

    def socket(self, name: str) -> str:
        """Where a part of the engine serves its metrics."""
        return f"unix:{self.servers.sockets}/bench-{name}"

    def log(self, name: str) -> Path:
        """Where a process of the rig writes what it has to say."""
        return self.folder / f"{name}.log"

    async def spawn(self, name: str, *program: str, cores: set[int], **settings: str) -> None:
        """Start ``python -m PROGRAM`` pinned to some cores; it ends with us, however we end."""
        command = [sys.executable, "-m", *program]
        self.processes[name] = await spawn(
            command, self.log(name), cores, **self.settings | settings
        )

    async def start_constant(self, body_bytes: int) -> None:
        """Start the constant peer on the engine's core. Raises EngineError."""
        port = self.constant_address.rpartition(":")[2]
        peer = ("loadtest.peers.constant", "--port", port, "--body-bytes", str(body_bytes))
        await self.spawn("constant", *peer, cores=self.server_cores)
        await self.ready("constant", self.constant_address, "/", 404)

    async def start(self, name: str, command: str, cores: set[int], **settings: str) -> None:
        """Start ``sale COMMAND`` under a name."""
        program = ("sale", command, "--metrics-listen", self.socket(name))
        await self.spawn(name, *program, cores=cores, **settings)

    async def ready(self, name: str, address: str, path: str, status: int) -> None:
        """Wait until a process answers a GET so. Raises EngineError."""
        await ready(self.processes[name], self.log(name), address, path, status)

    async def serve(self, name: str, cores: set[int]) -> None:
        """Start one more API process on the engine's address. Raises EngineError."""
        await self.start(name, "serve", cores)
        # Its address may be answered by another; whose metrics can be read, takes purchases.
        await self.ready(name, self.socket(name), "/metrics", 200)

    async def serve_anew(self, **settings: str) -> None:
        """Start the API anew with settings of its own. Raises EngineError."""
        if "serve" in self.processes:
            await stop(self.processes.pop("serve"))
        await self.start("serve", "serve", self.server_cores, **settings)
        await self.ready("serve", self.address, "/readyz", 200)

    async def metrics(self) -> dict[str, float]:
        """The first API process's own metrics, by name and labels as they are written."""
        async with Client(self.socket("serve")) as client:
            page = (await client.request(get_request("metrics", "/metrics"))).body.decode()
        lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def books_stand_back(self) -> None:
        """Let the client go before the books on the core that they share.

        It stands for members elsewhere; a client that waits for the writer's turn to end leaves
        the server's core idle, and measures the machine.
        """
        for pid in (self.pid("writer"), self.pid("postgresql")):
            for each in (pid, *_children(pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, each, BOOKS_NICE)

    def repin(self, *, apart: bool) -> None:
        """Give the parts their cores, or let all of them run on all cores of both sides."""
        both = self.server_cores | self.client_cores
        for name in (*self.processes, *self.servers.pids):
            if name != "constant":
                own = self.server_cores if name in _ON_SERVER_CORES else self.client_cores
                pin(self.pid(name), own if apart else both)

    async def campaign(self, name: str, tickets: int, opens_at: datetime | None = None) -> None:
        """Create a campaign of one showing; every card may buy up to three.

        In this process: five more of the command line cost a tiny run as much as its measurements.
        """
        moment = (opens_at or datetime.now(UTC)).isoformat()
        text = (
            f'id = "{name}"\ntitle = "benchmark"\ncategory = "culture"\nprice_fen = 500\n'
            f'payment = "counter"\ncard_limit = 3\nopens_at = {moment}\n'
            f'[[showings]]\nid = "{SHOWING}"\ntitle = "tickets"\ntickets = {tickets}\n'
        )
        settings = Settings(
            redis_url=self.settings["SALE_REDIS_URL"],
            database_url=self.settings["SALE_DATABASE_URL"],
        )
        async with open_stores(settings, pool_size=1) as stores:
            desk = CampaignDesk(stores.redis, stores.scripts, stores.pool)
            made = parse_campaign_toml(text, frozenset(stores.unions))
            await desk.create(made, Actor("cli:bench"), None, None)

    async def applied(self, campaign: str) -> int:
        """Number of the last event of a campaign in PostgreSQL."""
        query = "SELECT applied FROM campaign WHERE campaign_id = $1"
        return int(await self.postgres.fetchval(query, campaign) or 0)

    async def sold(self, campaign: str) -> int:
        """Orders of a campaign in PostgreSQL."""
        query = "SELECT count(*) FROM orders WHERE campaign_id = $1"
        return int(await self.postgres.fetchval(query, campaign))

    async def head(self, campaign: str) -> int:
        """Number of the last event of a campaign in Redis."""
        return int(await self.redis.hget(campaign_keys(campaign).head, "seq") or 0)

    async def written(self, campaign: str) -> None:
        """Wait until PostgreSQL has all of a campaign. Raises EngineError."""
        deadline = time.perf_counter() + WRITTEN_S
        while await self.applied(campaign) < await self.head(campaign):
            if time.perf_counter() > deadline:
                raise EngineError(f"{campaign}: not written after {WRITTEN_S:.0f} s")
            await asyncio.sleep(POLL_S)

    async def trimmed(self, campaign: str) -> int:
        """Wait until the stream has been trimmed (bounded); return the entries that are left."""
        stream, left = campaign_keys(campaign).stream, -1
        for _ in range(100):
            left = int(await self.redis.xlen(stream))
            if left <= 2:
                break
            await asyncio.sleep(0.1)
        return left

    async def used_memory(self) -> int:
        """Bytes that Redis has allocated."""
        return int((await self.redis.info("memory"))["used_memory"])


@contextlib.asynccontextmanager
async def rig_up(
    folder: Path, *, server_cores: set[int], client_cores: set[int]
) -> AsyncIterator[Rig]:
    """Run the engine in parts. Raises EngineError."""
    async with contextlib.AsyncExitStack() as stack:
        servers = await stack.enter_async_context(
            running(folder / "data", redis=True, postgres=True)
        )
        endpoints = servers.endpoints
        if endpoints.redis_url is None or endpoints.database_url is None:
            raise EngineError("the embedded servers gave no URLs")
        pin(servers.pids["redis"], server_cores)
        pin(servers.pids["postgresql"], client_cores)
        stock = redis.asyncio.Redis.from_url(endpoints.redis_url)
        stack.push_async_callback(stock.aclose)
        books = await connect(endpoints.database_url, name="sale loadtest", timeout_s=10)
        stack.push_async_callback(books.close)
        rig = Rig(folder, server_cores, client_cores, servers, stock, books)
        stack.push_async_callback(_stop_all, rig)
        rig.address = free_address(18_080)
        rig.constant_address = free_address(18_180)
        rig.settings = {
            "SALE_REDIS_URL": endpoints.redis_url,
            "SALE_DATABASE_URL": endpoints.database_url,
            "SALE_DATA_DIR": str(folder / "data"),
            "SALE_SIGNING_KEY": SIGNING_KEY,
            "SALE_LEDGER_RETENTION_EVENTS": "0",
            "SALE_LEDGER_RETENTION_S": "0",
        }
        await sale("migrate", settings=rig.settings)
        rig.settings["SALE_LISTEN"] = rig.address
        for name in ("scheduler", "writer", "serve"):
            await rig.start(name, name, server_cores if name == "serve" else client_cores)
        await rig.ready("serve", rig.address, "/readyz", 200)
        yield rig


async def _stop_all(rig: Rig) -> None:
    await asyncio.gather(*(stop(process) for process in rig.processes.values()))


async def spawn(
    command: list[str], log_file: Path, cores: set[int], **settings: str
) -> asyncio.subprocess.Process:
    """Start a program pinned to some cores; it ends with us, however we end."""
    with log_file.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *launch_command("TERM", program=command),
            env=environment(**settings),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    pin(process.pid, cores)
    return process


async def ready(
    process: asyncio.subprocess.Process, log_file: Path, address: str, path: str, status: int
) -> None:
    """Wait until a process answers a GET so. Raises EngineError with the end of its log."""
    deadline, why = time.perf_counter() + READY_S, "no answer"
    while time.perf_counter() < deadline and process.returncode is None:
        with contextlib.suppress(OSError):
            async with Client(address, timeout_s=2.0) as client:
                answer = await client.request(get_request(address, path))
            if answer.status == status:
                return
            why = f"{answer.status} {answer.body[:300].decode('utf-8', 'replace')}"
        await asyncio.sleep(0.1)
    said = log_file.read_text("utf-8", "replace")[-1_500:]  # noqa: ASYNC240 - a small local file
    raise EngineError(f"{log_file.stem} is not ready ({why}); it said last:\n{said}")


def pin(pid: int, cores: set[int]) -> None:
    """Pin a process, its threads and its children; what it starts later inherits that."""
    for each in (pid, *_children(pid)):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for thread in Path(f"/proc/{each}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process and its threads have used, its children not counted."""
    total_ns = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total_ns += int((thread / "schedstat").read_text().split()[0])
    except FileNotFoundError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    return total_ns / 1e9


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children; those of ended children in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    total = (int(fields[13]) + int(fields[14])) / _TICKS
    for each in (pid, *_children(pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += cpu_s(each)
    return total


def busy_s(cores: set[int]) -> float:
    """CPU seconds for which anything at all ran on some cores, in clock ticks."""
    times = psutil.cpu_times(percpu=True)
    return float(sum(sum(times[n][:7]) - times[n].idle - times[n].iowait for n in cores))


def _children(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()]
    return []
