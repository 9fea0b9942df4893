"""`sale campaign …`: what operators do, from the command line."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from sale.cli.runtime import (
    CommandContext,
    WholeNumber,
    command_context,
    echo,
    echo_fields,
    echo_table,
    note,
    run,
)
from sale.domain.campaign import InvalidCampaign, State, parse_campaign_toml
from sale.domain.clock import rfc3339
from sale.domain.problem import Refused
from sale.files import read_text, shown
from sale.operators.campaigns import Actor, CampaignDesk, moment_ms
from sale.stock.catalogue import CampaignNow, Unreadable, read_campaigns

REASON = click.option("--reason", help="Why, for the audit log.")
REASON_REQUIRED = click.option("--reason", required=True, help="Why, for the audit log.")


@click.group()
def campaign() -> None:
    """Plan, open, watch and close campaigns."""


@campaign.command()
@click.argument("file", type=click.Path(path_type=Path))
@command_context
def create(context: CommandContext, file: Path) -> None:
    """Make a campaign from a TOML file: scheduled, or a draft."""
    text = read_text(file)

    async def work() -> CampaignNow:
        async with _desk(context) as (desk, unions, _):
            try:
                parsed = parse_campaign_toml(text, frozenset(unions))
            except InvalidCampaign as wrong:
                raise click.ClickException(f"{shown(file)}: {wrong}") from None
            return await desk.create(parsed, _actor(context), None, None)

    made = run(work())
    _say_past(made)
    _show(context, made)


@campaign.command("list")
@click.option("--all", "rehearsals", is_flag=True, help="Rehearsals too.")
@command_context
def list_(context: CommandContext, *, rehearsals: bool) -> None:
    """List all campaigns, drafts too; rehearsals with --all."""

    unreadable: list[Unreadable] = []

    async def work() -> list[CampaignNow]:
        async with _desk(context) as (_, _, redis):
            return await read_campaigns(redis, unreadable=unreadable)

    found = [now for now in run(work()) if now.state is not State.DELETED]
    for each in unreadable:
        note(f"not listed: {each.detail}")
    campaigns = [now for now in found if rehearsals or not now.campaign.rehearsal_of]
    if hidden := len(found) - len(campaigns):
        note(f"{hidden} rehearsals are not listed: --all shows them")
    echo(
        context,
        [_as_json(now) for now in campaigns],
        lambda: echo_table(
            ("id", "title", "state", "opens at", "left", "of"),
            [
                (
                    now.campaign.id,
                    now.campaign.title,
                    f"{now.state.value}, a rehearsal"
                    if now.campaign.rehearsal_of
                    else now.state.value,
                    _moment(now.opens_at_ms),
                    sum(now.remaining),
                    sum(now.tickets),
                )
                for now in campaigns
            ],
        ),
    )


@campaign.command()
@click.argument("campaign_id", metavar="ID")
@command_context
def show(context: CommandContext, campaign_id: str) -> None:
    """Show a campaign and what is left of it."""

    async def work() -> CampaignNow:
        async with _desk(context) as (desk, _, _):
            return await desk.show(campaign_id, _actor(context))

    _show(context, run(work()))


@campaign.command()
@click.argument("campaign_id", metavar="ID")
@click.option("--at", metavar="TIME", help="Opening moment, RFC 3339 with offset.")
@REASON
@command_context
def schedule(context: CommandContext, campaign_id: str, at: str | None, reason: str | None) -> None:
    """Set a draft, or a new TIME, for opening by itself.

    Without --at it opens at the opens_at of its file.
    """
    scheduled = _step(context, campaign_id, "schedule", reason, at)
    _say_past(scheduled)


@campaign.command("open")
@click.argument("campaign_id", metavar="ID")
@REASON
@command_context
def open_(context: CommandContext, campaign_id: str, reason: str | None) -> None:
    """Open it now, also before its opening moment."""
    _step(context, campaign_id, "open", reason)


@campaign.command()
@click.argument("campaign_id", metavar="ID")
@REASON_REQUIRED
@command_context
def pause(context: CommandContext, campaign_id: str, reason: str) -> None:
    """Stop selling for a while."""
    _step(context, campaign_id, "pause", reason)


@campaign.command()
@click.argument("campaign_id", metavar="ID")
@REASON
@command_context
def resume(context: CommandContext, campaign_id: str, reason: str | None) -> None:
    """Go on selling after a pause."""
    _step(context, campaign_id, "resume", reason)


@campaign.command()
@click.argument("campaign_id", metavar="ID")
@REASON
@command_context
def close(context: CommandContext, campaign_id: str, reason: str | None) -> None:
    """End the sale."""
    _step(context, campaign_id, "close", reason)


@campaign.command()
@click.argument("campaign_id", metavar="ID")
@REASON_REQUIRED
@command_context
def reopen(context: CommandContext, campaign_id: str, reason: str) -> None:
    """Open a closed campaign again."""
    _step(context, campaign_id, "reopen", reason)


@campaign.command("add-stock")
@click.argument("campaign_id", metavar="ID")
@click.argument("showing")
@click.argument("count", metavar="N", type=WholeNumber(1))
@REASON_REQUIRED
@command_context
def add_stock(
    context: CommandContext, campaign_id: str, showing: str, count: int, reason: str
) -> None:
    """Add N tickets to a showing, while it sells too."""

    async def work() -> CampaignNow:
        async with _desk(context) as (desk, _, _):
            return await desk.add_stock(campaign_id, showing, count, _actor(context), reason, None)

    _show(context, run(work()))


@campaign.command()
@click.argument("campaign_id", metavar="ID")
@REASON
@command_context
def delete(context: CommandContext, campaign_id: str, reason: str | None) -> None:
    """Delete a draft."""

    async def work() -> None:
        async with _desk(context) as (desk, _, _):
            await desk.delete(campaign_id, _actor(context), reason, None)

    run(work())
    echo(context, {"deleted": campaign_id}, lambda: note(f"draft {campaign_id} deleted"))


@asynccontextmanager
async def _desk(
    context: CommandContext,
) -> AsyncIterator[tuple[CampaignDesk, dict[str, str], Any]]:
    from sale.bootstrap import open_stores

    async with open_stores(context.settings, pool_size=2) as stores:
        desk = CampaignDesk(stores.redis, stores.scripts, stores.pool)
        yield desk, stores.unions, stores.redis


def _actor(context: CommandContext) -> Actor:
    return Actor(context.actor)


def _step(
    context: CommandContext,
    campaign_id: str,
    action: str,
    reason: str | None,
    at: str | None = None,
) -> CampaignNow:
    opens_at_ms = None if at is None else _parsed(at)

    async def work() -> CampaignNow:
        async with _desk(context) as (desk, _, _):
            return await desk.step(campaign_id, action, _actor(context), reason, None, opens_at_ms)

    done = run(work())
    _show(context, done)
    return done


def _say_past(now: CampaignNow) -> None:
    """Say what a moment that is past already has brought about."""
    if now.state is State.OPEN:
        note("its opening is past: it sells already")
    elif now.state is State.CLOSED:
        note("its closing is past: it is closed already")


def _parsed(at: str) -> int:
    try:
        return moment_ms(at)
    except Refused as refused:
        raise click.ClickException(refused.detail) from None


def _show(context: CommandContext, now: CampaignNow) -> None:
    def in_words() -> None:
        campaign = now.campaign
        echo_fields(
            [
                ("id", campaign.id),
                ("title", campaign.title),
                *([("rehearses", campaign.rehearsal_of)] if campaign.rehearsal_of else []),
                ("state", now.state.value),
                ("why", now.recovering or None) if now.recovering else ("owner", campaign.owner),
                ("opens at", _moment(now.opens_at_ms)),
                ("closes at", _moment(now.closes_at_ms)),
                ("price", f"{campaign.price_fen / 100:.2f} yuan"),
                ("per card", campaign.card_limit),
                ("events", now.seq),
            ]
        )
        echo_table(
            ("showing", "title", "tickets", "left"),
            [
                (showing.id, showing.title, tickets, left)
                for showing, tickets, left in zip(
                    campaign.showings, now.tickets, now.remaining, strict=True
                )
            ],
        )

    echo(context, _as_json(now), in_words)


def _as_json(now: CampaignNow) -> dict[str, Any]:
    campaign = now.campaign
    return {
        "id": campaign.id,
        "title": campaign.title,
        "category": campaign.category,
        "price_fen": campaign.price_fen,
        "payment": campaign.payment,
        "card_limit": campaign.card_limit,
        "order_max": campaign.order_max,
        "state": now.state.value,
        "opens_at": _moment(now.opens_at_ms),
        "closes_at": _moment(now.closes_at_ms),
        "unions": list(campaign.unions),
        "owner": campaign.owner,
        "rehearsal_of": campaign.rehearsal_of or None,
        "recovering": now.recovering or None,
        "ledger_seq": now.seq,
        "showings": [
            {
                "id": showing.id,
                "title": showing.title,
                "starts_at": showing.starts_at and showing.starts_at.isoformat(),
                "tickets": tickets,
                "remaining": left,
            }
            for showing, tickets, left in zip(
                campaign.showings, now.tickets, now.remaining, strict=True
            )
        ],
    }


def _moment(moment_ms_: int | None) -> str | None:
    return None if moment_ms_ is None else rfc3339(moment_ms_)
