"""The command ``sale``: its groups, and nothing else."""

import sys

import click

from sale import __version__
from sale.cli.campaigns import campaign
from sale.cli.cards import cards, tokens
from sale.cli.checks import audit, doctor
from sale.cli.operators import operator
from sale.cli.processes import migrate, scheduler, serve, up, writer
from sale.cli.recovery import losses, recover
from sale.cli.rehearse import rehearse
from sale.cli.runtime import main_entry, remember_options
from sale.cli.streams import keep_streams, last_words


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Shell completion, for bash: eval "$(_SALE_COMPLETE=bash_source sale)"; zsh_source and '
    "fish_source likewise.",
)
@click.version_option(__version__, prog_name="sale")
@remember_options
def sale() -> None:
    """Sell tickets in a rush: never oversold, durable once answered, proven by an audit."""


for command in (
    up,
    serve,
    writer,
    scheduler,
    migrate,
    campaign,
    cards,
    tokens,
    operator,
    audit,
    recover,
    losses,
    rehearse,
    doctor,
):
    sale.add_command(command)


def main() -> None:
    """Run the command line and exit with its status."""
    keep_streams()
    try:
        status = main_entry(sale)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    sys.exit(last_words(status))
