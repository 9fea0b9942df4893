"""``python -m loadtest COMMAND``: the load tests' programs under one name."""

import sys
from importlib import import_module
from typing import Final

from sale.cli.terminal import take_any_character

COMMANDS: Final = {
    "rush": ("rush.__main__", "an open loop against a running engine, with proof"),
    "report": ("report.__main__", "a run's record as one HTML file, or two side by side"),
    "bench": ("bench.__main__", "the engine as a share of what its HTTP stack can do"),
    "overload": ("bench.overload", "what is sold while more is asked than can be done"),
    "demo": ("demo", "a whole engine and a whole release, from nothing"),
}
"""Module of each command, and what it is for. The wheel has no ``bench``."""


def usage() -> str:
    """The programs, with their help."""
    lines = [f"  {name:<9}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m loadtest COMMAND [OPTIONS]", "", *lines])


def main() -> None:
    """Run a command with the rest of the command line; exit status 2 for one that is none."""
    take_any_character()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        complaint = f"no command {name!r}" if name else "a command is wanted"
        print(f"loadtest: {complaint}\n{usage()}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    module = f"loadtest.{COMMANDS[name][0]}"
    try:
        sys.exit(import_module(module).main())
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        print(f"loadtest: {name} is not installed: run it in the project's folder", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # mostly while it is still being imported
        print("loadtest: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
