"""The faults of other flash-sale systems, by their rows in ``docs/HOLES.md``, proven absent here.

Each test says the row's fault and tries to bring it about, from outside, on the running system.
"""

import asyncio
import json
import time
from collections import Counter
from typing import Any

import pytest
from service import CAMPAIGNS, ORDERS, Client, Seen, Service, in_s, new_key
from waiting import until, until_equal


def sold(seen: list[Seen]) -> list[Seen]:
    return [one for one in seen if one.status == 201]


@pytest.mark.parametrize("tickets", [0, 1, 10])
async def test_row_01_the_last_ticket_is_sold_once(
    service: Service, client: Client, spread: Client, tickets: int
) -> None:
    """`>=` in the stock check: a stock of 10 sells 11."""
    campaign = await client.campaign(tickets=tickets)
    seen = await asyncio.gather(*(spread.buy(campaign, card.token) for card in service.cards(40)))
    assert len(sold(seen)) == tickets
    assert len({one.json()["order_no"] for one in sold(seen)}) == tickets
    assert Counter(one.code for one in seen)["sold-out"] == 40 - tickets
    assert all(count > 0 for count in await service.purchases_by_worker(campaign))
    assert await client.remaining(campaign) == [0]


async def test_row_02_more_at_once_than_any_pool_is_not_sold_out(
    service: Service, client: Client, spread: Client
) -> None:
    """Connections leak or the pool ends, and the error reads "sold out" for ever."""
    campaign = await client.campaign(tickets=10_000, card_limit=1_000, order_max=1)
    cards = service.cards(50)
    async with service.redis() as redis:
        before = int((await redis.info("clients"))["connected_clients"])
        for _ in range(3):
            seen = await asyncio.gather(
                *(spread.buy(campaign, card.token) for card in cards for _ in range(8))
            )
            assert {(one.status, one.code) for one in seen} == {(201, "")}
        after = int((await redis.info("clients"))["connected_clients"])
        # Every connection of the engine is lost at once; nobody is told "sold out" for it.
        killed = await redis.client_kill_filter(_type="normal", skipme=True)
        assert int(killed) > 0
        seen = await asyncio.gather(*(spread.buy(campaign, card.token) for card in cards))
    assert after - before < 40
    assert {(one.status, one.code) for one in seen} == {(201, "")}


async def test_row_04_retry_under_the_same_key_finds_a_readable_order(
    service: Service, client: Client, spread: Client
) -> None:
    """The hand-over fails after the ticket was taken; the retry says "purchased", with no order."""
    campaign, card, key = await client.campaign(), service.card(), new_key()
    with service.stopped("writer"):  # what takes the orders over is away
        first = await client.buy(campaign, card.token, key=key)
        again = await client.buy(campaign, card.token, key=key)
        read = await spread.get(first.headers["Location"], card.token)
    assert (first.status, again.status, read.status) == (201, 201, 200)
    assert again.json() == first.json() == read.json()

    async with service.database() as connection:
        orders = "SELECT count(*) FROM orders WHERE campaign_id = $1"
        await until_equal(lambda: connection.fetchval(orders, campaign), 1)
    assert (await spread.get(first.headers["Location"], card.token)).json() == first.json()


async def test_row_05_a_failed_first_try_is_not_replayed_as_success(
    service: Service, client: Client
) -> None:
    """A failed first try is cached under the idempotency key and replayed as success."""
    campaign, card, key = await client.campaign(tickets=0), service.card(), new_key()
    for _ in range(3):
        seen = await client.buy(campaign, card.token, key=key)
        assert (seen.status, seen.code) == (409, "sold-out")
        assert "Idempotency-Replayed" not in seen.headers
    assert (await client.get(ORDERS, card.token)).json()["items"] == []
    await client.step(campaign, "pause")
    assert (await client.buy(campaign, card.token, key=key)).code == "paused"
    await client.step(campaign, "resume")
    await client.step(campaign, "stock", showing="general", add=1)
    seen = await client.buy(campaign, card.token, key=key)
    assert (seen.status, "Idempotency-Replayed" in seen.headers) == (201, False)


async def test_row_10_window_pause_and_revocation_hold_at_the_sale(
    service: Service, client: Client
) -> None:
    """Window, pause and revocation are checked when the token is issued, not later."""
    campaign, card = await client.campaign(), service.card()
    token = service.token(card.member, card.union)  # issued while everything was well
    assert (await client.buy(campaign, token)).status == 201

    await client.step(campaign, "pause")
    assert (await client.buy(campaign, token)).code == "paused"
    await client.step(campaign, "resume")
    await service.asale("cards", "revoke", card.no, "--reason", "lost")
    await asyncio.sleep(1)
    assert (await client.buy(campaign, token)).status == 401
    token = service.token(card.member, card.union, generation=1)
    assert (await client.buy(campaign, token)).code == "card-revoked"
    await service.asale("cards", "restore", card.no, "--reason", "found")
    await asyncio.sleep(1)
    await client.step(campaign, "close")
    assert (await client.buy(campaign, token)).code == "closed"


async def test_row_13_the_limit_does_not_run_out(service: Service, client: Client) -> None:
    """The limit's counter has a time to live, so the limit resets after minutes."""
    campaign, card = await client.campaign(card_limit=1), service.card()
    assert (await client.buy(campaign, card.token)).status == 201
    async with service.redis() as redis:
        keys = [key async for key in redis.scan_iter(match=f"*{{{campaign}}}*", count=1_000)]
        lives = [await redis.pttl(key) for key in keys]
    assert len(keys) >= 4
    assert set(lives) == {-1}
    assert (await client.buy(campaign, card.token)).code == "limit-exceeded"


async def test_row_15_price_is_the_campaigns_and_a_key_its_cards(
    service: Service, client: Client
) -> None:
    """The price comes from the client; the idempotency key is not scoped to the buyer."""
    campaign, card, other, key = await client.campaign(), *service.cards(2), new_key()
    for field in ("price_fen", "amount_fen", "price", "amount"):
        priced: dict[str, Any] = {field: 1}
        seen = await client.buy(campaign, card.token, **priced)
        assert (seen.status, seen.json()["field"]) == (400, field)
    mine = (await client.buy(campaign, card.token, key=key)).json()
    theirs = await client.buy(campaign, other.token, 2, key=key)
    assert theirs.status == 201
    assert "Idempotency-Replayed" not in theirs.headers
    assert theirs.json()["order_no"] != mine["order_no"]
    assert (mine["amount_fen"], theirs.json()["amount_fen"]) == (500, 1_000)
    elsewhere = await client.buy(await client.campaign(), card.token, key=key)
    assert "Idempotency-Replayed" not in elsewhere.headers


async def test_row_16_limit_holds_and_an_order_number_stays(
    service: Service, client: Client, spread: Client
) -> None:
    """The limit is commented out; messages older than 5 s are dropped after the number went out."""
    campaign, card = await client.campaign(tickets=100, card_limit=3), service.card()
    with service.stopped("writer"):
        seen = await asyncio.gather(*(spread.buy(campaign, card.token) for _ in range(30)))
        assert len(sold(seen)) == 3
        assert {one.code for one in seen} == {"", "limit-exceeded"}
        await asyncio.sleep(6)
    numbers = {one.json()["order_no"] for one in sold(seen)}
    await until(lambda: client.all_applied(campaign), within_s=15)
    listed = (await client.get(ORDERS, card.token)).json()["items"]
    assert {order["order_no"] for order in listed} == numbers
    audit = await service.asale("audit", campaign, "--json")
    assert (audit.status, audit.json()["clean"]) == (0, True)


async def test_row_18_ticket_codes_of_one_second_differ_and_are_opaque(
    service: Service, client: Client, spread: Client
) -> None:
    """Ticket codes made from the clock's seconds: all codes of one second are the same."""
    campaign = await client.campaign(tickets=300)
    seen = await asyncio.gather(
        *(spread.buy(campaign, card.token, 3) for card in service.cards(60))
    )
    codes = [ticket["code"] for one in seen for ticket in one.json()["tickets"]]
    assert len(codes) == len(set(codes)) == 180
    assert {len(code) for code in codes} == {32}  # 128 bits, in hex
    # Of random digits no place is the same everywhere, nor do neighbours begin alike.
    for place in range(32):
        assert len({code[place] for code in codes}) > 8
    assert len({code[:8] for code in codes}) == 180


async def test_row_20_address_opens_nothing_and_the_token_identifies(
    service: Service, client: Client
) -> None:
    """ "Hidden" purchase addresses that are the same for all; identity from a client cookie."""
    campaign, card, other = await client.campaign(), *service.cards(2)
    order = (await client.buy(campaign, card.token)).json()
    path = f"{ORDERS}/{order['order_no']}"
    claims = {"Cookie": f"card_no={card.no}; token={card.token}", "X-Card-No": card.no}
    assert (await client.get(path, headers=claims)).status == 401
    assert (await client.get(path, other.token, headers=claims)).status == 404
    assert (await client.get(f"{path}?token={card.token}&card_no={card.no}")).status == 401
    seen = await client.ask(
        "POST",
        f"{CAMPAIGNS}/{campaign}/orders?card_no={card.no}",
        other.token,
        json={"quantity": 3},
        headers={"Idempotency-Key": new_key(), **claims},
    )
    assert seen.status == 201
    assert len((await client.get(ORDERS, card.token)).json()["items"]) == 1
    assert len((await client.get(ORDERS, other.token)).json()["items"]) == 1


async def test_row_21_only_an_operators_token_changes_a_live_sale(
    service: Service, client: Client
) -> None:
    """An open endpoint resets a live sale."""
    campaign, card = await client.campaign(tickets=5, cancel_until=in_s(3_600)), service.card()
    order = (await client.buy(campaign, card.token)).json()["order_no"]
    own = f"{ORDERS}/{order}/cancel"
    new = {"Idempotency-Key": new_key()}
    for token, headers, status in (
        (None, new, 401), (service.admin_token, new, 401), (service.card().token, new, 404),
        (card.token, {}, 400),
    ):  # fmt: skip
        assert (await client.ask("POST", own, token, headers=headers)).status == status
    document = (await client.get("/openapi.json")).json()
    bodies = {"stock": {"showing": "general", "add": 1, "reason": "x"}}
    tried = 0
    for path, methods in document["paths"].items():
        for method in set(methods) - {"get"}:
            if path.startswith((CAMPAIGNS, ORDERS)):
                continue  # a member's own purchases and cancellations
            real = path.replace("{id}", campaign).replace("{order_no}", order)
            body = bodies.get(path.rpartition("/")[2], {"reason": "x"})
            for token in (None, card.token):
                seen = await client.ask(method.upper(), real, token, json=body)
                assert seen.status in {401, 403}, (method, path)
                tried += 1
    assert tried >= 18
    for path in ("reset", "admin/reset", f"campaigns/{campaign}/reset", "init", "debug"):
        for method in ("GET", "POST", "DELETE"):
            assert (await client.ask(method, f"/api/v1/{path}", json={})).status in {404, 405}
    assert await client.remaining(campaign) == [4]
    assert (await client.get(f"{CAMPAIGNS}/{campaign}")).json()["state"] == "open"


async def test_row_23_lost_answer_is_found_by_key_and_among_orders(
    service: Service, client: Client
) -> None:
    """The success answer was lost and nothing gives the member the order again."""
    campaign, card, key = await client.campaign(), service.card(), new_key()
    host, port = service.url.removeprefix("http://").split(":")
    body = json.dumps({"quantity": 2}).encode()
    head = (
        f"POST {CAMPAIGNS}/{campaign}/orders HTTP/1.1\r\nHost: {host}\r\n"
        f"Authorization: Bearer {card.token}\r\nIdempotency-Key: {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode() + body)
    await writer.drain()
    writer.transport.abort()  # the phone loses the network before the answer comes

    async def listed() -> bool:
        return len((await client.get(ORDERS, card.token)).json()["items"]) == 1

    await asyncio.sleep(0.2)
    again = await client.buy(campaign, card.token, 2, key=key)
    assert again.status == 201
    await until(listed, within_s=2)
    order = (await client.get(ORDERS, card.token)).json()["items"][0]
    assert order == again.json()
    assert await client.remaining(campaign) == [98]


async def test_row_25_reading_what_is_left_and_taking_it_is_one_step(
    service: Service, client: Client, spread: Client
) -> None:
    """Read what is left, then insert, without a lock."""
    campaign = await client.campaign(tickets=30)
    cards = service.cards(40)
    quantities = [1 + number % 3 for number in range(len(cards))]
    seen = await asyncio.gather(
        *(
            spread.buy(campaign, card.token, quantity)
            for card, quantity in zip(cards, quantities, strict=True)
        ),
        *(spread.get(f"{CAMPAIGNS}/{campaign}/availability") for _ in range(40)),
    )
    bought = sum(one.json()["quantity"] for one in sold(seen))
    (left,) = await client.remaining(campaign)
    assert bought + left == 30
    # Each refusal is true: fewer tickets were left than the purchase asked for.
    for one, quantity in zip(seen, quantities, strict=False):
        if one.code == "sold-out":
            assert one.json()["remaining"] < quantity
    started = time.monotonic()
    audit = await service.asale("audit", campaign, "--json")
    assert (audit.status, audit.json()["clean"]) == (0, True)
    assert time.monotonic() - started < 10
