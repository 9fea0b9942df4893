"""A Redis connection of our own, for the two scripts that a rush calls.

redis-py stays for everything else. A small call costs the client 92 µs of CPU by redis-py and 20 by
this (``python tests/measure_scripts.py``): taking a connection from the pool, looking whether it
still lives, a timer and a lock each. A batch shares that, but a rush's batches are as small as the
process is fast.

Redis answers the calls of a connection in the order in which they were sent. If a call times out or
is cancelled, the connection is closed, because a late answer must never be taken for that of the
next call. All calls that wait on it fail with "connection lost", so their outcome is unknown. The
connection opens at the first use, and again after a loss; no call is repeated here.
"""

import asyncio
from collections import deque
from typing import Any, Final

import hiredis
from redis.asyncio import Connection, Redis, UnixDomainSocketConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

CONNECT_TIMEOUT_S: Final = 2.0
TIMEOUT_S: Final = 5.0
_PLAIN: Final = frozenset({Connection, UnixDomainSocketConnection})
_BEYOND: Final = frozenset({"credential_provider", "redis_connect_func"})
"""Settings of redis-py that this connection does not support."""
_ERRORS: Final = {
    "AUTH": AuthenticationError,
    "LOADING": BusyLoadingError,
    "MASTERDOWN": MasterDownError,
    "NOAUTH": AuthenticationError,
    "NOSCRIPT": NoScriptError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
    "WRONGPASS": AuthenticationError,
}


def pack(*command: str | int | bytes) -> bytes:
    """Encode a command in Redis' protocol."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


class ScriptConnection:
    """The connection; any number of callers may share it."""

    @staticmethod
    def to(redis: Redis) -> "ScriptConnection | None":
        """Connect to the server of ``redis``; None if only redis-py can (TLS, …)."""
        pool = redis.connection_pool
        settings = pool.connection_kwargs
        if pool.connection_class not in _PLAIN or any(settings.get(name) for name in _BEYOND):
            return None
        return ScriptConnection(settings)

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._timeout_s = settings.get("socket_timeout") or TIMEOUT_S
        self._wire: _Protocol | None = None
        self._opening = asyncio.Lock()

    async def call(self, command: bytes) -> Any:  # noqa: ANN401 - Redis' reply
        """Send a packed command and give its reply.

        Raises redis-py's errors, also for an error reply, and OSError if Redis is not reached.
        """
        wire = self._wire
        if wire is None or wire.lost is not None:
            wire = await self._open()
        return await wire.call(command, self._timeout_s)

    async def close(self) -> None:
        """Close the connection; waiting calls fail. A later call opens another."""
        if self._wire is not None:
            self._wire.drop(RedisConnectionError("closed"))
            await self._wire.ended

    async def _open(self) -> "_Protocol":
        async with self._opening:
            if self._wire is None or self._wire.lost is not None:
                seconds = self._settings.get("socket_connect_timeout") or CONNECT_TIMEOUT_S
                async with asyncio.timeout(seconds):
                    self._wire = await self._connect()
            return self._wire

    async def _connect(self) -> "_Protocol":
        given, loop = self._settings, asyncio.get_running_loop()
        if "path" in given:
            _, wire = await loop.create_unix_connection(_Protocol, given["path"])
        else:
            _, wire = await loop.create_connection(
                _Protocol, given.get("host") or "localhost", int(given.get("port") or 6379)
            )
        try:
            if given.get("username") or given.get("password"):
                user = [given["username"]] if given.get("username") else []
                password = given.get("password") or ""
                await wire.call(pack("AUTH", *user, password), self._timeout_s)
            if given.get("db"):
                await wire.call(pack("SELECT", int(given["db"])), self._timeout_s)
        except BaseException as error:
            wire.drop(RedisConnectionError(str(error)))
            raise
        return wire


class _Protocol(asyncio.Protocol):
    """One connection from its beginning to its end."""

    def __init__(self) -> None:
        self.lost: RedisError | None = None
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=_error)
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._transport: asyncio.Transport
        self.ended: asyncio.Future[None] = self._loop.create_future()

    async def call(self, command: bytes, timeout_s: float) -> Any:  # noqa: ANN401
        if self.lost is not None:
            raise self.lost
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.append(answer)
        self._transport.write(command)
        timer = self._loop.call_later(timeout_s, self.drop, RedisTimeoutError("no reply"))
        try:
            reply = await answer
        except asyncio.CancelledError:
            self.drop(RedisConnectionError("a call on this connection was given up"))
            raise
        finally:
            timer.cancel()
        if isinstance(reply, RedisError):
            raise reply
        return reply

    def drop(self, why: RedisError) -> None:
        """Close the connection now, without reading what still arrives on it."""
        if self.lost is None:
            self.lost = why
            self._transport.abort()
            for answer in self._waiting:
                if not answer.done():
                    answer.set_exception(why)
            self._waiting.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:
            return
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_result(reply)
        except (hiredis.ProtocolError, IndexError):
            self.drop(RedisConnectionError("the server does not speak Redis' protocol"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop(RedisConnectionError(f"connection lost: {exc}" if exc else "connection closed"))
        self.ended.set_result(None)


def _error(message: str) -> RedisError:
    code, _, rest = message.partition(" ")
    kind = _ERRORS.get(code)
    return ResponseError(message) if kind is None else kind(rest)
