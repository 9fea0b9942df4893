"""The demo: 182,850 card holders, 20,000 film tickets, one opening.

A scripted rush: a whole engine on embedded servers in a data directory that is made anew, a roster,
a campaign, those who come too early, and `loadtest.rush` in a closed loop over many connections,
which is harder than people are: some press twice, some come again for more, some have a suspended
card. Everything goes through the command line and the HTTP API.
"""

import argparse
import asyncio
import contextlib
import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import uvloop
from rich.console import Console
from rich.markup import escape

from loadtest.books.ledger import BooksError
from loadtest.books.proof import Where
from loadtest.client import AnswerError
from loadtest.engine import Engine, EngineError, cancelled_by_signals, engine_up, free_address
from loadtest.generator import closed
from loadtest.rush.arrivals import AT_ONCE
from loadtest.rush.asks import MIXED, Asks, Load
from loadtest.rush.plan import Plan, RushError
from loadtest.rush.play import play
from loadtest.rush.told import table, verdict
from loadtest.scenarios import ScenarioError, campaign_file
from loadtest.wire import ProtocolError
from sale.cli.terminal import take_any_character

CARDS: Final = 182_850
MEMBERS: Final = 60_000
DATA_DIR: Final = Path(".demo")
MARKER: Final = "made-by-demo"
CAMPAIGN: Final = "five-yuan-films"
SUSPENDED: Final = 500
EARLY_SHARE: Final = 0.04
RETRY_SHARE: Final = 0.08
"""Of the requests: the same again, under the same key."""

MORE_SHARE: Final = 0.2
"""Requests beyond one for each card: repeats, and members that come again under another key."""

CONNECTIONS: Final = 384
RETRIES: Final = 20
OPENS_IN_S: Final = 10.0
PROBLEMS: Final = (
    EngineError, RushError, AnswerError, BooksError, ProtocolError, ScenarioError, ValueError,
    OSError,
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
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):
                held = stack.enter_context((data_dir / "sale.lock").open("rb"))
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise EngineError(f"{data_dir} is in use: another demo runs there") from None
            shutil.rmtree(data_dir)
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    marker.write_text("The demo makes this directory anew each time: keep nothing here.\n", "utf-8")


async def play_release(
    engine: Engine, console: Console, *, members: int, cards: int, seed: int
) -> bool:
    """Play the script on an engine, and print what came of it; whether all is clean."""
    folder = engine.data_dir / "demo"
    folder.mkdir(mode=0o700, exist_ok=True)
    active, suspended, roster = (folder / name for name in ("active", "suspended", "roster.csv"))
    with _step(console, f"Roster of {cards:,} card holders, made up and imported"):
        await engine.command("cards", "sample", str(cards), "--out", str(roster))
        await engine.command("cards", "import", str(roster))
    with _step(console, f"Tokens of {members:,} members"):
        await engine.command("tokens", "--cards", str(members), "--out", str(active))
        more = ("--cards", str(SUSPENDED), "--status", "suspended", "--out", str(suspended))
        await engine.command("tokens", *more)
        with suspended.open("ab") as tokens:
            tokens.write(active.read_bytes())
    await engine.command("campaign", "create", str(campaign_file(CAMPAIGN)))
    opens_at = (datetime.now(UTC) + timedelta(seconds=OPENS_IN_S)).isoformat()
    await engine.command("campaign", "schedule", CAMPAIGN, "--at", opens_at, "--reason", "demo")
    await _knock(engine, console, active, min(int(members * EARLY_SHARE), members))
    plan = Plan(
        target=engine.address,
        campaign=CAMPAIGN,
        name="The rush",
        tokens=str(suspended),
        quantity=MIXED,
        duplicate_share=RETRY_SHARE,
        arrivals=AT_ONCE,
        rate=(members + SUSPENDED) * (1 + MORE_SHARE),
        seconds=1.0,
        seed=seed,
        at_opening=True,
        connections=CONNECTIONS,
        warm=CONNECTIONS,
        retries=RETRIES,
        alone=True,
        metrics=engine.metrics_address,
        books=Where(data_dir=str(engine.data_dir)),
    )
    record = await play(plan, lambda line: console.print(line, style="dim", highlight=False))
    console.print(table(record))
    why = verdict(record, proof_wanted=True)
    for line in why:
        console.print(f"[red]{escape(line)}[/]")
    console.print(_look_next(engine), soft_wrap=True, highlight=False)
    return not why


async def _knock(engine: Engine, console: Console, tokens: Path, count: int) -> None:
    """Let some come too early. If one of them got a ticket, the books would show it."""
    load = Load(
        address=engine.address, campaign=CAMPAIGN, tokens=str(tokens), salt="early",
        showings=("general",), order_max=1, cards=count,
    )  # fmt: skip
    if count:
        with Asks(load) as asks:
            tally = await closed(engine.address, asks.raw, count, CONNECTIONS)
        told = ", ".join(f"{code} {number:,}" for code, number in tally.outcomes().items())
        console.print(f"{count:,} came too early: {told}", style="dim", highlight=False)


@contextlib.contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    start = time.perf_counter()
    with console.status(what + " …"):
        yield
    console.print(f"[green]✓[/] {what} [dim]({time.perf_counter() - start:.1f} s)[/]")


def _look_next(engine: Engine) -> str:
    """Where to look while it stays up; lines that can be copied."""
    program = Path(sys.executable).with_name("sale")
    sale = _near(program) if program.exists() else "sale"
    where = f"--data-dir {_near(engine.data_dir)}"
    return (
        "[bold]Where to look next[/]\n"
        f"  page      {engine.url}/\n"
        f"  API       {engine.url}/api/v1/campaigns/{CAMPAIGN}/availability\n"
        f"  metrics   http://{engine.metrics_address}/metrics\n"
        f"  commands  {sale} campaign show {CAMPAIGN} {where}\n"
        f"            {sale} doctor {where}\n"
        f"            {sale} audit {where}\n"
        f"            {sale} campaign add-stock {CAMPAIGN} general 100 --reason 'more' {where}"
    )


def _near(path: Path) -> str:
    """A path as it is best typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


async def demo(options: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    console = Console()
    cancelled_by_signals()
    data_dir = options.data_dir.absolute()
    fresh(data_dir)
    address, metrics = free_address(8080), free_address(9108)
    console.print(f"Starting Redis, PostgreSQL and the engine in {options.data_dir} …")
    async with engine_up(data_dir, address=address, metrics_address=metrics) as engine:
        console.print(f"[green]✓[/] The engine sells at [bold]{engine.url}[/]")
        clean = await play_release(
            engine, console, members=options.members, cards=options.cards, seed=options.seed
        )
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
    try:
        status = uvloop.run(demo(parser.parse_args()))
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
