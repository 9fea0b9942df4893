"""A stream is followed along the chain from a position on, and the writer is waited for."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from ledger_maker import Ledger, created, operation, sold
from stock_maker import CAMPAIGN

from sale.ledger.chain import START, Position
from sale.stock.keys import campaign_keys
from sale.trust.history import History, stream_ends, wait_applied

STREAM = campaign_keys(CAMPAIGN).stream


@pytest.fixture
async def positions(redis: Any) -> list[Position]:
    """A stream of six entries of two events; the chain's positions before and after each."""
    book, found = Ledger(), [START]
    for n in range(6):
        await book.append(redis, created(50) if n == 0 else operation("opened"), sold(n))
        found.append(Position(book.seq, book.chain))
    return found


async def told(redis: Any, position: Position | None, **how: Any) -> tuple[list[int], History]:
    """Numbers of the entries that were given, and what is said of the stream."""
    history = History(redis, CAMPAIGN, position, **how)
    return [entry.last async for entry in history.follow()], history


@pytest.mark.parametrize("applied", range(7))
async def test_whole_stream_passes_through_each_position(
    redis: Any, positions: list[Position], applied: int
) -> None:
    tail, history = await told(redis, positions[applied])
    assert tail == [2 * n for n in range(applied + 1, 7)]
    assert (history.at, history.ends, history.met) == (positions[6], 12, True)
    assert (history.wrong, await stream_ends(redis, CAMPAIGN)) == ("", 12)


async def test_stream_alone_is_followed_from_its_first_entry(
    redis: Any, positions: list[Position]
) -> None:
    await redis.xtrim(STREAM, minid="5-0", approximate=False)
    tail, history = await told(redis, None)
    assert (tail, history.at, history.wrong) == ([6, 8, 10, 12], positions[6], "")


async def test_gap_beyond_the_position_ends_the_tail(redis: Any, positions: list[Position]) -> None:
    await redis.xdel(STREAM, "8-0")
    tail, history = await told(redis, positions[2])
    assert (tail, history.at, history.ends) == ([6], None, 10)
    assert history.wrong == "event 7 is missing: next is 9"


async def test_gap_before_the_position_leaves_the_tail(
    redis: Any, positions: list[Position]
) -> None:
    await redis.xdel(STREAM, "4-0")
    tail, history = await told(redis, positions[4])
    assert (tail, history.at) == ([10, 12], positions[6])
    assert history.wrong == "event 3 is missing: next is 5"


@pytest.mark.parametrize(("applied_now", "sound"), [(8, True), (4, False), (None, False)])
async def test_gap_of_what_was_trimmed_meanwhile_is_none(
    redis: Any, positions: list[Position], applied_now: int | None, sound: bool
) -> None:
    # Given: read at position 4, while the writer goes on and trims
    async def now() -> int:
        return applied_now or 0

    await redis.xtrim(STREAM, minid="9-0", approximate=False)
    # When
    tail, history = await told(
        redis, positions[2], applied_now=None if applied_now is None else now
    )
    # Then
    assert (tail == [10, 12]) is sound
    assert (history.wrong == "") is sound
    assert await history.passes() is sound


@pytest.mark.parametrize(
    "position",
    [Position(4, "1" * 40), Position(3, "1" * 40)],
    ids=["another hash", "within an entry"],
)
async def test_stream_that_does_not_pass_through_the_position_is_wrong(
    redis: Any, positions: list[Position], position: Position
) -> None:
    tail, history = await told(redis, position)
    assert tail == []
    assert history.wrong == "the chain in Redis does not pass through PostgreSQL's"
    assert not history.met


async def test_stream_that_ends_before_the_position_is_not_met(
    redis: Any, positions: list[Position]
) -> None:
    for position in (Position(20, "1" * 40), positions[6]):
        await redis.xdel(STREAM, "12-0")
        tail, history = await told(redis, position)
        assert (tail, history.met, await history.passes()) == ([], False, False)


@pytest.mark.parametrize("decode", [True, False])
async def test_event_that_cannot_be_read_is_wrong_where_it_matters(
    redis: Any, decode: bool
) -> None:
    book = Ledger()
    await book.append(redis, created(5))
    after = Position(book.seq, book.chain)
    await book.append(redis, operation("moved"))
    _, history = await told(redis, after, decode=decode)
    assert history.wrong == ("entry 2: unknown kind 'moved'" if decode else "")
    _, history = await told(redis, Position(book.seq, book.chain), decode=decode)
    assert history.wrong == ""


def steps(*numbers: int) -> Callable[[], Any]:
    """Numbers that a writer has applied, the last one again and again."""
    left = list(numbers)

    async def now() -> int:
        return left.pop(0) if len(left) > 1 else left[0]

    return now


@pytest.mark.parametrize(
    ("numbers", "patience_s", "within_s", "found"),
    [
        ((5,), 0.0, 0.0, 5),
        ((0, 1, 2, 3, 4, 5), 0.2, 5.0, 5),
        ((0, 1), 0.05, 5.0, 1),
        ((0, 1, 2, 3, 4, 5), 5.0, 0.02, None),
    ],
    ids=["there", "goes on", "stands still", "too slow"],
)
async def test_writer_is_waited_for_as_long_as_it_goes_on(
    numbers: tuple[int, ...], patience_s: float, within_s: float, found: int | None
) -> None:
    began = time.monotonic()
    seen = await wait_applied(
        steps(*numbers), 5, patience_s=patience_s, within_s=within_s, pause_s=0.01
    )
    assert seen == found if found is not None else seen < 5
    assert time.monotonic() - began < 2.0
