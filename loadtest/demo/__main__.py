"""The demo: 182,850 card holders, 20,000 film tickets, one opening.

Everything goes through the command line and the HTTP API of a whole engine on embedded servers, in
a data directory that is made anew. The load is a closed loop over many connections from this one
process: a connection asks again as soon as it is answered, which is harder than people are.
"""

import argparse
import asyncio
import contextlib
import fcntl
import shutil
import sys
from pathlib import Path
from typing import Final

import uvloop
from rich.console import Console

from loadtest.books.ledger import BooksError
from loadtest.client import AnswerError, Unreachable
from loadtest.demo.play import LagError
from loadtest.demo.show import Show
from loadtest.engine import EngineError, cancelled_by_signals, engine_up, free_address
from loadtest.wire import ProtocolError
from sale.cli.terminal import take_any_character

CARDS: Final = 182_850
MEMBERS: Final = 60_000
DATA_DIR: Final = Path(".demo")
MARKER: Final = "made-by-demo"
PROBLEMS: Final = (
    EngineError, AnswerError, LagError, BooksError, ProtocolError, Unreachable,
    ValueError, OSError,
)  # fmt: skip


def fresh(data_dir: Path) -> None:
    """Make the data directory anew, without what a former demo left there.

    Raises EngineError where a demo is still running there, or where no demo made it: a real
    engine's data looks the same, so only our own marker allows to remove it.
    """
    marker = data_dir / MARKER
    if data_dir.exists() and any(data_dir.iterdir()):
        if not marker.is_file():
            raise EngineError(f"{data_dir} was not made by the demo: it is left alone")
        _remove(data_dir)
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    marker.write_text("The demo makes this directory anew each time: keep nothing here.\n", "utf-8")


def _remove(data_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            held = stack.enter_context((data_dir / "sale.lock").open("rb"))
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EngineError(f"{data_dir} is in use: another demo is running there") from None
        shutil.rmtree(data_dir)


async def demo(options: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    console = Console()
    cancelled_by_signals()
    data_dir = options.data_dir.absolute()
    fresh(data_dir)
    show = Show(console, members=options.members, cards=options.cards, seed=options.seed)
    address, metrics = free_address(8080), free_address(9108)
    console.print(f"Starting Redis, PostgreSQL and the engine in {options.data_dir} …")
    async with engine_up(data_dir, address=address, metrics_address=metrics) as engine:
        console.print(f"[green]✓[/] The engine sells at [bold]{engine.url}[/]")
        clean = await show.run(engine)
        if not options.exit:
            console.print("[bold]Ctrl-C stops everything.[/]")
            with contextlib.suppress(asyncio.CancelledError):
                await engine.ended()
    again = f"sale up --data-dir {options.data_dir}"
    console.print(f"Stopped; nothing is left running. `{again}` starts it again.")
    return 0 if clean else 1


def main() -> None:
    """Command line of the demo."""
    take_any_character()
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--exit", action="store_true", help="stop after the outcome")
    parser.add_argument("--members", type=int, default=MEMBERS, help="how many take part")
    parser.add_argument("--cards", type=int, default=CARDS, help="size of the roster")
    parser.add_argument("--seed", type=int, default=2015, help="which crowd")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="made anew")
    options = parser.parse_args()
    try:
        status = uvloop.run(demo(options))
    except PROBLEMS as error:
        print(f"demo: {error}", file=sys.stderr)
        status = 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("demo: stopped", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.exit(status)


if __name__ == "__main__":
    main()
