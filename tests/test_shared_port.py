"""Processes of one deployment share an address; any other process is refused."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import Service

from sale.api.app import listen_on
from sale.config import StartError
from sale.host.metrics_server import MetricsAddressError, bound_metrics, serving_metrics
from sale.shared_port import claim, reserve

PARTS = ("serve", "writer", "scheduler", "keeper")


def serve(*words: object, redis_url: str, database_url: str, home: Path) -> list[str]:
    return [
        *("env", f"SALE_REDIS_URL={redis_url}", f"SALE_DATABASE_URL={database_url}"),
        *("SALE_SIGNING_KEY=" + "k" * 32, f"SALE_DATA_DIR={home}"),
        *(sys.executable, "-m", "sale", *map(str, words)),
    ]


@contextlib.contextmanager
def listener_for(deployment: str, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    with listen_on(f"{host}:{port}") as listener, claim(listener, deployment):
        listener.listen()
        yield listener.getsockname()[1]


def test_same_deployment_shares_an_address() -> None:
    with listener_for("ours") as port, listener_for("ours", port=port) as again:
        assert again == port


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")],
)
def test_another_deployment_is_refused(theirs: str, ours: str) -> None:
    with (
        listener_for("theirs", theirs) as port,
        pytest.raises(StartError, match=rf"{ours}:{port}: another deployment of sale has it"),
        listener_for("ours", ours, port),
    ):
        pass


def test_shared_port_of_another_program_is_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), reuse_port=True) as theirs,
        pytest.raises(StartError, match="already in use"),
        listener_for("ours", port=theirs.getsockname()[1]),
    ):
        pass
    with (
        socket.create_server(("::1", 0), family=socket.AF_INET6, reuse_port=True) as theirs,
        pytest.raises(StartError, match=r"\[::1\]:\d+: Address already in use"),
        listener_for("ours", "[::1]", theirs.getsockname()[1]),
    ):
        pass


def test_other_addresses_and_ports_are_free() -> None:
    with listener_for("theirs") as port, listener_for("ours", "127.0.0.2", port) as same:
        assert same == port
    with listener_for("theirs", port=0), listener_for("ours", port=0):
        pass
    with listener_for("ours", port=port):  # the claim ended with its listener
        pass


def test_reserved_address_is_for_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen_on("127.0.0.1:0") as holder, reserve(holder):
        port = holder.getsockname()[1]
        with pytest.raises(StartError, match="in use"), listener_for("theirs", port=port):
            pass
        monkeypatch.setattr(os, "getppid", os.getpid)
        with listener_for("ours", port=port):
            monkeypatch.undo()
            with listener_for("ours", port=port):  # started by hand beside `sale up`
                pass


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_metrics_address_in_use_is_reported_first(
    kind: str, short_path: Path, redis_url: str, database_url: str
) -> None:
    wanted = "127.0.0.1:0" if kind == "tcp" else f"unix:{short_path / 'm'}"
    async with serving_metrics(wanted, lambda: "") as address:
        for part in PARTS:
            listen = ("--listen", "127.0.0.1:0") if part == "serve" else ()
            done = await asyncio.to_thread(
                subprocess.run,
                serve(
                    *(part, "--metrics-listen", address, *listen),
                    redis_url=redis_url, database_url=database_url, home=short_path,
                ),
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            assert done.returncode == 1
            assert done.stderr == (
                f"sale: metrics address {address}: Address already in use: "
                "choose another with --metrics-listen (port 0: a free one)\n"
            )


async def test_metrics_socket_of_a_dead_process_is_replaced(short_path: Path) -> None:
    path = short_path / "m"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving_metrics(f"unix:{path}", lambda: "x 1\n"):
        with pytest.raises(MetricsAddressError, match="in use"), bound_metrics(f"unix:{path}"):
            pass
    assert os.listdir(short_path) == []  # noqa: PTH208


async def test_serve_refuses_the_port_of_another_deployment(
    service: Service, redis_url: str, database_url: str, short_path: Path
) -> None:
    address = service.url.removeprefix("http://")
    words = ("serve", "--listen", address, "--metrics-listen", "127.0.0.1:0")
    stranger = await asyncio.create_subprocess_exec(
        *serve(*words, redis_url=redis_url, database_url=database_url, home=short_path),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(stranger.communicate(), 30)
    assert stranger.returncode == 1
    assert f"sale: address {address}: another deployment of sale has it" in said.decode()
    assert "api.listening" not in said.decode()

    friend = await asyncio.create_subprocess_exec(
        *serve(
            *words,
            redis_url=service.redis_url, database_url=service.database_url, home=service.data_dir,
        ),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert friend.stderr is not None
    try:
        async with asyncio.timeout(30):
            async for line in friend.stderr:
                if json.loads(line)["action"] == "api.listening":
                    assert json.loads(line)["address"] == address
                    break
            else:
                pytest.fail("it ended before it listened")
    finally:
        friend.send_signal(signal.SIGTERM)
        await asyncio.wait_for(friend.communicate(), 20)
    assert friend.returncode == 0
