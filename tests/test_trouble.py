"""A campaign that cannot be read, worded, applied or audited never takes another with it."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from redis.asyncio import Redis
from service import ADMIN, CAMPAIGNS, ORDERS, Client, Service, in_s, metric
from stock_maker import operation
from waiting import until

from sale.db import deployment
from sale.ledger.chain import link
from sale.stock.keys import campaign_keys
from sale.stock.scripts import CallReply, Scripts

FAR = {"far": 253_402_300_799_000, "huge": 10**18, "past": -5}
"""Openings as a version without bounds took them: 9999-12-31T23:59:59Z, a number, before 1970."""
BROKEN = ("torn", "garbled", "newer")


class Planted(NamedTuple):
    """Campaigns by what is wrong with them; ``sound`` is right."""

    ids: dict[str, str]
    scripts: Scripts
    token: str

    @property
    def redis(self) -> Redis:
        return self.scripts.redis

    def of(self, *kinds: str) -> set[str]:
        return {self.ids[kind] for kind in kinds}


async def add_entry(redis_: Redis, campaign: str, payload: bytes) -> None:
    """Append an entry of one event whose chain hash is right, whatever its payload."""
    keys = campaign_keys(campaign)
    values: Any = await redis_.hmget(keys.head, "seq", "chain", "epoch", "clock")
    seq, epoch, clock = int(values[0]) + 1, int(values[2]), int(values[3])
    chain = link(values[1].decode(), seq, clock, epoch, payload)
    fields: Any = {"n": 1, "t": clock, "e": epoch, "h": chain, "d": payload}
    async with redis_.pipeline(transaction=True) as pipe:
        pipe.xadd(keys.stream, fields, id=f"{seq}-0")
        pipe.hset(keys.head, mapping={"seq": seq, "chain": chain})
        await pipe.execute()


@pytest.fixture
async def planted(service: Service, client: Client) -> AsyncIterator[Planted]:
    """One campaign of each kind, planted past today's checks; all are sound again at the end."""
    async with service.database() as connection:
        nonce, _ = await deployment.read(connection)
    ids = {kind: await client.campaign(opens_at=None) for kind in FAR}
    ids |= {kind: await client.campaign() for kind in (*BROKEN, "sound")}
    token = service.card().token
    for kind in (*BROKEN, "sound"):
        assert (await client.buy(ids[kind], token)).status == 201
    async with service.redis() as connected:
        planted = Planted(ids, Scripts(connected, nonce), token)
        for kind, opens_at_ms in FAR.items():
            reply = await planted.scripts.transition(
                ids[kind], "schedule", operation(), opens_at_ms
            )
            assert reply.reply is CallReply.OK
        await connected.hset(campaign_keys(ids["torn"]).head, "config", '{"id":')
        await add_entry(connected, ids["garbled"], b'[["sold","110')
        await add_entry(connected, ids["newer"], b'[["moved",{"actor":"cli:me"}]]')
        yield planted
        for kind in ("far", "huge"):
            assert (await client.step(ids[kind], "schedule", at=in_s(3_600))).status == 200
        for kind in BROKEN:
            mended = await service.asale("recover", ids[kind])
            assert mended.status == 0, mended


async def test_readers_go_on_beside_broken_campaigns(
    service: Service, client: Client, planted: Planted
) -> None:
    ids, others = planted.ids, planted.of(*FAR, "sound")

    # Lists leave out what cannot be read, and word what is far.
    for path, token in ((CAMPAIGNS, None), (ADMIN, service.admin_token)):
        pages = await client.pages(f"{path}?limit=200", token)
        listed = {item["id"] for page in pages for item in page}
        assert others <= listed
        assert ids["torn"] not in listed
    for kind in FAR:
        assert (await client.get(f"{CAMPAIGNS}/{ids[kind]}")).status == 200

    async def unavailable() -> bool:  # what was kept of it may be told for a moment
        return (await client.get(f"{CAMPAIGNS}/{ids['torn']}")).code == "unavailable"

    await until(unavailable)
    by_hand = await service.asale("campaign", "list", "--json")
    assert others <= {item["id"] for item in by_hand.json()}
    assert (by_hand.err.count("\n"), ids["torn"] in by_hand.err) == (1, True)
    shown = await service.asale("campaign", "show", ids["torn"])
    assert (shown.status, shown.err.count("\n")) == (1, 1)
    for kind in ("far", "huge"):
        assert (await service.asale("campaign", "show", ids[kind])).status == 0
        early = await client.buy(ids[kind], planted.token)
        assert (early.code, early.json()["opens_at"][:5]) == ("not-open", "9999-")

    # A card sees all its orders.
    orders = await client.get(ORDERS, planted.token)
    assert orders.status == 200
    assert {order["campaign"] for order in orders.json()["items"]} >= planted.of("sound", *BROKEN)

    # The audit says what is wrong with each, and goes on.
    audit = await service.asale("audit", "--json")
    found = {each["id"]: each["clean"] for each in audit.json()["campaigns"]}
    assert audit.status == 1
    assert {each for each, clean in found.items() if not clean} == planted.of(*BROKEN)
    assert (await service.asale("audit", ids["sound"])).status == 0
    assert (await service.asale("audit", ids["newer"])).status == 1

    # The doctor names each.
    doctor = await service.asale("doctor", "--json")
    trouble = {each["id"]: each["trouble"] for each in doctor.json()["campaigns"]}
    assert doctor.status == 1
    assert {each for each, why in trouble.items() if why} == planted.of("far", "huge", *BROKEN)
    assert "schedule it again" in trouble[ids["far"]]
    assert "unknown kind" in trouble[ids["newer"]]
    assert "recover it" in trouble[ids["torn"]]


async def test_processes_go_on_beside_broken_campaigns(
    service: Service, client: Client, planted: Planted
) -> None:
    ids = planted.ids

    # The ledger of others is carried over, and that of moments that are far, too.
    assert (await client.buy(ids["sound"], service.card().token)).status == 201
    for kind in (*FAR, "sound"):
        await until(lambda kind=kind: client.all_applied(ids[kind]))  # type: ignore[misc]

    # The clock opens others; members of a broken campaign go on buying.
    soon = await client.campaign(opens_at=in_s(0.5))

    async def opened() -> bool:
        return bool((await client.get(f"{CAMPAIGNS}/{soon}")).json()["state"] == "open")

    await until(opened)
    assert (await client.buy(ids["past"], service.card().token)).status == 201

    # Metric, log and readiness name each, and the host stays ready.
    async def named() -> bool:
        seen = await client.get("/readyz")
        said = " ".join(seen.json().get("campaigns", []))
        return seen.status == 200 and all(each in said for each in planted.of("far", *BROKEN))

    await until(named)
    text = await service.metrics()
    for kind in ("far", "huge", "torn"):
        assert metric(text, "sale_campaign_troubled", ids[kind]) == 1
    for kind in ("garbled", "newer"):
        assert metric(text, "sale_ledger_stuck", ids[kind]) == 1
    log = service.log_file.read_text("utf-8")
    for kind in ("far", *BROKEN):
        assert any(
            ids[kind] in line
            for line in log.splitlines()
            if "campaign.step_failed" in line or "ledger.stuck" in line
        )


async def test_way_out_of_a_far_opening_loses_nothing(
    service: Service, client: Client, planted: Planted
) -> None:
    for kind in ("far", "huge"):
        campaign = planted.ids[kind]
        # Given
        await until(lambda campaign=campaign: client.all_applied(campaign))  # type: ignore[misc]
        before = (await client.get(f"{ADMIN}/{campaign}/live", service.admin_token)).json()
        # When
        again = await service.asale("campaign", "schedule", campaign, "--at", in_s(3_600))
        # Then
        assert again.status == 0, again
        await until(lambda campaign=campaign: client.all_applied(campaign))  # type: ignore[misc]
        after = (await client.get(f"{ADMIN}/{campaign}/live", service.admin_token)).json()
        assert after["ledger_seq"] == before["ledger_seq"] + 1
        assert (await service.asale("audit", campaign)).status == 0


async def test_way_out_of_a_broken_ledger_keeps_every_order(
    service: Service, client: Client, planted: Planted
) -> None:
    for kind in BROKEN:
        campaign = planted.ids[kind]
        # Given: what was bought after it broke counts as well
        late = service.card().token
        assert (await client.buy(campaign, late)).status == 201
        bought = [
            (await client.get(ORDERS, each)).json()["items"] for each in (planted.token, late)
        ]
        # When
        done = await service.asale("recover", campaign, "--json")
        # Then
        assert (done.status, done.json()["changed"]) == (0, True)
        lost = sum(last - first + 1 for first, last in done.json()["voided"])
        assert lost == (0 if kind == "torn" else 1)
        await until(lambda campaign=campaign: client.all_applied(campaign))  # type: ignore[misc]
        for token, orders in zip((planted.token, late), bought, strict=True):
            now = (await client.get(ORDERS, token)).json()["items"]
            assert {each["order_no"] for each in now} == {each["order_no"] for each in orders}
        assert (await service.asale("audit", campaign)).status == 0

        async def sells(campaign: str = campaign) -> bool:
            return (await client.buy(campaign, service.card().token)).status == 201

        await until(sells)
