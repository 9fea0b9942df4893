"""Some short seeds of the soak, and tests that its judges find faults."""

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak.judge import Lost, _pauses, _replays
from soak.play import ActTold
from soak.run import run_seeds
from soak.schedule import Act, plan

from loadtest.books.answers import Answer

SECONDS = 1.5
FIXED = (1, 9, 19, 22, 24)
"""Seeds that failed once: everything was killed at once, several times in short succession."""
SEEDS = 7
FIXED_LOSSY = (944913306,)
"""Failed once: the tail was lost after every process that answered had stopped without a writer."""
LOSSY_SEEDS = 2


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, because sockets are created below it."""
    made = Path(tempfile.mkdtemp(prefix="soak-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.fault
@pytest.mark.timeout(400)
async def test_all_answers_are_true_under_random_faults(folder: Path, rng: random.Random) -> None:
    seeds = [*FIXED, *(rng.getrandbits(31) for _ in range(SEEDS - len(FIXED)))]
    broken = await run_seeds(seeds, SECONDS, folder)
    assert not broken, "\n".join(broken[0].report())


@pytest.mark.fault
@pytest.mark.timeout(120)
async def test_lost_files_list_each_lost_order_and_sell_once(
    folder: Path, rng: random.Random
) -> None:
    random_seeds = (rng.getrandbits(31) for _ in range(LOSSY_SEEDS - len(FIXED_LOSSY)))
    seeds = [*FIXED_LOSSY, *random_seeds]
    broken = await run_seeds(seeds, SECONDS, folder, lossy=True)
    assert not broken, "\n".join(broken[0].report())


def test_seed_always_gives_the_same_schedule() -> None:
    assert plan(7, 3.0) == plan(7, 3.0)
    assert plan(7, 3.0) != plan(8, 3.0)
    assert list(plan(7, 3.0, lossy=True).lines())


def _answer(at_s: float, status: int, code: str = "", **more: object) -> Answer:
    fields = {"member_no": "182850", "key": "k", "showing": "a", "quantity": 1, **more}
    order_no = "c.5.0000ff" if status == 201 else ""
    return Answer(
        status=status, code=code, order_no=order_no, sent_at=at_s, received_at=at_s + 0.1, **fields
    )


@pytest.mark.parametrize(
    ("later", "kinds"),
    [
        (_answer(2, 201, replayed=True), []),
        (_answer(2, 409, "sold-out"), ["replay-refused"]),
        (_answer(2, 503, "unavailable"), []),
        (_answer(0.05, 409, "sold-out"), []),
        (_answer(2, 201, quantity=2), ["mismatch-passed"]),
        (_answer(2, 422, "idempotency-mismatch", quantity=2), []),
    ],
    ids=["replayed", "refused", "unavailable", "at once", "other content sold", "other content"],
)
def test_judge_finds_a_changed_answer_to_a_key(later: Answer, kinds: list[str]) -> None:
    assert [row[0] for row in _replays([_answer(1, 201), later], None)] == kinds


def test_judge_finds_a_sale_during_a_pause() -> None:
    pause = ActTold(Act(0, "pause", 0, "p", 1), "soak 1 p", "c", [(1.0, 1.2, 200)])
    resume = ActTold(Act(0, "resume", 0, "r", 1), "soak 1 r", "c", [(3.0, 3.2, 200)])
    before, within, after = _answer(1.1, 201), _answer(2.0, 201), _answer(3.1, 201)
    found = [row[0] for row in _pauses([before, within, after], [pause, resume])]
    assert found == ["sold-while-stopped"]


def test_listed_loss_covers_only_its_number_or_key() -> None:
    told = _answer(1, 201)
    assert Lost(frozenset({5}), frozenset()).lists(told)
    assert not Lost(frozenset({6}), frozenset({(5, "another key")})).lists(told)
