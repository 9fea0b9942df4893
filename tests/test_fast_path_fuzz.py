"""Some seconds of ``fuzz_fast_path``; ``python -m tests.fuzz_fast_path`` runs longer."""

import asyncio

import pytest
from fuzz_fast_path.properties import properties, quiet_logs

EXAMPLES = {"heads": 600, "shapes_of_heads": 600, "connections": 200, "bounds": 150, "rushes": 150}


@pytest.mark.parametrize("name", EXAMPLES)
def test_fast_path_treats_generated_input_as_aiohttp_does(name: str, seed: int) -> None:
    with quiet_logs(), asyncio.Runner() as runner:
        found = properties(runner, EXAMPLES[name], seed)
        (prove,) = (each for each in found if each.__name__ == name)
        prove()
