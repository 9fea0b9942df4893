"""One rig per test module, built from its ``RIG``; each test makes its own campaigns."""

from collections.abc import AsyncIterator

import pytest
from rig import Rig, rig_up


@pytest.fixture(scope="module")
async def rig(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Rig]:
    """The engine in real processes; the module's ``RIG`` gives the arguments of ``rig_up``."""
    options = getattr(request.module, "RIG", {})
    async with rig_up(tmp_path_factory.mktemp("f"), **options) as rig:
        yield rig


@pytest.fixture(autouse=True)
async def mended(rig: Rig) -> AsyncIterator[None]:
    """Restart everything after each test."""
    yield
    loads, rig._loads[:] = list(rig._loads), []
    rig.campaigns.clear()
    for load in loads:
        await load.stop()
    await rig.settle()
