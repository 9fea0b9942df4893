"""The demo: 182,850 card holders, 20,000 film tickets, one opening.

Everything goes through the command line and the HTTP API of a whole engine on embedded servers, in
a data directory that is made anew. The load is a closed loop over many connections from this one
process: a connection asks again as soon as it is answered, which is harder than people are.
"""

import argparse
import asyncio
import contextlib
import fcntl
import re
import shutil
import sys
import time
import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.answers import Outcome, outcome
from loadtest.books import Finding, check
from loadtest.client import Client, Unreachable
from loadtest.engine import Engine, EngineError, cancelled_by_signals, engine_up, free_address
from loadtest.ledger import BooksError, highest, load_books, wait_applied
from loadtest.members import Crowd, gather, read_members
from loadtest.report import Figures, books_table, look_next, outcome_table
from loadtest.rush import LagWatch, Rush, RushError, knock, play, read, until_open
from loadtest.wire import ProtocolError

CAMPAIGN: Final = "five-yuan-films"
CARDS: Final = 182_850
MEMBERS: Final = 60_000
SUSPENDED: Final = 500
CONNECTIONS: Final = 384
DATA_DIR: Final = Path(".demo")
MARKER: Final = "made-by-demo"
OPENS_IN_S: Final = 6.0
LAG_ZERO_WITHIN_S: Final = 60.0
PROBLEMS: Final = (
    EngineError, RushError, BooksError, ProtocolError, Unreachable, ValueError, OSError,
)  # fmt: skip


class Show:
    """One run of the demo on a console."""

    def __init__(self, console: Console, *, members: int, cards: int, seed: int) -> None:
        self.console = console
        self.members = members
        self.cards = cards
        self.seed = seed

    async def run(self, engine: Engine) -> bool:
        """Play the rush and print what came of it; whether books and audit are clean."""
        crowd = await self._prepare(engine)
        figures, findings = await self._rush(engine, crowd)
        audit = await engine.json("audit", CAMPAIGN, accept=(0, 1))
        self.console.print(outcome_table(figures))
        self.console.print(books_table(findings, audit))
        self.console.print(look_next(engine, CAMPAIGN), soft_wrap=True, highlight=False)
        return bool(audit["clean"]) and not findings

    async def _prepare(self, engine: Engine) -> Crowd:
        """Roster, campaign file and crowd; nothing is on sale yet."""
        folder = engine.data_dir / "demo"
        folder.mkdir(mode=0o700, exist_ok=True)
        roster = folder / "roster.csv"
        async with self._step(f"Roster of {self.cards:,} card holders, made up and imported"):
            await engine.command("cards", "sample", str(self.cards), "--out", str(roster))
            await engine.command("cards", "import", str(roster))
        async with self._step(f"Tokens of {self.members:,} members, and their plans"):
            active, suspended = folder / "active.jsonl", folder / "suspended.jsonl"
            await self._tokens(engine, active, self.members)
            await self._tokens(engine, suspended, SUSPENDED, "--status", "suspended")
            campaign = tomllib.loads(_campaign_text())
            return gather(
                read_members(active),
                read_members(suspended),
                showings=[showing["id"] for showing in campaign["showings"]],
                card_limit=campaign["card_limit"],
                order_max=campaign.get("order_max", campaign["card_limit"]),
                seed=self.seed,
            )

    async def _tokens(self, engine: Engine, file: Path, cards: int, *more: str) -> None:
        await engine.command("tokens", "--cards", str(cards), *more, "--out", str(file))

    async def _rush(self, engine: Engine, crowd: Crowd) -> tuple[Figures, list[Finding]]:
        opens_at = datetime.now(UTC) + timedelta(seconds=OPENS_IN_S)
        file = engine.data_dir / "demo" / f"{CAMPAIGN}.toml"
        file.write_text(_scheduled(_campaign_text(), opens_at), "utf-8")
        await engine.command("campaign", "create", str(file))
        rush = Rush()
        async with (
            Client(engine.address, CONNECTIONS) as client,
            LagWatch(engine.metrics_address, engine.database_url(), CAMPAIGN) as lag,
        ):
            campaign = await read(client, f"/api/v1/campaigns/{CAMPAIGN}")
            with self._bar() as bar:
                task = bar.add_task("", total=len(crowd.rush))
                await knock(client, CAMPAIGN, crowd, rush)

                def countdown(left_s: float) -> None:
                    bar.update(task, description=f"{len(crowd.early):,} too early; {left_s:.1f} s")

                await until_open(client, opens_at, countdown)
                bar.update(task, description="The rush")
                done = 0

                def answered() -> None:
                    nonlocal done
                    done += 1
                    if done % 1_000 == 0:
                        bar.update(task, completed=done)

                await play(client, CAMPAIGN, crowd, rush, answered)
                bar.update(task, completed=len(crowd.rush))
            return await self._settle(engine, rush, lag, campaign)

    async def _settle(
        self, engine: Engine, rush: Rush, lag: LagWatch, campaign: dict[str, Any]
    ) -> tuple[Figures, list[Finding]]:
        """Wait until the ledger is written, then compare it with every answer."""
        async with self._step("Ledger written to PostgreSQL, and every answer compared with it"):
            url = engine.database_url()
            answers = list(rush.book)
            await wait_applied(url, CAMPAIGN, highest(answers), within_s=LAG_ZERO_WITHIN_S)
            await lag.until_zero(LAG_ZERO_WITHIN_S)
            zero_at = time.perf_counter()
            books = await load_books(url, CAMPAIGN)
            findings = check(answers, books, alone=True, only_falls=True)
        told: Outcome = outcome(answers)
        tickets = sum(showing["tickets"] for showing in campaign["showings"])
        return Figures.of(told, rush, lag, books, zero_at, tickets), findings

    @contextlib.asynccontextmanager
    async def _step(self, what: str) -> AsyncIterator[None]:
        start = time.perf_counter()
        with self.console.status(what + " …"):
            yield
        self.console.print(f"[green]✓[/] {what} [dim]({time.perf_counter() - start:.1f} s)[/]")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            refresh_per_second=5,
        )


def _campaign_text() -> str:
    name = f"{CAMPAIGN}.toml"
    for folder in (Path("config/campaigns"), Path(__file__).parents[1] / "config/campaigns"):
        if (folder / name).is_file():
            return (folder / name).read_text("utf-8")
    raise EngineError(f"config/campaigns/{name} is missing: run the demo in the project")


def _scheduled(text: str, opens_at: datetime) -> str:
    """The campaign file with another window: opens at ``opens_at``, closes a day later."""
    closes_at = opens_at + timedelta(days=1)
    kept = re.sub(r"(?m)^(opens_at|closes_at|draft) *=.*\n", "", text)
    window = f"opens_at = {opens_at.isoformat()}\ncloses_at = {closes_at.isoformat()}\n"
    head, table, rest = kept.partition("[[showings]]")
    return f"{head}{window}\n{table}{rest}"


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
