"""One run of the demo on a console: the crowd, the rush, the check of the books."""

import contextlib
import re
import time
import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.books.answers import Outcome, outcome
from loadtest.books.check import check
from loadtest.books.ledger import highest, load_books, wait_applied
from loadtest.client import Client, read_json
from loadtest.demo.play import LagWatch, Rush, knock, play, until_open
from loadtest.demo.tables import Figures, books_table, look_next, outcome_table
from loadtest.engine import Engine, EngineError
from loadtest.members import WaitingLine, gather, read_members
from loadtest.record import Finding

CAMPAIGN: Final = "five-yuan-films"
SUSPENDED: Final = 500
CONNECTIONS: Final = 384
OPENS_IN_S: Final = 6.0
LAG_ZERO_WITHIN_S: Final = 60.0
TELL_EVERY_S: Final = 1.0


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

    async def _prepare(self, engine: Engine) -> WaitingLine:
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

    async def _rush(self, engine: Engine, crowd: WaitingLine) -> tuple[Figures, list[Finding]]:
        opens_at = datetime.now(UTC) + timedelta(seconds=OPENS_IN_S)
        file = engine.data_dir / "demo" / f"{CAMPAIGN}.toml"
        file.write_text(_scheduled(_campaign_text(), opens_at), "utf-8")
        await engine.command("campaign", "create", str(file))
        rush = Rush()
        async with (
            Client(engine.address, CONNECTIONS) as client,
            LagWatch(engine.metrics_address, engine.database_url(), CAMPAIGN) as lag,
        ):
            campaign = await read_json(client, f"/api/v1/campaigns/{CAMPAIGN}")
            with self._bar() as bar:
                task = bar.add_task("", total=len(crowd.rush))
                await knock(client, CAMPAIGN, crowd, rush)

                self._tell(f"{len(crowd.early):,} came too early; the opening is in a moment")

                def countdown(left_s: float) -> None:
                    bar.update(task, description=f"{len(crowd.early):,} too early; {left_s:.1f} s")

                await until_open(client, opens_at, countdown)
                bar.update(task, description="The rush")
                done = 0

                told_at = time.monotonic()

                def answered() -> None:
                    nonlocal done, told_at
                    done += 1
                    if done % 1_000 == 0:
                        bar.update(task, completed=done)
                        if time.monotonic() - told_at >= TELL_EVERY_S:
                            told_at = time.monotonic()
                            self._tell(f"the rush: {done:,} of {len(crowd.rush):,} answered")

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
        self._tell(f"{what} …")
        with self.console.status(what + " …"):
            yield
        self.console.print(f"[green]✓[/] {what} [dim]({time.perf_counter() - start:.1f} s)[/]")

    def _tell(self, line: str) -> None:
        """Progress where no bar can be drawn."""
        if not self.console.is_terminal:
            self.console.print(line, highlight=False)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            refresh_per_second=5,
            disable=not self.console.is_terminal,
        )


def _campaign_text() -> str:
    name = f"{CAMPAIGN}.toml"
    for folder in (Path("config/campaigns"), Path(__file__).parents[2] / "config/campaigns"):
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
