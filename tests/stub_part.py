"""Replaces ``python -m sale`` in the supervisor's tests: parts that only count and answer."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge

from sale import config
from sale.host.metrics_server import serving_metrics


async def main(part: str, metrics_listen: str) -> None:
    settings = config.load()
    registry = CollectorRegistry()
    pings = Counter("sale_pings", "Pings.", ["part"], registry=registry)
    Gauge("sale_redis_up", "Up.", registry=registry).set(0 if part == "scheduler" else 1)
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)

    async def ping(_request: web.Request) -> web.Response:
        pings.labels(part).inc()
        return web.json_response({"pid": os.getpid()})

    app = web.Application()
    app.router.add_get("/readyz", lambda _request: web.json_response({"status": "ok"}))
    app.router.add_get("/ping", ping)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    if part == "serve":
        host, port = config.split_address(settings.listen)
        await web.TCPSite(runner, host, port, reuse_port=True).start()
    held_back = settings.data_dir / f"unready-{Path(metrics_listen).name[2:].rpartition('-')[0]}"
    while held_back.exists() and not asked.is_set():  # noqa: ASYNC110 - made by the test
        await asyncio.sleep(0.02)
    async with serving_metrics(metrics_listen, registry):
        await asked.wait()
    await runner.cleanup()
    with (settings.data_dir / "stopped").open("a") as stopped:
        stopped.write(f"{part}\n")


if __name__ == "__main__":
    if "--held" in sys.argv and not sys.stdin.readline():
        sys.exit(5)
    if sys.argv[1] == "migrate":
        settings = config.load()
        assert settings.redis_url
        assert settings.database_url
        assert settings.signing_key_file
        Path(settings.data_dir, "migrated").touch()
        sys.exit(3 if Path(settings.data_dir, "broken").exists() else 0)
    if Path(config.load().data_dir, f"dies-{sys.argv[1]}").exists():
        sys.exit(4)
    asyncio.run(main(sys.argv[1], sys.argv[3]))
