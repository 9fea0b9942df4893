"""`sale recover` and `sale losses`: what Redis lost, filled in again or listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from sale.cli.runtime import CommandContext, command_context, echo, echo_table, run

if TYPE_CHECKING:
    from sale.usecases.losses import Losses
    from sale.usecases.recovery import Recovery

SHOWN_MAX: Final = 100


@click.command()
@click.argument("campaign_id", metavar="ID")
@click.option("--dry-run", is_flag=True, help="Show the difference, change nothing.")
@command_context
def recover(context: CommandContext, campaign_id: str, *, dry_run: bool) -> None:
    """Rebuild a campaign's state in Redis from the ledger; does nothing if nothing is wrong."""
    from sale.bootstrap import open_stores
    from sale.usecases.recovery import recover as rebuild

    async def work() -> "Recovery":
        async with open_stores(context.settings, pool_size=3) as stores:
            with _progress(quiet=context.as_json) as on_progress:
                return await rebuild(
                    stores.redis,
                    stores.scripts,
                    stores.pool,
                    campaign_id,
                    actor=context.actor,
                    dry_run=dry_run,
                    progress=on_progress,
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
    """List voided order numbers, and orders that a member was told but the ledger does not have."""
    from sale.bootstrap import open_stores
    from sale.usecases.losses import losses as read

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
                (each.seq, each.at, each.card, each.showing, each.quantity, each.source, each.why)
                for each in found.conflicts
            ]
            names = ("event", "at", "card", "showing", "tickets", "source", "why")
            echo_table(names, rows, title="conflicts")

    echo(context, found, in_words)


def _range(first: int, last: int) -> str:
    return f"event {first}" if first == last else f"events {first} to {last}"


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Any]:
    """A bar on stderr where that is a terminal; yields the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task("recovering", total=None)

        def move(step: str, done: int, of: int) -> None:
            bar.update(task, description=step, completed=done, total=of)

        yield move
