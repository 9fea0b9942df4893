"""The peers of the benchmark: who they are, how each is started, and whether what it sold is right.

Each peer that sells gets a Redis of its own on the engine's core, started by the same code with the
same settings as the engine's (append-only file, an fsync before each answer), so that none is
measured while another's file is written anew.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

import msgspec
import redis.asyncio

from loadtest.bench.rig import SIGNING_KEY, pin, ready, spawn
from loadtest.engine import EngineError, free_address, run_program, stop
from sale.host.embedded import running

NPM_S: Final = 180.0
FIRST_PORT: Final = 18_280
CARD_LIMIT: Final = 3
NODE_FILES: Final = ("server.js", "package.json", "package-lock.json")
GO_FILES: Final = ("main.go", "go.mod")
BUILD_S: Final = 180.0
ONE_CORE: Final = {"GOMAXPROCS": "1"}
CACHE: Final = Path.home() / ".cache" / "sale-peers"
"""Where the Node peer's packages and the Go peer's program are kept between runs."""

_NOT_DONE: Final = (
    "hash chain, replay of a repeated key, opening times, revoked cards and unions, "
    "books in PostgreSQL, verification of Redis"
)


class Peer(msgspec.Struct, frozen=True):
    """A server that the engine is measured against. ``leaves_out``: what ours does and it does not.

    ``program`` is a Python module, ``node`` or ``go``; ``needs`` are packages beyond the engine's
    own. A new peer stands in `PEERS`; one in another language has its start in `_command`.
    """

    name: str
    title: str
    leaves_out: str
    program: str
    sells: bool = True
    checks_tokens: bool = False
    needs: tuple[str, ...] = ()
    idle_status: int = 404


_UNSIGNED: Final = f"token's signature, {_NOT_DONE}"
BARE: Final = Peer(
    *("bare", "httptools, constant", "everything", "loadtest.peers.bare"),
    sells=False,
    idle_status=201,
)
NAIVE: Final = Peer("naive", "aiohttp, one EVALSHA each", _UNSIGNED, "loadtest.peers.naive")
AFTERNOON: Final = Peer(
    *("afternoon", "FastAPI, one EVALSHA each", _NOT_DONE, "loadtest.peers.afternoon"),
    checks_tokens=True,
    needs=("fastapi", "uvicorn"),
)
NODE: Final = Peer("node", "Node, fastify, ioredis", _UNSIGNED, "node")
GO: Final = Peer("go", "Go, net/http, pipelined", _UNSIGNED, "go")
PEERS: Final = (BARE, NAIVE, AFTERNOON, NODE, GO)


class PeerMissingError(Exception):
    """The peer cannot run here; the message says in a few words what is not there."""


@dataclass(frozen=True, slots=True)
class RunningPeer:
    """A peer that answers. ``redis_pid`` and ``stock`` are of its own Redis; None: it has none."""

    peer: Peer
    address: str
    pid: int
    redis_pid: int | None = None
    stock: Any = None

    async def campaign(self, name: str, tickets: int) -> None:
        """Put tickets on sale; each card may buy CARD_LIMIT."""
        await self.stock.set(f"stock:{name}", tickets)

    async def misdeed(self, campaign: str, tickets: int, *, least: int, most: int) -> str:
        """Compare what it answered with its Redis: '' or what is wrong.

        ``least`` to ``most`` tickets, one an order, were answered as sold.
        """
        left = int(await self.stock.get(f"stock:{campaign}"))
        orders = int(await self.stock.xlen(f"orders:{campaign}"))
        cards = [int(each) for each in await self.stock.hvals(f"cards:{campaign}")]
        if left < 0 or orders > tickets:
            return f"OVERSOLD: {orders} of {tickets}, {left} left"
        if not tickets - left == orders == sum(cards):
            return f"{tickets - left} gone, {orders} orders, {sum(cards)} on cards"
        if not least <= orders <= most:
            return f"{orders} orders, but {least} to {most} answered"
        if max(cards, default=0) > CARD_LIMIT:
            return f"a card has {max(cards)}, the limit is {CARD_LIMIT}"
        return ""


@contextlib.asynccontextmanager
async def peer_up(
    peer: Peer, folder: Path, cores: set[int], *, body_bytes: int = 330, cache: Path = CACHE
) -> AsyncIterator[RunningPeer]:
    """Run a peer, with a Redis of its own where it sells, until the block ends.

    Raises:
        PeerMissingError: what it needs is not installed here.
        EngineError: it did not become ready; the message ends with what it said last.

    """
    command = await _command(peer, cache)
    home = folder / peer.name
    home.mkdir(parents=True)
    async with contextlib.AsyncExitStack() as stack:
        options = ["--body-bytes", str(body_bytes)]
        stock = redis_pid = None
        if peer.sells:
            servers = await stack.enter_async_context(
                running(home / "data", redis=True, postgres=False)
            )
            redis_pid = servers.pids["redis"]
            pin(redis_pid, cores)
            path = str(servers.sockets / "redis.sock")
            stock = redis.asyncio.Redis(unix_socket_path=path)
            stack.push_async_callback(stock.aclose)
            options = ["--redis-socket", path]
        if peer.checks_tokens:
            options += ["--signing-key", SIGNING_KEY]
        if peer in (NODE, GO):
            script = files("loadtest.peers").joinpath("lua/buy.lua")
            options += ["--script", str(stack.enter_context(as_file(script)))]
        address = free_address(FIRST_PORT)
        port = address.rpartition(":")[2]
        log_file = home / f"{peer.name}.log"
        settings = ONE_CORE if peer is GO else {}
        process = await spawn([*command, "--port", port, *options], log_file, cores, **settings)
        stack.push_async_callback(stop, process)
        await ready(process, log_file, address, "/", peer.idle_status)
        yield RunningPeer(peer, address, process.pid, redis_pid, stock)


async def _command(peer: Peer, cache: Path) -> list[str]:
    if peer is NODE:
        node = shutil.which("node")
        if node is None or (npm := shutil.which("npm")) is None:
            raise PeerMissingError("node and npm are not installed")
        return [node, str(await _install(npm, cache))]
    if peer is GO:
        if (go := shutil.which("go")) is None:
            raise PeerMissingError("go is not installed")
        return [str(await _build(go, cache))]
    for package in peer.needs:
        if importlib.util.find_spec(package) is None:
            raise PeerMissingError(f"{package} is not installed: pip install -e '.[peers]'")
    return [sys.executable, "-m", peer.program]


async def _install(npm: str, cache: Path) -> Path:
    """Install the Node peer's packages exactly as locked; return the place of ``server.js``.

    Kept in a folder that is named by its content. Raises PeerMissingError.
    """
    home = _sources("node", NODE_FILES, cache)
    server, done = home / "server.js", home / "node_modules" / ".sale-done"
    if done.exists():
        return server
    how = ("ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund")
    try:
        status, out, said = await run_program(npm, *how, within_s=NPM_S, cwd=home)
    except EngineError as error:
        raise PeerMissingError(f"npm ci: {error}") from None
    if status:
        lines = (out.decode("utf-8", "replace") + said).splitlines()
        errors = [line.partition(" ")[2] for line in lines if re.match("npm (error|ERR!)", line)]
        raise PeerMissingError(f"npm ci failed: {'; '.join(errors[:2])[:200] or '(nothing said)'}")
    done.touch()
    return server


async def _build(go: str, cache: Path) -> Path:
    """Build the Go peer, which needs Go's own library only; return the place of the program.

    Raises PeerMissingError.
    """
    home = _sources("go", GO_FILES, cache)
    program, draft = home / "peer", home / f"peer.{os.getpid()}"
    if program.exists():
        return program
    try:
        status, _, said = await run_program(
            go, "build", "-o", str(draft), ".", within_s=BUILD_S, cwd=home
        )
    except EngineError as error:
        raise PeerMissingError(f"go build: {error}") from None
    if status:
        raise PeerMissingError(f"go build failed: {said.strip()[-200:]}")
    draft.rename(program)
    return program


def _sources(language: str, names: tuple[str, ...], cache: Path) -> Path:
    """Write a peer's sources into a folder of the cache that their content names; return it."""
    sources = {
        name: files("loadtest.peers").joinpath(language, name).read_bytes() for name in names
    }
    home = cache / hashlib.sha256(b"\0".join(sources.values())).hexdigest()[:16]
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in sources.items():
        if not (home / name).exists():
            (home / name).write_bytes(content)
    return home


async def peers_up(
    stack: contextlib.AsyncExitStack, folder: Path, cores: set[int], body_bytes: int, cache: Path
) -> tuple[list[RunningPeer], dict[str, str]]:
    """Run those that can run here on a stack; give them, and why each of the others cannot."""
    up: list[RunningPeer] = []
    missing: dict[str, str] = {}
    for peer in PEERS:
        started = peer_up(peer, folder, cores, body_bytes=body_bytes, cache=cache)
        try:
            up.append(await stack.enter_async_context(started))
        except PeerMissingError as error:
            missing[peer.name] = str(error)
        except EngineError as error:
            missing[peer.name] = f"did not start: {str(error).splitlines()[-1][:200]}"
    return up, missing
