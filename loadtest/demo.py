"""The demo: 182,850 card holders, 20,000 film tickets, one opening.

A scripted rush: a whole engine on embedded servers in a data directory that is made anew, a roster,
a campaign, a crowd (`loadtest.members.gather`) in a closed loop over many connections, which is
harder than people are, and the check of the books. Everything goes through the command line and the
HTTP API.
"""

import argparse
import asyncio
import contextlib
import fcntl
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.books.answers import Spool, outcome
from loadtest.books.check import check
from loadtest.books.ledger import BooksError, highest, load_books, progress, wait_applied
from loadtest.client import AnswerError, Client, read_json
from loadtest.engine import Engine, EngineError, cancelled_by_signals, engine_up, free_address
from loadtest.generator import Tally, closed
from loadtest.members import Crowd, gather, read_members
from loadtest.sampler import Sampler
from loadtest.scenarios import ScenarioError, campaign_file
from loadtest.summary import at_share
from loadtest.tables import coloured, facts
from loadtest.wire import ProtocolError
from sale.cli.terminal import take_any_character
from sale.files import read_toml

CARDS: Final = 182_850
MEMBERS: Final = 60_000
DATA_DIR: Final = Path(".demo")
MARKER: Final = "made-by-demo"
CAMPAIGN: Final = "five-yuan-films"
SUSPENDED: Final = 500
CONNECTIONS: Final = 384
RETRIES: Final = 20
OPENS_IN_S: Final = 6.0
WRITTEN_WITHIN_S: Final = 60.0
SAMPLE_S: Final = 0.2
TELL_EVERY: Final = 1_000
FINDINGS_SHOWN: Final = 20
PROBLEMS: Final = (
    EngineError, AnswerError, BooksError, ProtocolError, ScenarioError, ValueError, OSError,
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


class Show:
    """One run of the demo on a console."""

    def __init__(self, console: Console, engine: Engine) -> None:
        self.console = console
        self.engine = engine
        self.folder = engine.data_dir / "demo"
        self.written_at = 0.0

    async def run(self, members: int, cards: int, seed: int) -> bool:
        """Play the rush and print what came of it; whether books and audit are clean."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        crowd = await self._prepare(members, cards, seed)
        opens_at = datetime.now(UTC) + timedelta(seconds=OPENS_IN_S)
        file = self.folder / f"{CAMPAIGN}.toml"
        file.write_text(_scheduled(campaign_file(CAMPAIGN).read_text("utf-8"), opens_at), "utf-8")
        await self.engine.command("campaign", "create", str(file))
        asked = [*crowd.early, *crowd.rush]
        early, spool = len(crowd.early), Spool(asked.__getitem__)
        following = asyncio.create_task(self._follow())
        try:
            async with Sampler(self.engine.metrics_address, CAMPAIGN, every_s=SAMPLE_S) as sampler:
                tally, ended_at = await self._rush(crowd, opens_at, spool, early)
                async with self._step("Ledger written to PostgreSQL, every answer compared"):
                    answers, url = list(spool), self.engine.database_url()
                    await wait_applied(url, CAMPAIGN, highest(answers), within_s=WRITTEN_WITHIN_S)
                    zero_s = time.perf_counter() - ended_at
                    books = await load_books(url, CAMPAIGN)
                    findings = check(answers, books, alone=True, only_falls=True)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        audit = await self.engine.json("audit", CAMPAIGN, accept=(0, 1))
        told, orders, tickets = outcome(answers), len(books.orders), sum(books.stock.values())
        took_ms = sorted(tally.took_ms(sent=True))
        written_s = max(self.written_at - (ended_at - tally.duration_s), 1e-3)
        lag_events = max((each.lag_events for each in sampler.samples), default=0)
        lag_s = max((each.lag_s for each in sampler.samples), default=0.0)
        counts = [
            ("requests offered", f"{told.offered:,}"),
            ("sold: orders", f"{told.sold_orders:,}"),
            ("sold: tickets", f"{told.sold_tickets:,} of {tickets:,}"),
            ("replayed (same key again)", f"{told.replayed:,}"),
            *(
                (f"refused: {code}", f"{count:,}")
                for code, count in sorted(told.refused.items(), key=lambda item: -item[1])
            ),
            ("no answer", f"{told.unknown:,}"),
            ("asked again after 503, no answer or too early", f"{tally.retries:,}"),
        ]
        rate = tally.answered.total() / tally.duration_s
        times = [
            ("from the opening to the last answer", f"{tally.duration_s:.2f} s"),
            ("purchase requests answered a second", f"{rate:,.0f}"),
            *(
                (f"answered within, p{share * 100:g}", f"{at_share(took_ms, share):.1f} ms")
                for share in (0.5, 0.95, 0.99)
            ),
        ]
        written = [
            ("orders in PostgreSQL", f"{orders:,}"),
            ("durable orders a second, opening to last one", f"{orders / written_s:,.0f}"),
            ("ledger lag, most seen", f"{max(lag_events, 0):,} events, {max(lag_s, 0):.2f} s"),
            ("ledger lag zero after the last answer", f"{zero_s:.2f} s"),
        ]
        self.console.print(facts("The rush", counts, times, written))
        clean = bool(audit["clean"])
        ours = f"{len(findings)} findings" if findings else "clean"
        compared = [("every answer compared with PostgreSQL", coloured(ours, good=not findings))]
        compared += [(f"[red]{each.kind}[/]", each.what) for each in findings[:FINDINGS_SHOWN]]
        audited = [("sale audit", coloured("clean" if clean else "findings", good=clean))]
        audited += [
            (f"[red]{finding['invariant']}[/]", finding["what"])
            for campaign in audit["campaigns"]
            for finding in campaign["findings"][:FINDINGS_SHOWN]
        ]
        self.console.print(facts("The books", compared, audited))
        self.console.print(_look_next(self.engine), soft_wrap=True, highlight=False)
        return clean and not findings

    async def _prepare(self, members: int, cards: int, seed: int) -> Crowd:
        """Roster and crowd; nothing is on sale yet."""
        command, roster = self.engine.command, str(self.folder / "roster.csv")
        async with self._step(f"Roster of {cards:,} card holders, made up and imported"):
            await command("cards", "sample", str(cards), "--out", roster)
            await command("cards", "import", roster)
        async with self._step(f"Tokens of {members:,} members, and their plans"):
            active, suspended = self.folder / "active.jsonl", self.folder / "suspended.jsonl"
            await command("tokens", "--cards", str(members), "--out", str(active))
            more = ("--status", "suspended", "--out", str(suspended))
            await command("tokens", "--cards", str(SUSPENDED), *more)
            campaign: dict[str, Any] = read_toml(campaign_file(CAMPAIGN))
            return gather(
                read_members(active),
                read_members(suspended),
                showings=[showing["id"] for showing in campaign["showings"]],
                card_limit=campaign["card_limit"],
                order_max=campaign.get("order_max", campaign["card_limit"]),
                seed=seed,
            )

    async def _rush(
        self, crowd: Crowd, opens_at: datetime, spool: Spool, early: int
    ) -> tuple[Tally, float]:
        """Those who come too early, the wait for the opening, the rush; and when it ended."""
        address, count, done = self.engine.address, len(crowd.rush), 0
        raws = [each.raw(address, CAMPAIGN) for each in (*crowd.early, *crowd.rush)]
        with Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self.console, refresh_per_second=5,
            disable=not self.console.is_terminal,
        ) as bar:  # fmt: skip
            task = bar.add_task("", total=count)
            if early:
                await closed(address, raws[:early], early, CONNECTIONS, spool=spool)
            self._tell(f"{early:,} came too early; the opening is in a moment")
            async with Client(address) as client:
                while (left_s := await _left_s(client, opens_at)) > 0:
                    bar.update(task, description=f"{early:,} too early; {left_s:.1f} s")
                    await asyncio.sleep(min(left_s, 0.2))
            bar.update(task, description="The rush")

            def answered(number: int, status: int, replayed: bool, body: bytes) -> None:  # noqa: FBT001
                nonlocal done
                spool(early + number, status, replayed, body)
                done += 1
                if done % TELL_EVERY == 0:
                    bar.update(task, completed=min(done, count))
                    if done % (TELL_EVERY * 10) == 0:
                        self._tell(f"the rush: {done:,} answers, {count:,} requests planned")

            tally = await closed(
                address, raws[early:], count, CONNECTIONS, spool=answered, retries=RETRIES,
                early_again=True,
            )  # fmt: skip
            bar.update(task, completed=count)
        return tally, time.perf_counter()

    async def _follow(self) -> None:
        """Note when PostgreSQL was last seen to go on."""
        async for _ in progress(self.engine.database_url(), CAMPAIGN):
            self.written_at = time.perf_counter()

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


async def _left_s(client: Client, opens_at: datetime) -> float:
    """Seconds to the opening, by the engine's own clock."""
    now = datetime.fromisoformat((await read_json(client, "/api/v1/time"))["now"])
    return (opens_at - now).total_seconds()


def _scheduled(text: str, opens_at: datetime) -> str:
    """The campaign file with another window: opens at ``opens_at``, closes a day later."""
    closes_at = opens_at + timedelta(days=1)
    kept = re.sub(r"(?m)^(opens_at|closes_at|draft) *=.*\n", "", text)
    window = f"opens_at = {opens_at.isoformat()}\ncloses_at = {closes_at.isoformat()}\n"
    head, table, rest = kept.partition("[[showings]]")
    return f"{head}{window}\n{table}{rest}"


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
        clean = await Show(console, engine).run(options.members, options.cards, options.seed)
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
