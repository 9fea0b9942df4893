"""Purchases and members' reads against the running system."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from page_app import with_pages
from service import (
    ADMIN,
    CAMPAIGNS,
    ORDERS,
    PAST,
    Card,
    Client,
    Seen,
    Service,
    in_s,
    new_key,
    showings,
)
from waiting import until

from sale.api import pages
from sale.api import request as reading
from sale.api.calls import Call
from sale.api.dispatch import add_routes
from sale.http.routes import Route

BODY_MAX = 16 * 1024
JSON = {"Content-Type": "application/json"}


def orders_of(campaign: str) -> str:
    return f"{CAMPAIGNS}/{campaign}/orders"


async def post_raw(
    client: Client, campaign: str, token: str | None, body: Any, **headers: str
) -> Seen:
    """POST a purchase whose body and headers are exactly these."""
    told = {"Idempotency-Key": new_key(), **JSON, **headers}
    return await client.ask(
        "POST",
        orders_of(campaign),
        token,
        data=body,
        headers={name.replace("_", "-"): value for name, value in told.items()},
    )


def unverified(header: dict[str, Any], claims: dict[str, Any], signature: str = "") -> str:
    """A token put together by hand."""
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()) for part in (header, claims))
    return ".".join([*(part.decode().rstrip("=") for part in parts), signature])


# The purchase.


async def test_order_of_a_purchase_follows_the_contract(service: Service, client: Client) -> None:
    campaign, card = await client.campaign(), service.card()

    seen = await client.buy(campaign, card.token, 2)

    order = seen.json()
    assert seen.status == 201
    assert seen.headers["Location"] == f"{ORDERS}/{order['order_no']}"
    assert "Idempotency-Replayed" not in seen.headers
    assert list(order) == [
        *("order_no", "campaign", "showing", "quantity", "state", "amount_fen"),
        *("pay_before", "created_at", "tickets", "card_remaining", "payment", "cancel_until"),
    ]
    assert (order["campaign"], order["showing"], order["quantity"]) == (campaign, "general", 2)
    assert (order["state"], order["amount_fen"], order["pay_before"]) == ("confirmed", 1_000, None)
    assert (order["card_remaining"], order["cancel_until"]) == (1, None)
    assert order["payment"] == {
        "state": "due", "amount_fen": 1_000, "paid_fen": 0, "refunded_fen": 0,
    }  # fmt: skip
    assert [(ticket["no"], ticket["state"]) for ticket in order["tickets"]] == [
        (1, "valid"),
        (2, "valid"),
    ]
    assert abs(datetime.fromisoformat(order["created_at"]).timestamp() - time.time()) < 5
    assert set(order["order_no"]) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-"
    )
    assert len(order["order_no"]) <= 64
    assert await client.remaining(campaign) == [98]


async def test_same_key_replays_the_order_as_it_is_now(service: Service, client: Client) -> None:
    campaign, card, key = await client.campaign(), service.card(), new_key()
    first = (await client.buy(campaign, card.token, key=key)).json()
    await client.buy(campaign, card.token)

    seen = await client.buy(campaign, card.token, key=key, showing="general")

    assert (seen.status, seen.headers["Idempotency-Replayed"]) == (201, "true")
    assert seen.headers["Location"] == f"{ORDERS}/{first['order_no']}"
    assert seen.json() == first | {"card_remaining": 1}
    assert await client.remaining(campaign) == [98]


async def test_key_with_other_content_is_422(service: Service, client: Client) -> None:
    campaign = await client.campaign(showings=showings(5, 5))
    card, key = service.card(), new_key()
    assert (await client.buy(campaign, card.token, key=key, showing="a")).status == 201

    for quantity, showing in ((2, "a"), (1, "b")):
        seen = await client.buy(campaign, card.token, quantity, key=key, showing=showing)
        assert (seen.status, seen.code) == (422, "idempotency-mismatch")
    assert await client.remaining(campaign) == [4, 5]


async def test_replay_works_when_sold_out_paused_or_closed(
    service: Service, client: Client
) -> None:
    campaign = await client.campaign(tickets=1)
    card, other, key = service.card(), service.card(), new_key()
    order = (await client.buy(campaign, card.token, key=key)).json()

    async def replayed(refusal: str) -> None:
        # Refusing others first: the engine refuses cheaply then, and must not lose this one.
        for _ in range(3):
            assert (await client.buy(campaign, other.token)).code == refusal
        seen = await client.buy(campaign, card.token, key=key)
        assert (seen.status, seen.headers.get("Idempotency-Replayed")) == (201, "true"), seen
        assert seen.json() == order

    await replayed("sold-out")
    await client.step(campaign, "pause")
    await replayed("paused")
    await client.step(campaign, "close")
    await replayed("closed")


async def test_sold_out_answer_has_the_remaining_tickets(service: Service, client: Client) -> None:
    campaign, card = await client.campaign(tickets=1), service.card()

    seen = await client.buy(campaign, card.token, 3)

    assert (seen.code, seen.json()["remaining"]) == ("sold-out", 1)
    assert "1" in seen.json()["detail"]
    assert (await client.buy(campaign, card.token, 1)).status == 201


async def test_limit_answer_has_what_the_card_may_still_buy(
    service: Service, client: Client
) -> None:
    campaign, card = await client.campaign(), service.card()
    await client.buy(campaign, card.token, 2)

    seen = await client.buy(campaign, card.token, 2)

    assert (seen.status, seen.code) == (409, "limit-exceeded")
    assert seen.json()["card_remaining"] == 1
    assert (await client.buy(campaign, card.token, 1)).status == 201
    assert (await client.buy(campaign, card.token, 1)).json()["card_remaining"] == 0


async def test_one_of_several_showings_must_be_named(service: Service, client: Client) -> None:
    campaign, card = await client.campaign(showings=showings(1, 1)), service.card()

    for fields in ({}, {"showing": None}, {"showing": "z"}, {"showing": ""}):
        seen = await client.buy(campaign, card.token, **fields)
        assert (seen.status, seen.code, seen.json()["field"]) == (
            *(400, "invalid-request"),
            "showing",
        )
        assert "a, b" in seen.json()["detail"] or fields == {"showing": ""}
    order = await client.buy(campaign, card.token, showing="b")
    assert order.json()["showing"] == "b"
    assert (await client.buy(campaign, card.token, showing="b")).code == "sold-out"
    assert (await client.buy(campaign, card.token, showing="a")).status == 201


async def test_unknown_showing_is_400_where_there_is_one(service: Service, client: Client) -> None:
    campaign = await client.campaign()
    seen = await client.buy(campaign, service.card().token, showing="balcony")
    assert (seen.status, seen.json()["field"]) == (400, "showing")


async def test_added_stock_sells_at_once(service: Service, client: Client) -> None:
    campaign, card = await client.campaign(tickets=0), service.card()
    for _ in range(3):
        assert (await client.buy(campaign, card.token)).code == "sold-out"

    added = await client.step(campaign, "stock", showing="general", add=2)

    assert added.json()["showings"][0]["tickets"] == 2
    assert (await client.buy(campaign, card.token)).status == 201


async def test_card_on_many_phones_gets_its_limit_and_no_more(
    service: Service, client: Client, spread: Client
) -> None:
    campaign, card, key = await client.campaign(), service.card(), new_key()

    same = await asyncio.gather(*(spread.buy(campaign, card.token, key=key) for _ in range(20)))
    others = await asyncio.gather(*(spread.buy(campaign, card.token) for _ in range(20)))

    assert {(one.status, one.json()["order_no"]) for one in same} == {
        (201, same[0].json()["order_no"])
    }
    assert sum("Idempotency-Replayed" not in one.headers for one in same) == 1
    assert sorted(one.status for one in others) == [201] * 2 + [409] * 18
    assert await client.remaining(campaign) == [97]


@pytest.mark.load
async def test_sale_opens_on_time_and_not_before(
    service: Service, client: Client, spread: Client
) -> None:
    # The campaign must be made before it opens, which takes a second or more on a busy machine.
    campaign = await client.campaign(tickets=40, opens_at=in_s(4))
    opens_at = datetime.fromisoformat(
        (await client.get(f"{CAMPAIGNS}/{campaign}")).json()["opens_at"]
    )
    refused: list[Seen] = []

    async def hasty(card: Card) -> Seen:
        key = new_key()
        while time.time() < opens_at.timestamp() + 5:
            seen = await spread.buy(campaign, card.token, key=key)
            if seen.code != "not-open":
                return seen
            refused.append(seen)
            # 60 members who ask ten times a second: more would be this process's load, not theirs.
            await asyncio.sleep(0.1)
        raise AssertionError("it does not open")

    seen = await asyncio.gather(*(hasty(card) for card in service.cards(60)))

    created = sorted(
        datetime.fromisoformat(one.json()["created_at"]) for one in seen if one.status == 201
    )
    assert len(created) == 40
    assert {one.code for one in seen} == {"", "sold-out"}
    assert created[0] >= opens_at
    assert (created[0] - opens_at).total_seconds() < 0.5
    assert len(refused) > 60
    for one in refused:
        assert datetime.fromisoformat(one.json()["opens_at"]) == opens_at
        assert 1 <= int(one.headers["Retry-After"]) <= 4


async def test_nothing_is_sold_after_the_closing_moment(
    service: Service, client: Client, spread: Client
) -> None:
    closes_at = in_s(1)
    campaign = await client.campaign(tickets=1_000, closes_at=closes_at)
    sold: list[Seen] = []

    async def late(card: Card) -> None:
        for _ in range(3):
            seen = await spread.buy(campaign, card.token)
            if seen.status == 201:
                sold.append(seen)
            else:
                assert seen.code == "closed"
            await asyncio.sleep(0.5)

    await asyncio.gather(*(late(card) for card in service.cards(30)))

    assert sold
    closing = datetime.fromisoformat(closes_at)
    assert all(datetime.fromisoformat(one.json()["created_at"]) < closing for one in sold)
    assert (await client.buy(campaign, service.card().token)).code == "closed"
    assert (await client.get(f"{CAMPAIGNS}/{campaign}")).json()["state"] == "closed"


# Eligibility.


async def test_campaign_of_a_union_sells_to_its_members_only(
    service: Service, client: Client
) -> None:
    card, other = service.card(), service.card()
    while other.union == card.union:
        other = service.card()
    campaign = await client.campaign(unions=[card.union])

    assert (await client.buy(campaign, card.token)).status == 201
    seen = await client.buy(campaign, other.token)
    assert (seen.status, seen.code) == (403, "not-eligible")


@pytest.mark.parametrize("status", ["suspended", "cancelled"])
async def test_inactive_card_buys_nothing(service: Service, client: Client, status: str) -> None:
    card = (await asyncio.to_thread(service.members, status))[0]
    campaign = await client.campaign()

    seen = await client.buy(campaign, card.token)

    assert (seen.status, seen.code) == (403, "card-revoked")
    allowance = (await client.get(f"{CAMPAIGNS}/{campaign}/allowance", card.token)).json()
    assert (allowance["eligible"], allowance["reason"]) == (False, "card-revoked")


async def test_revoked_card_buys_nothing_a_second_later(
    service: Service, client: Client, spread: Client
) -> None:
    campaign, card, key = await client.campaign(card_limit=1_000), service.card(), new_key()
    assert (await client.buy(campaign, card.token, key=key)).status == 201

    done = await service.asale("cards", "revoke", card.no, "--reason", "lost")
    assert done.status == 0, done
    await asyncio.sleep(1)

    fresh = service.token(card.member, card.union, generation=1)
    for token, code in ((card.token, "unauthenticated"), (fresh, "card-revoked")):
        seen = await asyncio.gather(*(spread.buy(campaign, token) for _ in range(20)))
        assert {one.code for one in seen} == {code}
        assert (await client.buy(campaign, token, key=key)).code == code

    await service.asale("cards", "restore", card.no, "--reason", "found")
    await asyncio.sleep(1)
    seen = await asyncio.gather(*(spread.buy(campaign, fresh) for _ in range(20)))
    assert {one.status for one in seen} == {201}
    assert (await client.buy(campaign, card.token, key=key)).code == "unauthenticated"


# Reads.


async def test_order_is_readable_at_once_without_the_writer(
    service: Service, client: Client, spread: Client
) -> None:
    for _ in range(10):
        await spread.get(CAMPAIGNS)  # every worker has just read which campaigns there are
    campaign, card = await client.campaign(), service.card()
    with service.stopped("writer"):
        order = (await client.buy(campaign, card.token)).json()
        for _ in range(10):
            one = await spread.get(f"{ORDERS}/{order['order_no']}", card.token)
            assert (one.status, one.json()) == (200, order)
            assert one.headers["Cache-Control"] == "no-store"
            listed = await spread.get(ORDERS, card.token)
            assert listed.json() == {"items": [order], "next": None}


async def test_order_of_another_member_is_404(service: Service, client: Client) -> None:
    campaign, card, other = await client.campaign(), service.card(), service.card()
    order_no = (await client.buy(campaign, card.token)).json()["order_no"]
    name, seq, moment = order_no.split(".")
    await until(lambda: client.all_applied(campaign))  # PostgreSQL knows it too

    for number in (
        order_no,
        f"{name}.{int(seq, 16) + 1:x}.{moment}",
        f"{name}.{seq}.000000",
        *("nothing", "..", "%00", "x" * 300, "%F0%9F%92%A9"),
    ):
        seen = await client.get(f"{ORDERS}/{number}", other.token)
        assert (seen.status, seen.code) == (404, "not-found"), number
    assert (await client.get(ORDERS, other.token)).json()["items"] == []
    assert (await client.get(f"{ORDERS}/{order_no}")).status == 401
    assert (await client.get(ORDERS)).status == 401


async def test_order_pages_have_each_order_once_newest_first(
    service: Service, client: Client
) -> None:
    card = service.card()
    campaigns = [await client.campaign(card_limit=9) for _ in range(2)]
    bought = []
    for campaign in campaigns * 3:
        bought.append((await client.buy(campaign, card.token)).json()["order_no"])
        await asyncio.sleep(0.002)

    pages = await client.pages(f"{ORDERS}?limit=2", card.token)

    assert [len(page) for page in pages] == [2, 2, 2]
    assert [order["order_no"] for page in pages for order in page] == bought[::-1]


@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=201", "limit=-1", "limit=x", "limit=", "limit=1.5", "limit=1e2"),
        *("limit=00000000001000", "cursor=!", "cursor=AAAA", "cursor=", "cursor=%FF"),
        f"cursor={'A' * 3_000}",
        *("limit=²", "limit=0001000000", f"limit={'9' * 5_000}"),
    ],
)
async def test_bad_page_parameter_is_400_and_named(
    service: Service, client: Client, query: str
) -> None:
    for path, token in ((ORDERS, service.card().token), (CAMPAIGNS, None)):
        seen = await client.get(f"{path}?{query}", token)
        assert (seen.status, seen.json().get("field")) == (400, query.partition("=")[0]), path


def cursor_of(value: str) -> str:
    return base64.urlsafe_b64encode(value.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "value",
    [
        *("9223372036854775808", "-1", "99999999999999999999999"),
        *("1.5", "true", "null", '"x"', "[]", "[1]", "{}"),
        *('[99999999999999999,"x",1]', '[-99999999999999999,"x",1]', '[1,"\\u0000",1]'),
        *('[1,"x",99999999999999999999]', '[1,"x",-1]', '["1","x",1]', "[1,2,3,4]"),
    ],
)
async def test_forged_cursor_is_400_or_an_empty_page(
    service: Service, client: Client, value: str
) -> None:
    for path, token in (
        (ORDERS, service.card().token),
        (CAMPAIGNS, None),
        (ADMIN, service.admin_token),
        ("/api/v1/admin/audit-log", service.admin_token),
    ):
        seen = await client.get(f"{path}?cursor={cursor_of(value)}", token)
        if seen.status == 200:
            assert seen.json()["items"] == [], (path, seen)
        else:
            assert (seen.status, seen.json().get("field")) == (400, "cursor"), (path, seen)


async def test_campaign_list_has_all_but_drafts_once(client: Client) -> None:
    made = {await client.campaign() for _ in range(3)}
    draft = await client.campaign(draft=True)
    await asyncio.sleep(1)  # a list is at most a second old
    pages = await client.pages(f"{CAMPAIGNS}?limit=2")
    found = [each["id"] for page in pages for each in page]
    assert made <= set(found)
    assert draft not in found
    assert len(found) == len(set(found))


async def test_campaign_is_as_created_and_has_an_etag(client: Client) -> None:
    campaign = await client.campaign(closes_at=in_s(3_600), unions=["dongsi", "longtan"])

    seen = await client.get(f"{CAMPAIGNS}/{campaign}")

    body = seen.json()
    assert set(body) == {
        *("id", "title", "category", "price_fen", "payment", "card_limit", "order_max", "state"),
        *("opens_at", "closes_at", "unions", "owner", "showings", "hold_s", "cancel_until"),
    }
    assert (body["id"], body["state"], body["order_max"]) == (campaign, "open", 3)
    assert body["unions"] == ["dongsi", "longtan"]
    assert body["showings"] == [
        {
            "id": "general", "title": "通用券", "starts_at": None, "showing_limit": None,
            "tickets": 100,
        }
    ]  # fmt: skip
    assert datetime.fromisoformat(body["opens_at"]) == datetime.fromisoformat(PAST)
    assert seen.headers["Cache-Control"] == "public, max-age=1"
    again = await client.get(
        f"{CAMPAIGNS}/{campaign}", headers={"If-None-Match": seen.headers["ETag"]}
    )
    assert (again.status, again.body) == (304, b"")
    assert again.headers["ETag"] == seen.headers["ETag"]
    await client.step(campaign, "stock", showing="general", add=1)
    await asyncio.sleep(1)
    changed = await client.get(
        f"{CAMPAIGNS}/{campaign}", headers={"If-None-Match": seen.headers["ETag"]}
    )
    assert changed.status == 200
    assert changed.json()["showings"][0]["tickets"] == 101


async def test_availability_is_never_older_than_a_second(
    service: Service, client: Client, spread: Client
) -> None:
    campaign = await client.campaign(tickets=100)
    path = f"{CAMPAIGNS}/{campaign}/availability"
    sold_by: list[tuple[float, int]] = []
    told: list[tuple[float, dict[str, Any]]] = []

    async def sell() -> None:
        for count, card in enumerate(service.cards(30), 1):
            await client.buy(campaign, card.token)
            sold_by.append((time.time(), count))
            await asyncio.sleep(0.05)

    async def watch() -> None:
        for _ in range(60):
            seen = await spread.get(path)
            told.append((time.time(), seen.json()))
            await asyncio.sleep(0.03)

    await asyncio.gather(sell(), watch())

    for moment, body in told:
        known = max((count for at, count in sold_by if at < moment - 1), default=0)
        (showing,) = body["showings"]
        assert (showing["id"], showing["tickets"]) == ("general", 100)
        assert showing["remaining"] <= 100 - known
        assert moment - datetime.fromisoformat(body["as_of"]).timestamp() < 1.05


async def test_draft_is_404_for_members(service: Service, client: Client) -> None:
    draft, card = await client.campaign(draft=True), service.card()
    for path in ("", "/availability", "/allowance"):
        seen = await client.get(f"{CAMPAIGNS}/{draft}{path}", card.token)
        assert (seen.status, seen.code) == (404, "not-found")
    seen = await client.buy(draft, card.token)
    assert (seen.status, seen.code) == (404, "not-found")


@pytest.mark.load
async def test_allowance_has_the_first_reason_that_holds(service: Service, client: Client) -> None:
    card = service.card()

    async def allows(campaign: str, *expected: object) -> None:
        async def told() -> bool:
            body = (await client.get(f"{CAMPAIGNS}/{campaign}/allowance", card.token)).json()
            return list(body.items()) == list(
                zip(("eligible", "reason", "card_limit", "card_remaining"), expected, strict=True)
            )

        await until(told, within_s=1.2)  # a campaign's state is kept for a moment

    campaign = await client.campaign(tickets=2, card_limit=2)
    await allows(campaign, True, None, 2, 2)
    await client.buy(campaign, card.token)
    await allows(campaign, True, None, 2, 1)
    await client.buy(campaign, card.token)
    await allows(campaign, False, "limit-exceeded", 2, 0)
    await client.step(campaign, "pause")
    await allows(campaign, False, "paused", 2, 0)
    await client.step(campaign, "close")
    await allows(campaign, False, "closed", 2, 0)

    await allows(await client.campaign(tickets=0), False, "sold-out", 3, 3)
    await allows(await client.campaign(opens_at=in_s(99)), False, "not-open", 3, 3)
    foreign = "dongsi" if card.union != "dongsi" else "longtan"
    campaign = await client.campaign(tickets=0, unions=[foreign])
    await allows(campaign, False, "not-eligible", 3, 3)
    assert (await client.get(f"{CAMPAIGNS}/{campaign}/allowance")).status == 401


async def test_time_is_the_clock_that_decides(client: Client) -> None:
    seen = await client.get("/api/v1/time")
    now = datetime.fromisoformat(seen.json()["now"])
    assert now.utcoffset() is not None
    assert abs(now.timestamp() - time.time()) < 1
    assert seen.headers["Cache-Control"] == "no-store"


async def test_clock_is_shared_by_all_who_ask_at_once(service: Service, client: Client) -> None:
    async def asked() -> int:
        return int((await redis.info("commandstats"))["cmdstat_time"]["calls"])

    async with service.redis() as redis:
        before = await asked()
        answers = await asyncio.gather(*(client.get("/api/v1/time") for _ in range(1_000)))
        # The scheduler and the API processes ask too, some times a second.
        assert await asked() - before < 500
    assert {answer.status for answer in answers} == {200}
    assert abs(datetime.fromisoformat(answers[-1].json()["now"]).timestamp() - time.time()) < 1


# Bad requests.


@pytest.fixture(scope="module")
async def open_campaign(service: Service) -> AsyncIterator[str]:
    """A campaign in which nothing of the tests below may sell."""
    async with Client(service) as client:
        campaign = await client.campaign(tickets=10)
        yield campaign
        assert await client.remaining(campaign) == [10]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"null", "body"),
        (b"[]", "body"),
        (b'"quantity"', "body"),
        (b"1", "body"),
        (b"{}", "quantity"),
        (b'{"quantity":1}x', "body"),
        (b'{"quantity":1', "body"),
        (b"{'quantity':1}", "body"),
        (b"quantity=1", "body"),
        (b'{"quantity":NaN}', "body"),
        (b'{"quantity":01}', "body"),
        (b'{"quantity":1,"showing":"\xff\xfe"}', "body"),
        (b"\xff\xfe{", "body"),
        (b"\x00", "body"),
        (b"[" * 10_000, "body"),
        (b'{"a":' * 3_000, "a"),
        (b'{"quantity":0}', "quantity"),
        (b'{"quantity":-1}', "quantity"),
        (b'{"quantity":4}', "quantity"),
        (b'{"quantity":1000000000}', "quantity"),
        (b'{"quantity":1000000000000000000000000000000}', "quantity"),
        (b'{"quantity":-9223372036854775809}', "quantity"),
        (b'{"quantity":1.5}', "quantity"),
        (b'{"quantity":1.0}', "quantity"),
        (b'{"quantity":1e0}', "quantity"),
        (b'{"quantity":1e400}', "quantity"),
        (b'{"quantity":true}', "quantity"),
        (b'{"quantity":null}', "quantity"),
        (b'{"quantity":"2"}', "quantity"),
        (b'{"quantity":[1]}', "quantity"),
        (b'{"quantity":{}}', "quantity"),
        (b'{"quantity":1,"showing":1}', "showing"),
        (b'{"quantity":1,"showing":["general"]}', "showing"),
        (b'{"quantity":1,"showing":"GENERAL"}', "showing"),
        (b'{"quantity":1,"showing":"general "}', "showing"),
        (b'{"quantity":1,"price_fen":0}', "price_fen"),
        (b'{"quantity":1,"card_no":"1"}', "card_no"),
        (b'{"Quantity":1}', "Quantity"),
    ],
)
async def test_bad_body_is_400_and_sells_nothing(
    service: Service, client: Client, open_campaign: str, body: bytes, field: str
) -> None:
    seen = await post_raw(client, open_campaign, service.card().token, body)
    assert (seen.status, seen.code) == (400, "invalid-request"), seen
    assert seen.json()["field"] == field
    assert "Expected" not in seen.body.decode()


@pytest.mark.parametrize(
    "key", ["a" * 65, "", " ", "a b", "a.b", "a/b", "ключ", "a,b", '"abc"', "a\tb"]
)
async def test_malformed_key_is_400(
    service: Service, client: Client, open_campaign: str, key: str
) -> None:
    token = service.card().token
    seen = await post_raw(client, open_campaign, token, b'{"quantity":1}', Idempotency_Key=key)
    assert (seen.status, seen.code) == (400, "invalid-request")
    assert seen.json()["field"] == "Idempotency-Key"


async def test_missing_key_is_400(service: Service, client: Client, open_campaign: str) -> None:
    seen = await client.ask(
        "POST", orders_of(open_campaign), service.card().token, json={"quantity": 1}
    )
    assert (seen.status, seen.code) == (400, "missing-idempotency-key")


@pytest.mark.parametrize("key", ["a", "0", "_", "-", "A" * 64, "aZ09_-"])
async def test_every_key_of_the_contract_is_accepted(
    service: Service, client: Client, key: str
) -> None:
    campaign = await client.campaign()
    assert (await client.buy(campaign, service.card().token, key=key)).status == 201


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_over_16_kib_is_413(service: Service, client: Client, chunked: bool) -> None:
    campaign, card = await client.campaign(), service.card()

    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1_000):
            yield body[start : start + 1_000]

    async def sent(size: int) -> Seen:
        body = b'{"quantity":1' + b" " * (size - 14) + b"}"
        assert len(body) == size
        return await post_raw(client, campaign, card.token, pieces(body) if chunked else body)

    assert (await sent(BODY_MAX)).status == 201
    for size in (BODY_MAX + 1, 40_000):
        seen = await sent(size)
        assert (seen.status, seen.code) == (413, "payload-too-large")
    assert await client.remaining(campaign) == [99]


@pytest.mark.parametrize(
    ("media_type", "status"),
    [
        ("application/json", 201),
        ("application/json; charset=utf-8", 201),
        ("Application/JSON;charset=UTF-8", 201),
        ("application/json; charset=utf8", 201),
        ('application/json;charset="UTF8"', 201),
        ("application/json;", 201),
        ("application/json; charset=utf-8;", 201),
        ("application/json ; charset=utf-8 ; ;", 201),
        ("application/json; charset=utf-8; version=1", 201),
        ("application/json; charset=utf-8; charset=gbk", 415),
        ("application/json; charset=", 415),
        ("application/json; =utf-8", 415),
        ("application/json; utf-8", 415),
        ("application/json, text/plain", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/jsonx", 415),
        ("application/json; charset=gbk", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
    ],
)
async def test_only_json_is_accepted(
    service: Service, client: Client, media_type: str, status: int
) -> None:
    campaign = await client.campaign()
    seen = await post_raw(
        client, campaign, service.card().token, b'{"quantity":1}', Content_Type=media_type
    )
    assert seen.status == status
    assert seen.code == ("unsupported-media-type" if status == 415 else "")


async def test_bad_token_is_401(service: Service, client: Client, open_campaign: str) -> None:
    card = service.card()
    head, claims, signature = card.token.split(".")
    now_s = int(time.time())
    known = {
        "sub": str(card.member), "gen": 0, "union": card.union,
        "iat": now_s, "exp": now_s + 99, "aud": "member",
    }  # fmt: skip
    bad = [
        *("", "x", "..", "Bearer", "null", card.token[:-1], card.token + "A", "é" * 10),
        f"{head}.{claims}.", f"{head}.{claims}", f"{claims}.{head}.{signature}",
        f"{head}.{claims[:-2]}.{signature}", f"{card.token}.{card.token}", "a" * 5_000,
        unverified({"alg": "none", "typ": "JWT"}, known),
        unverified({"alg": "HS256", "typ": "JWT", "kid": service.key.kid}, known, signature),
        unverified({"alg": "none", "kid": service.key.kid}, known, signature),
        service.token(card.member, now_s=now_s - 100, ttl_s=99),
        service.token(0, now_s=now_s), service.admin_token,
    ]  # fmt: skip
    for token in bad:
        seen = await client.buy(open_campaign, token)
        assert (seen.status, seen.code) == (401, "unauthenticated"), token
        assert seen.headers["WWW-Authenticate"].startswith("Bearer")
    for header in ("", "Basic abc", card.token, f"Token {card.token}"):
        seen = await client.get(ORDERS, headers={"Authorization": header})
        assert seen.status == 401, header
    assert (await client.buy(open_campaign, None)).status == 401


@pytest.mark.parametrize(
    "identifier",
    [
        *("nothing", "NOTHING", "%20", "a%2Fb", "%00", "..%2F..", "{x}", "x" * 500, "%FF", "é"),
        *("*", "sale:campaigns", "a%0D%0Ab", "%F0%9F%92%A9"),
    ],
)
async def test_unknown_campaign_is_404(service: Service, client: Client, identifier: str) -> None:
    token = service.card().token
    for path in ("", "/availability", "/allowance"):
        seen = await client.get(f"{CAMPAIGNS}/{identifier}{path}", token)
        assert (seen.status, seen.code) == (404, "not-found"), path
    assert (await client.buy(identifier, token)).code == "not-found"


@pytest.mark.parametrize(
    "path",
    [
        *("/api/v1/nothing", "/api/v2/campaigns", "/nothing", "/api/v1/campaigns/x/nothing"),
        *("/api/v1/orders/x/nothing", "/api/v1/login", "/api/v1/station/x", "/problems/nothing"),
        *("/assets/../member.py", "/assets/%2e%2e/member.py", "/api/v1/admin"),
    ],
)
async def test_unknown_path_is_a_problem_document(client: Client, path: str) -> None:
    seen = await client.ask("GET", path)
    assert (seen.status, seen.code) == (404, "not-found")


HEAD = b"GET /api/v1/time HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /api/v1/campaigns/x/orders HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "request_head",
    [
        HEAD + b"no colon here\r\n\r\n",
        HEAD + b"X-Long: " + b"a" * 20_000 + b"\r\n\r\n",
        HEAD + b"X-Many: 1\r\n" * 2_000 + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"\x00\x01\x02\x03\r\n\r\n",
        b"HELLO\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
    ],
)
async def test_malformed_request_is_4xx_or_closed_and_harms_no_other(
    service: Service, client: Client, request_head: bytes
) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request_head)
        answer = await asyncio.wait_for(reader.read(100_000), 5)
    except ConnectionResetError:
        answer = b""
    finally:
        writer.close()
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:200]
    assert answer == b"" or b"application/problem+json" in answer
    for secret in (b"Traceback", b'File "', b"sale/", b"redis"):
        assert secret not in answer
    assert (await client.get("/api/v1/time")).status == 200


async def test_first_problem_in_the_contracts_order_is_answered(
    service: Service, client: Client
) -> None:
    """Request, token, campaign, card and union, same key, state, limit, stock."""
    revoked = (await asyncio.to_thread(service.members, "suspended"))[1]
    card, stranger, key = service.card(), service.card(), new_key()
    while stranger.union == card.union:
        stranger = service.card()
    paused = await client.campaign(tickets=1, card_limit=2, unions=[card.union])
    assert (await client.buy(paused, card.token, key=key)).status == 201
    await client.step(paused, "pause")
    full = await client.campaign(tickets=1, card_limit=1)
    assert (await client.buy(full, card.token)).status == 201
    revoked_there = service.token(revoked.member, card.union)

    table: list[tuple[str, str, str | None, int, str | None, str]] = [
        ("request before token", "nothing", None, 0, None, "invalid-request"),
        ("request before token", paused, None, 9, None, "invalid-request"),
        ("request before card", paused, revoked.token, 9, None, "invalid-request"),
        ("request before same key", paused, card.token, 9, key, "invalid-request"),
        ("token before campaign", "nothing", "x", 1, None, "unauthenticated"),
        ("campaign before card", "nothing", revoked.token, 1, None, "not-found"),
        ("card before union", paused, revoked.token, 1, None, "card-revoked"),
        ("card before state", paused, revoked_there, 1, None, "card-revoked"),
        ("card before stock", full, revoked.token, 1, None, "card-revoked"),
        ("union before state", paused, stranger.token, 1, None, "not-eligible"),
        ("same key before state", paused, card.token, 1, key, "replayed"),
        ("same key, other content, before state", paused, card.token, 2, key,
         "idempotency-mismatch"),
        ("state before limit and stock", paused, card.token, 2, None, "paused"),
        ("limit before stock", full, card.token, 1, None, "limit-exceeded"),
        ("stock", full, stranger.token, 1, None, "sold-out"),
    ]  # fmt: skip
    # Twice: the second time the engine may know a cheaper way to refuse.
    for says, campaign, token, quantity, with_key, expected in table * 2:
        seen = await client.buy(campaign, token, quantity, key=with_key)
        told = "replayed" if seen.headers.get("Idempotency-Replayed") else seen.code
        assert told == expected, says


# Problems, pages, the description.


async def test_errors_follow_rfc_9457_and_reveal_no_internals(
    service: Service, client: Client, open_campaign: str
) -> None:
    card = service.card()
    seen = [
        await client.buy(open_campaign, card.token, 9),
        await client.buy("nothing", card.token),
        await client.buy(open_campaign, None),
        await client.get("/nothing"),
        await client.get(f"{ADMIN}/x", card.token),
    ]
    for one in seen:
        body = one.json()
        assert one.headers["Content-Type"] == "application/problem+json"
        assert body["type"] == f"/problems/{body['code']}"
        assert body["status"] == one.status
        assert body["title"]
        assert body["detail"]
        assert card.no not in one.body.decode()
        for secret in ("Traceback", "EVALSHA", "SELECT", "sale:{", ".py"):
            assert secret not in one.body.decode()


async def test_page_and_api_description_are_served(client: Client) -> None:
    assert (await client.get("/")).headers["Content-Type"] == "text/html; charset=utf-8"
    seen = await client.get("/openapi.json")
    assert seen.headers["Content-Type"] == "application/json"
    assert seen.json()["openapi"] == "3.1.0"


async def test_order_of_a_client_that_hung_up_is_replayed(service: Service, client: Client) -> None:
    campaign, card, key = await client.campaign(), service.card(), new_key()
    hasty = aiohttp.ClientTimeout(total=0.0005)
    for _ in range(20):
        try:
            await client.ask(
                "POST",
                orders_of(campaign),
                card.token,
                json={"quantity": 1},
                headers={"Idempotency-Key": key},
                timeout=hasty,
            )
        except TimeoutError:
            continue
    seen = await client.buy(campaign, card.token, key=key)
    assert seen.status == 201
    await until(lambda: _has_one(client, campaign))


async def _has_one(client: Client, campaign: str) -> bool:
    return await client.remaining(campaign) == [99]


async def test_body_that_never_arrives_is_400_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BODY_WITHIN_S", 0.1)

    async def read(call: Call[dict[str, int]]) -> dict[str, int]:
        return call.body

    app = web.Application()
    add_routes(
        app, [Route(method="POST", path="/", handler=read, body=dict, decoded=dict[str, int])]
    )
    async with TestServer(app) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        try:
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(head + b"Content-Length: 100\r\n\r\n{")
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            body = await asyncio.wait_for(reader.readuntil(b"}"), 5)
        finally:
            writer.close()
            await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert json.loads(body)["code"] == "invalid-request"
    assert json.loads(body)["detail_en"]


async def test_failing_page_is_a_problem_document(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> web.Response:
        raise OSError("inside")

    monkeypatch.setattr(pages._Static, "answer", broken)
    app = with_pages(web.Application())
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        for path in ("/", "/assets/page.js", "/favicon.ico", "/problems/closed", "/openapi.json"):
            async with session.get(server.make_url(path)) as answer:
                assert answer.status == 503
                assert answer.content_type == "application/problem+json"
                assert "inside" not in await answer.text()
