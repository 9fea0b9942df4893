"""The engine beside its peers, in one run: same client, same cores, rounds in turn.

In each round everybody is offered the same bytes for as long: the engine's cases, the constant
before and after each of them, then purchases and sold-out refusals of each peer. Ratios are taken
within a round, and the median of them is told. A peer that sells wrongly is told so beside its
figures: rates of wrong answers mean nothing.
"""

import contextlib
import platform
import statistics
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from loadtest.bench.cases import CONNECTIONS, SOLD_OUT_TICKETS, STOCK, Bench, Target, median, middle
from loadtest.bench.figures import BUSY, CASE_COLUMNS, KINDS, OURS, Case
from loadtest.bench.offer import OfferError
from loadtest.bench.peers import GO, NAIVE, NODE, PEERS, Peer, RunningPeer, peers_up
from loadtest.engine import EngineError
from loadtest.generator import closed
from loadtest.record import SOLD
from loadtest.tables import CLEAN, Goal, figures, goals_table, grid, other_core, verdict
from loadtest.wire import ProtocolError

FULL_CONNECTIONS: Final = 768
"""Enough that a batch is full when the one before it comes back."""

SELLS_NOTHING: Final = "sells nothing"
TOO_MANY: Final = 2 * CONNECTIONS
FAILURES: Final = (OfferError, EngineError, ProtocolError, OSError)


class PeerResult(msgspec.Struct, frozen=True):
    """A peer's figures. ``why_not``: why there are none; ``check``: ``clean``, or what it did.

    ``ours`` is the engine's rate of purchases as a multiple of its, ``ours_refused`` that of
    sold-out refusals of cards in turn.
    """

    name: str
    title: str
    leaves_out: str
    why_not: str = ""
    check: str = ""
    purchases: Case | None = None
    sold_out: Case | None = None
    ours: float | None = None
    ours_refused: float | None = None

    @property
    def row(self) -> list[str]:
        """It as a row of the table of all."""
        books = self.check if self.check in {CLEAN, SELLS_NOTHING} else "[red]WRONG[/]"
        cells, bought, refused = [""] * 7, self.purchases, self.sold_out
        if bought is not None:
            cells[:2] = [f"{bought.rate:,.0f}", f"{bought.ratio:.2f}"]
            cells[3:5] = [f"{bought.api_us:.1f}", f"{bought.redis_us:.1f}"]
        if self.ours is not None:
            cells[2] = f"{self.ours:.2f}"
        if refused is not None:
            cells[5:] = [f"{refused.rate:,.0f}", f"{refused.ratio:.2f}"]
        return [self.title, *cells, "[yellow]not here[/]" if self.why_not else books]

    @property
    def left_out(self) -> str:
        """The parts that it leaves out, and why it has no figures."""
        words = [self.leaves_out]
        if self.why_not:
            words.append(f"[yellow]not measured: {self.why_not}[/]")
        elif self.check not in {CLEAN, SELLS_NOTHING}:
            words.append(f"[red]{self.check}[/]")
        return "\n".join(words)


class FullBatches(msgspec.Struct, frozen=True):
    """Purchases over so many connections that batches are full. ``mean``: purchases a call."""

    connections: int
    mean: float
    case: Case

    @property
    def api_cores(self) -> float:
        """API cores that one core of Redis feeds."""
        return self.case.api_us / self.case.redis_us


class Comparison(msgspec.Struct, frozen=True):
    """Everything that one run measured. ``ours`` are the engine's cases, ``constant`` peer (a)."""

    client: str
    connections: int
    rounds: int
    seconds: int
    constant: Case
    ours: list[Case]
    peers: list[PeerResult]
    full: FullBatches
    goals: list[Goal]
    audit: str

    @property
    def all_peers(self) -> list[PeerResult]:
        """The constant and the peers, with the letters by which the documents call them."""
        first = PeerResult("constant", "aiohttp, constant", "everything", check=SELLS_NOTHING)
        ratio = next(case.ratio for case in self.ours if case.name == "purchases")
        first = msgspec.structs.replace(first, purchases=self.constant, ours=ratio)
        return [
            msgspec.structs.replace(peer, title=f"{letter} {peer.title}")
            for letter, peer in zip("abcdefgh", (first, *self.peers), strict=False)
        ]

    def show(self, console: Console) -> None:
        """Print the tables."""
        console.print(
            f"Client: {self.client}, {self.connections} connections, closed loop; {self.rounds} "
            f"rounds of {self.seconds} s each in turn. Python {platform.python_version()}. API and "
            f"its Redis on one core, client (and the engine's PostgreSQL and writer) on "
            f"{other_core()}."
        )
        ours = {case.name: case for case in self.ours}
        engine = PeerResult("ours", "ours", "", "", self.audit, ours["purchases"], ours["sold_out"])
        caption = (
            "purchases/s of constants: answers. ours ×: the engine's purchases as a multiple. µs: "
            "CPU time a purchase. books: whether what it answered is what its Redis holds, never "
            "above the stock. All that sell fsync before each answer."
        )
        headings = "|purchases/s|× a|ours ×|API µs|Redis µs|sold-out/s|× a|books"
        title = "The engine beside its peers: one core for API and Redis"
        rows = [each.row for each in (engine, *self.all_peers)]
        console.print(grid(title, headings, rows, caption, left="books"))
        left_out = [(peer.title, peer.left_out) for peer in self.all_peers]
        console.print(grid("What each leaves out", "|what", left_out, left="what"))
        theirs = [case for peer in self.peers for case in (peer.purchases, peer.sold_out) if case]
        if min(case.server_busy for case in (self.constant, *self.ours, *theirs)) < BUSY:
            console.print(
                "[red]In some row the server's core was not full: another program used it, or the "
                "client was the bottleneck. Run it again on a quiet machine.[/]"
            )
        cases, full = [self.constant, *self.ours], self.full
        console.print(figures("The engine's cases and the constant", CASE_COLUMNS, cases))
        console.print(goals_table(self.goals))
        console.print(
            f"Full batches ({full.connections} connections, {full.mean:.0f} purchases a call): API "
            f"{full.case.api_us:.1f} µs and Redis {full.case.redis_us:.1f} µs a purchase, so one "
            f"core of Redis feeds {full.api_cores:.1f} API cores."
        )
        console.print(f"Audit of all that the engine sold: {verdict(self.audit)}")


class Comparing:
    """One comparison on one rig."""

    def __init__(self, bench: Bench, cache: Path) -> None:
        self.bench = bench
        self.cache = cache
        self.rounds: dict[tuple[str, str], list[Case]] = defaultdict(list)
        self.answered: dict[str, list[int]] = defaultdict(list)
        self.wrong: dict[str, str] = {}
        self.progress = "first steps"

    async def run(self) -> Comparison:
        """Measure everybody. Raises EngineError, OfferError where it is the engine that fails."""
        bench, rig = self.bench, self.bench.rig
        await bench.prepare()
        rig.books_stand_back()
        async with contextlib.AsyncExitStack() as stack:
            bench.note("the peers (the first time, npm installs one of them)")
            folder = rig.folder / "peers"
            up, missing = await peers_up(
                stack, folder, rig.server_cores, bench.answer_bytes, self.cache
            )
            await bench.warm_up()
            for running in up:
                await self._try(running, self._prepare)
            full = []
            for number in range(bench.plan.rounds):
                self.progress = f"round {number + 1} of {bench.plan.rounds}"
                for name, case in (await bench.round(self.progress)).items():
                    self.rounds["ours", name].append(case)
                bench.note(f"{self.progress}: full batches")
                full.append(await self._full())
                for running in up:
                    await self._try(running, self._round)
            for running in up:
                await self._try(running, self._check)
        full.sort(key=lambda each: each.case.redis_us)
        return self._result(missing, full[(len(full) - 1) // 2], await bench.audit())

    async def _try(
        self, running: RunningPeer, step: Callable[[RunningPeer], Awaitable[None]]
    ) -> None:
        """Take a step with a peer; one that failed is told so and left out from then on."""
        name = running.peer.name
        if name not in self.wrong:
            self.bench.note(f"{self.progress}: {running.peer.title}")
            try:
                await step(running)
            except FAILURES as error:
                self.wrong[name] = str(error)[:200]

    async def _prepare(self, running: RunningPeer) -> None:
        """Put tickets on sale, sell one campaign out to a crowd, and warm it up."""
        if not running.peer.sells:
            return
        await running.campaign("bench", STOCK)
        await running.campaign("bench-sold-out", SOLD_OUT_TICKETS)
        cards = self.bench.cards(SOLD_OUT_TICKETS + TOO_MANY)
        raws = list(self.bench.requests("bench-sold-out", cards))
        tally = await closed(running.address, raws, len(raws), CONNECTIONS)
        sold = tally.outcomes()[SOLD]
        self._note_wrong(
            running,
            f"sold {sold} of {SOLD_OUT_TICKETS} to a crowd" if sold != SOLD_OUT_TICKETS else "",
            await running.misdeed("bench-sold-out", SOLD_OUT_TICKETS, least=sold, most=sold),
        )
        await self._purchases(running)

    async def _round(self, running: RunningPeer) -> None:
        name, bench, target = running.peer.name, self.bench, _target(running)
        if not running.peer.sells:
            case = await bench.measure("constant", bench.replays, target)
            self.rounds[name, "purchases"].append(case)
            return
        self.rounds[name, "purchases"].append(await self._purchases(running))
        feed = bench.refused["bench-sold-out"]
        case = await bench.measure("sold_out", feed, target, refuses=True)
        self.rounds[name, "sold_out"].append(case)

    async def _purchases(self, running: RunningPeer) -> Case:
        feed = self.bench.purchases(running.peer.name)
        case = await self.bench.measure("purchases", feed, _target(running))
        feed.file.unlink()
        self.answered[running.peer.name].append(case.requests)
        return case

    async def _check(self, running: RunningPeer) -> None:
        """Compare what was answered with the peer's Redis.

        The client leaves with requests under way, which are sold and not counted.
        """
        if not running.peer.sells:
            return
        answered = self.answered[running.peer.name]
        most = sum(answered) + self.bench.plan.connections * len(answered)
        self._note_wrong(
            running,
            await running.misdeed("bench", STOCK, least=sum(answered), most=most),
            await running.misdeed("bench-sold-out", SOLD_OUT_TICKETS, least=0, most=STOCK),
        )

    def _note_wrong(self, running: RunningPeer, *misdeeds: str) -> None:
        if words := "; ".join(filter(None, misdeeds)):
            self.wrong[running.peer.name] = words

    async def _full(self) -> FullBatches:
        bench, feed = self.bench, self.bench.purchases("purchases")
        before = await bench.rig.metrics()
        case = await bench.measure("full", feed, bench.ours, connections=FULL_CONNECTIONS)
        now = await bench.rig.metrics()
        sold, calls = (
            now[name] - before[name] for name in ("sale_batch_size_sum", "sale_batch_size_count")
        )
        feed.file.unlink()
        await bench.rig.written("bench")
        return FullBatches(FULL_CONNECTIONS, sold / max(calls, 1.0), case)

    def _result(self, missing: dict[str, str], full: FullBatches, audit: str) -> Comparison:
        plan, ours = self.bench.plan, [median(self.rounds["ours", name]) for name in OURS]
        peers = [self._peer(peer, missing.get(peer.name, "")) for peer in PEERS]
        return Comparison(
            client=self.bench.client,
            connections=plan.connections,
            rounds=plan.rounds,
            seconds=plan.seconds,
            constant=middle(self.rounds["ours", "constant"]),
            ours=ours,
            peers=peers,
            full=full,
            goals=goals(ours, peers, full),
            audit=audit,
        )

    def _peer(self, peer: Peer, why_not: str) -> PeerResult:
        clean = CLEAN if peer.sells else SELLS_NOTHING
        return PeerResult(
            name=peer.name,
            title=peer.title,
            leaves_out=peer.leaves_out,
            why_not=why_not,
            check="" if why_not else self.wrong.get(peer.name) or clean,
            purchases=self._median(peer, "purchases"),
            sold_out=self._median(peer, "sold_out"),
            ours=self._multiple(peer, "purchases"),
            ours_refused=self._multiple(peer, "sold_out"),
        )

    def _median(self, peer: Peer, what: str) -> Case | None:
        """A peer's median, as a share of its rounds' constants; None where it has failed."""
        pairs = zip(self.rounds[peer.name, what], self.rounds["ours", "constant"], strict=False)
        shares = [case.beside(constant) for case, constant in pairs]
        return median(shares) if shares else None

    def _multiple(self, peer: Peer, what: str) -> float | None:
        """The engine's rate as a multiple of a peer's: the median of the rounds."""
        pairs = zip(self.rounds["ours", what], self.rounds[peer.name, what], strict=False)
        each = [mine.rate / other.rate for mine, other in pairs]
        return statistics.median_low(each) if each else None


def goals(ours: list[Case], peers: list[PeerResult], full: FullBatches) -> list[Goal]:
    """The project's targets, and what this run reached of them."""
    share = {case.name: case.ratio for case in ours}
    ahead = {peer.name: peer for peer in peers if peer.check == CLEAN}
    node, naive, go = (ahead.get(peer.name) for peer in (NODE, NAIVE, GO))
    titles = {
        "sold_out": "sold-out refusals",
        "not_open": "not-open refusals",
        "sold_out_fresh": "sold-out refusals of new cards",
        "not_open_fresh": "not-open refusals of new cards",
    }
    return [
        *(
            Goal(f"{titles.get(name, name)} × (a)", kind.goal, share[name])
            for name, kind in KINDS.items()
        ),
        Goal("purchases × Node's", 1.3, node.ours if node else None),
        Goal("purchases × the naive service's", 4.0, naive.ours if naive else None),
        Goal("purchases × Go's", 1.5, go.ours if go else None),
        Goal("sold-out refusals × Go's", 3.0, go.ours_refused if go else None),
        Goal("Redis µs a purchase, full batches", 10.0, full.case.redis_us, at_most=True),
    ]


def _target(running: RunningPeer) -> Target:
    return Target(running.peer.name, running.address, running.pid, running.redis_pid)
