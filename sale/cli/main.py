"""The command ``sale``: its groups, and nothing else.

A command's module is imported when the command is used: ``sale up`` starts five processes, and each
would import what only operators' commands need.
"""

import sys
from importlib import import_module
from typing import Final

import click

from sale import __version__
from sale.cli.runtime import main_entry, remember_options
from sale.cli.streams import keep_streams, last_words

COMMANDS: Final = {
    "audit": "checks",
    "campaign": "campaigns",
    "cards": "cards",
    "doctor": "checks",
    "keeper": "processes",
    "losses": "recovery",
    "migrate": "processes",
    "operator": "operators",
    "order": "orders",
    "recover": "recovery",
    "rehearse": "rehearse",
    "report": "reports",
    "scheduler": "processes",
    "serve": "processes",
    "tokens": "cards",
    "up": "processes",
    "writer": "processes",
}
"""The module of ``sale.cli`` that defines each command, under the command's name."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Give the names, in the order in which they are shown."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Give the command, or None where there is none of this name."""
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = getattr(import_module(f"sale.cli.{module}"), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"sale.cli.{module}.{cmd_name} is no command")
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Shell completion, for bash: eval "$(_SALE_COMPLETE=bash_source sale)"; zsh_source and '
    "fish_source likewise.",
)
@click.version_option(__version__, prog_name="sale")
@remember_options
def sale() -> None:
    """Sell tickets in a rush: never oversold, durable once answered, proven by an audit."""


def main() -> None:
    """Run the command line and exit with its status."""
    keep_streams()
    try:
        status = main_entry(sale)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.exit(last_words(status))
