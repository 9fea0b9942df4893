"""Every answer of a run, kept as it came and read when the run is over."""

from collections.abc import Iterator

from loadtest.books.answers import Answer, Asked, read_answer
from loadtest.wire import Response


class AnswerBook:
    """Every answer of a run. Bodies are kept as they came and read when the run is over."""

    def __init__(self) -> None:
        self._rows: list[tuple[Asked, int, bytes, bool, float, float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, asked: Asked, response: Response) -> None:
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
