"""Plays a run in an open loop with one or more generating processes, and makes its record.

The generating processes do nothing else (`loadtest.rush.worker`); this one starts them, gives them
one start time, samples the engine meanwhile, adds their counts up, and compares every answer with
PostgreSQL.
"""

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtest.books.ledger import count_orders, highest, must_know, wait_applied
from loadtest.books.proof import PROBLEMS, prove
from loadtest.client import Client, read_json
from loadtest.engine import engine_settings
from loadtest.record import Record
from loadtest.rush.arrivals import AT_ONCE
from loadtest.rush.asks import MIXED, Asks, Load, write_minted
from loadtest.rush.plan import Plan, RushError, Stopped
from loadtest.rush.worker import Job, Progress, Worker
from loadtest.sampler import Sampler, discover_processes, metrics_address
from loadtest.summary import fill
from loadtest.surroundings import describe
from loadtest.tally import Bounds, Tally
from loadtest.wire import get_request, problem_code
from sale.config import SettingsError
from sale.identity import load_or_create_signing_key

READY_S: Final = 120.0
START_IN_S: Final = 0.5
CLOCK_LOOKS: Final = 7
OPENING_MAX_S: Final = 86_400.0
SUM_UP_S: Final = 120.0
PROCESSES_MAX: Final = 64
WARM_LEAST: Final = 16
BOOKS_WITHIN_S: Final = 5.0

Note = Callable[[str], None]


async def play(plan: Plan, note: Note | None = None) -> Record:
    """Play the plan against a running engine, and prove the books where ``plan.books`` is known.

    ``note`` is told what goes on, a line at a time. The caller judges the record: a ``bottleneck``,
    a ``proof`` that is missing or not clean.

    Raises:
        RushError, AnswerError, EngineError, BooksError: it could not be played, or not be proved.
        ProtocolError, Unreachable, OSError, ValueError: bad plan or a server that is none.

    """
    note = note or (lambda _: None)
    if not 1 <= plan.processes <= PROCESSES_MAX:
        raise RushError(f"processes: 1 to {PROCESSES_MAX}")
    with tempfile.TemporaryDirectory(prefix="sale-rush-") as made:
        folder = Path(made)
        campaign = await _campaign(plan)
        await _look_at_books(plan)
        if not plan.at_opening and campaign.get("state") != "open":
            note(f"campaign {plan.campaign} is {campaign.get('state')}: it refuses everybody")
        load = await asyncio.to_thread(_load, plan, campaign, folder, note)
        await _try_token(plan, load)
        offsets = await asyncio.to_thread(load.offsets)
        note(f"{len(offsets):,} members over {offsets[-1]:.1f} s, seed {plan.seed}")
        warm = plan.warm or max(Counter(int(offset * 10) for offset in offsets).values())
        plan = msgspec.structs.replace(plan, warm=min(max(warm, WARM_LEAST), plan.connections))
        jobs = [_job(plan, load, index, folder) for index in range(plan.processes)]
        record, tallies = await _play(plan, jobs, campaign, offsets[-1], note)
        ended = time.monotonic()
        try:
            await asyncio.to_thread(fill, record, tallies, plan.fail_if)
            planned_s = record.duration_s if load.arrivals == AT_ONCE else load.seconds
            planned_s = offsets[-1] if load.arrivals.startswith("file:") else planned_s
            record.offered_rate = len(offsets) / max(planned_s, 1.0)
            if plan.proof and plan.books.known:
                note("the ledger, and every answer compared with PostgreSQL")
                await _prove(plan, jobs, record, ended)
        except asyncio.CancelledError:
            raise Stopped(record.offered, record.answered) from None
    return record


async def _prove(plan: Plan, jobs: list[Job], record: Record, ended: float) -> None:
    """Put the proof into the record, or why there is none: the run is reported all the same."""
    within_s = plan.ledger_within_s
    try:
        url = plan.books.books_url()
        answers = await asyncio.to_thread(lambda: [each for job in jobs for each in job.answers()])
        await wait_applied(url, plan.campaign, highest(answers), within_s=within_s)
        written_s = time.monotonic() - ended
        record.proof = await prove(
            answers, plan.campaign, plan.books, alone=plan.alone, within_s=within_s
        )
    except PROBLEMS as error:
        record.not_proved = " ".join(str(error).split()) or type(error).__name__
        return
    record.plan["ledger complete, s after the end"] = round(written_s, 2)
    rate = record.proof.orders / (record.duration_s + written_s)
    record.plan["orders in PostgreSQL a second"] = round(rate)


async def _look_at_books(plan: Plan) -> None:
    """See before the load that they can be read; orders from before would all be findings.

    Raises RushError, BooksError, EngineError.
    """
    if not (plan.proof and plan.books.known):
        return
    url = plan.books.books_url()
    count = await count_orders(url, plan.campaign)
    await must_know(url, plan.campaign, plan.target, BOOKS_WITHIN_S)
    if plan.alone and count:
        raise RushError(
            f"campaign {plan.campaign} has {count:,} orders already, so this rush is not --alone:"
            " name a fresh campaign, or leave --alone away"
        )


async def _try_token(plan: Plan, load: Load) -> None:
    """See before the load that the engine takes our tokens. Raises RushError, AsksError."""
    with Asks(load) as asks:
        token = asks.token(0)
    async with Client(plan.target) as client:
        path = f"/api/v1/campaigns/{plan.campaign}/allowance"
        answer = await client.request(get_request(plan.target, path, token))
    if answer.status == 401:
        raise RushError(
            f"{plan.target} does not take the tokens: are they signed with this engine's key, and"
            " not expired?"
        )


async def _campaign(plan: Plan) -> dict[str, Any]:
    """The campaign as its members see it. Raises RushError and AnswerError."""
    path = f"/api/v1/campaigns/{plan.campaign}"
    try:
        async with Client(plan.target) as client:
            answer = await client.request(get_request(plan.target, path))
            if answer.status == 404 and problem_code(404, answer.body) == "not-found":
                raise RushError(f"no campaign {plan.campaign} at {plan.target}")
            found: dict[str, Any] = await read_json(client, path)
    except OSError as error:
        raise RushError(f"{plan.target}: {error.strerror or error}") from None
    if not found.get("showings"):
        raise RushError(f"{plan.target}: no engine answers there")
    return found


def only_loopback(target: str) -> str:
    """Say why a target is not of this machine alone; '' if it is. Raises OSError."""
    host, _, port = target.rpartition(":")
    try:
        every = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"{target}: {error.strerror or error}") from None
    for found in every:
        address = str(found[4][0])
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            which = "" if address == host.strip("[]") else f"{address}, "
            return f"{host} is {which}not a loopback address"
    return ""


def _load(plan: Plan, campaign: dict[str, Any], folder: Path, note: Note) -> Load:
    """Make what all processes share; mint tokens where there is no file."""
    showings = tuple(showing["id"] for showing in campaign["showings"])
    if plan.showing and plan.showing not in showings:
        raise RushError(f"campaign {plan.campaign}: no showing {plan.showing}")
    order_max = int(campaign["order_max"])
    if plan.quantity != MIXED and not 1 <= plan.quantity <= order_max:
        raise RushError(f"quantity {plan.quantity}: 1 to {order_max}, or 0 for a mixture")
    same = ("campaign", "arrivals", "rate", "seconds", "seed", "cards", "quantity")
    load = Load(
        **{name: getattr(plan, name) for name in (*same, "duplicate_share")},
        address=plan.target,
        tokens=plan.tokens or str(folder / "tokens"),
        salt=f"r{secrets.token_hex(4)}",
        showings=(plan.showing,) if plan.showing else showings,
        order_max=min(order_max, int(campaign["card_limit"])),
    )
    if plan.tokens:
        return load
    cards = plan.cards or len(load.offsets())
    try:
        settings = engine_settings(
            Path(plan.config) if plan.config else None,
            data_dir=plan.books.data_dir,
            signing_key_file=plan.signing_key_file,
        )
        key = load_or_create_signing_key(settings)
    except SettingsError as error:
        raise RushError(
            f"no tokens: {error}; or give --tokens, --signing-key-file or --data-dir"
        ) from None
    note(f"tokens of {cards:,} synthetic cards")
    write_minted(Path(load.tokens), key, first=plan.first_card, count=cards)
    return load


def _job(plan: Plan, load: Load, index: int, folder: Path) -> Job:
    def share(total: int) -> int:
        return max(total // plan.processes, 1)

    bounds = Bounds(
        connections=share(plan.connections),
        warm=share(min(plan.warm, plan.connections)),
        queue=share(plan.queue),
        timeout_s=plan.timeout_s,
        retries=plan.retries,
        give_up_s=plan.give_up_s,
        early_again=plan.at_opening,
        window=plan.arrivals == AT_ONCE,
    )
    return Job(load=load, bounds=bounds, index=index, processes=plan.processes, folder=str(folder))


async def _play(
    plan: Plan, jobs: list[Job], campaign: dict[str, Any], last_s: float, note: Note
) -> tuple[Record, list[Tally]]:
    """Start the processes and let them play; their answers lie in the folder then."""
    data_dir = Path(plan.books.data_dir) if plan.books.data_dir else None
    settings, versions, machine = await describe(data_dir)
    async with contextlib.AsyncExitStack() as stack:
        workers: list[Worker] = []
        for job in jobs:
            workers.append(Worker(job))
            stack.push_async_callback(workers[-1].stop)
        await asyncio.gather(*(worker.hear(READY_S) for worker in workers))
        start, started_at = await _start_moment(plan, campaign, note)
        sampler = None
        if metrics := plan.metrics or metrics_address(data_dir):
            generators = {worker.name: worker.pid for worker in workers}
            sampler = Sampler(
                metrics, plan.campaign, lambda: discover_processes(data_dir) | generators
            )
            await stack.enter_async_context(sampler)
        for worker in workers:
            worker.start(start)
        patience_s = last_s + plan.give_up_s + 2 * plan.timeout_s + SUM_UP_S
        within_s = max(start - time.monotonic(), 0) + patience_s
        watch = asyncio.create_task(_tell_progress(workers, note))
        stack.callback(watch.cancel)
        try:
            tallies = await _all_done(workers, within_s)
        except asyncio.CancelledError:
            if time.monotonic() < start:
                raise
            so_far = _sum(workers)
            raise Stopped(so_far.offered, so_far.answered) from None
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    record = Record(
        name=plan.name,
        campaign=plan.campaign,
        started_at=started_at.isoformat(timespec="milliseconds"),
        duration_s=0.0,
        offered=_sum(workers).offered,
        answered=_sum(workers).answered,
        plan=plan.told(),
        # perf_counter, which the sampler counts by, and monotonic are one clock on Linux.
        samples=sampler.since(start) if sampler is not None else [],
        settings=settings,
        versions=versions,
        machine=machine,
    )
    return record, tallies


async def _all_done(workers: list[Worker], within_s: float) -> list[Tally]:
    try:
        async with asyncio.TaskGroup() as group:
            done = [group.create_task(worker.done(within_s)) for worker in workers]
    except* (RushError, TimeoutError) as problems:
        first = problems.exceptions[0]
        raise RushError(str(first) or "the generators are not done in time") from None
    return [each.result() for each in done]


async def _start_moment(plan: Plan, campaign: dict[str, Any], note: Note) -> tuple[float, datetime]:
    """The moment of offset 0 on our monotonic clock, and as the clock on the wall has it."""
    if not plan.at_opening:
        now = datetime.now(UTC)
        return time.monotonic() + START_IN_S, now + timedelta(seconds=START_IN_S)
    if campaign["opens_at"] is None:
        raise RushError(f"campaign {plan.campaign} has no opening to wait for")
    opens_at = datetime.fromisoformat(campaign["opens_at"])
    looks: list[tuple[float, float]] = []
    async with Client(plan.target) as client:
        for _ in range(CLOCK_LOOKS):
            asked = time.monotonic()
            told = datetime.fromisoformat((await read_json(client, "/api/v1/time"))["now"])
            took_s = time.monotonic() - asked
            looks.append((took_s, asked + took_s / 2 + (opens_at - told).total_seconds()))
    _, moment = min(looks)  # the quickest answer tells the clock best
    left_s = moment - time.monotonic()
    if not START_IN_S <= left_s <= OPENING_MAX_S:
        raise RushError(f"campaign {plan.campaign} opens at {opens_at}: no opening to wait for")
    note(f"waiting for the opening, {left_s:.1f} s")
    return moment, opens_at


async def _tell_progress(workers: list[Worker], note: Note) -> None:
    while True:
        await asyncio.sleep(1.0)
        so_far = _sum(workers)
        if so_far.offered:
            note("offered {:,}, sent {:,}, answered {:,}".format(*so_far))


def _sum(workers: list[Worker]) -> Progress:
    """Sum the last reports of all processes."""
    each = zip(*(worker.progress for worker in workers), strict=True)
    return Progress(*map(sum, each))
