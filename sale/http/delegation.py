"""aiohttp's part of one connection: what was delegated to it, and whether it is done with that."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from sale.http.fast_path import FastPath

DELEGATE_KEEPALIVE_S: Final = 1e8
"""aiohttp's own timer would end a connection on which only the fast path is busy: the connection's
deadline goes instead."""

LOOKS: Final = 5
PAUSE_S: Final = 0.001


class Delegate(Protocol):
    """aiohttp's handler of a connection."""

    client_ended: bool

    @property
    def busy(self) -> bool: ...  # noqa: D102

    @property
    def idle(self) -> bool: ...  # noqa: D102

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...  # noqa: D102
    def connection_lost(self, exc: BaseException | None) -> None: ...  # noqa: D102
    def data_received(self, data: bytes) -> None: ...  # noqa: D102
    def eof_received(self) -> bool: ...  # noqa: D102
    def pause_writing(self) -> None: ...  # noqa: D102
    def resume_writing(self) -> None: ...  # noqa: D102


class MakeDelegate(Protocol):
    """Makes the handler of a connection.

    ``draining`` tells it whether each answer must be the connection's last. It calls ``answered``
    behind each answer, and ``reading`` with whether it wants to read on.
    """

    def __call__(  # noqa: D102
        self,
        *,
        draining: Callable[[], bool],
        answered: Callable[[], None],
        reading: Callable[[bool], None],
        keepalive_timeout: float,
    ) -> Delegate: ...


class Delegation:
    """A connection's handler, and the request that it has."""

    __slots__ = ("_answered", "_looks", "_loop", "_unended", "active", "full", "handler", "left")

    def __init__(
        self,
        fast_path: "FastPath",
        *,
        answered: Callable[[], None],
        reading: Callable[[bool], None],
    ) -> None:
        self.handler = fast_path.make_delegate(
            draining=fast_path.is_draining,
            answered=answered,
            reading=reading,
            keepalive_timeout=DELEGATE_KEEPALIVE_S,
        )
        self._loop = fast_path.loop
        self.active = False
        """Whether it has a request that is not known to be done."""
        self.left = 0
        """Bytes of that request that are still to come."""
        self.full = False
        """Whether the handler wants to read no more for now."""
        self._answered = False
        self._looks = 0
        self._unended = 0

    def open(self, transport: asyncio.Transport, *, client_ended: bool, paused: bool) -> None:
        """Begin, with the connection as it is by now."""
        self.handler.connection_made(transport)
        self.handler.client_ended = client_ended
        if paused:
            self.handler.pause_writing()

    def begin(self, part: bytes, left: int) -> None:
        """Give it a request, of which ``left`` bytes are still to come."""
        self.left = left
        self.active, self._answered, self._looks = True, False, 0
        self.handler.data_received(part)

    def go_on(self, data: bytes) -> bytes:
        """Give it what its request still lacks; give back the rest."""
        self.handler.data_received(data[: self.left])
        rest = data[self.left :]
        self.left = max(self.left - len(data), 0)
        return rest

    def note_answer(self) -> None:
        """Note that an answer is out."""
        self._answered = True

    def is_over(self, look_again: Callable[[], None]) -> bool:
        """Whether its request is done; where it is about to be, ``look_again`` is called soon."""
        if not self._answered or self.left:
            return False
        if self.handler.idle:
            self.active = False
            return True
        # Its answer is out, and it is about to wait for more: some turns later, unless it waits for
        # the rest of a body that it does not want.
        self._answered, self._looks = False, self._looks + 1
        if self._looks <= LOOKS:
            self._loop.call_soon(look_again)
        else:
            self._loop.call_later(PAUSE_S, look_again)
        return False

    def unended(self, length: int) -> int:
        """Count further bytes of a head that does not end; give how many there are."""
        self._unended = self._unended + length if self.handler.idle else 0
        return self._unended
