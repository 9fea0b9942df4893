"""Fixtures of the fast path's tests."""

import asyncio
from collections.abc import Iterator

import pytest
from fast_path_rig import World, make_campaigns, world_on
from service import Service

BOTH_LOOPS = pytest.mark.parametrize("world", ["uvloop", "asyncio"], indirect=True)


@pytest.fixture(scope="module")
def campaigns(service: Service) -> dict[str, str]:
    return asyncio.run(make_campaigns(service))


@pytest.fixture(scope="module")
def revoked(service: Service) -> str:
    card = service.card()
    assert service.sale("cards", "revoke", card.no, "--reason", "lost").status == 0
    return service.token(card.member, card.union, generation=1)


@pytest.fixture(name="world", scope="module")
def world_fixture(
    request: pytest.FixtureRequest, service: Service, campaigns: dict[str, str], revoked: str
) -> Iterator[World]:
    with world_on(service, getattr(request, "param", "uvloop"), campaigns, revoked) as world:
        yield world
