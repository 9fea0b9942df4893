"""The client's side of a connection: its transport, its deadline, and what it sent and waits.

What is done with that is in ``connection.py``.
"""

import asyncio
from typing import TYPE_CHECKING, Final

from sale.http.bounds import HELD_FREELY, HELD_MAX, KEEPALIVE_S
from sale.http.client_address import first_of
from sale.http.request_ids import named, request_id

if TYPE_CHECKING:
    from sale.http.delegation import Delegation
    from sale.http.fast_path import FastPath

NEVER: Final = float("inf")


class ClientConnection(asyncio.Protocol):
    """The client's side of a connection: its bytes, its state, its deadlines."""

    __slots__ = (
        "_admitted", "_counted", "_delegation", "_ended", "_fast_path", "_held", "_reading_paused",
        "_request_id", "_transport", "_unsettled", "_writing_paused", "deadline",
    )  # fmt: skip

    def __init__(self, fast_path: "FastPath") -> None:
        self._fast_path = fast_path
        self._transport: asyncio.Transport | None = None
        self.deadline = NEVER
        """When it has waited too long, by the fast path's clock; NEVER while it waits for us."""
        self._held = b""
        """Bytes received and not served yet."""
        self._counted = 0
        """How much of it the fast path's sum has."""
        self._request_id: str | None = None
        """The name of the request that is served now, as it was given or once it was made."""
        self._delegation: Delegation | None = None
        self._reading_paused = self._writing_paused = False
        self._admitted = False
        self._ended = False
        """Whether the client sends no more."""
        self._unsettled = False
        """Whether there is more to do when all is served: to count, to read on, or to close."""

    @property
    def lost(self) -> bool:
        """Whether the client has gone."""
        return self._transport is None

    @property
    def request_id(self) -> str:
        """The name of the request that is served now."""
        name = self._request_id = request_id(self._request_id)
        return name

    @property
    def peer(self) -> str:
        """The host at the other end; '' on a unix socket, or when it is gone."""
        transport = self._transport
        return first_of(None if transport is None else transport.get_extra_info("peername"))

    @property
    def last(self) -> bool:
        """Whether the next answer must be the last."""
        return self._fast_path.draining

    def _answer(self, wire: bytes, *, last: bool) -> None:
        if self._transport is None:
            return
        self._transport.write(named(wire, self._request_id))
        self._request_id = None
        if last:
            self._transport.close()
        elif not self._writing_paused:
            self.deadline = self._fast_path.now + KEEPALIVE_S

    def bound_what_is_held(self) -> None:
        """Read no more while too much waits behind a request that is under way, or in all."""
        fast_path, held = self._fast_path, len(self._held)
        if held != self._counted:
            more, self._counted = held - self._counted, held
            fast_path.hold(more)
        transport = self._transport
        if transport is None or self._ended:  # there is nothing more to read
            fast_path.unread.pop(self, None)
            return
        much = held > HELD_FREELY and fast_path.overfull
        if much:
            fast_path.unread[self] = None
        elif fast_path.unread:
            fast_path.unread.pop(self, None)
        full = self._delegation is not None and self._delegation.full
        paused = much or full or held > HELD_MAX
        self._unsettled = paused or held > 0
        if paused != self._reading_paused:
            self._reading_paused = paused
            if paused:
                transport.pause_reading()
            else:
                transport.resume_reading()

    def close(self) -> None:
        """Close it, whatever is under way."""
        if self._transport is not None:
            self._transport.close()
