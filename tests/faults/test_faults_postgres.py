"""PostgreSQL returns with an older copy, or is away for a while."""

from pathlib import Path

import pytest
from load import Load
from rig import Rig
from waiting import until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

RIG = {"workers": 2, "proxied": [("*", "postgres")]}


async def test_older_copy_of_postgres_is_filled_from_the_stream(rig: Rig, tmp_path: Path) -> None:
    campaign = await rig.campaign(tickets=10_000, card_limit=30)
    load = await rig.rush(campaign, seconds=0.5)
    await load.over()
    await rig.copy_postgres(tmp_path / "old")
    copied = await rig.written(campaign)
    load = await rig.rush(campaign)
    await until(lambda: has_written(rig, campaign, copied + 50))
    ahead = await rig.written(campaign)
    await rig.restore_postgres(tmp_path / "old")
    went_back_to = await rig.written(campaign)
    await rig.selling(campaign, within_s=5)
    await load.finish()

    print(f"PostgreSQL went back from event {ahead} to {went_back_to}")
    assert ahead > went_back_to >= copied
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_sales_stop_at_the_lag_bound_and_resume(rig: Rig) -> None:
    """Beyond the bound of unapplied events no ticket is sold until the writer catches up."""
    campaign = await rig.campaign(tickets=10_000, card_limit=30)
    await rig.settle()
    kept = dict(rig.settings)
    rig.settings["SALE_LEDGER_BEHIND_MAX_EVENTS"] = "200"
    try:
        for name in ("serve-1", "serve-2"):
            await rig.restart(name)
        for link in rig.links("postgres"):
            link.cut()
        load = await rig.rush(campaign, rate=300)
        await until(lambda: has_stopped(load))
        behind = await rig.sold(campaign) - await rig.written(campaign)
        assert 100 <= behind < 200 + 256  # the head learns a little later what was applied
        for link in rig.links("postgres"):
            link.heal()
        took_s = await rig.selling(campaign, within_s=5)
        print(f"selling {took_s:.2f} s after PostgreSQL was back")
        await load.finish()
    finally:
        rig.settings = kept
    await rig.settle()
    assert await rig.verdict(campaign) == []
    for name in ("serve-1", "serve-2"):
        await rig.restart(name)


async def has_written(rig: Rig, campaign: str, seq: int) -> bool:
    return await rig.written(campaign) >= seq


async def has_stopped(load: Load) -> bool:
    return any(answer.code == "unavailable" for answer in load.answers)
