"""The small programs that measure parts: they run, and measure what the engine really does."""

import measure_fast_path as fast_path
import measure_scripts as shapes
import pytest

from sale.stock.scripts import PURCHASE


def test_each_shape_changes_one_line_of_the_script() -> None:
    compared = shapes.shapes()
    assert compared[0].source == PURCHASE.source
    sources = [shape.source for shape in compared]
    assert len(set(sources)) == len(sources)
    for source in sources[1:]:
        kept = set(PURCHASE.source.splitlines()) - set(source.splitlines())
        assert len(kept) <= 1, kept


async def test_each_part_of_the_fast_path_has_a_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast_path, "ROUNDS", 1)
    monkeypatch.setattr(fast_path, "BATCHES", 2)
    least = await fast_path.Parts().run()
    assert {"read, check, queue (token never seen)", " head, by its shape"} < set(least)
    assert len(least) == 14
    assert min(least.values()) > 0
