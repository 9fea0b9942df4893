"""HTTP/1.1 on the wire: requests as bytes, answers cut out of a byte stream.

It reads what this engine and its peers send, an answer with a length, and fails loudly at anything
else, because a client that guesses where an answer ends gives one member another's order.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

Protocol = TypeVar("Protocol", bound=asyncio.Protocol)

UNKNOWN: Final = 0
"""Status of an answer that never came."""

CODE_MAX_CHARS: Final = 48
ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024
_END: Final = b"\r\n\r\n"
_BODILESS: Final = (204, 304)

TOO_MANY: Final = 429
UNNAMED: Final = "HTTP "
"""So begins the code of an answer that has none of its own, before its status."""


class ProtocolError(Exception):
    """The server sent what this client does not read (chunked, no length, not HTTP/1.1).

    ``status`` is that of the answer where it could be told, else 0.
    """

    def __init__(self, message: str, status: int = UNKNOWN) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ConnectionError):  # noqa: N818 - says what it is
    """No connection to the server could be made, or made again, in time."""


async def open_connection(address: str, make: Callable[[], Protocol], source: str = "") -> Protocol:
    """Connect to ``host:port`` (from an address ``source``) or ``unix:PATH``. Raises OSError."""
    loop = asyncio.get_running_loop()
    if address.startswith("unix:"):
        return (await loop.create_unix_connection(make, address.removeprefix("unix:")))[1]
    host, _, port = address.rpartition(":")
    local = (source, 0) if source else None
    return (await loop.create_connection(make, host.strip("[]"), int(port), local_addr=local))[1]


class Response:
    """One answer; ``sent_at`` and ``received_at`` are moments of ``time.perf_counter()``."""

    __slots__ = ("body", "head", "received_at", "sent_at", "status", "why")

    def __init__(self, status: int, head: bytes, body: bytes, why: str = "") -> None:
        self.status = status
        self.head = head
        self.body = body
        self.why = why
        self.sent_at = 0.0
        self.received_at = 0.0

    def header(self, name: str) -> str | None:
        """Value of a header, or None. Headers are searched only when asked for."""
        return _header(self.head.lower(), self.head, name.lower().encode())

    def json(self) -> Any:  # noqa: ANN401 - whatever the server says
        """Body as JSON. Raises ValueError."""
        return json.loads(self.body)


def _header(lowered: bytes, head: bytes, name: bytes) -> str | None:
    start = lowered.find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else len(head)].strip().decode("latin-1")


class ResponseParser:
    """Cuts HTTP/1.1 answers out of a byte stream that may be split anywhere."""

    def __init__(self) -> None:
        self._buffer = b""

    @property
    def idle(self) -> bool:
        """Whether nothing of a further answer has come."""
        return not self._buffer

    def feed(self, data: bytes, most: int = 1_000) -> list[Response]:
        """Take in bytes; return the answers that they complete.

        Raises:
            ProtocolError: not understood, or more than ``most`` answers.

        """
        buffer = self._buffer + data if self._buffer else data
        answers: list[Response] = []
        at = 0
        while at < len(buffer):
            end = buffer.find(_END, at)
            if end < 0:
                break
            head = buffer[at:end]
            status = _status(head)
            length = 0 if status < 200 or status in _BODILESS else _length(head, status)
            stop = end + 4 + length
            if len(buffer) < stop:
                break
            if status >= 200:
                answers.append(Response(status, head, buffer[end + 4 : stop]))
            at = stop
        if len(answers) > most:
            raise ProtocolError("an answer that nobody asked for")
        self._buffer = buffer[at:]
        if len(self._buffer) > ANSWER_MAX_BYTES:
            raise ProtocolError(f"an answer of more than {ANSWER_MAX_BYTES} bytes")
        return answers


def _status(head: bytes) -> int:
    known = head.startswith(b"HTTP/1.") and head[9:12].isdigit()
    status = int(head[9:12]) if known else UNKNOWN
    if not known or not head.startswith(b"HTTP/1.1 "):
        raise ProtocolError(f"not an HTTP/1.1 answer: {head[:40]!r}", status)
    return status


def _length(head: bytes, status: int) -> int:
    lowered = head.lower()
    if b"\r\ntransfer-encoding:" in lowered:
        raise ProtocolError("a chunked answer", status)
    text = _header(lowered, head, b"content-length")
    if text is None or not text.isdigit():
        raise ProtocolError("an answer without a content-length", status)
    return int(text)


def asks_again(status: int) -> bool:
    """Whether a client that was answered so asks again under the same key.

    That is after no answer, 429, 503, and any other 5xx: 502 and 504 are a balancer's words, which
    say nothing of the order that the engine may have made meanwhile.
    """
    return status in (UNKNOWN, TOO_MANY) or status >= 500


def problem_code(status: int, body: bytes) -> str:
    """Code in a problem's body; ``HTTP 502`` where there is none, '' for an answer that never came.

    Searched, not parsed: it is asked for in the midst of the load.
    """
    if status == UNKNOWN:
        return ""
    at = body.find(b'"code":"') + 8
    raw = body[at : body.find(b'"', at)] if at > 7 else b""
    known = raw.isascii() and 0 < len(raw) <= CODE_MAX_CHARS
    return raw.decode("ascii") if known else f"{UNNAMED}{status}"


def retry_after_s(head: bytes) -> float:
    """Seconds that a Retry-After header tells, 0 where there is none that is a number."""
    text = _header(head.lower(), head, b"retry-after")
    return float(text) if text is not None and text.isdecimal() else 0.0


def closes(head: bytes) -> bool:
    """Whether the server closes the connection after this answer."""
    return (_header(head.lower(), head, b"connection") or "").lower() == "close"


def get_request(host: str, path: str, token: str | None = None) -> bytes:
    """Bytes of a GET; with a token, as that member or operator."""
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{authorization}\r\n".encode()


def purchase_request(
    host: str, campaign: str, token: str, key: str, quantity: int, showing: str | None
) -> bytes:
    """Bytes of a purchase of ``quantity`` tickets under the idempotency key ``key``."""
    content = f'{{"quantity":{quantity}' + (f',"showing":"{showing}"}}' if showing else "}")
    return (
        f"POST /api/v1/campaigns/{campaign}/orders HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        f"Authorization: Bearer {token}\r\n"
        f"Idempotency-Key: {key}\r\n"
        f"Content-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n{content}"
    ).encode()
