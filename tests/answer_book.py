"""Requests of tests and their answers, stored as received and parsed after the run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from loadtest.books.answers import Answer, read_answer
from loadtest.members import Ask, Member
from loadtest.wire import Response, purchase_request


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of a member: so many tickets of a showing under a key."""

    member: Member
    key: str
    showing: str
    quantity: int

    @property
    def member_no(self) -> str:
        """Number of the member who asks."""
        return self.member.member_no

    def raw(self, host: str, campaign: str) -> bytes:
        """Bytes of the purchase."""
        return purchase_request(
            host, campaign, self.member.token, self.key, self.quantity, self.showing
        )


class AnswerBook:
    """Every answer of a run. Bodies are kept as they came and read when the run is over."""

    def __init__(self) -> None:
        self._rows: list[tuple[Ask | Attempt, int, bytes, bool, float, float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, asked: Ask | Attempt, response: Response) -> None:
        """Take down one answer; quick, so that it may be called in the midst of the load."""
        replayed = response.status == 201 and b"dempotency-" in response.head
        self._rows.append(
            (
                asked,
                response.status,
                response.body,
                replayed and response.header("idempotency-replayed") == "true",
                response.sent_at,
                response.received_at,
            )
        )

    def __iter__(self) -> Iterator[Answer]:
        for asked, status, body, replayed, sent_at, received_at in self._rows:
            yield read_answer(
                asked, status, body, replayed=replayed, sent_at=sent_at, received_at=received_at
            )


@dataclass(slots=True)
class Outcome:
    """Counts of a run, from its answers alone."""

    offered: int = 0
    sold_orders: int = 0
    sold_tickets: int = 0
    replayed: int = 0
    unknown: int = 0
    refused: dict[str, int] = field(default_factory=dict)


def outcome(answers: Iterable[Answer]) -> Outcome:
    """Count what clients were told."""
    total = Outcome()
    for answer in answers:
        total.offered += 1
        if answer.sold and answer.replayed:
            total.replayed += 1
        elif answer.sold:
            total.sold_orders += 1
            total.sold_tickets += answer.told_quantity
        elif answer.status == 0:
            total.unknown += 1
        else:
            code = answer.code or f"HTTP {answer.status}"
            total.refused[code] = total.refused.get(code, 0) + 1
    return total
