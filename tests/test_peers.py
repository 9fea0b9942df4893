"""The peers of the benchmark: each sells what it has and no more, and who is missing is told."""

import asyncio
import dataclasses
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console
from service import ROOT

from loadtest.bench import compare, peers
from loadtest.bench.cases import FULL, Bench, Plan
from loadtest.bench.compare import (
    SELLS_NOTHING,
    Comparing,
    Comparison,
    FullBatches,
    PeerResult,
)
from loadtest.bench.figures import Case
from loadtest.bench.offer import OfferError, read_feed, write_feed
from loadtest.bench.peers import (
    AFTERNOON,
    BARE,
    GO,
    NAIVE,
    NODE,
    Peer,
    PeerMissingError,
    RunningPeer,
    peer_up,
)
from loadtest.bench.rig import SIGNING_KEY
from loadtest.client import Client
from loadtest.generator import closed
from loadtest.members import Mint
from loadtest.tables import CLEAN, Goal
from sale.identity import SigningKey

TICKETS, CROWD = 100, 300
NO_REGISTRY = "ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|E5..|not done in"
CORES = os.sched_getaffinity(0)
PEER_RATE = 2_500.0
GO_HERE = shutil.which("go") is not None
NODE_HERE = shutil.which("node") is not None and shutil.which("npm") is not None


@pytest.fixture(scope="module")
def mint() -> Mint:
    key = SigningKey(SIGNING_KEY.encode())
    return Mint(key.secret)


@pytest.fixture
def cache(request: pytest.FixtureRequest) -> Path:
    """Where the Node peer's packages stay between runs of the tests."""
    return request.config.cache.mkdir("sale-peers")


# Selling -----------------------------------------------------------------------------------------


async def sell(running: RunningPeer, mint: Mint) -> None:
    """A crowd for few tickets, then one card again and again, then refusals of other kinds."""
    await running.campaign("small", TICKETS)
    await running.campaign("large", 10_000)
    raws = list(mint.requests("h", "small", "general", range(CROWD)))
    statuses: Counter[int] = Counter()
    await closed(
        running.address, raws, CROWD, 64, spool=lambda _, status, *__: statuses.update([status])
    )
    assert statuses == {201: TICKETS, 409: CROWD - TICKETS}
    assert await running.misdeed("small", TICKETS, least=TICKETS, most=TICKETS) == ""
    async with Client(running.address) as client:
        (raw,) = mint.requests("h", "large", "general", [1])
        answers = [await client.request(raw) for _ in range(4)]
        assert [answer.status for answer in answers] == [201, 201, 201, 409]
        assert answers[3].body.count(b"limit-exceeded") >= 1
        order = answers[0].json()
        assert order["quantity"] == 1
        assert order["card_remaining"] == 2
        assert answers[0].header("Location") == f"/api/v1/orders/{order['order_no']}"
        assert len({answer.json()["order_no"] for answer in answers[:3]}) == 3

        for old, new, status in (
            (b"campaigns/large", b"campaigns/other", {404}),
            (b'"quantity":1', b'"quantity":9', {400, 422}),
        ):
            assert (await client.request(raw.replace(old, new))).status in status
        assert await running.misdeed("large", 10_000, least=3, most=3) == ""


@pytest.mark.load
@pytest.mark.parametrize("peer", [NAIVE, AFTERNOON], ids=lambda peer: peer.name)
async def test_peer_sells_what_it_has_to_a_crowd(peer: Peer, tmp_path: Path, mint: Mint) -> None:
    async with peer_up(peer, tmp_path, CORES) as running:
        await sell(running, mint)


@pytest.mark.load
async def test_node_peer_sells_what_it_has_or_says_why_not(
    tmp_path: Path, mint: Mint, cache: Path
) -> None:
    why_not = ""
    try:
        async with peer_up(NODE, tmp_path, CORES, cache=cache) as running:
            await sell(running, mint)
    except PeerMissingError as error:
        why_not = str(error)
    wanted = f"^$|{NO_REGISTRY}" if NODE_HERE else "node and npm are not installed"
    assert re.search(wanted, why_not), why_not


@pytest.mark.load
async def test_go_peer_sells_what_it_has_or_says_why_not(
    tmp_path: Path, mint: Mint, cache: Path
) -> None:
    why_not = ""
    try:
        async with peer_up(GO, tmp_path, CORES, cache=cache) as running:
            await sell(running, mint)
    except PeerMissingError as error:
        why_not = str(error)
    assert why_not == ("" if GO_HERE else "go is not installed")


async def test_afternoon_peer_refuses_a_forged_token(tmp_path: Path, mint: Mint) -> None:
    forged = Mint(b"another key, which is as long as one is")
    async with peer_up(AFTERNOON, tmp_path, CORES) as running, Client(running.address) as client:
        await running.campaign("films", 1)
        (raw,) = forged.requests("h", "films", "general", [1])
        assert (await client.request(raw)).status == 401
        assert await running.misdeed("films", 1, least=0, most=0) == ""


async def test_bare_peer_answers_each_request_of_a_read(tmp_path: Path, mint: Mint) -> None:
    (raw,) = mint.requests("h", "films", "general", [1])
    async with peer_up(BARE, tmp_path, CORES, body_bytes=400) as running:
        async with Client(running.address) as client:
            answer = await client.request(raw)
        host, _, port = running.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw + raw + b"nonsense\r\n\r\n")
        async with asyncio.timeout(10):
            got = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.status == 201
    assert len(answer.body) == 400
    # What is malformed ends the connection, with what came with it in the same read.
    assert got.count(b"HTTP/1.1 201") in (0, 2)


class Shelf:
    """A peer's Redis as it might look."""

    def __init__(self, left: int, orders: int, cards: list[int]) -> None:
        self.left, self.orders, self.cards = left, orders, cards

    async def get(self, _: str) -> int:
        return self.left

    async def xlen(self, _: str) -> int:
        return self.orders

    async def hvals(self, _: str) -> list[int]:
        return self.cards


@pytest.mark.parametrize(
    ("shelf", "said"),
    [
        (Shelf(8, 2, [1, 1]), ""),
        (Shelf(-1, 11, [3, 3, 3, 2]), "OVERSOLD: 11 of 10"),
        (Shelf(0, 11, [3, 3, 3, 2]), "OVERSOLD"),
        (Shelf(9, 2, [1, 1]), "1 gone, 2 orders"),
        (Shelf(8, 2, [1]), "1 on cards"),
        (Shelf(9, 1, [1]), "1 orders, but 2 to 2"),
        (Shelf(6, 4, [4]), "4 orders, but 2 to 2"),
    ],
)
async def test_misdeeds_of_a_peer_are_told(shelf: Shelf, said: str) -> None:
    running = RunningPeer(NAIVE, "", 0, 0, shelf)
    told = await running.misdeed("films", 10, least=2, most=2)
    assert told.startswith(said) if "on cards" not in said else told.endswith(said)
    assert bool(told) == bool(said)


async def test_card_over_the_limit_is_told() -> None:
    running = RunningPeer(NAIVE, "", 0, 0, Shelf(6, 4, [4]))
    assert "a card has 4" in await running.misdeed("films", 10, least=4, most=4)


# What is not there -------------------------------------------------------------------------------


async def test_missing_node_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.shutil, "which", lambda _: None)
    with pytest.raises(PeerMissingError, match="node and npm are not installed"):
        async with peer_up(NODE, tmp_path, CORES):
            pass


async def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PeerMissingError, match="fastapi is not installed"):
        async with peer_up(AFTERNOON, tmp_path, CORES):
            pass


async def test_failing_npm_tells_its_reason(
    tmp_path: Path,
) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND'\necho 'log elsewhere'\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(PeerMissingError, match="npm ci failed: error code ENOTFOUND"):
        await peers._install(str(npm), tmp_path / "cache")


def test_packages_of_the_node_peer_are_exact() -> None:
    folder = ROOT / "loadtest/peers/node"
    wanted = json.loads((folder / "package.json").read_text("utf-8"))["dependencies"]
    lock = json.loads((folder / "package-lock.json").read_text("utf-8"))
    assert set(wanted) == {"fastify", "ioredis"}
    assert lock["packages"][""]["dependencies"] == wanted
    for name, version in wanted.items():
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
    for place, package in lock["packages"].items():
        assert "resolved" not in package, place
        assert not place or package["integrity"].startswith("sha512-"), place


# The comparison ----------------------------------------------------------------------------------


class SmallBench:
    """Offers some hundred requests by our own client; the engine's own figures are made up."""

    client = "our own client"
    answer_bytes = 330
    plan = Plan(seconds=1, rounds=2, backlog=0, cards=0, growth=())

    def __init__(self, folder: Path, mint: Mint) -> None:
        self.mint = mint
        self.next_card = 1
        self.calls = 0
        self.rig = SimpleNamespace(
            folder=folder,
            server_cores=CORES,
            metrics=self.metrics,
            written=self.nothing,
            books_stand_back=lambda: None,
        )
        self.replays = self.feed("bench", self.cards(10))
        self.refused = {"bench-sold-out": self.feed("bench-sold-out", self.cards(200))}
        self.ours = SimpleNamespace(name="serve")

    async def metrics(self) -> dict[str, float]:
        self.calls += 1
        return {"sale_batch_size_sum": self.calls * 500.0, "sale_batch_size_count": self.calls * 2}

    async def nothing(self, *_: object) -> None: ...

    prepare = warm_up = nothing
    round = Bench.round

    async def audit(self) -> str:
        return CLEAN

    def note(self, _: str) -> None: ...

    async def case(self, name: str) -> Case:
        rate = {"constant": 1_000.0, "sold_out": 4_000.0}.get(name, 1_100.0)
        return made_case(name, rate, 100)

    async def measure(self, name: str, feed: Any, target: Any, **how: Any) -> Case:
        if target.name == "serve":
            return made_case(name, 2_000.0, 100)
        raws = list(read_feed(feed))
        got = (await closed(target.address, raws, len(raws), 64)).outcomes()
        if got["sold"] != (0 if how.get("refuses") else len(raws)):
            raise OfferError(f"{target.name}: {dict(got)}")
        return made_case(name, PEER_RATE, len(raws))  # a real one differs from round to round

    def cards(self, count: int) -> range:
        self.next_card += count
        return range(self.next_card - count, self.next_card)

    def requests(self, campaign: str, cards: range) -> Iterator[bytes]:
        return self.mint.requests("h", campaign, "general", cards)

    def purchases(self, *_: object) -> Any:
        return self.feed("bench", self.cards(200))

    def feed(self, campaign: str, cards: range) -> Any:
        file = self.rig.folder / f"{campaign}-{cards.start}"
        return write_feed(file, self.requests(campaign, cards))


def made_case(name: str, rate: float, requests: int) -> Case:
    return Case(name, rate, (1.0, 2.0, 3.0), 40.0, 8.0, 1.0, 0.2, 0.1, requests=requests)


@pytest.mark.load
async def test_comparison_tells_all_peers(
    tmp_path: Path, mint: Mint, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = msgspec.structs.replace(NAIVE, name="afternoon")

    async def some(stack: Any, folder: Path, *_: object) -> Any:
        naive = await stack.enter_async_context(peer_up(NAIVE, folder, CORES))
        liar = await stack.enter_async_context(peer_up(wrong, folder, CORES))
        liar = dataclasses.replace(liar, stock=Liar(liar.stock))
        return [naive, liar], {"node": "node and npm are not installed", "bare": "no httptools"}

    monkeypatch.setattr(compare, "peers_up", some)
    result = await Comparing(SmallBench(tmp_path, mint), tmp_path).run()
    told = {peer.name: peer for peer in result.peers}
    assert told["naive"].check == CLEAN
    assert told["naive"].purchases.requests == told["naive"].sold_out.requests == 200
    assert told["naive"].ours == pytest.approx(1_100 / PEER_RATE)
    assert told["afternoon"].check.startswith("OVERSOLD")
    assert told["node"].why_not == "node and npm are not installed"
    assert result.full.mean == 250
    assert result.full.api_cores == 5
    met = {goal.what: goal.met for goal in result.goals}
    assert met["purchases × (a)"] is False
    assert met["sold-out refusals × (a)"] is True
    assert met["purchases × Node's"] is None
    assert met["Redis µs a purchase, full batches"] is True

    console = Console(file=io.StringIO(), width=116)
    result.show(console)
    shown = console.file.getvalue()
    for words in (
        "not measured: node and npm are not installed",
        "WRONG",
        "OVERSOLD",
        "not met",
        "not measured",
        "one core of Redis feeds 5.0 API cores",
        "revoked cards",
    ):
        assert words in " ".join(shown.replace("│", " ").split()), words


class Liar:
    """The Redis of a peer that has sold more than it had."""

    def __init__(self, real: Any) -> None:
        self.real = real

    async def set(self, name: str, tickets: int) -> None:
        await self.real.set(name, tickets)

    async def get(self, _: str) -> int:
        return -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def made_peer(name: str, ratio: float, why_not: str = "") -> PeerResult:
    if why_not:
        return PeerResult(name, f"the {name} one", "", why_not)
    case = msgspec.structs.replace(made_case("purchases", 1_000.0 * ratio, 100), ratio=ratio)
    return PeerResult(name, f"the {name} one", "", check=CLEAN, purchases=case, sold_out=case)


def made_comparison() -> Comparison:
    ours = [made_case("purchases", 1_200.0, 100), made_case("sold_out", 4_000.0, 100)]
    return Comparison(
        client="wrk",
        connections=256,
        rounds=1,
        seconds=1,
        constant=made_case("constant", 1_000.0, 100),
        ours=ours,
        peers=[made_peer("naive", 0.73), made_peer("node", 0.0, "not installed")],
        full=FullBatches(768, 250.0, ours[0]),
        goals=[],
        audit=CLEAN,
    )


def test_comparison_is_drawn_as_two_pictures(tmp_path: Path) -> None:
    from loadtest.bench import plots

    made = plots.draw(made_comparison(), tmp_path)
    assert [file.name for file in made] == ["peers-ratio.png", "peers-cpu.png"]
    for file in made:
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_picture_names_who_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from loadtest.bench import plots

    drawn: dict[str, set[str]] = {}

    def save(figure: Any, file: Path, **_: object) -> None:
        drawn[file.stem] = {
            each.get_text() for each in figure.findobj(match=lambda each: hasattr(each, "get_text"))
        }

    monkeypatch.setattr(plots.Figure, "savefig", save)
    plots.draw(made_comparison(), tmp_path)
    wanted = {"this engine", "aiohttp, constant", "the naive one", "0.73 ×  (730/s)"}
    assert wanted <= drawn["peers-ratio"]
    assert "the node one" not in drawn["peers-ratio"]
    assert "40 + 8 µs" in drawn["peers-cpu"]


def test_goal_is_met_from_its_figure_on() -> None:
    assert Goal("x", 1.2, 1.2).met is True
    assert Goal("x", 1.2, 1.19).met is False
    assert Goal("x", 10, 10.1, at_most=True).met is False
    assert Goal("x", 1.2, None).met is None
    assert SELLS_NOTHING != CLEAN
    assert FULL.rounds % 2 == 1
