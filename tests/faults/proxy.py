"""A proxy between two processes that makes their connections fail as networks do.

It runs in the caller's event loop and never blocks it. Each connection has two pumps per
direction: one reads and counts, one forwards. The buffer between them is bounded; when it is full,
the kernel slows the sender. A mode may be set at any moment and applies to the bytes that come
then, on existing and on new connections.

Addresses: ``host:port`` or ``unix:/PATH``. Directions: ``up`` is client to server, ``down`` server
to client.
"""

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Final, Literal, Self

Direction = Literal["up", "down"]
DIRECTIONS: Final[tuple[Direction, ...]] = ("up", "down")
CHUNK_BYTES: Final = 65_536
CHUNKS_KEPT_MAX: Final = 64
"""Most chunks that are held for a direction of a connection; then reading stops."""

CONNECT_TIMEOUT_S: Final = 5.0
BACKLOG: Final = 1_024


class Proxy:
    """Forwards ``listen`` to ``target``; use as ``async with Proxy(listen, target) as proxy``."""

    def __init__(self, listen: str, target: str) -> None:
        self.listen = listen
        self.target = target
        self.bytes: dict[Direction, int] = {"up": 0, "down": 0}
        """Bytes read, forwarded or not."""
        self.forwarded: dict[Direction, int] = {"up": 0, "down": 0}
        self.accepted = 0
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Condition()
        self.sprung = asyncio.Event()
        """Set when a trap was sprung."""
        self._closed = False
        self._clear_modes()

    def _clear_modes(self) -> None:
        self._delay_s: dict[Direction, float] = dict.fromkeys(DIRECTIONS, 0.0)
        self._halve_after: dict[Direction, int | None] = dict.fromkeys(DIRECTIONS)
        self._swallowing: set[Direction] = set()
        self._trap: tuple[bytes, Direction] | None = None
        for gate in getattr(self, "_gates", {}).values():
            gate.set()
        self._gates = {direction: asyncio.Event() for direction in DIRECTIONS}
        for gate in self._gates.values():
            gate.set()

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._pairs)

    # Modes

    def cut(self) -> None:
        """Close all connections and refuse new ones, until ``heal``."""
        self._shut()
        for pair in list(self._pairs):
            pair.abort()

    def drop(self) -> None:
        """Close all connections and accept new ones."""
        for pair in list(self._pairs):
            pair.abort()

    def delay(self, seconds: float, direction: Direction | None = None) -> None:
        """Delay all bytes that come from now on, in both directions if none is given."""
        for each in DIRECTIONS if direction is None else (direction,):
            self._delay_s[each] = seconds

    def halve(self, after_bytes: int, direction: Direction) -> None:
        """Forward this many more bytes, then close that connection; once."""
        self._halve_after[direction] = after_bytes

    def hold(self, direction: Direction) -> None:
        """Hold the bytes that come, in order, until ``release`` or ``heal``; none is lost."""
        self._gates[direction].clear()

    def trap(self, word: bytes, holding: Direction) -> None:
        """Hold a direction as soon as ``word`` goes up; once. ``up`` holds the word itself back,
        ``down`` lets it through and holds the answer. Then ``sprung`` is set.
        """
        self.sprung.clear()
        self._trap = (word, holding)

    def release(self) -> None:
        """Forward the held bytes."""
        for gate in self._gates.values():
            gate.set()

    def swallow(self, direction: Direction) -> None:
        """Drop the bytes that come. ``heal`` closes the connections that lost some."""
        self._swallowing.add(direction)

    def heal(self) -> None:
        """End all modes."""
        for pair in list(self._pairs):
            if pair.robbed:
                pair.abort()
        self._clear_modes()
        if self._listener is None and not self._closed:
            self._open()

    async def wait_bytes(self, direction: Direction, n: int, within_s: float = 10.0) -> None:
        """Wait until ``n`` bytes more than now have come. Raises TimeoutError."""
        goal = self.bytes[direction] + n
        async with asyncio.timeout(within_s), self._moved:
            await self._moved.wait_for(lambda: self.bytes[direction] >= goal)

    async def close(self) -> None:
        """Stop, and close all connections."""
        self._closed = True
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # State of the modes

    def _open(self) -> None:
        if self.listen.startswith("unix:"):
            path = self.listen.removeprefix("unix:")
            Path(path).unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
        else:
            host, _, port = self.listen.rpartition(":")
            listener = socket.create_server((host, int(port)))
            self.listen = f"{host}:{listener.getsockname()[1]}"
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._listener = listener
        self._loop.add_reader(listener, self._accept)

    def _shut(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            if self.listen.startswith("unix:"):
                Path(self.listen.removeprefix("unix:")).unlink(missing_ok=True)

    def _accept(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = self._listener.accept()
            client.setblocking(False)
            self.accepted += 1
            task = self._loop.create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # Outside the task: a task cancelled before its first step runs no code.
            task.add_done_callback(lambda _: client.close())

    async def _serve(self, client: socket.socket) -> None:
        try:
            server = await self._connect()
        except (OSError, TimeoutError):
            return
        with contextlib.closing(server):
            pair = _Pair(self, client, server)
            self._pairs.add(pair)
            try:
                # A ``cut`` while the connection is being made closes it too.
                if self._listener is not None:
                    await pair.run()
            finally:
                self._pairs.discard(pair)

    async def _connect(self) -> socket.socket:
        if self.target.startswith("unix:"):
            made, where = socket.socket(socket.AF_UNIX), self.target.removeprefix("unix:")
        else:
            host, _, port = self.target.rpartition(":")
            made, where = socket.socket(), (host, int(port))
        made.setblocking(False)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._loop.sock_connect(made, where)
        except BaseException:
            made.close()
            raise
        return made

    async def _count(self, direction: Direction, size: int) -> None:
        async with self._moved:
            self.bytes[direction] += size
            self._moved.notify_all()


class _Pair:
    """One connection: client and server, and the four pumps between them."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy = proxy
        self.ends: dict[Direction, tuple[socket.socket, socket.socket]] = {
            "up": (client, server),
            "down": (server, client),
        }
        self.robbed = False
        """Whether bytes of it were dropped, so that the rest cannot be understood."""
        self._pumps: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Forward until either side closes or ``abort`` is called."""
        loop = asyncio.get_running_loop()
        for direction in DIRECTIONS:
            kept: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_KEPT_MAX)
            self._pumps.append(loop.create_task(self._read(direction, kept)))
            self._pumps.append(loop.create_task(self._forward(direction, kept)))
        try:
            await asyncio.wait(self._pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.abort()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    def abort(self) -> None:
        """Close both sides; held bytes are lost."""
        for pump in self._pumps:
            pump.cancel()

    async def _read(self, direction: Direction, kept: "asyncio.Queue[tuple[float, bytes]]") -> None:
        loop, proxy, source = asyncio.get_running_loop(), self.proxy, self.ends[direction][0]
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(source, CHUNK_BYTES):
                await proxy._count(direction, len(data))
                if direction == "up" and proxy._trap is not None and proxy._trap[0] in data:
                    proxy.hold(proxy._trap[1])
                    proxy._trap = None
                    proxy.sprung.set()
                if direction in proxy._swallowing:
                    self.robbed = True
                else:
                    await kept.put((loop.time() + proxy._delay_s[direction], data))
        await kept.put((0.0, b""))
        await asyncio.sleep(3_600)  # the other pump ends the pair after forwarding all

    async def _forward(
        self, direction: Direction, kept: "asyncio.Queue[tuple[float, bytes]]"
    ) -> None:
        loop, proxy, sink = asyncio.get_running_loop(), self.proxy, self.ends[direction][1]
        with contextlib.suppress(OSError):
            while True:
                due, data = await kept.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await proxy._gates[direction].wait()
                if not data:
                    return
                left = proxy._halve_after[direction]
                if left is not None and left < len(data):
                    proxy._halve_after[direction] = None
                    await loop.sock_sendall(sink, data[:left])
                    return
                if left is not None:
                    proxy._halve_after[direction] = left - len(data)
                await loop.sock_sendall(sink, data)
                proxy.forwarded[direction] += len(data)
