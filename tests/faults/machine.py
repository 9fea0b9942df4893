"""Start, kill and stop the processes of a rig; copy and tear the files of its servers."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from proxy import Proxy
from service import free_port

from sale.host.embedded import EmbeddedServers
from sale.host.embedded.child import launch_command, spawn

ROOT: Final = Path(__file__).resolve().parents[2]
START_LIMIT_S: Final = 30.0
STOP_LIMIT_S: Final = 20.0
POLL_S: Final = 0.02
SERVERS: Final = {"redis": "redis", "postgres": "postgresql"}


class Machine:
    """Servers, parts and links by name: ``redis``, ``postgres``, ``serve-N``, ``writer-N``, …"""

    def __init__(
        self,
        data_dir: Path,
        servers: EmbeddedServers,
        parts: list[str],
        settings: Mapping[str, str],
    ) -> None:
        endpoints = servers.endpoints
        assert endpoints.redis_url is not None
        assert endpoints.database_url is not None
        self.data_dir = data_dir
        self.redis_url: str = endpoints.redis_url
        self.database_url: str = endpoints.database_url
        self.address = f"127.0.0.1:{free_port()}"
        """The address of all API processes."""
        self.parts = parts
        self.names = [*SERVERS, *parts]
        self.settings = dict(settings)
        """``SALE_…`` variables for the parts from their next start on."""
        self._servers = servers
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._killed: set[int] = set()
        self._links: dict[tuple[str, str], Proxy] = {}

    def pid(self, name: str) -> int:
        """The pid of a started process, which may have ended since."""
        process = self._process(name)
        assert process is not None, f"{name} was never started"
        return process.pid

    def alive(self, name: str) -> bool:
        """Whether it runs or is stopped."""
        process = self._process(name)
        return (
            process is not None
            and process.returncode is None
            and process.pid not in self._killed
            and _lives(process.pid)
        )

    def kill(self, name: str) -> None:
        """Kill it and all its children with SIGKILL, as a power cut would."""
        self._signal(name, signal.SIGKILL)
        self._killed.add(self.pid(name))

    def stop(self, name: str) -> None:
        """Send SIGSTOP to it and all its children."""
        self._signal(name, signal.SIGSTOP)

    def cont(self, name: str) -> None:
        """Send SIGCONT to it and all its children."""
        self._signal(name, signal.SIGCONT)

    async def term(self, name: str) -> float:
        """Send SIGTERM and wait; give the seconds until it ended by itself."""
        started = time.monotonic()
        self._signal(name, signal.SIGCONT)
        if name in SERVERS:
            await self._servers._servers[SERVERS[name]].stop()
        else:
            self._running[name].send_signal(signal.SIGTERM)
            async with asyncio.timeout(STOP_LIMIT_S):
                await self._running[name].wait()
        return time.monotonic() - started

    async def ended(self, name: str) -> None:
        """Wait until a process that was killed is gone."""
        process = self._process(name)
        if process is not None:
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()

    async def start(self, name: str, *, ready: bool = True) -> None:
        """Start it; wait until it serves if ``ready`` (always for servers)."""
        await self.ended(name)
        async with asyncio.timeout(START_LIMIT_S):
            if name in SERVERS:
                await self._servers._servers[SERVERS[name]].start()
                return
            metrics = self._metrics_socket(name)
            metrics.unlink(missing_ok=True)
            words = [sys.executable, "-m", "sale", name.partition("-")[0]]
            self._running[name] = await spawn(
                launch_command("KILL", f"--chdir={ROOT}", program=words),
                self.log_file(name),
                env=self._environment(name),
            )
            # This holds for an API process too: it serves metrics once it accepts purchases.
            while ready and not metrics.exists():
                assert self.alive(name), f"{name} does not start: {self.log(name)[-2_000:]}"
                await asyncio.sleep(POLL_S)

    async def restart(self, name: str) -> None:
        """Kill it if it runs, and start it."""
        if self.alive(name):
            self.kill(name)
        await self.start(name)

    async def start_all(self) -> None:
        """Start everything that does not run, servers first."""
        for group in (SERVERS, self.parts):
            await asyncio.gather(*(self.start(name) for name in group if not self.alive(name)))

    def log_file(self, name: str) -> Path:
        """The path of its log."""
        return self.data_dir / "logs" / f"{SERVERS.get(name, name)}.log"

    def log(self, name: str) -> str:
        """The text of its log."""
        return self.log_file(name).read_text("utf-8", "replace")

    def link(self, a: str, b: str) -> Proxy:
        """The proxy between a part and a server, as named in ``proxied``."""
        return self._links[a, b]

    def links(self, server: str) -> list[Proxy]:
        """All proxies to a server."""
        return [proxy for (_, b), proxy in self._links.items() if b == server]

    # Files

    async def copy_redis(self, to: Path) -> None:
        """Copy its files: of a dead server all, of a live one all that was fsynced."""
        await _copy(self.data_dir / "redis", to)

    async def restore_redis(self, frm: Path | None) -> None:
        """Kill it and replace its files by a copy, or by nothing. The caller starts it."""
        if self.alive("redis"):
            self.kill("redis")
        await self.ended("redis")
        await _copy(frm, self.data_dir / "redis")

    async def tear_redis(self, n_bytes: int) -> None:
        """Kill it and truncate its append-only file. The caller starts it."""
        if self.alive("redis"):
            self.kill("redis")
        await self.ended("redis")
        home = self.data_dir / "redis"
        files = [*home.glob("appendonly.aof"), *home.glob("appendonlydir/*.incr.aof")]
        newest = max(files, key=lambda file: (file.stat().st_mtime, file.name))
        os.truncate(newest, max(0, newest.stat().st_size - n_bytes))

    async def copy_postgres(self, to: Path) -> None:
        """Stop the server, copy its data directory, start it."""
        await self.term("postgres")
        await _copy(self.data_dir / "postgresql", to)
        await self.start("postgres")

    async def restore_postgres(self, frm: Path) -> None:
        """Stop the server, replace its data directory by a copy, start it."""
        await self.term("postgres")
        await _copy(frm, self.data_dir / "postgresql")
        await self.start("postgres")

    def _process(self, name: str) -> asyncio.subprocess.Process | None:
        if name in SERVERS:
            return self._servers._servers[SERVERS[name]].process
        return self._running.get(name)

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._process(name)
        if process is None or process.returncode is not None:
            return
        # PostgreSQL has many processes; the parent is first, so that it starts no further ones.
        for pid in (process.pid, *_descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _metrics_socket(self, name: str) -> Path:
        return self._servers.sockets / f"m-{name}"

    def _environment(self, name: str) -> dict[str, str]:
        plain = {key: value for key, value in os.environ.items() if not key.startswith("SALE_")}
        return {
            **plain,
            "PYTHONPATH": str(ROOT),
            "SALE_DATA_DIR": str(self.data_dir),
            "SALE_LISTEN": self.address,
            "SALE_METRICS_LISTEN": f"unix:{self._metrics_socket(name)}",
            "SALE_REDIS_URL": self._url(name, "redis", self.redis_url),
            "SALE_DATABASE_URL": self._url(name, "postgres", self.database_url),
            **self.settings,
        }

    def _url(self, name: str, server: str, direct: str) -> str:
        if (name, server) not in self._links:
            return direct
        path = Path(self._links[name, server].listen.removeprefix("unix:"))
        if server == "redis":
            return f"unix://{path}?db=0"
        port = path.name.rpartition(".")[2]
        return f"postgresql://sale@/sale?host={path.parent}&port={port}"

    def _proxy(self, name: str, server: str) -> Proxy:
        sockets = self._servers.sockets
        short = f"{name[:2]}{name.rpartition('-')[2]}"
        if server == "redis":
            return Proxy(f"unix:{sockets}/r-{short}", f"unix:{sockets}/redis.sock")
        # libpq's naming: the directory is the host, the number in the name is the port.
        number = 1 + len(self._links)
        return Proxy(f"unix:{sockets}/.s.PGSQL.{number}", f"unix:{sockets}/pg/.s.PGSQL.5432")


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [each for child in children for each in (int(child), *_descendants(int(child)))]


async def _copy(frm: Path | None, to: Path) -> None:
    """Copy ``frm`` to ``to`` with owners and modes; None makes an empty directory."""

    def work() -> None:
        if to.exists():
            shutil.rmtree(to)
        if frm is None:
            to.mkdir(mode=0o700)
        else:
            subprocess.run(["cp", "-a", str(frm), str(to)], check=True, timeout=60)

    await asyncio.to_thread(work)
