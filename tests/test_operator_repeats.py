"""An operator's key that is sent again is answered as the first time, whatever happened since."""

import asyncio
from typing import Any

import pytest
from service import ADMIN, Client, Seen, Service, campaign_table, new_key, showings
from shop import ME, Shop
from stock_maker import campaign

from sale.domain.campaign import State
from sale.domain.problem import Problem, Refused
from sale.stock.rebuild import freeze

KEY = "Idempotency-Key"


@pytest.fixture
async def operator(service: Service) -> str:
    """Token of an operator of the district."""
    return (await asyncio.to_thread(service.operator, "operator"))[1]


async def send(
    client: Client, method: str, path: str, token: str, key: str | None, body: Any = None
) -> Seen:
    given = {} if body is None else {"json": body}
    headers = {} if key is None else {KEY: key}
    return await client.ask(method, path, token, headers=headers, **given)


async def test_delete_again_is_deleted(service: Service, spread: Client, operator: str) -> None:
    made = await spread.campaign(draft=True)
    path, key = f"{ADMIN}/{made}", new_key()
    seen = await asyncio.gather(*(send(spread, "DELETE", path, operator, key) for _ in range(8)))
    assert {each.status for each in seen} == {204}
    assert (await send(spread, "DELETE", path, operator, key)).status == 204
    for other in (None, new_key()):
        assert (await send(spread, "DELETE", path, operator, other)).status == 404
    mixed = await send(spread, "POST", f"{path}/open", operator, key, {})
    assert (mixed.status, mixed.code) == (422, "idempotency-mismatch")


async def test_delete_again_spares_new_draft(
    service: Service, client: Client, operator: str
) -> None:
    made = await client.campaign(draft=True)
    path, key = f"{ADMIN}/{made}", new_key()
    assert (await send(client, "DELETE", path, operator, key)).status == 204
    table = campaign_table(made, draft=True, title="另一个")
    assert (await send(client, "POST", ADMIN, service.admin_token, None, table)).status == 201
    assert (await send(client, "DELETE", path, operator, key)).status == 204
    there = (await client.get(path, operator)).json()
    assert (there["title"], there["state"]) == ("另一个", "draft")


async def test_create_again_after_its_end_is_never_another(
    service: Service, client: Client, operator: str
) -> None:
    table, key = campaign_table(service.new_id(), draft=True, title="第一个"), new_key()
    path = f"{ADMIN}/{table['id']}"
    first = await send(client, "POST", ADMIN, operator, key, table)
    assert (await send(client, "DELETE", path, operator, None)).status == 204

    async def check() -> None:
        again = await send(client, "POST", ADMIN, operator, key, table)
        assert again.status == 201
        assert again.headers["Location"] == path
        assert again.json() == {**first.json(), "state": "deleted"}

    await check()
    assert (await client.get(path, operator)).status == 404
    # The same table again, by somebody else: another draft, that looks like the first.
    for changes in ({}, {"title": "别人的", "owner": "longtan", "showings": showings(1, 2)}):
        other = table | changes
        assert (await send(client, "POST", ADMIN, service.admin_token, None, other)).status == 201
        await check()
        assert (await send(client, "POST", f"{path}/stock", service.admin_token, None,
                           {"showing": other["showings"][0]["id"], "add": 1, "reason": "x"})
                ).status == 200  # fmt: skip
        await check()
        assert (await send(client, "DELETE", path, service.admin_token, None)).status == 204
    await check()


async def test_stock_again_after_its_draft_is_told_as_it_was(
    service: Service, client: Client, operator: str
) -> None:
    made, key = await client.campaign(draft=True, showings=showings(10, 20)), new_key()
    path = f"{ADMIN}/{made}"
    wish = {"showing": "b", "add": 7, "reason": "more"}
    first = await send(client, "POST", f"{path}/stock", operator, key, wish)
    assert [each["tickets"] for each in first.json()["showings"]] == [10, 27]
    assert (await send(client, "DELETE", path, operator, None)).status == 204
    table = campaign_table(made, draft=True, owner="longtan", showings=showings(1))
    for _ in range(2):
        again = await send(client, "POST", f"{path}/stock", operator, key, wish)
        assert (again.status, again.json()) == (200, {**first.json(), "state": "deleted"})
        await send(client, "POST", ADMIN, service.admin_token, None, table)
    there = (await client.get(path, service.admin_token)).json()
    assert [each["tickets"] for each in there["showings"]] == [1]


async def test_key_for_other_content_stays_a_mismatch(
    service: Service, client: Client, operator: str
) -> None:
    table, key = campaign_table(service.new_id(), draft=True), new_key()
    path = f"{ADMIN}/{table['id']}"
    assert (await send(client, "POST", ADMIN, operator, key, table)).status == 201
    assert (await send(client, "DELETE", path, operator, key)).status == 422
    assert (await send(client, "DELETE", path, operator, None)).status == 204
    other = await send(client, "POST", ADMIN, operator, key, table | {"price_fen": 1})
    assert (other.status, other.code) == (422, "idempotency-mismatch")
    # Another account's key of the same name is another key.
    mine = await send(client, "POST", ADMIN, service.admin_token, key, table | {"title": "新的"})
    assert (mine.status, mine.json()["title"]) == (201, "新的")


@pytest.mark.parametrize("lost", ["head", "operations", "all"])
async def test_recovered_redis_still_knows_repeats(shop: Shop, lost: str) -> None:
    first, second = campaign(10, 5), campaign(3)
    await shop.desk.create(first, ME, None, "made")
    await shop.take("delete", first.id, "gone")
    await shop.desk.create(second, ME, None, "other")
    await shop.applied()
    if lost == "all":
        await shop.redis.flushall()
    else:
        await shop.redis.delete(getattr(shop.stock.keys, lost))
    await freeze(shop.redis, first.id, "a test")
    await shop.recover()
    again = await shop.desk.create(first, ME, None, "made")
    assert (again.state, again.campaign) == (State.DELETED, first)
    await shop.take("delete", first.id, "gone")
    there = await shop.desk.create(second, ME, None, "other")
    assert (there.state, there.campaign) == (State.DRAFT, second)
    await shop.applied()
    assert (await shop.audit()).clean


async def test_campaign_from_before_the_note_is_the_first(shop: Shop) -> None:
    made = campaign(10, 5)
    await shop.desk.create(made, ME, None, "made")
    await shop.redis.hdel(shop.stock.keys.head, "made")
    assert (await shop.desk.create(made, ME, None, "made")).state is State.DRAFT


async def test_repeat_is_unknown_until_postgresql_has_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sale.operators.campaigns.APPLIED_WAIT_S", 0.05)
    made = campaign(10, 5)
    await shop.desk.create(made, ME, None, "made")
    await shop.applied()
    await shop.stop_writer()
    await shop.take("delete", made.id)
    with pytest.raises(Refused) as caught:
        await shop.desk.create(made, ME, None, "made")
    assert caught.value.problem is Problem.UNAVAILABLE
    await shop.start_writer()
    await shop.applied()
    assert (await shop.desk.create(made, ME, None, "made")).state is State.DELETED
