"""`sale campaign …`: what operators do, from the command line."""

from pathlib import Path
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
from sale.cli.steps import step_command
from sale.domain.campaign import InvalidCampaign, State, parse_campaign_toml
from sale.domain.clock import rfc3339
from sale.files import read_text, shown
from sale.operators.campaigns import Actor
from sale.operators.steps import SCHEDULE, STEPS, Step
from sale.stock.catalogue import CampaignNow, Unreadable, read_campaigns


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
        async with context.campaign_desk() as (desk, stores):
            try:
                parsed = parse_campaign_toml(text, frozenset(stores.unions))
            except InvalidCampaign as wrong:
                raise click.ClickException(f"{shown(file)}: {wrong}") from None
            return await desk.create(parsed, Actor(context.actor), None, None)

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
        async with context.campaign_desk() as (_, stores):
            return await read_campaigns(stores.redis, unreadable=unreadable)

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
        async with context.campaign_desk() as (desk, _):
            return await desk.show(campaign_id, Actor(context.actor))

    _show(context, run(work()))


def _show_step(
    context: CommandContext, step: Step, campaign_id: str, now: CampaignNow | None
) -> None:
    """Show the campaign after a step."""
    if now is None:
        echo(context, {"deleted": campaign_id}, lambda: note(f"draft {campaign_id} deleted"))
        return
    _show(context, now)
    if step is SCHEDULE:
        _say_past(now)


for _each in STEPS.values():
    campaign.add_command(step_command(_each, _show_step))


def _say_past(now: CampaignNow) -> None:
    """Say what a moment that is past already has brought about."""
    if now.state is State.OPEN:
        note("its opening is past: it sells already")
    elif now.state is State.CLOSED:
        note("its closing is past: it is closed already")


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
