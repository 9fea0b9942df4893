"""`sale order`: look at a single order, cancel tickets of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click

from sale.cli.runtime import CommandContext, command_context, echo, run
from sale.cli.terminal import echo_fields
from sale.domain.campaign import CARD_LIMIT_MAX
from sale.domain.order import Order
from sale.operators.campaigns import Actor
from sale.operators.orders import OrderDesk
from sale.stock.catalogue import Catalogue


@click.group()
def order() -> None:
    """Look at single orders, and cancel tickets of them."""


@order.command()
@click.argument("order_no", metavar="ORDER_NO")
@command_context
def show(context: CommandContext, order_no: str) -> None:
    """Show an order as it is now."""

    async def work() -> Order:
        async with _desk(context) as desk:
            return await desk.show(order_no, Actor(context.actor))

    _show(context, run(work()))


@order.command()
@click.argument("order_no", metavar="ORDER_NO")
@click.option("--tickets", metavar="1,2", help="Their numbers; without it, all that can be.")
@click.option("--reason", required=True, help="Why, for the audit log.")
@command_context
def cancel(context: CommandContext, order_no: str, tickets: str | None, reason: str) -> None:
    """Cancel tickets of an order: they are on sale again at once."""
    numbers = None if tickets is None else _numbers(tickets)

    async def work() -> Order:
        async with _desk(context) as desk:
            return await desk.cancel(order_no, numbers, reason, Actor(context.actor))

    _show(context, run(work()))


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number <= CARD_LIMIT_MAX for number in numbers):
        raise click.UsageError(f"--tickets takes numbers from 1 to {CARD_LIMIT_MAX}, as 1,2")
    return numbers


@asynccontextmanager
async def _desk(context: CommandContext) -> AsyncIterator[OrderDesk]:
    from sale.bootstrap import open_stores

    async with open_stores(context.settings, pool_size=2) as stores:
        catalogue = Catalogue(stores.redis)
        try:
            yield OrderDesk(stores.redis, stores.scripts, stores.pool, catalogue)
        finally:
            await catalogue.close()


def _show(context: CommandContext, found: Order) -> None:
    def in_words() -> None:
        states = ", ".join(f"{ticket.no} {ticket.state}" for ticket in found.tickets)
        echo_fields(
            [
                ("order", found.order_no),
                ("campaign", found.campaign),
                ("showing", found.showing),
                ("state", found.state),
                ("bought", found.created_at),
                ("pay before", found.pay_before or "–"),
                ("tickets", states),
                ("amount", f"{found.amount_fen / 100:.2f} yuan"),
                ("payment", found.payment.state),
            ]
        )

    echo(context, found, in_words)
