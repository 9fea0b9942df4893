"""Locust: the table of rushes, the shape, cards and answers at the desk, and real runs."""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import gevent
import msgspec
import pytest
from service import free_port
from test_loadtest import run_program

from loadtest.books.answers import Answer, read_answers, write_answers
from loadtest.books.ledger import load_books
from loadtest.books.proof import Where
from loadtest.crowd import proof, setup
from loadtest.crowd.desk import BATCH, LOCAL, Booth, Desk, Setting
from loadtest.crowd.options import deeds_of, mix_of, phases_of
from loadtest.crowd.programs import Errand, program
from loadtest.crowd.proof import measured
from loadtest.crowd.shape import Plan, target
from loadtest.engine import Engine, engine_up, find_database
from loadtest.members import Member
from loadtest.record import Proof, read
from loadtest.scenarios import (
    SCENARIOS,
    Mix,
    Phases,
    campaign_file,
    campaign_of_run,
    cards_needed,
    read_campaign,
    run_name,
)
from sale.domain.campaign_file import parse_campaign
from sale.domain.unions import default_unions_path, load_unions

ROWS = {
    "five-yuan-films",
    "ice-snow-carnival",
    "illusion-art",
    "children-theatre-may",
    "interest-classes",
    "green-gift",
}


def options(**given: Any) -> argparse.Namespace:
    lengths, weights = ("quiet", "gathering", "opening", "tail"), ("members", "refreshers", "bots")
    names = (*lengths, *weights, "raise_stock", "pauses")
    return argparse.Namespace(**dict.fromkeys(names) | given)


# The table ---------------------------------------------------------------------------------------


def test_each_rush_has_a_scenario_and_a_campaign_file() -> None:
    assert set(SCENARIOS) == ROWS
    for name in SCENARIOS:
        assert read_campaign(name)["id"] == campaign_file(name).stem == name


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("full", [True, False])
def test_engine_accepts_the_campaign_of_each_scenario(name: str, full: bool) -> None:
    scenario, opens_at = SCENARIOS[name], datetime(2026, 1, 1, tzinfo=UTC)
    identifier = run_name(name)
    table = campaign_of_run(
        scenario,
        read_campaign(name),
        identifier=identifier,
        opens_at=opens_at,
        users=scenario.crowd // 10,
        full_stock=full,
    )
    made = parse_campaign(table, frozenset(load_unions(default_unions_path())))
    stock = sum(showing["tickets"] for showing in read_campaign(name)["showings"])
    assert made.id == identifier != run_name(name)
    assert made.opens_at == opens_at
    tickets = sum(showing.tickets for showing in made.showings)
    assert tickets == stock if full else stock * 0.09 <= tickets <= stock * 0.11


def test_theatre_scenario_adds_half_of_its_stock() -> None:
    # 2,000 tickets of the file and a half of them make the 3,000 of the record.
    deeds = SCENARIOS["children-theatre-may"].deeds
    assert read_campaign("children-theatre-may")["showings"][0]["tickets"] == 2_000
    assert deeds.raise_share * 2_000 == 1_000
    assert deeds.raises > 1


def test_refreshers_need_no_cards() -> None:
    assert cards_needed(Mix(members=1), 150) == 150
    assert cards_needed(Mix(members=1), 150, operators=1) == 149
    assert cards_needed(Mix(members=1, refreshers=1), 100) == 52
    assert cards_needed(Mix(members=0, refreshers=1), 100) == 0
    assert cards_needed(Mix(members=2, refreshers=1, bots=1), 1) == 1


def test_options_override_the_scenario() -> None:
    scenario = SCENARIOS["illusion-art"]
    assert mix_of(options(), None) == Mix(members=1)
    assert mix_of(options(bots=9), scenario).bots == 9
    assert deeds_of(options(pauses=0), scenario).any is False
    raised = deeds_of(options(raise_stock=2), None)
    assert (raised.raise_tickets, raised.raises) == (2, 2)
    assert phases_of(options(tail=7.0), scenario, None).tail_s == 7.0
    soon = phases_of(options(), scenario, 8.0)
    assert (soon.quiet_s, soon.gathering_s) == (0.0, 8.0)


# The shape ---------------------------------------------------------------------------------------


def test_users_follow_the_phases_of_a_release() -> None:
    phases = Phases(quiet_s=10, gathering_s=20, opening_s=5, tail_s=40)
    plan = Plan(1_000, phases=phases)
    seen = [target(plan, float(second)) for second in range(76)]
    users = [step[0] for step in seen if step is not None]
    assert users[0] == users[9] == 50
    assert users[10] == users[29] == 850
    assert users[30] == users[34] == 1_000
    assert users[35] == users[74] == 300
    assert seen[75] is None
    gathering, opening = seen[10], seen[30]
    assert gathering is not None
    assert opening is not None
    assert gathering[1] * phases.gathering_s > 800, "the crowd stands before the doors open"
    assert opening[1] == 150, "the rest comes within the second of the opening"


async def test_missed_threshold_or_release_that_was_none_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given bots whose wishes outnumber the members', and then a campaign that was closed."""

    async def clean(*_: object) -> Proof:
        return Proof(clean=True)

    monkeypatch.setattr(proof, "proven", clean)
    many = [answer(f"b{n}", 100.5, 429, code="rate-limited") for n in range(300)]
    for told, rules, status, says in (
        ([*many, answer("k", 100.5, 201)], [], 0, "books: clean"),
        ([answer("k", 100.5, 201)], ["sold<2"], 1, "fail if sold<2: 1, MISSED"),
        ([answer("k", 100.5, 409, code="closed")], [], 1, "the release did not happen: 1 of 1"),
    ):
        write_answers(told, tmp_path / "answers")
        answers = str(tmp_path / "answers")
        errand = errand_of(started_at=100.0, ended_at=104.0, answers=answers, fail_if=rules)
        assert await proof.prove_run(errand) == status
        assert says in capsys.readouterr().out


def test_without_a_scenario_users_stay_for_the_run_time() -> None:
    assert target(Plan(7, rate=3.0), 1e6) == (7, 3.0)
    assert target(Plan(7, run_s=5.0), 4.9) is not None
    assert target(Plan(7, run_s=5.0), 5.0) is None
    short = Plan(7, run_s=5.0, phases=Phases(1, 1, 1, 60))
    assert short.duration_s == 5.0
    assert target(Plan(1, phases=Phases(1, 1, 1, 1)), 0.0) == (1, 1.0)


# The desk ----------------------------------------------------------------------------------------


class OneProcess:
    """Delivers messages to itself, as Locust's runner does where there is one process.

    Locust itself cannot be imported here: it patches what asyncio needs.
    """

    def __init__(self) -> None:
        self.taken: dict[str, Callable[..., None]] = {}
        self.register_message = self.taken.__setitem__

    def send_message(self, kind: str, data: Any, _: str = LOCAL) -> None:
        self.taken[kind](msg=SimpleNamespace(data=data, node_id=LOCAL))


def opened(folder: Path, cards: int) -> tuple[Desk, Booth]:
    runner, desk, booth = OneProcess(), Desk(), Booth()
    booth.join(runner)
    events = SimpleNamespace(worker_connect=SimpleNamespace(add_listener=lambda _: None))
    desk.join(SimpleNamespace(runner=runner, events=events))
    members = [Member(str(182_850 + n), "t", "u") for n in range(cards)]
    desk.open(Setting(1, "c"), members, folder / "answers")
    return desk, booth


def test_user_without_a_card_is_a_finding(
    tmp_path: Path,
) -> None:
    desk, booth = opened(tmp_path, 1)
    users = [gevent.spawn(booth.card) for _ in range(2)]
    gevent.joinall(users, timeout=5)
    assert sorted(user.value is None for user in users) == [False, True]
    booth.account()
    assert [finding.kind for finding in desk.close()] == ["without-card"]


def test_booth_sends_all_answers_before_its_account(tmp_path: Path) -> None:
    desk, booth = opened(tmp_path, 0)
    for number in range(BATCH * 2 + 1):
        booth.record(answer(f"k{number}", 1.0, 201))
    booth.account()
    assert desk.close() == []
    assert len(read_answers(tmp_path / "answers")) == BATCH * 2 + 1
    assert (tmp_path / "answers").stat().st_mode & 0o077 == 0


def test_missing_answers_and_accounts_are_findings(tmp_path: Path) -> None:
    desk, booth = opened(tmp_path, 0)
    booth.record(answer("k", 1.0, 201))
    booth.account()
    desk.received["1"] -= 1
    desk.received["2"] = 7
    assert [finding.kind for finding in desk.close()] == ["answers-missing", "no-account"]


# The record --------------------------------------------------------------------------------------


def errand_of(**fields: Any) -> Errand:
    return Errand(what="prove", **{"name": "n", "campaign": "c", **fields})


def answer(key: str, sent_at: float, status: int, **more: Any) -> Answer:
    received_at = sent_at + 0.25
    told = {"member_no": "182850", "showing": "a", "quantity": 1, "key": key}
    return Answer(status=status, sent_at=sent_at, received_at=received_at, **told | more)


def test_wish_counts_once_from_its_first_try() -> None:
    answers = [
        answer("k2", 101.5, 201),
        answer("k1", 100.5, 503, code="overloaded"),
        answer("k1", 102.5, 201),
        answer("k3", 102.6, 0),
    ]
    record = measured(answers, errand_of(started_at=100.0, ended_at=104.0, plan={"users": 3}))
    assert (record.offered, record.sent, record.answered) == (3, 4, 3)
    assert record.outcomes == {"sold": 2, "no-answer": 1}
    assert record.plan["loop"] == "closed"
    assert [second.offered for second in record.seconds] == [1, 1, 1]
    assert [second.sent for second in record.seconds] == [1, 1, 2]
    assert record.seconds[0].outcomes == {"sold": 1}
    assert record.seconds[0].p50_ms == pytest.approx(2_250)
    assert record.latency_sold[-1].ms == pytest.approx(2_250, rel=0.01)


@pytest.mark.parametrize("more", ["", "/", "//"])
def test_host_may_end_with_slashes(more: str) -> None:
    assert setup.Api(f"http://127.0.0.1:8080{more}").host == "http://127.0.0.1:8080"


@pytest.mark.parametrize("host", ["http://h/api", "http://h/?a=b", "h:80", "ftp://h", "http://"])
def test_host_that_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(setup.SetupError, match="--host"):
        setup.Api(host)


# The whole ---------------------------------------------------------------------------------------


async def run_locust(*arguments: str) -> tuple[int, str]:
    """Run Locust's command line to its end; status, and stdout and stderr together."""
    return await run_program("locust", "-f", "loadtest/locustfile.py", *arguments, within_s=90)


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """A whole engine with 120 cards."""
    folder = tmp_path_factory.mktemp("locust")
    async with engine_up(folder / "d") as engine:
        await engine.command("cards", "sample", "120", "--out", str(folder / "r.csv"))
        await engine.command("cards", "import", str(folder / "r.csv"))
        yield engine


def where(engine: Engine) -> list[str]:
    return ["--host", f"{engine.url}/", "--data-dir", str(engine.data_dir), "--headless"]


@pytest.mark.load
async def test_engine_makes_the_campaign_of_each_scenario(
    engine: Engine,
) -> None:
    api = setup.Api(engine.url)
    api.token = await asyncio.to_thread(setup.operator_token, str(engine.data_dir), "")
    for name, scenario in SCENARIOS.items():
        table = campaign_of_run(
            scenario,
            read_campaign(name),
            identifier=run_name(name),
            opens_at=api.now() + timedelta(seconds=60),
            users=30,
            full_stock=False,
        )
        made = await asyncio.to_thread(api.must, 201, "POST", setup.ADMIN, "", body=table)
        found = await asyncio.to_thread(setup.find_campaign, api, made["id"])
        assert (found["id"], found["state"]) == (table["id"], "scheduled")
        assert [each["id"] for each in found["showings"]] == [
            each["id"] for each in read_campaign(name)["showings"]
        ]
        assert found["order_max"] >= 1
        await asyncio.to_thread(api.close, made["id"])


@pytest.mark.load
async def test_stock_is_added_once_and_books_balance(engine: Engine, tmp_path: Path) -> None:
    lengths = ["--quiet", "0", "--gathering", "1", "--opening", "1", "--tail", "5"]
    who = ["-u", "30", "--bots", "0", "--raise-stock", "2"]
    status, told = await run_locust(
        *(*where(engine), *lengths, *who, "--scenario", "children-theatre-may"),
        *("--only-summary", "--out", str(tmp_path), "--fail-if", "max>900s,errors>99%"),
    )
    assert status == 0, told
    assert "fail if max>900s: " in told
    assert ", met\n" in told
    assert "books: clean" in told
    assert "audit: clean" in told
    # Two tickets in two steps, each asked for twice under its key.
    (line,) = [each for each in told.splitlines() if "/[id]/stock " in each and "POST" in each][:1]
    assert int(line.split()[2]) >= 4
    record = read(tmp_path / "run.json")
    assert record.outcomes["sold"] > 0
    books = await load_books(find_database(engine.data_dir), record.campaign)
    assert books.stock == {"general": await at_first(engine, record.campaign) + 2}


async def at_first(engine: Engine, campaign: str) -> int:
    """Tickets with which it was made."""
    connection = await asyncpg.connect(find_database(engine.data_dir))
    query = "SELECT config->'showings'->0->'tickets' FROM campaign WHERE campaign_id = $1"
    try:
        return int(await connection.fetchval(query, campaign))
    finally:
        await connection.close()


@pytest.mark.load
async def test_release_on_two_processes_is_proven(engine: Engine, tmp_path: Path) -> None:
    out, port = tmp_path / "out", str(free_port())
    lengths = ["--quiet", "1", "--gathering", "2", "--opening", "1", "--tail", "5"]
    ports = ["--processes", "2", "--master-port", port, "--master-bind-port", port]
    many = run_locust(*where(engine), *ports, "--scenario", "illusion-art", "-u", "5000")
    wrong = run_locust(*where(engine), "--campaign", "mistyped")
    rule = run_locust(*where(engine), "--scenario", "illusion-art", "--fail-if", "p98>1ms")
    # given a mistyped campaign, or more users than cards: told at the start, in one line
    refused = await asyncio.gather(many, wrong, rule)
    says = "cards, 4,", "'mistyped' is not known", "no figure 'p98'"
    for (status, told), said in zip(refused, says, strict=True):
        assert status == 2, told
        assert said in told.splitlines()[-1]
        assert "Traceback" not in told
    # when a release is played
    status, told = await run_locust(
        *(*where(engine), *ports, *lengths, "--only-summary", "--out", str(out)),
        *("--scenario", "illusion-art", "-u", "60", "--members", "70", "--bots", "5"),
    )
    # then it was proven, and all that should have happened has
    assert status == 0, told
    assert "books: clean" in told
    assert "audit: clean" in told
    record = read(out / "run.json")
    assert record.plan["processes"] == 2
    assert record.proof is not None
    assert record.proof.clean
    assert record.proof.orders == record.outcomes["sold"]
    assert {"sold", "sold-out", "unauthenticated"} <= set(record.outcomes), record.outcomes
    for step in ("pause", "resume"):
        assert f"/api/v1/admin/campaigns/[id]/{step} " in told, "the operator was on duty"
    assert record.samples
    assert (out / "report.html").stat().st_size > 10_000
    # and one answer that says otherwise than the books is found
    answers = read_answers(out / "answers.jsonl")
    first = next(number for number, each in enumerate(answers) if each.sold)
    answers[first] = msgspec.structs.replace(answers[first], order_no="lost.1.000000")
    write_answers(answers, tmp_path / "tampered")
    books = Where(database_url=find_database(engine.data_dir))
    errand = errand_of(
        campaign=record.campaign, where=books, ended_at=1.0, answers=str(tmp_path / "tampered")
    )
    status, told = await asyncio.to_thread(program, errand, 60.0)
    assert status == 1, told
    assert "lost: order lost.1.000000" in told
