"""Runs many seeds on one rig: new campaigns for each, new data after some of them."""

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))

from rig import rig_up
from service import campaign_table

from loadtest.books.answers import write_answers
from loadtest.books.ledger import BooksError, wait_applied
from loadtest.members import Member
from sale.stock.keys import campaign_keys
from soak.judge import Wrong, history, judge_campaign
from soak.members import Stall
from soak.play import Player
from soak.schedule import LINKS, MEMBERS_A_SEED, Schedule, plan
from soak.timeline import Timeline
from soak.trouble import Trouble

SEEDS_A_RIG = 15
LOSSY_SEEDS_A_RIG = 4
MEMBERS_MIN = MEMBERS_A_SEED + 8
LEAD_S = 0.4
APPLIED_S = 20.0
RECOVERED_S = 3.0
RECOVER_TRIES = 3
HISTORIES_MAX = 5
LISTED_AS = ("refused by PostgreSQL", "it was acknowledged, and the ledger has", "conflict")
SETTINGS = {"SALE_PURCHASE_DEADLINE_MS": "800", "SALE_AUDIT_INTERVAL_S": "3600"}


@dataclass
class Told:
    """The result of a seed."""

    schedule: Schedule
    timeline: Timeline
    stalls: Sequence[Stall] = ()
    wrong: list[Wrong] = field(default_factory=list)
    listed: dict[str, int] = field(default_factory=dict)
    """How many orders of each campaign the engine lists as lost."""
    took_s: float = 0.0

    def summary(self) -> str:
        """The result in one line."""
        answers = sum(len(stall.book) for stall in self.stalls)
        sold = sum(each.sold and not each.replayed for stall in self.stalls for each in stall.book)
        how = f"{len(self.wrong)} WRONG" if self.wrong else "clean"
        return (
            f"seed {self.schedule.seed}: {how}, {answers} answers, {sold} orders,"
            f" {sum(self.listed.values())} listed as lost,"
            f" {len(self.schedule.faults)} faults, {self.took_s:.1f} s"
        )

    def report(self) -> Iterator[str]:
        """A report with all details that help to find the cause."""
        schedule = self.schedule
        again = f"python -m tests.soak --seed {schedule.seed} --seconds {schedule.seconds:g}"
        yield f"== seed {schedule.seed}; again: {again}" + (" --lossy" if schedule.lossy else "")
        for number, stall in enumerate(self.stalls):
            yield f"campaign {number} is {stall.campaign}"
        yield from schedule.lines()
        yield "-- what happened"
        yield from self.timeline.lines()
        yield "-- what is wrong"
        for each in self.wrong[:50]:
            yield f"{each.campaign}: {each.kind}: {each.what}"
        shown = [each for each in self.wrong if each.key][:HISTORIES_MAX]
        for each in shown:
            yield f"-- {each.kind}: all answers to key {each.key}"
            stall = next(stall for stall in self.stalls if stall.campaign == each.campaign)
            yield from history(stall, each.key, self.timeline.started_at)


async def run_seeds(
    seeds: Iterable[int],
    seconds: float,
    folder: Path,
    *,
    lossy: bool = False,
    keep: bool = False,
    say: Callable[[str], None] = print,
) -> list[Told]:
    """Run them, report and return the failed ones. With ``keep``, ``folder`` keeps their data."""
    left, broken, rigs = list(seeds), [], 0
    while left:
        rigs += 1
        home = folder / f"r{rigs}"
        home.mkdir(parents=True)
        most = LOSSY_SEEDS_A_RIG if lossy else SEEDS_A_RIG
        failed: Told | None = None
        async with rig_up(
            home, workers=2, writers=2, schedulers=2, proxied=LINKS, settings=SETTINGS
        ) as rig:
            spent: set[str] = set()
            for _ in range(min(most, len(left))):
                told = await run_seed(rig, plan(left.pop(0), seconds, lossy=lossy), spent, home)
                say(told.summary())
                if told.wrong:
                    failed = told
                    break
        if failed is not None:
            broken.append(failed)
            lines = [*failed.report(), *(_kept(failed, home) if keep else ())]
            for line in lines:
                say(line)
        if not (keep and failed):
            await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)
    return broken


def _kept(told: Told, home: Path) -> Iterator[str]:
    """Write the answers to a file; yield lines that say where everything is."""
    for stall in told.stalls:
        write_answers(stall.book, home / f"answers-{stall.campaign}.jsonl")
    yield f"kept in {home}: d/ (data of both stores, logs/), answers"


async def run_seed(rig: Any, schedule: Schedule, spent: set[str], home: Path) -> Told:
    """Run one seed on a sound rig, and judge it. ``spent`` are revoked cards."""
    since, timeline = time.perf_counter(), Timeline(schedule.seconds)
    told = Told(schedule, timeline)
    members = [Member(card, token, "") for card, token in rig.members if card not in spent]
    assert len(members) >= MEMBERS_MIN, "too few cards are left on this rig"
    begins = datetime.now(UTC) + timedelta(seconds=LEAD_S)
    told.stalls = await _open(rig, schedule, begins)
    trouble = Trouble(rig, timeline, home / "copies")
    player = Player(
        rig,
        schedule,
        timeline,
        trouble,
        told.stalls,
        members,
        rig.admin_token,
        partial(_recover, rig, told.stalls, timeline) if schedule.lossy else _do_nothing,
    )
    await asyncio.sleep((begins - datetime.now(UTC)).total_seconds())
    await player.play()
    await player.settle()
    spent.update(members[act.member].member_no for act in schedule.acts if act.what == "revoke")
    for stall in told.stalls:
        told.wrong += await _judge(rig, stall, player, told)
    told.wrong += [Wrong("", "problem", each) for each in (*player.problems, *trouble.problems)]
    told.took_s = time.perf_counter() - since
    await asyncio.to_thread(shutil.rmtree, home / "copies", ignore_errors=True)
    return told


async def _open(rig: Any, schedule: Schedule, begins: datetime) -> list[Stall]:
    """Create the campaigns of a seed."""
    stalls = []
    for number, sale in enumerate(schedule.sales):
        ids = tuple("abcdefgh"[: len(sale.tickets)])
        closes = sale.closes_s
        table = campaign_table(
            f"s{schedule.seed}-{number}",
            card_limit=sale.card_limit,
            order_max=sale.order_max,
            opens_at=(begins + timedelta(seconds=sale.opens_s)).isoformat(),
            closes_at=None if closes is None else (begins + timedelta(seconds=closes)).isoformat(),
            showings=[
                {"id": showing, "title": showing, "tickets": tickets}
                for showing, tickets in zip(ids, sale.tickets, strict=True)
            ],
        )
        status, said = await rig.admin("POST", "", table)
        assert status == 201, said
        stalls.append(Stall(table["id"], ids))
    return stalls


async def _do_nothing() -> None:
    """Without lost files, wait until the engine recovers by itself."""


async def _recover(rig: Any, stalls: Sequence[Stall], timeline: Timeline) -> None:
    """After lost files, wait for the auto recovery, then recover as an operator."""
    deadline = time.perf_counter() + RECOVERED_S
    ailing = list(stalls)
    while ailing and time.perf_counter() < deadline:
        await asyncio.sleep(0.1)
        ailing = [stall for stall in ailing if await _ails(rig, stall)]
    for stall in ailing:
        if why := await _ails(rig, stall):
            timeline.note(f"{stall.campaign} does not heal by itself: {why}")
            for _ in range(RECOVER_TRIES):
                ran = await rig.sale("recover", stall.campaign)
                timeline.note(f"sale recover: {ran.status} {' | '.join(ran[1:])}".strip())
                if not ran.status:
                    break
                await asyncio.sleep(1.0)


async def _ails(rig: Any, stall: Stall) -> str:
    with contextlib.suppress(OSError):
        async with rig.redis() as client:
            keys = campaign_keys(stall.campaign)
            head = await client.hmget(keys.head, ["seq", "recovering", "run_id"])
            run_id = (await client.info("server"))["run_id"]
        seq, recovering, verified = ((value or b"").decode() for value in head)
        return "lost" if not seq else recovering or ("unverified" if verified != run_id else "")
    return "Redis does not answer"


async def _judge(rig: Any, stall: Stall, player: Player, told: Told) -> list[Wrong]:
    """Wait until PostgreSQL has all events of Redis, then run all checks."""
    try:
        head = await rig.sold(stall.campaign)
        await wait_applied(rig.database_url, stall.campaign, head, within_s=APPLIED_S)
        acts = [act for act in player.acts if act.campaign == stall.campaign]
        wrong, told.listed[stall.campaign] = await judge_campaign(
            rig.database_url,
            stall,
            acts,
            lossy=told.schedule.lossy,
            witnessed=told.schedule.witnessed,
        )
    except BooksError as error:
        wrong = [Wrong(stall.campaign, "not-written", str(error))]
    ran = await rig.sale("audit", stall.campaign, "--json")
    if ran.status:
        said = f"{ran.status}: {ran.out[:1_500]} {ran.err[-500:]}"
        if not (told.schedule.lossy and _only_conflicts(ran)):
            wrong.append(Wrong(stall.campaign, "audit", said))
    return wrong


def _only_conflicts(ran: Any) -> bool:
    """Whether the audit finds only what the engine lists in table ``conflict``."""
    if ran.status != 1:
        return False
    findings = [each for one in ran.json()["campaigns"] for each in one["findings"]]
    return all(any(how in each["what"] for how in LISTED_AS) for each in findings)
