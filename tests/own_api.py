"""An additional API process for one test, on the stores of the running system."""

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from service import Service, free_port

from loadtest.bench.rig import ready, spawn
from loadtest.engine import stop
from loadtest.members import Mint

_numbers = itertools.count(70_000_000)


@dataclass
class OwnApi:
    """The process, and purchases for it by unused cards."""

    service: Service
    address: str
    pid: int

    def purchases(self, campaign: str, count: int) -> list[bytes]:
        """Make requests for one ticket each."""
        members: Iterator[int] = itertools.islice(_numbers, count)
        mint = Mint(self.service.key.secret)
        return list(mint.requests(self.address, campaign, "general", members))

    @property
    def rss(self) -> int:
        """Its resident memory in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)


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
            async with asyncio.timeout(10):
                while not listen.exists():  # noqa: ASYNC110 - another process makes it
                    await asyncio.sleep(0.02)
            redis_url = f"unix://{listen}"
        address = f"127.0.0.1:{free_port()}"
        given = {
            "SALE_REDIS_URL": redis_url,
            "SALE_DATABASE_URL": service.database_url,
            "SALE_DATA_DIR": str(service.data_dir),
            "SALE_LISTEN": address,
        }
        command = [sys.executable, "-m", "sale", "serve"]
        command += ["--metrics-listen", f"unix:{folder}/metrics"]
        process = await spawn(command, folder / "serve.log", cores, **(given | settings))
        stack.push_async_callback(stop, process)
        await ready(process, folder / "serve.log", address, "/readyz", 200)
        yield OwnApi(service, address, process.pid)
