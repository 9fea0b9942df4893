"""Every answer that clients got, as the check of the books and the outcome table read it."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from loadtest.members import Ask
from loadtest.record import NO_ANSWER, REPLAYED, SOLD
from loadtest.wire import TOO_MANY, UNNAMED
from sale.files import LARGE_MAX_BYTES, UnreadableFile, parse_json, read_bytes


class Answer(msgspec.Struct, frozen=True):
    """One request and what the client was told. Status 0: nothing."""

    member_no: str
    key: str
    showing: str
    quantity: int
    status: int
    code: str = ""
    order_no: str = ""
    told_showing: str = ""
    told_quantity: int = 0
    amount_fen: int = 0
    tickets: tuple[str, ...] = ()
    replayed: bool = False
    remaining: int | None = None
    sent_at: float = 0.0
    received_at: float = 0.0

    @property
    def sold(self) -> bool:
        """Whether the client was told that it has an order."""
        return self.status in (200, 201)

    @property
    def outcome(self) -> str:
        """Its word in a record."""
        if self.sold:
            return REPLAYED if self.replayed else SOLD
        return self.code or (f"{UNNAMED}{self.status}" if self.status else NO_ANSWER)

    @property
    def refused(self) -> bool:
        """Whether the engine told the client that it has none.

        429 and 5xx leave that open, and so does a 4xx that is no problem document: it comes from a
        balancer.
        """
        named = self.code and not self.code.startswith(UNNAMED)
        return bool(400 <= self.status < 500 and self.status != TOO_MANY and named)


class _TicketBody(msgspec.Struct):
    code: str


class _Body(msgspec.Struct):
    """The parts of an order, or of a problem, that are compared."""

    order_no: str = ""
    showing: str = ""
    quantity: int = 0
    amount_fen: int = 0
    tickets: tuple[_TicketBody, ...] = ()
    code: str = ""
    remaining: int | None = None


class Spool:
    """Records what a generator gets: a tuple each, which costs it next to nothing.

    ``asked`` gives what arrival ``n`` asked for, when the answers are read.
    """

    def __init__(self, asked: Callable[[int], Ask]) -> None:
        self._asked = asked
        self._rows: list[tuple[int, int, bool, bytes]] = []

    def __call__(self, number: int, status: int, replayed: bool, body: bytes, /) -> None:  # noqa: FBT001
        """Record one answer."""
        self._rows.append((number, status, replayed, body))

    def __iter__(self) -> Iterator[Answer]:
        for number, status, replayed, body in self._rows:
            yield read_answer(self._asked(number), status, body, replayed=replayed)

    def __len__(self) -> int:
        return len(self._rows)


def read_answer(
    asked: Ask,
    status: int,
    body: bytes,
    *,
    replayed: bool = False,
    sent_at: float = 0.0,
    received_at: float = 0.0,
) -> Answer:
    """Read one answer from the wire; a body that is not understood is an order of no number."""
    try:
        told = _BODY.decode(body) if status else _Body()
    except msgspec.DecodeError:
        told = _Body(code="" if status >= 300 else "unreadable")
    return Answer(
        *(asked.member_no, asked.key, asked.showing, asked.quantity, status),
        code=told.code or (f"{UNNAMED}{status}" if status >= 300 else ""),
        order_no=told.order_no,
        told_showing=told.showing,
        told_quantity=told.quantity,
        amount_fen=told.amount_fen,
        tickets=tuple(ticket.code for ticket in told.tickets),
        replayed=replayed,
        remaining=told.remaining,
        sent_at=sent_at,
        received_at=received_at,
    )


def write_answers(answers: Iterable[Answer], path: Path) -> None:
    """Write answers as JSON lines, readable by the owner alone (they name members)."""
    path.touch(mode=0o600)
    with path.open("wb") as stream:
        stream.writelines(msgspec.json.encode(answer) + b"\n" for answer in answers)


def read_answers(path: Path) -> list[Answer]:
    """Read what ``write_answers`` wrote. Raises ValueError in words."""
    try:
        lines = read_bytes(path, most=LARGE_MAX_BYTES).splitlines()
        return [parse_json(line, Answer) for line in lines]
    except UnreadableFile as error:
        raise ValueError(f"answers file {error}") from None
    except ValueError as error:
        raise ValueError(f"answers file {path}: {error}") from None


_BODY: Final[msgspec.json.Decoder[_Body]] = msgspec.json.Decoder(_Body)
