"""One rig for the tests of a module, as its ``RIG`` says; each test makes campaigns of its own."""

from collections.abc import AsyncIterator

import pytest
from rig import Rig, rig_up


@pytest.fixture(scope="module")
async def rig(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Rig]:
    """The engine, whole, in real processes; ``RIG`` of the module gives ``rig_up``'s arguments."""
    options = getattr(request.module, "RIG", {})
    async with rig_up(tmp_path_factory.mktemp("f"), **options) as rig:
        yield rig


@pytest.fixture(autouse=True)
async def mended(rig: Rig) -> AsyncIterator[None]:
    """The next test finds everything running, whatever this one broke."""
    yield
    loads, rig._loads[:] = list(rig._loads), []
    rig.campaigns.clear()
    for load in loads:
        await load.stop()
    await rig.settle()
