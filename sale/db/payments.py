"""Payments and refunds in PostgreSQL: what came in, what goes back, and when to look at it next."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, Final

import msgspec

from sale.db import queries
from sale.db.pool import Connection
from sale.domain.clock import from_ms, to_ms
from sale.domain.order import OrderPlace


class PaymentRow(msgspec.Struct, frozen=True):
    """The payment of an order. Moments are UTC ms; ``outcome`` is None until it is applied.

    ``order_state`` is that of the order, as far as it is applied, where the keeper asks.
    """

    payment_no: str
    order_no: str
    campaign_id: str
    order_seq: int
    member_no: int
    amount_fen: int
    provider: str
    pay_url: str
    expires_at_ms: int
    state: str
    outcome: str | None
    tries: int
    refunded_fen: int = 0
    order_state: str | None = None


class RefundRow(msgspec.Struct, frozen=True):
    """A refund; ``total_fen`` is what the whole payment was."""

    refund_no: str
    payment_no: str
    provider: str
    amount_fen: int
    total_fen: int
    state: str
    tries: int


class MoneyRow(msgspec.Struct, frozen=True):
    """Money of a campaign and day, in fen: taken = kept + returned + under way + stuck."""

    campaign: str
    day: str
    taken_fen: int
    kept_fen: int
    returned_fen: int
    under_way_fen: int
    stuck_fen: int


class StuckRow(msgspec.Struct, frozen=True):
    """Money that only people can help."""

    what: str
    number: str
    order_no: str
    amount_fen: int
    trouble: str


class StuckSum(msgspec.Struct, frozen=True):
    """How much money of one kind only people can help."""

    what: str
    rows: int
    amount_fen: int


class TestPayment(msgspec.Struct, frozen=True):
    """A payment in the books of the test provider."""

    __test__ = False  # not a test, whatever its name says

    payment_no: str
    amount_fen: int
    expires_at_ms: int
    state: str
    return_to: str
    ref: str


async def begin(
    conn: Connection,
    payment_no: str,
    order_no: str,
    place: OrderPlace,
    member_no: int,
    amount_fen: int,
    provider: str,
    expires_at_ms: int,
    next_at_ms: int,
) -> PaymentRow:
    """Give the payment of an order, made where there is none yet."""
    row = await conn.fetchrow(
        _SQL["begin"], payment_no, order_no, place.campaign_id, place.seq, member_no, amount_fen,
        provider, from_ms(expires_at_ms), from_ms(next_at_ms),
    )  # fmt: skip
    assert row is not None  # noqa: S101 - the statement returns its row
    return _payment(row)


async def set_url(conn: Connection, payment_no: str, pay_url: str) -> None:
    """Note where a payment is paid."""
    await conn.execute(_SQL["set_url"], payment_no, pay_url)


async def one(conn: Connection, payment_no: str) -> PaymentRow | None:
    """Give a payment by its number."""
    row = await conn.fetchrow(_SQL["one"], payment_no)
    return None if row is None else _payment(row)


async def of_order(conn: Connection, order_no: str) -> PaymentRow | None:
    """Give the payment of an order, with what has gone back."""
    row = await conn.fetchrow(_SQL["of_order"], order_no)
    return None if row is None else _payment(row)


async def refunded(conn: Connection, order_nos: Sequence[str]) -> dict[str, int]:
    """Give what has gone back of each of these orders, in fen; those without any are left out."""
    rows = await conn.fetch(_SQL["of_orders"], order_nos)
    return {row["order_no"]: row["refunded_fen"] for row in rows}


async def record_paid(conn: Connection, payment_no: str, paid_fen: int, ref: str) -> bool:
    """Note that money came in; whether that was new."""
    done: str = await conn.execute(_SQL["record_paid"], payment_no, paid_fen, ref)
    return done == "UPDATE 1"


async def record_closed(conn: Connection, payment_no: str) -> None:
    """Note that no money can come in for a payment any more."""
    await conn.execute(_SQL["record_closed"], payment_no)


async def take_payments(conn: Connection, state: str, limit: int, for_s: float) -> list[PaymentRow]:
    """Take payments in ``state`` that wait for the keeper; left alone for ``for_s`` seconds."""
    return [_payment(row) for row in await conn.fetch(_SQL["take_payments"], state, limit, for_s)]


async def put_off_payment(conn: Connection, payment_no: str, for_s: float, trouble: str) -> None:
    """Look at a payment again after ``for_s`` seconds."""
    await conn.execute(_SQL["put_off_payment"], payment_no, for_s, trouble)


async def take_refunds(conn: Connection, limit: int, for_s: float) -> list[RefundRow]:
    """Take refunds that wait for the keeper, one of each payment; see ``take_payments``."""
    return [
        RefundRow(**{name: row[name] for name in RefundRow.__struct_fields__})
        for row in await conn.fetch(_SQL["take_refunds"], limit, for_s)
    ]


async def set_refund(
    conn: Connection, refund_no: str, state: str, next_in_s: float = 0.0, trouble: str = ""
) -> None:
    """Note what became of a refund. One that is done stays done."""
    await conn.execute(_SQL["set_refund"], refund_no, state, next_in_s, trouble)


async def refunds_by_state(conn: Connection) -> dict[str, int]:
    """Count the refunds by their state."""
    return {row["state"]: row["refunds"] for row in await conn.fetch(_SQL["refunds_by_state"])}


async def money(
    conn: Connection, first: date | None, last: date | None, time_zone: str
) -> list[MoneyRow]:
    """Add up the money by campaign and day; the days are those of ``time_zone``."""
    return [
        MoneyRow(
            row["campaign_id"], row["day"].isoformat(), row["taken_fen"], row["kept_fen"],
            row["returned_fen"], row["under_way_fen"], row["stuck_fen"],
        )
        for row in await conn.fetch(_SQL["money"], first, last, time_zone)
    ]  # fmt: skip


async def stuck(conn: Connection, limit: int = 1_000) -> list[StuckRow]:
    """List the money that only people can help."""
    return [StuckRow(*row.values()) for row in await conn.fetch(_SQL["stuck"], limit)]


async def stuck_sums(conn: Connection) -> list[StuckSum]:
    """Add up the money that only people can help, by kind; nothing where there is none."""
    return [StuckSum(*row.values()) for row in await conn.fetch(_SQL["stuck_sums"])]


async def test_begin(
    conn: Connection, payment_no: str, amount_fen: int, expires_at_ms: int, return_to: str
) -> None:
    """Begin a payment at the test provider; a repeat is the same one."""
    await conn.execute(
        _SQL["test_begin"], payment_no, amount_fen, from_ms(expires_at_ms), return_to
    )


async def test_one(conn: Connection, payment_no: str) -> TestPayment | None:
    """Give a payment at the test provider."""
    row = await conn.fetchrow(_SQL["test_one"], payment_no)
    return None if row is None else _test_payment(row)


async def test_result(
    conn: Connection, payment_no: str, result: str, ref: str
) -> TestPayment | None:
    """Note that the payer paid or failed; None where that is not possible any more."""
    row = await conn.fetchrow(_SQL["test_result"], payment_no, result, ref)
    return None if row is None else _test_payment(row)


async def test_close(conn: Connection, payment_no: str) -> str:
    """Close a payment at the test provider; give its state then."""
    state: str = await conn.fetchval(_SQL["test_close"], payment_no)
    return state


async def test_refund(conn: Connection, refund_no: str, payment_no: str, amount_fen: int) -> None:
    """Send money back from the test provider, once under each number."""
    await conn.execute(_SQL["test_refund"], refund_no, payment_no, amount_fen)


async def test_refunded(conn: Connection, refund_no: str) -> int | None:
    """Give how much the test provider has sent back under a number."""
    amount: int | None = await conn.fetchval(_SQL["test_refunded"], refund_no)
    return amount


def _payment(row: Mapping[str, Any]) -> PaymentRow:
    found = dict(row)
    return PaymentRow(
        **{name: found[name] for name in _PLAIN},
        expires_at_ms=_ms(found["expires_at"]),
        refunded_fen=found.get("refunded_fen", 0),
        order_state=found.get("order_state"),
    )


def _test_payment(row: Mapping[str, Any]) -> TestPayment:
    return TestPayment(
        row["payment_no"], row["amount_fen"], _ms(row["expires_at"]), row["state"],
        row["return_to"], row["ref"],
    )  # fmt: skip


def _ms(moment: datetime) -> int:
    return to_ms(moment)


_PLAIN: Final = (
    "payment_no", "order_no", "campaign_id", "order_seq", "member_no", "amount_fen", "provider",
    "pay_url", "state", "outcome", "tries",
)  # fmt: skip
_SQL: Final = queries.load("payments")
