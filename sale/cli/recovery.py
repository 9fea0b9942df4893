"""`sale recover` rebuilds a campaign that Redis lost; `sale losses` lists what is missing."""

from typing import TYPE_CHECKING, Final

import click

from sale.cli.runtime import CommandContext, command_context, echo, run
from sale.cli.terminal import echo_table, progress

if TYPE_CHECKING:
    from sale.trust.losses import Losses
    from sale.trust.recover import Recovery

SHOWN_MAX: Final = 100


@click.command()
@click.argument("campaign_id", metavar="ID")
@click.option("--dry-run", is_flag=True, help="Show the difference, change nothing.")
@command_context
def recover(context: CommandContext, campaign_id: str, *, dry_run: bool) -> None:
    """Rebuild a campaign in Redis from the ledger, if needed.

    Does nothing and exits 0 if nothing is wrong. A campaign of 20,000 orders takes some seconds;
    progress is shown on stderr.
    """
    from sale.bootstrap import open_stores
    from sale.trust.recover import recover as rebuild

    async def work() -> "Recovery":
        async with open_stores(context.settings, pool_size=3) as stores:
            with progress("recovering") as move:
                return await rebuild(
                    stores.redis,
                    stores.scripts,
                    stores.pool,
                    campaign_id,
                    actor=context.actor,
                    dry_run=dry_run,
                    progress=lambda step, done, of: move(done, of, step),
                )

    done = run(work())

    def in_words() -> None:
        click.echo(done.says)
        for difference in done.differences:
            click.echo(f"  {difference}")
        for first, last in done.voided[:SHOWN_MAX]:
            click.echo(
                f"  {_range(first, last)}: no process knows what was answered; never used again"
            )
        if done.voided:
            click.echo(
                "  operators' steps under such numbers are not repeated: check the campaign's state"
            )
        if done.conflicts and done.changed:
            click.echo(f"  sale losses {campaign_id} lists the conflicts")
        for process in done.silent:
            click.echo(
                f"  API process {process} did not report in time; it is checked when it does"
            )

    echo(context, done, in_words)


@click.command()
@click.argument("campaign_id", metavar="ID")
@command_context
def losses(context: CommandContext, campaign_id: str) -> None:
    """List the order numbers that a campaign lost, and why.

    Voided order numbers are lost, and it is unknown whether a member got an answer; conflicts are
    orders that a member was given but the ledger does not have.
    """
    from sale.bootstrap import open_stores
    from sale.trust.losses import losses as read

    async def work() -> "Losses":
        async with open_stores(context.settings, pool_size=1) as stores:
            return await read(stores.pool, campaign_id)

    found = run(work())

    def in_words() -> None:
        if not found.voided and not found.conflicts:
            click.echo(f"{campaign_id}: nothing is lost")
        for first, last in found.voided:
            click.echo(f"{_range(first, last)}: voided")
        if found.conflicts:
            rows = [
                (each.seq, each.at, each.member, each.showing, each.quantity, each.source, each.why)
                for each in found.conflicts
            ]
            names = ("event", "at", "member", "showing", "tickets", "source", "why")
            echo_table(names, rows, title="conflicts")

    echo(context, found, in_words)


def _range(first: int, last: int) -> str:
    return f"event {first}" if first == last else f"events {first} to {last}"
