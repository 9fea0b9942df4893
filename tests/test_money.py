"""Money on the running system: pay, notices, the keeper, refunds, the books (INV-11)."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from service import CAMPAIGNS, PAST, Card, Client, Seen, Service, in_s, new_key, running_service
from waiting import until

from sale.db.payments import TestPayment
from sale.domain.order import parse_order_number
from sale.members.pay import payment_number
from sale.members.test_provider import SIGNATURE, TestProvider
from sale.stock.keys import campaign_keys

ORDERS = "/api/v1/orders"
NOTIFY = "/api/v1/payments/notify/test"
HOLD_S = 300
PRICE_FEN = 500


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A system with the test provider; its books, money too, are audited at the end."""
    data_dir = tmp_path_factory.mktemp("money") / "data"
    with running_service(data_dir, SALE_TEST_PROVIDER="1") as service:
        service.admin_token = service.operator("admin")[1]
        service.take_roster()
        yield service
        audit = service.sale("audit", "--json")
        assert audit.json()["clean"], audit


class Till:
    """One campaign that is paid online, and its members."""

    def __init__(self, service: Service, client: Client, campaign: str) -> None:
        self.service = service
        self.client = client
        self.campaign = campaign
        self.card: Card = service.card()

    async def hold(self, quantity: int = 1, card: Card | None = None) -> str:
        """Hold tickets; give the order's number."""
        seen = await self.client.buy(self.campaign, (card or self.card).token, quantity)
        assert (seen.status, seen.json().get("state")) == (201, "held"), seen
        return str(seen.json()["order_no"])

    async def pay(self, order_no: str, card: Card | None = None, **fields: Any) -> Seen:
        return await self.client.ask(
            "POST", f"{ORDERS}/{order_no}/pay", (card or self.card).token, json=fields
        )

    async def result(self, order_no: str, result: str) -> Seen:
        """Act at the test provider."""
        url = f"/api/v1/test-provider/{payment_number(order_no)}"
        return await self.client.ask("POST", url, json={"result": result})

    async def paid(self, quantity: int = 1) -> str:
        """Hold and pay."""
        order_no = await self.hold(quantity)
        assert (await self.pay(order_no)).status == 200
        assert (await self.result(order_no, "paid")).json()["state"] == "paid"
        return order_no

    async def order(self, order_no: str, card: Card | None = None) -> dict[str, Any]:
        seen = await self.client.get(f"{ORDERS}/{order_no}", (card or self.card).token)
        assert seen.status == 200, seen
        return dict(seen.json())

    async def cancel(self, order_no: str, *tickets: int) -> Seen:
        body = {"tickets": list(tickets)} if tickets else {}
        return await self.client.ask(
            "POST", f"{ORDERS}/{order_no}/cancel", self.card.token, json=body,
            headers={"Idempotency-Key": new_key()},
        )  # fmt: skip

    async def pass_time(self, ms: int = HOLD_S * 1_000) -> None:
        """Let the campaign's clock stand ``ms`` further on."""
        async with self.service.redis() as redis:
            seconds, micros = await redis.time()
            head = campaign_keys(self.campaign).head
            clock = int(await redis.hget(head, "clock") or 0)
            now_ms = max(clock, seconds * 1_000 + micros // 1_000)
            await redis.hset(head, "clock", str(now_ms + ms))

    async def payment(self, order_no: str) -> dict[str, Any]:
        async with self.service.database() as connection:
            row = await connection.fetchrow("SELECT * FROM payment WHERE order_no = $1", order_no)
        return dict(row)

    async def provider(self) -> TestProvider:
        """The test provider's own side, with its key."""
        async with self.service.database() as connection:
            secret = await connection.fetchval("SELECT ticket_secret FROM deployment")
        return TestProvider(None, secret)  # type: ignore[arg-type]

    async def notice(self, order_no: str, **changes: Any) -> tuple[dict[str, str], bytes]:
        """Sign a notice that an order was paid."""
        payment = await self.payment(order_no)
        told = {"amount_fen": payment["amount_fen"], "state": "paid", **changes}
        return (await self.provider()).notice(
            TestPayment(payment["payment_no"], told["amount_fen"], 0, told["state"], "", "ref")
        )

    async def notify(self, notice: tuple[dict[str, str], bytes]) -> int:
        headers, body = notice
        headers = {**headers, "Content-Type": "application/json"}
        return (await self.client.ask("POST", NOTIFY, headers=headers, data=body)).status

    async def pay_unheard(self, order_no: str) -> None:
        """Pay at the provider, whose notice is lost."""
        async with self.service.database() as connection:
            await connection.execute(
                "UPDATE test_payment SET state = 'paid', ref = 'r' WHERE payment_no = $1",
                payment_number(order_no),
            )

    async def hurry(self, order_no: str) -> None:
        """Let the keeper look at a payment now."""
        async with self.service.database() as connection:
            await connection.execute(
                "UPDATE payment SET next_at = now() WHERE order_no = $1", order_no
            )

    async def refunds(self, order_no: str) -> list[tuple[int, str]]:
        async with self.service.database() as connection:
            rows = await connection.fetch(
                "SELECT amount_fen, state FROM refund WHERE payment_no = $1 ORDER BY event_seq",
                payment_number(order_no),
            )
        return [tuple(row) for row in rows]


@pytest.fixture
async def till(service: Service, client: Client) -> Till:
    campaign = await client.campaign(
        6, payment="online", hold_s=HOLD_S, opens_at=PAST, card_limit=6,
        cancel_until=in_s(86_400),
    )  # fmt: skip
    return Till(service, client, campaign)


async def test_paid_order_is_confirmed(till: Till) -> None:
    order_no = await till.hold(2)
    held = await till.order(order_no)
    assert held["payment"] == {
        "state": "due", "amount_fen": 1_000, "paid_fen": 0, "refunded_fen": 0
    }  # fmt: skip
    begun = (await till.pay(order_no)).json()
    assert begun == {
        "payment_no": payment_number(order_no), "provider": "test", "amount_fen": 1_000,
        "pay_url": f"/api/v1/test-provider/{payment_number(order_no)}",
        "pay_before": held["pay_before"],
    }  # fmt: skip
    assert (await till.pay(order_no)).json() == begun
    page = await till.client.get(begun["pay_url"])
    assert page.status == 200
    assert "10.00" in page.body.decode()
    assert (await till.result(order_no, "none")).json()["state"] == "none"
    assert (await till.result(order_no, "failed")).json()["state"] == "failed"
    assert (await till.order(order_no))["state"] == "held"
    assert (await till.result(order_no, "paid")).json()["state"] == "paid"
    order = await till.order(order_no)
    assert (order["state"], order["pay_before"]) == ("confirmed", None)
    assert order["payment"]["state"] == "paid"
    again = await till.pay(order_no)
    assert (again.status, again.json()["reason"]) == (409, "confirmed")


async def test_repeated_notice_on_two_processes_is_one_payment(
    till: Till, service: Service
) -> None:
    order_no = await till.hold()
    await till.pay(order_no)
    await till.pay_unheard(order_no)
    notice = await till.notice(order_no)
    async with Client(service, spread=True) as spread:
        other = Till(service, spread, till.campaign)
        answers = await asyncio.gather(*(other.notify(notice) for _ in range(12)))
    assert set(answers) == {200}
    assert (await till.order(order_no))["state"] == "confirmed"


async def test_notice_after_a_paid_order_was_cancelled_refunds_once(till: Till) -> None:
    order_no = await till.paid()
    notice = await till.notice(order_no)
    assert (await till.cancel(order_no)).status == 200
    assert await till.notify(notice) == 200
    await until(lambda: _refunded(till, order_no, [(500, "done")]))
    order = await till.order(order_no)
    assert (order["state"], order["payment"]["state"]) == ("cancelled", "refunded")
    assert order["payment"]["refunded_fen"] == 500


async def _refunded(till: Till, order_no: str, refunds: list[tuple[int, str]]) -> bool:
    return await till.refunds(order_no) == refunds


async def test_notice_before_pay_was_answered_is_taken(till: Till) -> None:
    order_no = await till.hold()
    await till.pay(order_no)
    async with till.service.database() as connection:  # the answer and its address are lost
        await connection.execute("UPDATE payment SET pay_url = '' WHERE order_no = $1", order_no)
    await till.pay_unheard(order_no)
    assert await till.notify(await till.notice(order_no)) == 200
    assert (await till.order(order_no))["state"] == "confirmed"


async def test_lost_notice_is_found_by_asking(till: Till) -> None:
    order_no = await till.hold()
    await till.pay(order_no)
    await till.pay_unheard(order_no)
    await till.hurry(order_no)
    await until(lambda: _in_state(till, order_no, "confirmed"))


async def _in_state(till: Till, order_no: str, state: str) -> bool:
    return bool((await till.order(order_no))["state"] == state)


async def test_failed_after_paid_changes_nothing(till: Till) -> None:
    # HOLES 29
    order_no = await till.paid()
    assert await till.notify(await till.notice(order_no, state="failed")) == 200
    assert (await till.payment(order_no))["state"] == "paid"
    assert (await till.order(order_no))["state"] == "confirmed"


@pytest.mark.parametrize("wrong", ["forged", "altered", "old", "unknown"])
async def test_notice_of_nobody_is_refused(till: Till, wrong: str) -> None:
    order_no = await till.hold()
    await till.pay(order_no)
    headers, body = await till.notice(order_no)
    if wrong == "forged":
        headers[SIGNATURE] = "0" * 64
    elif wrong == "altered":
        body = body.replace(b"500", b"501")
    elif wrong == "old":
        headers["Test-Provider-Time"] = "1"
    else:
        provider = await till.provider()
        headers, body = provider.notice(TestPayment("z" * 26, 500, 0, "paid", "", "r"))
    assert await till.notify((headers, body)) == (404 if wrong == "unknown" else 403)
    assert (await till.order(order_no))["state"] == "held"


async def test_wrong_amount_is_for_people(till: Till) -> None:
    order_no = await till.hold()
    await till.pay(order_no)
    assert await till.notify(await till.notice(order_no, amount_fen=499)) == 200
    assert (await till.payment(order_no))["state"] == "disputed"
    assert (await till.order(order_no))["state"] == "held"
    told = (await till.service.asale("report", "money", "--json")).json()
    assert order_no in {each["order_no"] for each in told["stuck"]}


async def test_late_payment_revives_or_is_returned(till: Till) -> None:
    # HOLES 24, 27
    revived, other = await till.hold(3), till.service.card()
    await till.pay(revived)
    await till.pay_unheard(revived)
    await till.pass_time()
    assert await till.notify(await till.notice(revived)) == 200
    assert (await till.order(revived))["state"] == "confirmed"
    late = await till.hold(3)
    await till.pay(late)
    await till.pay_unheard(late)
    await till.pass_time()
    assert await till.hold(3, other)  # nobody is refused for tickets whose time is up
    assert await till.notify(await till.notice(late)) == 200
    order = await till.order(late)
    assert (order["state"], order["payment"]["state"]) in {
        ("expired", "refunding"), ("expired", "refunded")
    }  # fmt: skip
    await until(lambda: _refunded(till, late, [(1_500, "done")]))


async def test_cancelled_in_part_gives_its_share_back(till: Till) -> None:
    order_no = await till.paid(3)
    assert (await till.cancel(order_no, 2)).json()["payment"]["state"] == "refunding"
    assert (await till.cancel(order_no, 1, 2)).status == 200
    await until(lambda: _refunded(till, order_no, [(500, "done"), (500, "done")]))
    order = await till.order(order_no)
    assert [each["state"] for each in order["tickets"]] == ["cancelled", "cancelled", "valid"]
    assert (order["state"], order["payment"]["state"]) == ("confirmed", "refunded")


async def test_hold_cancelled_while_being_paid_gets_its_money_back(till: Till) -> None:
    order_no = await till.hold(2)
    await till.pay(order_no)
    await asyncio.gather(till.cancel(order_no), till.result(order_no, "paid"))
    await till.hurry(order_no)

    async def settled() -> bool:
        payment = await till.payment(order_no)
        if payment["state"] == "closed":
            return True
        back = sum(amount for amount, state in await till.refunds(order_no) if state == "done")
        return payment["state"] == "paid" and back == 1_000

    await until(settled)
    assert (await till.order(order_no))["state"] == "cancelled"


async def test_payment_of_an_ended_order_is_closed(till: Till) -> None:
    order_no = await till.hold()
    await till.pay(order_no)
    assert (await till.cancel(order_no)).status == 200

    async def closed() -> bool:
        return bool((await till.payment(order_no))["state"] == "closed")

    await until(closed)
    assert (await till.result(order_no, "paid")).json()["state"] == "closed"


async def test_member_without_an_order_or_hold_cannot_pay(till: Till) -> None:
    order_no, other = await till.hold(), till.service.card()
    assert (await till.pay(order_no, other)).status == 404
    assert (await till.pay("x.1.000000")).status == 404
    assert (await till.cancel(order_no)).status == 200
    assert (await till.pay(order_no)).json()["reason"] == "cancelled"
    assert (await till.pay(order_no, return_to="//evil.example")).status == 400


async def test_money_adds_up_to_the_fen(till: Till) -> None:
    order_no = await till.paid(2)
    await till.cancel(order_no, 1)
    await until(lambda: _refunded(till, order_no, [(500, "done")]))
    told = (await till.service.asale("report", "money", "--json")).json()
    rows = [row for row in told["days"] if row["campaign"] == till.campaign]
    assert [(row["taken_fen"], row["kept_fen"], row["returned_fen"]) for row in rows] == [
        (1_000, 500, 500)
    ]
    for row in told["days"]:
        parts = ("kept_fen", "returned_fen", "under_way_fen", "stuck_fen")
        assert row["taken_fen"] == sum(row[part] for part in parts), row
    place = parse_order_number(order_no)
    assert place is not None
    assert place.campaign_id == till.campaign


async def test_sold_out_says_what_may_come_back(till: Till) -> None:
    order_no = await till.hold(6)
    seen = await till.client.buy(till.campaign, till.service.card().token)
    told = seen.json()
    assert (seen.code, told["remaining"], told["held"]) == ("sold-out", 0, 6)
    assert told["pay_before"] == (await till.order(order_no))["pay_before"]
    await till.pass_time()
    answers = [await till.client.buy(till.campaign, till.service.card().token, 2) for _ in range(3)]
    assert [each.status for each in answers] == [201] * 3
    assert (await till.client.get(f"{CAMPAIGNS}/{till.campaign}")).status == 200
