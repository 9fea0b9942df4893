"""With what a run was made: the engine's settings, versions, and the machine. No secrets.

The settings are those that the running engine was started with, read from the environment of one of
its processes: those of the load test's own shell would be a guess.
"""

import contextlib
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg
import psutil

import sale
from loadtest.sampler import discover_processes
from sale import config
from sale.config import Settings
from sale.db.pool import connect
from sale.host.embedded import EmbeddedError, find
from sale.stock.connection import open_redis, product_of
from sale.stock.errors import REDIS_ERRORS

REACH_S: Final = 5.0
UNREACHED: Final = "not reached"
_PACKAGES: Final = (
    "aiohttp", "uvloop", "httptools", "redis", "hiredis", "asyncpg", "msgspec", "prometheus-client",
)  # fmt: skip
_SECRET: Final = re.compile(r"(^|_)(key|keys|secret|secrets|password|passwords|token)($|_file$)")
_HARMLESS: Final = frozenset({"db", "dbname", "host", "port", "sslmode"})

Table = dict[str, str]


async def describe(
    data_dir: Path | None = None, *, settings: Settings | None = None
) -> tuple[Table, Table, Table]:
    """Settings, versions and machine for a run's record; call it before the load.

    The engine is found by its data directory, or by ``settings``, which then are believed. What
    cannot be found out is left out; a store that does not answer is "not reached".
    """
    used = settings or _running_settings(discover_processes(data_dir))
    redis_url = used.redis_url if used else None
    database_url = used.database_url if used else None
    if data_dir is not None:
        with contextlib.suppress(EmbeddedError):
            if found := find(data_dir):
                redis_url = redis_url or found.redis_url
                database_url = database_url or found.database_url
    told = {} if used is None else plain_settings(used)
    versions = _versions()
    if redis_url is not None:
        await _ask_redis(redis_url, told, versions)
    if database_url is not None:
        await _ask_postgres(database_url, told, versions)
    return told, versions, _machine()


def plain_settings(settings: Settings) -> Table:
    """Settings as text, without signing keys, and URLs without user, password and tokens."""
    shown = {}
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if value is not None and not _SECRET.search(name):
            shown[name] = plain_url(str(value)) if "://" in str(value) else str(value)
    return shown


def plain_url(url: str) -> str:
    """A URL without user and password, keeping only the options that are known to be harmless."""
    try:
        parts = urlsplit(url)
        options = [(key, value) for key, value in parse_qsl(parts.query) if key in _HARMLESS]
    except ValueError:
        return "(not a URL)"
    host = parts.netloc.rpartition("@")[2]
    query = f"?{urlencode(options, safe='/')}" if options else ""
    return f"{parts.scheme}://{host}{parts.path}{query}"


def _running_settings(pids: Mapping[str, int]) -> Settings | None:
    """Read what an API process runs with; None where we may not look, or it is another version."""
    for name, pid in sorted(pids.items()):
        if name.startswith("serve"):
            try:
                return config.load(environment=psutil.Process(pid).environ())
            except (psutil.Error, OSError, config.SettingsError):
                continue
    return None


def _versions() -> Table:
    versions = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sale": sale.__version__,
    }
    for package in _PACKAGES:
        try:
            versions["redis-py" if package == "redis" else package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


async def _ask_redis(url: str, told: Table, versions: Table) -> None:
    versions["redis server"] = UNREACHED
    with contextlib.suppress(*REDIS_ERRORS, ValueError):
        client = open_redis(url, max_connections=1)
        async with contextlib.aclosing(client):
            versions["redis server"] = str(product_of(await client.info("server")))
            for name in ("appendonly", "appendfsync", "maxmemory", "io-threads"):
                for key, value in (await client.config_get(name)).items():
                    told[f"redis {key}"] = str(value)


async def _ask_postgres(url: str, told: Table, versions: Table) -> None:
    versions["postgresql"] = UNREACHED
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError):
        connection = await connect(
            url, name="sale loadtest", timeout_s=REACH_S, command_timeout=REACH_S
        )
        try:
            versions["postgresql"] = str(await connection.fetchval("SHOW server_version"))
            for name in ("fsync", "synchronous_commit", "shared_buffers", "max_connections"):
                told[f"postgresql {name}"] = str(await connection.fetchval(f"SHOW {name}"))
        finally:
            connection.terminate()


def _machine() -> Table:
    machine = {
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores usable": str(len(os.sched_getaffinity(0))),
        "cores": str(os.cpu_count() or ""),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "load average before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    return {name: value for name, value in machine.items() if value}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
