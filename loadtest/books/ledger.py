"""Reads a campaign's books from PostgreSQL, and waits until they are written up."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from importlib.resources import files
from typing import Any, Final

import asyncpg
import msgspec

from loadtest.books.answers import Answer
from sale.db.pool import connect
from sale.domain.order import order_number, parse_order_number
from sale.store_urls import BadUrl

CONNECT_S: Final = 10.0
READ_S: Final = 120.0
WAIT_S: Final = 60.0
POLL_S: Final = 0.02
_PROBLEMS: Final = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a server that dies in mid-call
)


class OrderRow(msgspec.Struct, frozen=True):
    """One order as PostgreSQL has it."""

    order_no: str
    member_no: str
    showing: str
    quantity: int
    price_fen: int
    state: str
    key_hash: str
    created_at_ms: int = 0


class Books(msgspec.Struct, frozen=True):
    """A campaign in PostgreSQL: its orders, the stock of each showing, and its limits."""

    orders: tuple[OrderRow, ...]
    stock: dict[str, int]
    card_limit: int
    applied: int = 0
    opens_at_ms: int | None = None


class BooksError(Exception):
    """The books cannot be read; the message is for people."""


@contextlib.asynccontextmanager
async def _open(database_url: str) -> AsyncIterator[Any]:
    """A connection. Raises BooksError, also for what PostgreSQL does within the block."""
    try:
        connection = await connect(
            database_url, name="sale loadtest", timeout_s=CONNECT_S, command_timeout=READ_S
        )
        try:
            yield connection
        finally:
            await connection.close(timeout=CONNECT_S)
    except (*_PROBLEMS, BadUrl) as error:
        raise BooksError(f"PostgreSQL: {error or type(error).__name__}") from None


async def load_books(database_url: str, campaign: str) -> Books:
    """Read orders, stock and limit of a campaign, at one moment. Raises BooksError."""
    async with (
        _open(database_url) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        head = await connection.fetchrow(_sql("campaign"), campaign)
        showings = await connection.fetch(_sql("showings"), campaign)
        rows = await connection.fetch(_sql("orders"), campaign, timeout=READ_S)
    if head is None:
        raise BooksError(f"campaign {campaign}: not in PostgreSQL")
    orders = tuple(
        OrderRow(
            order_no=order_number(campaign, row["seq"], row["created_at_ms"]),
            member_no=str(row["member_no"]),
            showing=row["showing_id"] or "",
            quantity=row["quantity"],
            price_fen=row["price_fen"],
            state=row["state"],
            key_hash=row["key_hash"],
            created_at_ms=row["created_at_ms"],
        )
        for row in rows
    )
    stock = {row["showing_id"]: row["stock"] for row in showings}
    return Books(orders, stock, head["card_limit"], head["applied"], head["opens_at_ms"])


async def count_orders(database_url: str, campaign: str) -> int:
    """How many orders PostgreSQL has of a campaign. Raises BooksError."""
    async with _open(database_url) as connection:
        return int(await connection.fetchval(_sql("count"), campaign))


def highest(answers: Iterable[Answer]) -> int:
    """Highest event number that any client was told of, 0 for none."""
    numbers = (parse_order_number(answer.order_no) for answer in answers if answer.sold)
    return max((number[1] for number in numbers if number), default=0)


async def wait_applied(
    database_url: str, campaign: str, seq: int, *, within_s: float = WAIT_S
) -> float:
    """Wait until PostgreSQL has event ``seq``; return the seconds. Raises BooksError."""
    start, applied = time.perf_counter(), -1
    try:
        async with (
            asyncio.timeout(within_s),
            contextlib.aclosing(progress(database_url, campaign)) as steps,
        ):
            async for applied in steps:
                if applied >= seq:
                    break
    except TimeoutError:
        raise BooksError(
            f"campaign {campaign}: after {within_s:.0f} s PostgreSQL is at event {applied},"
            f" clients were told of {seq}"
        ) from None
    return time.perf_counter() - start


async def must_know(database_url: str, campaign: str, engine: str, within_s: float) -> None:
    """See that PostgreSQL has a campaign; a new one may be on its way. Raises BooksError."""
    try:
        await wait_applied(database_url, campaign, 1, within_s=within_s)
    except BooksError:
        raise BooksError(
            f"PostgreSQL does not know campaign {campaign}: are these the books of the engine at"
            f" {engine}?"
        ) from None


async def progress(database_url: str, campaign: str) -> AsyncGenerator[int, None]:
    """Give each further number that PostgreSQL has applied, as it is seen. Raises BooksError."""
    seen = -1
    async with _open(database_url) as connection:
        while True:
            head = await connection.fetchrow(_sql("campaign"), campaign)
            applied = 0 if head is None else head["applied"]
            if applied > seen:
                yield applied
                seen = applied
            await asyncio.sleep(POLL_S)


def _sql(name: str) -> str:
    return files("loadtest.books").joinpath("sql", f"{name}.sql").read_text("utf-8")
