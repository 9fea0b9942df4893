"""An additional API process for one test, on the stores of the running system."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from service import Service, free_port
from waiting import until

from loadtest.bench.rig import ready, spawn
from loadtest.engine import stop
from loadtest.members import Mint

_numbers = itertools.count(70_000_000)


@dataclass
class OwnApi:
    """The process, and purchases for it by unused cards."""

    service: Service
    address: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def purchases(self, campaign: str, count: int) -> list[bytes]:
        """Make requests for one ticket each."""
        members: Iterator[int] = itertools.islice(_numbers, count)
        mint = Mint(self.service.key.secret)
        return list(mint.requests(self.address, campaign, "general", members))

    @property
    def rss(self) -> int:
        """Its resident memory in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    async def said(self, action: str, within_s: float = 20) -> None:
        """Wait until an action is in its log."""
        await until(lambda: f'"{action}"' in self.log.read_text("utf-8"), within_s)

    async def ready(self) -> None:
        """Wait until it may sell."""
        await ready(self.process, self.log, self.address, "/readyz", 200)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextlib.asynccontextmanager
async def own_api(
    service: Service, folder: Path, *, redis_late_ms: float = 0, **settings: str
) -> AsyncIterator[OwnApi]:
    """Run an API process with settings; a proxy delays the answers of its Redis."""
    cores = os.sched_getaffinity(0)
    redis_url = service.redis_url
    async with contextlib.AsyncExitStack() as stack:
        if redis_late_ms:
            target, listen = urlsplit(redis_url).path, folder / "far"
            module = (sys.executable, "-m", "loadtest.bench.delay")
            command = [*module, str(listen), target, str(redis_late_ms)]
            relay = await spawn(command, folder / "far.log", cores)
            stack.push_async_callback(stop, relay)
            await until(listen.exists)
            redis_url = f"unix://{listen}"
        address = f"127.0.0.1:{free_port()}"
        given = {
            "SALE_REDIS_URL": redis_url,
            "SALE_DATABASE_URL": service.database_url,
            "SALE_DATA_DIR": str(service.data_dir),
            "SALE_LISTEN": address,
        }
        command = [sys.executable, "-m", "sale", "serve", "--metrics-listen", f"unix:{folder}/m"]
        api = OwnApi(
            service,
            address,
            await spawn(command, folder / "serve.log", cores, **(given | settings)),
            folder / "serve.log",
        )
        stack.push_async_callback(stop, api.process)
        await api.said("api.listening")
        yield api
