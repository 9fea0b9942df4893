"""`sale audit`, `sale recover`, `sale doctor`: is everything as it should be?"""

import sys
from typing import Any

import click

from sale.cli.runtime import (
    CommandContext,
    command_context,
    echo,
    echo_fields,
    echo_table,
    note,
    run,
)
from sale.usecases.audit import AuditReport, CouldNotCheck

EXIT_FINDING = 1
EXIT_COULD_NOT_CHECK = 3


@click.command()
@click.argument("campaign_id", metavar="[ID]", required=False)
@command_context
def audit(context: CommandContext, campaign_id: str | None) -> int:
    """Check every invariant, in both stores. Exit: 0 clean, 1 a finding, 3 could not check."""
    from sale.bootstrap import STORE_ERRORS, open_stores
    from sale.config import SettingsError
    from sale.embedded import EmbeddedError
    from sale.usecases.audit import audit as check

    async def work() -> AuditReport:
        try:
            async with open_stores(context.settings, pool_size=3) as stores:
                return await check(stores.redis, stores.pool, campaign_id)
        except (*STORE_ERRORS, SettingsError, EmbeddedError) as error:
            raise CouldNotCheck(str(error) or type(error).__name__) from None

    try:
        report = run(work())
    except CouldNotCheck as error:
        note(f"sale: could not check: {error}")
        return EXIT_COULD_NOT_CHECK
    echo(context, report, lambda: _show_audit(report))
    return 0 if report.clean else EXIT_FINDING


@click.command()
@click.argument("campaign_id", metavar="ID")
@click.option("--dry-run", is_flag=True, help="Show the difference, change nothing.")
@command_context
def recover(context: CommandContext, campaign_id: str, *, dry_run: bool) -> None:
    """Rebuild a campaign's state in Redis from PostgreSQL; nothing where nothing is wrong."""
    from sale.bootstrap import open_stores
    from sale.usecases.recovery import Recovery
    from sale.usecases.recovery import recover as rebuild

    async def work() -> Recovery:
        async with open_stores(context.settings, pool_size=3) as stores:
            return await rebuild(
                stores.redis,
                stores.scripts,
                stores.pool,
                campaign_id,
                actor=context.actor,
                dry_run=dry_run,
            )

    done = run(work())

    def in_words() -> None:
        click.echo(done.says)
        for difference in done.differences:
            click.echo(f"  {difference}")

    echo(context, done, in_words)


@click.command()
@command_context
def doctor(context: CommandContext) -> None:
    """Tell what is running, its versions, how durable it really is, and the ledger's lag."""
    from sale.bootstrap import open_stores
    from sale.usecases.diagnosis import Diagnosis, diagnose

    async def work() -> Diagnosis:
        async with open_stores(context.settings, pool_size=2) as stores:
            return await diagnose(stores.redis, stores.pool, stores.nonce)

    found = run(work())

    def in_words() -> None:
        echo_fields(
            [
                ("redis", found.redis_version),
                ("postgresql", found.postgres_version),
                ("durability", "every answer after its fsync" if not found.faults else "WEAK"),
                ("writer", found.writer),
                ("cards in the roster", found.cards),
            ]
        )
        for fault in found.faults:
            click.echo(f"  {fault}")
        rows: list[tuple[Any, ...]] = [
            (each.id, each.state, each.seq, each.applied, each.seq - each.applied, each.trouble)
            for each in found.campaigns
        ]
        echo_table(("campaign", "state", "events", "in PostgreSQL", "lag", "trouble"), rows)

    echo(context, found, in_words)
    if found.faults or any(each.trouble for each in found.campaigns):
        sys.exit(1)


def _show_audit(report: AuditReport) -> None:
    rows = [
        (each.id, "clean" if each.clean else f"{len(each.findings)} findings")
        for each in report.campaigns
    ]
    echo_table(("campaign", "audit"), rows)
    for each in report.campaigns:
        for finding in each.findings:
            click.echo(f"{each.id}: {finding.invariant}: {finding.what}")
    click.echo("clean: every invariant holds" if report.clean else "NOT CLEAN")
