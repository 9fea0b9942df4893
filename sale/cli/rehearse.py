"""`sale rehearse`: a campaign's release played with made-up cards, proven, and removed again."""

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from sale.cli.rehearsal_play import Plan, ask, opened, play
from sale.cli.rehearsal_report import RECORD, show
from sale.cli.runtime import CommandContext, Number, WholeNumber, command_context, echo, run
from sale.cli.terminal import note
from sale.files import UnreadableFile, read_json, shown

if TYPE_CHECKING:
    from sale.domain.campaign_view import CampaignNow

CARDS_MAX: Final = 1_000_000
ARRIVALS: Final = {
    "release": "half of them in its first tenth",
    "poisson": "by chance all along",
    "constant": "evenly",
}
"""How they come, as the load generator names it, and in words."""

RUSH_S: Final = 10.0
"""Default time in which all cards arrive: a release is decided in its first seconds."""
SECONDS_MAX: Final = 3_600.0
OPENS_IN_S: Final = 15.0
OPENS_IN_MIN_S: Final = 3.0
OPENS_IN_MAX_S: Final = 86_400.0
NEEDED: Final = ("loadtest", "jinja2", "plotly", "psutil")


@click.command()
@click.argument("campaign_id", metavar="[CAMPAIGN]", required=False)
@click.option("--cards", type=WholeNumber(1, CARDS_MAX), help="How many made-up cards buy.")
@click.option(
    "--rate",
    type=Number(0.1, 1e6),
    help="Members a second, the mean (default: cards / 10).",
)
@click.option("--seconds", type=Number(1, SECONDS_MAX), help="How long (default: cards / rate).")
@click.option(
    "--arrivals",
    type=click.Choice(list(ARRIVALS)),
    default="release",
    show_default=True,
    help="When members arrive after the opening: most at once, at random, or evenly.",
)
@click.option(
    "--opens-in",
    type=Number(OPENS_IN_MIN_S, OPENS_IN_MAX_S),
    default=OPENS_IN_S,
    show_default=True,
    help="Seconds from your confirmation to the opening.",
)
@click.option(
    "--processes",
    type=WholeNumber(1, 64),
    default=1,
    show_default=True,
    help="Processes of the load generator.",
)
@click.option("--target", metavar="H:P", help="Address of the API (default: where `up` listens).")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the report."
)
@click.option(
    "--fail-if",
    multiple=True,
    metavar="RULE",
    help="Fail where this holds, as 'p99>200ms' (docs/LOADTEST.md); may be given several times.",
)
@click.option("--reason", help="Why, for the audit log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--keep", is_flag=True, help="Keep the copy's data until `sale rehearse --purge ID`.")
@click.option(
    "--beside-real-sales", is_flag=True, help="Allow it while a real campaign sells or soon will."
)
@click.option(
    "--purge", is_flag=True, help="Remove what is left of one rehearsal, or of all; asks nothing."
)
@command_context
def rehearse(
    context: CommandContext,
    campaign_id: str | None,
    *,
    cards: int | None,
    rate: float | None,
    seconds: float | None,
    arrivals: str,
    opens_in: float,
    processes: int,
    target: str | None,
    out: Path | None,
    fail_if: tuple[str, ...],
    reason: str | None,
    yes: bool,
    keep: bool,
    beside_real_sales: bool,
    purge: bool,
) -> int:
    """Play a campaign's release with made-up cards, prove it.

    It runs on this deployment, and is removed afterwards.

    Exit: 0 where books and audit are clean; 1 where they are not, it could not be played, a
    threshold was missed, or the load generator itself was the limit.
    """
    if purge:
        return _purge(context, campaign_id, reason or "left over")
    if campaign_id is None or cards is None:
        raise click.UsageError("say which CAMPAIGN and how many --cards")
    rate = rate or max(cards / RUSH_S, 1.0)
    plan = Plan(
        of=campaign_id,
        cards=cards,
        rate=rate,
        seconds=seconds or min(max(cards / rate, 1.0), SECONDS_MAX),
        arrivals=arrivals,
        target=target or _address(context),
        out=out,
        keep=keep,
        beside_real_sales=beside_real_sales,
        opens_in_s=opens_in,
        processes=processes,
        fail_if=fail_if,
    )
    _check_generator(fail_if)
    if out is not None and (out / RECORD).exists():
        raise click.ClickException(f"{shown(out)} holds another run's report: name another folder")
    _say_effect(plan, run(_look(context, plan)))
    reason = _confirmed(reason, yes=yes)
    outcome = run(play(context, plan, reason))
    echo(context, outcome, lambda: show(outcome))
    return 0 if outcome.clean and not (outcome.bottleneck or outcome.failed) else 1


def _check_generator(fail_if: tuple[str, ...]) -> None:
    """See that it is there and reads the rules. Raises click.ClickException, BadParameter."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"the load generator is not installed here ({', '.join(missing)} is missing): "
            "in the project's folder, pip install -e '.[loadtest]'"
        )
    from loadtest.rehearsal import read_rules

    try:
        read_rules(fail_if)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--fail-if") from None


def _address(context: CommandContext) -> str:
    """Where the API listens: as ``sale up`` wrote it down, else as the settings have it."""
    settings = context.settings
    listen = settings.listen
    if settings.database_url is None:
        with contextlib.suppress(UnreadableFile, KeyError):
            register = settings.data_dir / "run" / "processes.json"
            listen = read_json(register, dict[str, Any])["listen"]
    host, _, port = listen.rpartition(":")
    return f"{'127.0.0.1' if host in {'0.0.0.0', '[::]', ''} else host}:{port}"  # noqa: S104


async def _look(context: CommandContext, plan: Plan) -> "CampaignNow":
    """Give the campaign to be rehearsed. Raises Refused, click.ClickException."""
    async with opened(context) as (_, desk):
        original = await desk.original(plan.of)
        selling = await desk.real_sales(plan.opens_in_s + plan.seconds)
    if selling and not plan.beside_real_sales:
        raise click.ClickException(
            f"real members may be buying: {'; '.join(selling)}. A rehearsal would slow them down; "
            "play it at another time, or say --beside-real-sales"
        )
    await ask(plan.target, "/api/v1/time")
    return original


def _say_effect(plan: Plan, original: "CampaignNow") -> None:
    campaign, tickets = original.campaign, sum(original.tickets)
    note(f"Rehearsal of {campaign.id} {campaign.title}")
    keeps = "its data stays until sale rehearse --purge" if plan.keep else "its data is removed"
    showings = "1 showing" if len(campaign.showings) == 1 else f"{len(campaign.showings)} showings"
    copy = f"{showings}, {tickets:,} tickets, {campaign.card_limit} a card"
    members = f"{max(plan.rate * plan.seconds, 1):,.0f} members in {plan.seconds:,.0f} s"
    rush = f"{members}, {ARRIVALS[plan.arrivals]}"
    for name, what in (
        ("copy", f"{copy}; in no list; the real one's stock is not touched"),
        ("buyers", f"{plan.cards:,} made-up cards, who buy nothing else; no real card buys here"),
        ("rush", f"{rush}, from this host to {plan.target}"),
        ("opening", f"{plan.opens_in_s:.0f} s after your confirmation and the making of the cards"),
        (
            "members",
            "the same API processes, Redis, PostgreSQL and disks carry it: while it lasts,",
        ),
        ("", "real members' pages and purchases may be slower, or refused as overloaded"),
        ("afterwards", f"closed, compared with the books, reported; {keeps}; the audit log stays"),
    ):
        note(f"  {name:<10} {what}")


def _confirmed(reason: str | None, *, yes: bool) -> str:
    """Ask for a reason and a yes where a person is there to give them."""
    reason = (reason or "").strip()
    lacks = ["--reason R"] * (not reason) + ["--yes"] * (not yes)
    if lacks and not sys.stdin.isatty():
        raise click.UsageError(f"there is no terminal to ask on: give {' and '.join(lacks)}")
    try:
        while not reason:
            reason = str(click.prompt("Why (for the audit log)", err=True)).strip()
        if yes or click.confirm("Play it?", err=True):
            return reason
    except click.Abort:
        note("")  # behind the prompt
    note("nothing was made")
    raise click.Abort


def _purge(context: CommandContext, campaign_id: str | None, reason: str) -> int:
    """Remove one rehearsal, or all that are left."""
    from sale.operators.campaigns import Actor

    async def work() -> list[dict[str, Any]]:
        done = []
        async with opened(context) as (_, desk), desk.alone():
            ids = (
                [each.id for each in await desk.left_over()]
                if campaign_id is None
                else [campaign_id]
            )
            for identifier in ids:
                removed = await desk.purge(identifier, Actor(context.actor), reason)
                done.append({"purged": identifier, **msgspec.structs.asdict(removed)})
        return done

    done = run(work())

    def in_words() -> None:
        for each in done:
            click.echo(f"{each['purged']}: removed, with {each['orders']} orders")
        if not done:
            click.echo("no rehearsal is left")

    echo(context, done, in_words)
    return 0
