"""`sale up`, and the parts it is made of: `serve`, `writer`, `scheduler`, `keeper`, `migrate`."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import click

from sale.cli.runtime import CommandContext, echo, overriding, run
from sale.cli.terminal import note
from sale.config import Settings

if TYPE_CHECKING:
    from sale.stock.batchers import Batchers

LISTEN = click.option("--listen", metavar="H:P", help="Address of the API (port 0: a free one).")
METRICS = click.option("--metrics-listen", metavar="H:P", help="Address of /metrics.")
HELD = click.option(
    "--held", is_flag=True, hidden=True, help="Begin once a line comes on standard input."
)
RELEASED_POLL_S: Final = 0.02
RELEASED_WITHIN_S: Final = 10.0
"""Longest time that an API process waits for a weak Redis before it serves its metrics."""


@click.command()
@LISTEN
@METRICS
@click.option("--workers", type=int, metavar="N", help="API processes.")
@overriding("listen", "metrics_listen", "workers")
def up(context: CommandContext) -> None:
    """Run everything here, servers too where no URL is given."""
    from sale.host import supervisor

    _log(context.settings)
    run(supervisor.run(context.settings, on_ready=_print_ready))


@click.command()
@LISTEN
@METRICS
@HELD
@overriding("listen", "metrics_listen")
def serve(context: CommandContext, *, held: bool) -> None:
    """Run one API process; any number of them share one address."""
    from sale.api.app import listen_on, listening
    from sale.bootstrap import open_engine
    from sale.host.metrics_server import bound_metrics, serving_metrics

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        with (
            bound_metrics(settings.metrics_listen) as metrics,
            listen_on(settings.listen) as listener,
        ):
            async with (
                open_engine(settings) as engine,
                listening(engine, listener) as api,
            ):
                # ``supervisor.py`` takes a part as ready when its metrics can be read. A Redis that
                # rewrites its file at the start sells a moment later in each API process.
                await _released(engine.batchers, stop)
                async with serving_metrics(metrics, engine.registry):
                    await stop.wait()
                    await api.drain()

    _run_part(context.settings, work, held=held)


@click.command()
@METRICS
@HELD
@overriding("metrics_listen")
def writer(context: CommandContext, *, held: bool) -> None:
    """Run the ledger writer; a second one stands by."""
    from sale.bootstrap import START_PATIENCE_S, open_stores, store_urls
    from sale.db.locks import WRITER
    from sale.host.metrics_server import bound_metrics, serving_metrics
    from sale.jobs.leadership import refuse_unfit_proxy
    from sale.jobs.writer import LedgerWriter
    from sale.jobs.writer_metrics import LedgerMetrics
    from sale.metrics import StoreMetrics, new_registry
    from sale.operators.campaigns import CampaignDesk
    from sale.trust.store_watch import watching

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        registry = new_registry("writer")
        database_url = store_urls(settings)[1]
        with bound_metrics(settings.metrics_listen) as metrics:
            await refuse_unfit_proxy(database_url, WRITER)
            async with (
                open_stores(settings, patience_s=START_PATIENCE_S, pool_size=2) as stores,
                watching(stores.redis, stores.pool, StoreMetrics(registry)),
                serving_metrics(metrics, registry),
            ):
                desk = CampaignDesk(stores.redis, stores.scripts, stores.pool)
                carrier = LedgerWriter(
                    stores.redis,
                    stores.scripts,
                    database_url,
                    settings,
                    pause_campaign=desk.pause_for,
                    metrics=LedgerMetrics(registry),
                )
                await carrier.run(stop)

    _run_part(context.settings, work, held=held)


@click.command()
@METRICS
@HELD
@overriding("metrics_listen")
def scheduler(context: CommandContext, *, held: bool) -> None:
    """Run the scheduler: openings, closings, verification, audits."""
    from sale.bootstrap import START_PATIENCE_S, open_stores, store_urls
    from sale.db.locks import SCHEDULER
    from sale.host.metrics_server import bound_metrics, serving_metrics
    from sale.jobs.leadership import refuse_unfit_proxy
    from sale.jobs.scheduler import Scheduler
    from sale.metrics import new_registry

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        registry = new_registry("scheduler")
        database_url = store_urls(settings)[1]
        with bound_metrics(settings.metrics_listen) as metrics:
            await refuse_unfit_proxy(database_url, SCHEDULER)
            async with (
                open_stores(settings, patience_s=START_PATIENCE_S, pool_size=3) as stores,
                serving_metrics(metrics, registry),
            ):
                await Scheduler(stores, database_url, registry).run(stop)

    _run_part(context.settings, work, held=held)


@click.command()
@METRICS
@HELD
@overriding("metrics_listen")
def keeper(context: CommandContext, *, held: bool) -> None:
    """Run the keeper: presents payments, drives refunds."""
    from sale.bootstrap import (
        START_PATIENCE_S,
        open_stores,
        providers_of,
        store_urls,
        test_provider_of,
    )
    from sale.db.locks import KEEPER
    from sale.host.metrics_server import bound_metrics, serving_metrics
    from sale.jobs.keeper import Keeper
    from sale.jobs.leadership import refuse_unfit_proxy
    from sale.metrics import StoreMetrics, new_registry
    from sale.trust.store_watch import watching

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        registry = new_registry("keeper")
        database_url = store_urls(settings)[1]
        with bound_metrics(settings.metrics_listen) as metrics:
            await refuse_unfit_proxy(database_url, KEEPER)
            async with (
                open_stores(settings, patience_s=START_PATIENCE_S, pool_size=5) as stores,
                watching(stores.redis, stores.pool, StoreMetrics(registry)),
                serving_metrics(metrics, registry),
            ):
                providers = providers_of(test_provider_of(stores))
                await Keeper(
                    stores.pool,
                    stores.scripts,
                    providers,
                    database_url,
                    refunds_per_s=settings.refunds_per_s,
                    registry=registry,
                ).run(stop)

    _run_part(context.settings, work, held=held)


@click.command()
@click.option(
    "--metrics-listen",
    metavar="H:P",
    help="Accepted as by the other parts; nothing is served, because this command ends at once.",
)
@overriding("metrics_listen")
def migrate(context: CommandContext) -> None:
    """Bring the database to this version's schema; may be repeated."""
    from sale.db.migrate import migrate as run_migrations

    _log(context.settings)
    applied = run(run_migrations(context.database_url()))
    echo(
        context,
        {"applied": applied},
        lambda: click.echo("\n".join(applied) if applied else "nothing to do"),
    )


async def _released(batchers: "Batchers", stop: asyncio.Event) -> None:
    """Wait until nothing halts the sale, bounded, or until ``stop`` is set."""
    from sale.jobs.backoff import pause

    deadline = time.monotonic() + RELEASED_WITHIN_S
    while batchers.halted and time.monotonic() < deadline and not stop.is_set():
        await pause(stop, RELEASED_POLL_S)


def _print_ready(address: str) -> None:
    try:
        click.echo(f"ready {address}")
    except OSError as error:  # for example a full disk; the system runs in spite of it
        with contextlib.suppress(OSError):
            note(f"sale: ready {address}, and stdout cannot be written: {error.strerror}")


def _run_part(
    settings: Settings,
    work: Callable[[Settings, asyncio.Event], Coroutine[Any, Any, None]],
    *,
    held: bool,
) -> None:
    from sale.lifetime import run_until_stopped, stop_on_signal

    async def part() -> None:
        with stop_on_signal() as stop:
            await run_until_stopped(work(settings, stop), stop, settings.drain_limit_s)

    _log(settings)
    # `sale up` starts a part before its stores, so that it is imported while they start.
    if not held or sys.stdin.buffer.readline():
        run(part())


def _log(settings: Settings) -> None:
    from sale.logs import set_up_logging

    set_up_logging(settings)
