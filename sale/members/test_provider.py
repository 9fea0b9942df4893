"""The test provider: pays, fails and refunds at the word of whoever asks, and takes no money.

It stands where a real provider would: with books of its own, notices that are signed and may be
lost or come twice, payments that expire and refunds under numbers. It exists only with the setting
``test_provider``.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from typing import Final, Literal

import asyncpg
import msgspec

from sale.db import payments
from sale.db.payments import TestPayment
from sale.members.provider import BadNotice, Notice, Paid, ProviderError, Returned, Status

NAME: Final = "test"
SIGNATURE: Final = "Test-Provider-Signature"
MOMENT: Final = "Test-Provider-Time"
NOTICE_AGE_MAX_S: Final = 300
PATH: Final = "/api/v1/test-provider"

Result = Literal["paid", "failed", "none"]


class _Body(msgspec.Struct, frozen=True):
    payment_no: str
    state: str
    amount_fen: int
    ref: str


class TestProvider:
    """See the module's docstring."""

    __test__ = False  # not a test, whatever its name says
    name = NAME

    def __init__(self, pool: asyncpg.Pool, secret: bytes) -> None:
        self._pool = pool
        self._key = hmac.digest(secret, b"notices of the test provider", "sha256")

    async def create(
        self, payment_no: str, amount_fen: int, expires_at_ms: int, return_to: str
    ) -> str:
        """Begin a payment; it is paid at ``PATH/{payment_no}`` of this service."""
        async with self._pool.acquire() as connection:
            await payments.test_begin(connection, payment_no, amount_fen, expires_at_ms, return_to)
        return f"{PATH}/{payment_no}"

    async def query(self, payment_no: str) -> Status:
        """Tell what has become of a payment."""
        found = await self.one(payment_no)
        if found is None:
            raise ProviderError(f"no payment {payment_no}")
        return _status(found)

    async def close(self, payment_no: str) -> Status:
        """Take nothing any more."""
        async with self._pool.acquire() as connection:
            state = await payments.test_close(connection, payment_no)
        if state == "closed":
            return Status(Paid.CLOSED)
        return await self.query(payment_no)

    async def refund(
        self,
        payment_no: str,
        refund_no: str,
        amount_fen: int,
        total_fen: int,  # noqa: ARG002 - of the port
    ) -> Returned:
        """Send money back at once."""
        async with self._pool.acquire() as connection:
            await payments.test_refund(connection, refund_no, payment_no, amount_fen)
        return await self.query_refund(refund_no)

    async def query_refund(self, refund_no: str) -> Returned:
        """Tell what has become of a refund."""
        async with self._pool.acquire() as connection:
            amount = await payments.test_refunded(connection, refund_no)
        return Returned.FAILED if amount is None else Returned.DONE

    def verify(self, headers: Mapping[str, str], body: bytes) -> Notice:
        """Read a notice. Raises BadNotice."""
        moment = headers.get(MOMENT, "")
        if not hmac.compare_digest(self._sign(moment, body), headers.get(SIGNATURE, "")):
            raise BadNotice("its signature is wrong")
        if not moment.isdecimal() or abs(time.time() - int(moment)) > NOTICE_AGE_MAX_S:
            raise BadNotice("it is too old")
        try:
            told = _BODY.decode(body)
        except msgspec.MsgspecError as error:
            raise BadNotice(str(error)) from None
        paid = Paid.YES if told.state == "paid" else Paid.NO
        return Notice(told.payment_no, Status(paid, told.amount_fen, told.ref))

    # Its other side: the page on which people pay ------------------------------------------------

    async def one(self, payment_no: str) -> TestPayment | None:
        """Give a payment as the page shows it."""
        async with self._pool.acquire() as connection:
            return await payments.test_one(connection, payment_no)

    async def act(
        self, payment_no: str, result: Result
    ) -> tuple[TestPayment | None, tuple[dict[str, str], bytes] | None]:
        """Do what the payer wants; give the payment, and the notice that is sent of it.

        A result that is not possible any more changes nothing, and nothing is sent.
        """
        if result == "none":
            return await self.one(payment_no), None
        async with self._pool.acquire() as connection:
            done = await payments.test_result(connection, payment_no, result, secrets.token_hex(8))
        if done is None:
            return await self.one(payment_no), None
        return done, self.notice(done)

    def notice(self, payment: TestPayment) -> tuple[dict[str, str], bytes]:
        """Sign a notice: its headers and its body."""
        body = msgspec.json.encode(
            _Body(payment.payment_no, payment.state, payment.amount_fen, payment.ref)
        )
        moment = str(int(time.time()))
        return {MOMENT: moment, SIGNATURE: self._sign(moment, body)}, body

    def _sign(self, moment: str, body: bytes) -> str:
        return hmac.digest(self._key, f"{moment}|".encode() + body, hashlib.sha256).hex()


def _status(found: TestPayment) -> Status:
    match found.state:
        case "paid":
            return Status(Paid.YES, found.amount_fen, found.ref)
        case "closed":
            return Status(Paid.CLOSED)
        case _:
            return Status(Paid.NO)


_BODY: Final = msgspec.json.Decoder(_Body)
