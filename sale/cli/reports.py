"""`sale report`: what was sold and what was paid, for those who account for it."""

from datetime import date, datetime

import click
import msgspec

from sale.cli.runtime import CommandContext, command_context, echo, run
from sale.cli.terminal import echo_table
from sale.db import payments
from sale.db.payments import MoneyRow, StuckRow

TIME_ZONE = "Asia/Shanghai"
DAY = click.DateTime(["%Y-%m-%d"])


class Money(msgspec.Struct, frozen=True):
    """The money by campaign and day, and what only people can help."""

    days: list[MoneyRow]
    stuck: list[StuckRow]


@click.group()
def report() -> None:
    """Reports."""


@report.command()
@click.option("--from", "first", type=DAY, metavar="D", help="First day.")
@click.option("--to", "last", type=DAY, metavar="D", help="Last day.")
@command_context
def money(context: CommandContext, first: object, last: object) -> None:
    """Money taken, kept, returned, under way and stuck, by campaign and day."""
    from sale.bootstrap import open_stores

    async def work() -> Money:
        async with (
            open_stores(context.settings, pool_size=1) as stores,
            stores.pool.acquire() as connection,
        ):
            days = await payments.money(connection, _day(first), _day(last), TIME_ZONE)
            return Money(days, await payments.stuck(connection))

    found = run(work())

    def in_words() -> None:
        names = ("taken_fen", "kept_fen", "returned_fen", "under_way_fen", "stuck_fen")
        rows = [
            (row.day, row.campaign, *(yuan(getattr(row, n)) for n in names)) for row in found.days
        ]
        sums = (yuan(sum(getattr(row, name) for row in found.days)) for name in names)
        rows.append(("all", "", *sums))
        echo_table(("day", "campaign", "taken", "kept", "returned", "under way", "stuck"), rows)
        for each in found.stuck:
            click.echo(
                f"stuck: {each.what} {each.number} of order {each.order_no}, "
                f"{yuan(each.amount_fen)}: {each.trouble}"
            )

    echo(context, found, in_words)


def yuan(fen: int) -> str:
    """Word an amount."""
    return f"{fen // 100}.{fen % 100:02d}"


def _day(given: object) -> date | None:
    return given.date() if isinstance(given, datetime) else None
