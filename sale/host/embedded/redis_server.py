"""The embedded Valkey (or Redis): its settings, and when it is ready."""

import asyncio
import signal
from pathlib import Path
from urllib.parse import quote

from sale.host.embedded.binaries import Program
from sale.host.embedded.child import launch_command
from sale.host.embedded.data_dir import DataDirectory
from sale.host.embedded.server import Server


def redis_server(directory: DataDirectory, program: Program) -> Server:
    """Make the Valkey or Redis of a data directory; it is not started yet."""
    home = directory.path / "redis"
    settings = {
        "port": "0",
        "unixsocket": str(directory.sockets / "redis.sock"),
        "unixsocketperm": "700",
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "aof-use-rdb-preamble": "yes",
        "auto-aof-rewrite-percentage": "100",
        "auto-aof-rewrite-min-size": "64mb",
        "maxmemory": "0",
        "maxmemory-policy": "noeviction",
        "save": "",
        "set-max-intset-entries": "16384",  # revoked members: 4 bytes each instead of about 60
    }

    async def prepare() -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        directory.stamp("redis", program.name)

    arguments = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return Server(
        name="redis",
        home=home,
        command=launch_command(
            "TERM",
            f"--lock={home}.lock",
            f"--chdir={home}",
            program=[str(program.path), *arguments],
        ),
        log_file=directory.path / "logs" / "redis.log",
        prepare=prepare,
        ready=lambda: _ping_redis(directory.sockets / "redis.sock"),
        stop_signal=signal.SIGTERM,
    )


async def _ping_redis(socket: Path) -> str | None:
    """None if Redis answers, else the obstacle in words."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                writer.write(b"PING\r\n")
                reply = await reader.readline()
            finally:
                writer.close()
                await writer.wait_closed()
    except (OSError, TimeoutError) as error:
        return repr(error)
    return None if reply.startswith(b"+PONG") else reply.decode("utf-8", "replace").strip()


def redis_url(directory: DataDirectory) -> str:
    """Give the URL of this Redis."""
    return f"unix://{quote(str(directory.sockets / 'redis.sock'))}?db=0"
