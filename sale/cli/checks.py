"""`sale audit` and `sale doctor`: checks of the whole deployment."""

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from sale.cli.runtime import CommandContext, command_context, echo, one_line, run
from sale.cli.terminal import echo_fields, echo_table, note, progress
from sale.domain.problem import Refused
from sale.trust.audit import AuditReport, CampaignAudit, CouldNotCheck

if TYPE_CHECKING:
    from sale.operators.diagnosis import Diagnosis

EXIT_FINDING = 1
EXIT_COULD_NOT_CHECK = 3
_DURABILITY = {
    "fsync": "every answer after its fsync",
    "replicated": "every answer after its fsync, and after the replicas have it",
    "relaxed": "a crash may lose about the last second's answered orders",
}


@click.command()
@click.argument("campaign_id", metavar="[ID]", required=False)
@command_context
def audit(context: CommandContext, campaign_id: str | None) -> int:
    """Check every invariant, in both stores.

    Exit status: 0 clean, 1 a finding, 2 no such campaign, 3 could not check. 20,000 orders take
    about five seconds; progress is shown on stderr.
    """
    from sale.bootstrap import STORE_ERRORS, open_stores
    from sale.config import SettingsError
    from sale.host.embedded import EmbeddedError
    from sale.trust.audit import audit as check

    async def work() -> AuditReport:
        try:
            async with open_stores(context.settings, pool_size=3) as stores:
                with progress("auditing") as move:
                    return await check(
                        stores.redis,
                        stores.pool,
                        campaign_id,
                        durability=context.settings.durability,
                        replicas_min=context.settings.replicas_min,
                        progress=move,
                    )
        except Refused as refused:  # an unknown ID; exit status 1 would say that there is a finding
            raise click.UsageError(refused.detail) from None
        except (*STORE_ERRORS, SettingsError, EmbeddedError) as error:
            raise CouldNotCheck(str(error) or type(error).__name__) from None

    try:
        report = run(work())
    except CouldNotCheck as error:
        note(f"sale: could not check: {error}")
        return EXIT_COULD_NOT_CHECK
    echo(context, report, lambda: _show_audit(report))
    if report.clean:
        return 0
    found = any(each.checked and not each.clean for each in report.campaigns)
    return EXIT_FINDING if found else EXIT_COULD_NOT_CHECK


@click.command()
@command_context
def doctor(context: CommandContext) -> None:
    """Tell what is running, how durable it is, the ledger's lag."""
    from sale.bootstrap import store_urls
    from sale.db.errors import POSTGRES_ERRORS
    from sale.db.pool import close_pool, open_pool
    from sale.operators.diagnosis import Diagnosis, diagnose
    from sale.stock.connection import open_redis

    async def work() -> Diagnosis:
        settings = context.settings
        redis_url, database_url = store_urls(settings)
        async with contextlib.AsyncExitStack() as stack:
            redis = open_redis(redis_url, max_connections=2)
            stack.push_async_callback(redis.aclose)
            pool, away = None, ""
            try:
                pool = await open_pool(database_url, max_size=2)
                stack.push_async_callback(close_pool, pool)
            except POSTGRES_ERRORS as error:
                away = one_line(error) or str(error)
            return await diagnose(
                redis,
                pool,
                redis_url=redis_url,
                postgres_away=away,
                durability=settings.durability,
                replicas_min=settings.replicas_min,
            )

    found = run(work())
    bound_mb = context.settings.disk_free_min_mb
    short = found.redis_disk_free_mb is not None and found.redis_disk_free_mb < bound_mb

    def in_words() -> None:
        echo_fields(
            [
                ("redis", found.redis_version or "see below"),
                ("postgresql", found.postgres_version or "see below"),
                ("durability", f"{found.durability}: {_DURABILITY[found.durability]}"),
                ("in force", _in_force(found)),
                ("free on Redis' disk", _free(found.redis_disk_free_mb, bound_mb)),
                ("API processes", found.api),
                ("writer", found.writer),
                ("scheduler", found.scheduler),
                ("keeper", found.keeper),
                ("cards in use", found.cards),
            ]
        )
        for trouble in found.wrong:
            click.echo(f"  wrong: {trouble}")
        if context.settings.test_provider:
            click.echo("  warning: the test provider is on: payments are not real (test_provider)")
        rows: list[tuple[Any, ...]] = [
            (each.id, each.state, each.seq, each.applied, each.lag, each.trouble)
            for each in found.campaigns
        ]
        echo_table(("campaign", "state", "events", "in PostgreSQL", "lag", "trouble"), rows)
        for each in found.campaigns:
            if each.rehearsal_of:
                click.echo(
                    f"{each.id} rehearses {each.rehearsal_of}; if nobody plays it any more: "
                    f"sale rehearse --purge {each.id}"
                )

    echo(context, found, in_words)
    if short or not found.sound:
        sys.exit(1)


def _in_force(found: "Diagnosis") -> str:
    if not found.redis_version or not found.postgres_version:
        return "unknown: see below"
    return "no: see below" if found.faults else "yes"


def _free(left_mb: int | None, bound_mb: int) -> str:
    if left_mb is None:
        return "unknown: Redis' files are not on this host"
    return f"{left_mb} MB" + (f": below {bound_mb} MB nothing is sold" * (left_mb < bound_mb))


def _unclean(audited: CampaignAudit) -> str:
    return f"{len(audited.findings)} findings" if audited.checked else "could not check"


def _show_audit(report: AuditReport) -> None:
    rows = [(each.id, "clean" if each.clean else _unclean(each)) for each in report.campaigns]
    echo_table(("campaign", "audit"), rows)
    for each in report.campaigns:
        for finding in each.findings:
            click.echo(f"{each.id}: {finding.invariant}: {finding.what}")
    if report.clean:
        click.echo("clean: every invariant holds")
    elif all(each.clean or not each.checked for each in report.campaigns):
        click.echo("NOT ALL CHECKED: what was checked is clean")
    else:
        click.echo("NOT CLEAN")
