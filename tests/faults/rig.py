"""The whole engine as real processes, which a test can kill, stop, cut off or restore.

The servers are the embedded ones, and the parts run by their real command lines as under the
supervisor. But nothing restarts a dead process, so that the test decides when it returns. All
children end with this process, for whatever reason it ends.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import asyncpg
import redis.asyncio
from answer_book import AnswerBook
from load import Load, Phone
from machine import SERVERS, START_LIMIT_S, Machine
from service import ADMIN, Ran, campaign_table, command

from loadtest.books import ledger
from loadtest.books.answers import Answer
from loadtest.books.check import check
from loadtest.members import Member, read_members
from sale.config import Settings
from sale.db import claims
from sale.domain.order import parse_order_number
from sale.host.embedded import EmbeddedServers, running
from sale.identity import load_or_create_signing_key
from sale.stock.keys import CAMPAIGNS, campaign_keys

CARDS: Final = 2_000
PROBES_MAX: Final = 8
PROBE_EVERY_S: Final = 0.05
PROBE_MEMBERS: Final = 200
"""The last members of the roster only probe; loads do not use them."""


@contextlib.asynccontextmanager
async def rig_up(
    path: Path,
    *,
    workers: int = 2,
    writers: int = 1,
    schedulers: int = 1,
    proxied: Collection[tuple[str, str]] = (),
    settings: Mapping[str, str] = {},
    cards: int = CARDS,
) -> AsyncIterator["Rig"]:
    """Run the system on a data directory below ``path``, which is removed afterwards.

    ``proxied`` names links as (part, server): ``("serve-1", "redis")``; ``("*", "redis")`` means
    the links of all parts. ``settings`` are ``SALE_…`` variables of every part.
    """
    parts = [
        *(f"serve-{number + 1}" for number in range(workers)),
        *(f"writer-{number + 1}" for number in range(writers)),
        *(f"scheduler-{number + 1}" for number in range(schedulers)),
    ]
    links = [
        (part, server)
        for part in parts
        for server in SERVERS
        if (part, server) in proxied or ("*", server) in proxied
    ]
    async with (
        running(path / "d", redis=True, postgres=True) as servers,
        contextlib.AsyncExitStack() as stack,
    ):
        rig = Rig(path / "d", servers, parts, settings, cards)
        stack.push_async_callback(rig._end)
        await rig._migrate_and_enroll()
        for link in links:
            rig._links[link] = await stack.enter_async_context(rig._proxy(*link))
        await asyncio.gather(*(rig.start(part) for part in parts))
        yield rig


class Rig(Machine):
    """The running system, its members and operators, and the check of all answers."""

    def __init__(
        self,
        data_dir: Path,
        servers: EmbeddedServers,
        parts: list[str],
        settings: Mapping[str, str],
        cards: int,
    ) -> None:
        super().__init__(data_dir, servers, parts, settings)
        self.admin_token = ""
        self.members: list[tuple[str, str]] = []
        self.card_numbers: dict[str, str] = {}
        """Card number and token of each active member."""
        self.campaigns: list[str] = []
        """Campaigns that ``settle`` waits for."""
        self._crowd: list[Member] = []
        self._cards = cards
        self._probe = 0
        self._made = 0
        self._books: dict[str, AnswerBook] = {}
        self._loads: list[Load] = []
        self._words = asyncio.Lock()

    # Members and operators

    async def sale(self, *words: object) -> Ran:
        """Run a ``sale`` command, one at a time."""
        async with self._words:
            return await asyncio.to_thread(command, *words, data_dir=self.data_dir)

    async def campaign(self, tickets: int = 1_000, card_limit: int = 3, **fields: Any) -> str:
        """Create and open a campaign; give its ID."""
        self._made += 1
        table = campaign_table(f"rig-{self._made}", tickets, card_limit=card_limit, **fields)
        status, told = await self.admin("POST", "", table)
        assert status == 201, told
        self.campaigns.append(table["id"])
        return str(table["id"])

    async def admin(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Call the operators' API of campaigns; give status and JSON. Raises OSError."""
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        timeout = aiohttp.ClientTimeout(total=10)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.request(method, f"http://{self.address}{ADMIN}{path}", json=body) as answer,
        ):
            return answer.status, await answer.json(content_type=None)

    def book(self, campaign: str) -> AnswerBook:
        """The book of every answer in a campaign."""
        return self._books.setdefault(campaign, AnswerBook())

    async def rush(
        self,
        campaign: str,
        seconds: float = 3_600.0,
        rate: float = 150.0,
        *,
        seed: int = 2015,
        **options: Any,
    ) -> Load:
        """Start a ``Load`` in the background; end it by ``await load.finish()``."""
        load = Load(
            self.address,
            campaign,
            self._crowd[:-PROBE_MEMBERS],
            self.book(campaign),
            seconds=seconds,
            rate=rate,
            seed=seed,
            **options,
        )
        self._loads.append(load)
        return load

    def phone(self, campaign: str, **options: Any) -> Phone:
        """Give the phone of the next member, for single purchases."""
        self._probe = (self._probe + 1) % PROBE_MEMBERS
        member = self._crowd[-1 - self._probe]
        return Phone(self.address, campaign, member, self.book(campaign), self.pid, **options)

    async def selling(self, campaign: str, within_s: float) -> float:
        """Try until a purchase succeeds; give the seconds. Raises AssertionError after the limit.

        A campaign that is sold out counts as a failure at once.
        """
        started = time.monotonic()
        asked: set[asyncio.Task[Any]] = set()
        try:
            while True:
                for task in [task for task in asked if task.done()]:
                    asked.discard(task)
                    if task.result().status == 201:
                        return time.monotonic() - started
                    assert b'"sold-out"' not in task.result().body, f"{campaign} is sold out"
                    last = task.result()
                    assert time.monotonic() - started < within_s, (
                        f"{campaign} does not sell after {within_s} s: {last.status or last.why} "
                        f"{last.body[:300]!r}"
                    )
                assert time.monotonic() - started < within_s + 5, f"{campaign}: nobody answers"
                if len(asked) < PROBES_MAX:
                    asked.add(asyncio.create_task(self.phone(campaign, timeout_s=1.0).buy()))
                await asyncio.sleep(PROBE_EVERY_S)
        finally:
            # Each ends within its own time limit, and its answer must be in the book.
            await asyncio.gather(*asked, return_exceptions=True)

    # Recovery and checks

    async def settle(self, within_s: float = 30.0) -> None:
        """Heal, continue and start all; wait until every campaign is verified and applied."""
        for proxy in self._links.values():
            proxy.heal()
        for name in self.names:
            self.cont(name)
        deadline = time.monotonic() + within_s
        async with asyncio.timeout(within_s + START_LIMIT_S):
            await self.start_all()
            while why := await self._unsettled():
                assert time.monotonic() < deadline, f"not settled after {within_s} s: {why}"
                await asyncio.sleep(0.05)
                await self.start_all()

    async def _unsettled(self) -> str:
        """Say what is not settled yet, or ''."""
        for name in self.names:
            if not self.alive(name):
                return f"{name} is down: {self.log(name)[-500:]}"
        try:
            async with self.redis() as client, self.database() as connection:
                run_id = (await client.info("server"))["run_id"]
                for campaign in self.campaigns:
                    fields = ("seq", "recovering", "run_id")
                    head = await client.hmget(campaign_keys(campaign).head, fields)
                    seq, recovering, verified = ((value or b"").decode() for value in head)
                    applied = await connection.fetchval(
                        "SELECT applied FROM campaign WHERE campaign_id = $1", campaign
                    )
                    if recovering:
                        return f"{campaign} is recovering: {recovering}"
                    if verified != run_id:
                        return f"{campaign} is not verified"
                    if seq != str(applied):
                        return f"{campaign}: Redis is at {seq}, PostgreSQL at {applied}"
        except (OSError, TimeoutError, redis.exceptions.RedisError, asyncpg.PostgresError) as error:
            return repr(error)
        return ""

    async def verdict(
        self,
        *campaigns: str | Load,
        voided: Collection[int] = (),
        within_s: float = 20.0,
        alone: bool = True,
    ) -> list[str]:
        """Check all answers against PostgreSQL, and both stores against each other.

        Gives one line per fault. ``voided`` are event numbers whose orders may be lost, because
        the recovery listed them. Without ``campaigns``, checks every campaign with an answer.
        """
        ids = {each.campaign if isinstance(each, Load) else each for each in campaigns}
        wrong = []
        for campaign in sorted(ids or self._books):
            told = [answer for answer in self.book(campaign) if told_number(answer) not in voided]
            try:
                seq = ledger.highest(told)
                await ledger.wait_applied(self.database_url, campaign, seq, within_s=within_s)
                written = await ledger.load_books(self.database_url, campaign)
            except ledger.BooksError as error:
                wrong.append(f"{campaign}: {error}")
                continue
            found = check(told, written, alone=alone)
            wrong += [f"{campaign}: {one.kind}: {one.what}" for one in found]
            ran = await self.sale("audit", campaign, "--json")
            if ran.status != 0:
                wrong.append(f"{campaign}: audit: {(ran.out + ran.err).strip()[:2_000]}")
        return wrong

    # Direct access to the stores

    @contextlib.asynccontextmanager
    async def redis(self) -> AsyncIterator[Any]:
        """A client connected to Redis without a proxy."""
        async with redis.asyncio.from_url(
            self.redis_url, socket_timeout=5, socket_connect_timeout=2
        ) as client:
            yield client

    @contextlib.asynccontextmanager
    async def database(self) -> AsyncIterator[Any]:
        """A connection to PostgreSQL without a proxy."""
        connection = await asyncpg.connect(self.database_url, timeout=5, command_timeout=10)
        try:
            yield connection
        finally:
            await connection.close(timeout=5)

    async def sold(self, campaign: str) -> int:
        """Give the number of the campaign's last event in Redis."""
        async with self.redis() as client:
            return int(await client.hget(campaign_keys(campaign).head, "seq") or 0)

    async def written(self, campaign: str) -> int:
        """Give the number of the campaign's last event in PostgreSQL."""
        async with self.database() as connection:
            return (
                await connection.fetchval(
                    "SELECT applied FROM campaign WHERE campaign_id = $1", campaign
                )
                or 0
            )

    async def voided(self, campaign: str) -> set[int]:
        """Give the event numbers that a recovery has voided."""
        async with self.database() as connection:
            ranges = await claims.voided(connection, campaign)
        return {number for first, last in ranges for number in range(first, last + 1)}

    async def known(self) -> list[str]:
        """Give the campaigns that Redis knows."""
        async with self.redis() as client:
            return sorted(each.decode() for each in await client.smembers(CAMPAIGNS))

    # Internal

    async def _migrate_and_enroll(self) -> None:
        load_or_create_signing_key(Settings(data_dir=self.data_dir), create=True)
        for words in (
            ("migrate",),
            ("cards", "sample", self._cards, "--out", self.data_dir / "roster.csv"),
            ("cards", "import", self.data_dir / "roster.csv"),
            ("tokens", "--cards", self._cards, "--out", self.data_dir / "tokens.jsonl"),
            ("operator", "add", "rig", "--role", "admin"),
        ):
            ran = await self.sale(*words)
            assert ran.status == 0, (words, ran)
        self.admin_token = (await self.sale("operator", "token", "rig", "--json")).json()["token"]
        self._crowd = read_members(self.data_dir / "tokens.jsonl")
        self.members = [(member.member_no, member.token) for member in self._crowd]
        lines = (self.data_dir / "tokens.jsonl").read_text("utf-8").splitlines()
        numbers = [json.loads(line)["card_no"] for line in lines]
        self.card_numbers = dict(zip((no for no, _ in self.members), numbers, strict=True))

    async def _end(self) -> None:
        for load in self._loads:
            await load.stop()
        for name in self.names:
            self.cont(name)
        for part in self.parts:
            if self.alive(part):
                self.kill(part)
        await asyncio.gather(*(self.ended(part) for part in self.parts))


def told_number(answer: Answer) -> int:
    """Event number of the order in an answer; 0 for none."""
    number = parse_order_number(answer.order_no) if answer.sold else None
    return number[1] if number else 0
