"""A whole system, started once for all tests of a process that look from outside.

``service`` is the real ``sale up`` with two API workers on servers of its own. Each test makes
campaigns of its own in it, so tests do not meet. At the end the whole of it must pass the audit.
"""

import asyncio
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiohttp
import asyncpg
import pytest
import redis.asyncio
import structlog
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from loadtest.members import member_of
from sale.cli.main import sale as root_command
from sale.cli.runtime import main_entry
from sale.config import Settings
from sale.domain.clock import LOCAL_ZONE
from sale.host import embedded
from sale.identity import Member, SigningKey, issue_member_token, load_or_create_signing_key
from sale.stock.keys import campaign_keys

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
CARDS = 3_000
READY_LIMIT_S = 60
STOP_LIMIT_S = 30
PAST = "2020-01-01T00:00:00+08:00"
ORDERS = "/api/v1/orders"
CAMPAIGNS = "/api/v1/campaigns"
ADMIN = "/api/v1/admin/campaigns"


class Ran(NamedTuple):
    """How a command went: exit status, and what it wrote."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """The one JSON value on stdout; fails where there is anything else."""
        return json.loads(self.out)


class Seen(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Code of a problem document; '' where it is none."""
        if self.headers["Content-Type"] != "application/problem+json":
            return ""
        return str(self.json()["code"])


class Card(NamedTuple):
    """A card of the roster, with a token."""

    no: str
    union: str
    token: str

    @property
    def member(self) -> int:
        """Number of its member."""
        return int(member_of(self.token))


def command(*arguments: object, data_dir: Path | None = None) -> Ran:
    """Run ``sale`` in this process, as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    if data_dir is not None:
        words = ["--data-dir", str(data_dir), *words]
    kept = structlog.get_config()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main_entry(root_command, words)
            except SystemExit as end:  # as at the console: sys.exit from a command
                status = int(end.code or 0)
    finally:
        structlog.configure(**kept)
    return Ran(status, out.getvalue(), err.getvalue())


@dataclasses.dataclass
class Service:
    """The running system."""

    url: str
    data_dir: Path
    log_file: Path
    process: "subprocess.Popen[str]"
    redis_url: str
    database_url: str
    key: SigningKey
    admin_token: str = ""

    def __post_init__(self) -> None:
        self._ids = itertools.count(1)
        self._names = itertools.count(1)
        self._cards: Iterator[Card] = iter(())

    def sale(self, *arguments: object) -> Ran:
        """Run a command beside the system."""
        return command(*arguments, data_dir=self.data_dir)

    def run(
        self, *words: object, given: bytes = b"", cwd: Path = ROOT, **environment: str
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a command in a process of its own."""
        return subprocess.run(
            [sys.executable, "-m", "sale", *map(str, words)],
            env=self.environment(**environment),
            cwd=cwd,
            input=given,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def environment(self, **more: str) -> dict[str, str]:
        """Give the environment of such a process."""
        own = {"PYTHONPATH": str(ROOT), "SALE_DATA_DIR": str(self.data_dir)}
        return {**os.environ, **own, **more}

    async def asale(self, *arguments: object) -> Ran:
        """Like ``sale``, from a coroutine."""
        return await asyncio.to_thread(self.sale, *arguments)

    def told(self) -> dict[str, Any]:
        """Give what the supervisor tells of itself: addresses, and process numbers by name."""
        told: dict[str, Any] = json.loads(
            (self.data_dir / "run" / "processes.json").read_text("utf-8")
        )
        return told

    def new_id(self, prefix: str = "c") -> str:
        """Give a campaign ID that no other test has."""
        return f"{prefix}-{next(self._ids)}-{random.randrange(16**6):06x}"

    def card(self) -> Card:
        """Give an active card that no other test has had."""
        return next(self._cards)

    def cards(self, count: int) -> list[Card]:
        """Give several of them."""
        return [self.card() for _ in range(count)]

    def take_roster(self) -> None:
        """Import a sample, and deal its active cards from now on."""
        file = self.data_dir / "roster.csv"
        assert self.sale("cards", "sample", CARDS, "--out", file).status == 0
        assert self.sale("cards", "import", file).status == 0
        self._cards = iter(self.members())

    def members(self, status: str = "active") -> list[Card]:
        """Give all cards of a status, with tokens."""
        file = self.data_dir / f"{status}.jsonl"
        done = self.sale("tokens", "--cards", CARDS, "--status", status, "--out", file)
        assert done.status == 0, done
        rows = map(json.loads, file.read_text("utf-8").splitlines())
        return [Card(row["card_no"], row["union"], row["token"]) for row in rows]

    def token(self, member: int, union: str = "district", generation: int = 0, **times: int) -> str:
        """Make a member's token, by default one that is good for an hour from now."""
        times = {"now_s": int(time.time()), "ttl_s": 3_600, **times}
        return issue_member_token(self.key, Member(member, union, generation), **times)

    def operator(self, role: str, union: str | None = None) -> tuple[str, str]:
        """Make an account; give its name and its token."""
        name = f"{role}-{next(self._names)}"
        for_union = () if union is None else ("--union", union)
        added = self.sale("operator", "add", name, "--role", role, *for_union)
        assert added.status == 0, added
        return name, str(self.sale("operator", "token", name, "--json").json()["token"])

    @contextlib.contextmanager
    def stopped(self, part: str) -> Iterator[None]:
        """Freeze one process of the system while the block runs."""
        pid = self.told()["processes"][part]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    async def purchases_by_worker(self, campaign: str) -> list[float]:
        """Give how many purchases of a campaign each API process has answered."""
        texts = [
            await read_metrics(path) for path in sorted((self.data_dir / "run").glob("m-serve-*"))
        ]
        assert len(texts) == WORKERS
        return [metric(text, "sale_purchases_total", campaign) for text in texts]

    async def metrics(self) -> str:
        """Give the metrics of all processes together."""
        return await read_metrics(self.told()["metrics_listen"])

    @contextlib.asynccontextmanager
    async def redis(self) -> AsyncIterator["redis.asyncio.Redis"]:
        """Give a client of the system's Redis."""
        async with redis.asyncio.from_url(self.redis_url) as client:
            yield client

    @contextlib.asynccontextmanager
    async def database(self) -> AsyncIterator[Any]:
        """Give a connection to the system's PostgreSQL."""
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()


class Described:
    """The API as it describes itself."""

    UNDESCRIBED = frozenset({405})
    HEADERS = frozenset(
        {
            *("ETag", "Idempotency-Replayed", "Location", "RateLimit", "RateLimit-Policy"),
            *("Retry-After", "WWW-Authenticate", "X-Request-Id"),
        }
    )
    """Those that a client acts on: an answer carries none that is not described."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._paths = [
            (re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), methods)
            for path, methods in document["paths"].items()
        ]
        self._components = document["components"]

    @classmethod
    @functools.cache
    def of(cls, url: str) -> "Described":
        """Read the description of a running system."""
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=10) as answer:
            return cls(json.load(answer))

    def check(self, method: str, path: str, seen: Seen) -> None:
        """Fail where an answer is not as described. Other paths than the API's pass."""
        called = [
            methods[method.lower()]
            for pattern, methods in self._paths
            if pattern.fullmatch(path.partition("?")[0]) and method.lower() in methods
        ]
        if not called or seen.status in self.UNDESCRIBED:
            return
        response = called[0]["responses"].get(str(seen.status))
        assert response is not None, f"{method} {path} does not describe its {seen}"
        told = self.HEADERS.intersection(seen.headers)
        assert told <= set(response.get("headers", ())), f"{method} {path}: {told} in its {seen}"
        if "content" not in response:
            assert not seen.body, seen
            return
        kind = seen.headers["Content-Type"].partition(";")[0]
        schema = {**response["content"][kind]["schema"], "components": self._components}
        Draft202012Validator(schema).validate(seen.json())


class Client:
    """Talks HTTP to the system; ``spread`` opens a connection a request, over all workers."""

    def __init__(self, service: Service, *, spread: bool = False) -> None:
        self.service = service
        connector = aiohttp.TCPConnector(limit=0, force_close=spread)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=20)
        )
        self._described = Described.of(service.url)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def ask(self, method: str, path: str, token: str | None = None, **options: Any) -> Seen:
        """Send one request as it is given; its answer must be as ``/openapi.json`` describes it."""
        headers = dict(options.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        url = self.service.url + path
        async with self._session.request(method, url, headers=headers, **options) as answer:
            seen = Seen(answer.status, answer.headers, await answer.read())
        self._described.check(method, path, seen)
        return seen

    async def get(self, path: str, token: str | None = None, **options: Any) -> Seen:
        return await self.ask("GET", path, token, **options)

    async def buy(
        self,
        campaign: str,
        token: str | None,
        quantity: Any = 1,
        *,
        key: str | None = None,
        **fields: Any,
    ) -> Seen:
        """Buy, under a new key where none is given."""
        return await self.ask(
            "POST",
            f"{CAMPAIGNS}/{campaign}/orders",
            token,
            json={"quantity": quantity, **fields},
            headers={"Idempotency-Key": key or new_key()},
        )

    async def step(
        self, campaign: str, action: str, reason: str | None = "a test", **fields: Any
    ) -> Seen:
        """Take an operator's step as the administrator."""
        told = {} if reason is None else {"reason": reason}
        return await self.ask(
            "POST", f"{ADMIN}/{campaign}/{action}", self.service.admin_token, json=told | fields
        )

    async def campaign(self, tickets: int = 100, **changes: Any) -> str:
        """Make a campaign that sells, unless ``changes`` say otherwise; give its ID."""
        table = campaign_table(self.service.new_id(), tickets, **changes)
        made = await self.ask("POST", ADMIN, self.service.admin_token, json=table)
        assert made.status == 201, made
        return str(table["id"])

    async def pages(self, path: str, token: str | None = None) -> list[list[dict[str, Any]]]:
        """Give the items of each page of a list; ``path`` has a query."""
        pages, cursor = [], ""
        while True:
            seen = await self.get(path + cursor, token)
            assert seen.status == 200, seen
            page = seen.json()
            pages.append(page["items"])
            if page["next"] is None:
                return pages
            assert len(pages) < 1_000, "no end"
            cursor = f"&cursor={page['next']}"

    async def all_applied(self, campaign: str) -> bool:
        """Tell whether PostgreSQL has all of a campaign's events."""
        live = (await self.get(f"{ADMIN}/{campaign}/live", self.service.admin_token)).json()
        return bool(live["ledger_applied"] == live["ledger_seq"])

    async def remaining(self, campaign: str) -> list[int]:
        """Give what is left of each showing at this moment."""
        live = await self.get(f"{ADMIN}/{campaign}/live", self.service.admin_token)
        assert live.status == 200, live
        return [showing["remaining"] for showing in live.json()["showings"]]


def campaign_table(identifier: str, tickets: int = 100, **changes: Any) -> dict[str, Any]:
    """Give a campaign's fields: open, three tickets a card; None in ``changes`` leaves one out."""
    table = {
        "id": identifier,
        "title": "五元看大片",
        "category": "culture",
        "price_fen": 500,
        "payment": "counter",
        "card_limit": 3,
        "opens_at": PAST,
        "unions": ["*"],
        "owner": "district",
        "showings": [{"id": "general", "title": "通用券", "tickets": tickets}],
    }
    return {field: value for field, value in (table | changes).items() if value is not None}


def showings(*tickets: int) -> list[dict[str, Any]]:
    """Give showings a, b, c … with these tickets."""
    return [
        {"id": "abcdefgh"[number], "title": f"第{number + 1}场", "tickets": count}
        for number, count in enumerate(tickets)
    ]


def new_key() -> str:
    """Give an idempotency key that nobody has used."""
    return f"k{random.randrange(16**24):024x}"


def in_s(seconds: float) -> str:
    """Give the moment so many seconds from now, RFC 3339."""
    return (datetime.now(LOCAL_ZONE) + timedelta(seconds=seconds)).isoformat()


async def end_holds(service: Service, campaign: str) -> None:
    """Let the campaign's clock stand at the end of every hold that there is now."""
    keys = campaign_keys(campaign)
    async with service.redis() as redis:
        ((_, ends_ms),) = await redis.zrange(keys.holds, -1, -1, withscores=True)
        await redis.hset(keys.head, "clock", str(int(ends_ms)))


def metric(text: str, name: str, *labels: str) -> float:
    """Sum the samples of a name that have these label values."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if re.match(rf"{name}(\{{|\s)", line) and all(f'="{label}"' in line for label in labels)
    )


async def read_metrics(place: str | Path) -> str:
    """Read the metrics at an address, or at a socket."""
    connector = aiohttp.UnixConnector(str(place)) if isinstance(place, Path) else None
    address = "part" if connector else place
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://{address}/metrics") as answer,
    ):
        assert (answer.status, answer.content_type) == (200, "text/plain")
        return await answer.text()


def free_port() -> int:
    """Give a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_service(
    data_dir: Path, *, killed: bool = False, **environment: str
) -> Iterator[Service]:
    """Run ``sale up`` on a data directory until the block ends; it must end cleanly.

    With ``killed`` the block must have killed it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    log_file = data_dir.with_name("up.log")
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "sale", "up", "--data-dir", str(data_dir)),
                *("--listen", "127.0.0.1:0", "--metrics-listen", f"127.0.0.1:{free_port()}"),
                *("--workers", str(WORKERS)),
            ],
            env={**os.environ, **environment},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    with process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            assert ready.startswith("ready http://"), log_file.read_text("utf-8")[-3_000:]
            endpoints = embedded.find(data_dir)
            assert endpoints is not None
            assert endpoints.redis_url is not None
            assert endpoints.database_url is not None
            yield Service(
                url=ready.split()[1],
                data_dir=data_dir,
                log_file=log_file,
                process=process,
                redis_url=endpoints.redis_url,
                database_url=endpoints.database_url,
                key=load_or_create_signing_key(Settings(data_dir=data_dir)),
            )
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert status == (-signal.SIGKILL if killed else 0), log_file.read_text("utf-8")[-3_000:]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The system, with a roster and an administrator; its books are audited at the end."""
    data_dir = tmp_path_factory.mktemp("service") / "data"
    with running_service(data_dir, SALE_TEST_PROVIDER="1") as service:
        service.admin_token = service.operator("admin")[1]
        service.take_roster()
        yield service
        audit = service.sale("audit", "--json")
        assert audit.status == 0, audit
        assert audit.json()["clean"]


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    async with Client(service) as client:
        yield client


@pytest.fixture
async def spread(service: Service) -> AsyncIterator[Client]:
    """A client whose requests spread over all workers, each on a new connection."""
    async with Client(service, spread=True) as client:
        yield client
