"""`sale campaign …`: what operators do, from the command line."""

from datetime import datetime
from pathlib import Path
from typing import Final

import click

from sale.cli.runtime import CommandContext, command_context, echo, run
from sale.cli.steps import step_command
from sale.cli.terminal import echo_fields, echo_table, note
from sale.domain.campaign import State
from sale.domain.campaign_file import InvalidCampaign, parse_campaign_toml
from sale.domain.campaign_view import CampaignNow, DeskView, StockView, desk_view
from sale.files import read_text, shown
from sale.operators.campaigns import Actor
from sale.operators.steps import SCHEDULE, STEPS, Step
from sale.stock.catalogue import Unreadable, read_campaigns


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
        [desk_view(now) for now in campaigns],
        lambda: echo_table(
            ("id", "title", "state", "opens at", "left", "of"),
            [
                (
                    now.campaign.id,
                    now.campaign.title,
                    f"{now.state.value}, a rehearsal"
                    if now.campaign.rehearsal_of
                    else now.state.value,
                    desk_view(now).opens_at,
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
    """Note that the campaign is open or closed already, because the moment is past."""
    if now.state is State.OPEN:
        note("its opening is past: it sells already")
    elif now.state is State.CLOSED:
        note("its closing is past: it is closed already")


def _show(context: CommandContext, now: CampaignNow) -> None:
    view = desk_view(now)

    def in_words() -> None:
        fields = [_in_words(name, getattr(view, name)) for name in _SHOWN]
        echo_fields([field for field in fields if field[1] is not None])
        columns = StockView.__struct_fields__
        rows = [
            [_in_words(name, getattr(showing, name))[1] for name in columns]
            for showing in view.showings
        ]
        echo_table([name.replace("_", " ") for name in columns], rows)

    echo(context, view, in_words)


def _in_words(name: str, value: object) -> tuple[str, object]:
    """Give a field of a view as people read it: its label and its value."""
    label = name.removesuffix("_fen").replace("_", " ")
    if name.endswith("_fen") and isinstance(value, int):
        return label, f"{value / 100:.2f} yuan"
    if isinstance(value, tuple):
        return label, ", ".join(map(str, value))
    return label, value.isoformat() if isinstance(value, datetime) else value


_SHOWN: Final = tuple(name for name in DeskView.__struct_fields__ if name != "showings")
