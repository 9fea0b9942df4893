"""The first page in a real browser, against the real routes and a stub of the API."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from page_app import with_pages

from sale.domain.clock import LOCAL_ZONE

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER_LIMIT_S = 40
BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = pytest.mark.browser


class StubApi:
    """Answers the page's requests from plain data; ``away`` answers 503 to everything."""

    def __init__(self) -> None:
        self.campaigns: list[dict[str, Any]] = []
        self.remaining: dict[str, int] = {}
        self.away = False
        self.answers_left: int | None = None  # availability answers before it goes away
        self.asked: list[str] = []
        self.availability_asked = asyncio.Event()

    def add(self, identifier: str, state: str, remaining: int = 100, **fields: Any) -> None:
        campaign = {
            "id": identifier,
            "title": identifier,
            "category": "culture",
            "price_fen": 500,
            "payment": "counter",
            "card_limit": 3,
            "order_max": 3,
            "state": state,
            "opens_at": None,
            "closes_at": None,
            "unions": ["*"],
            "owner": "district",
            "showings": [{"id": "general", "title": "通用券", "starts_at": None, "tickets": 1000}],
        }
        self.campaigns.append(campaign | fields)
        for showing in self.campaigns[-1]["showings"]:
            self.remaining.setdefault(f"{identifier}/{showing['id']}", remaining)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._maybe_away])
        with_pages(app)
        app.router.add_get("/api/v1/time", self._time)
        app.router.add_get("/api/v1/campaigns", self._campaigns)
        app.router.add_get("/api/v1/campaigns/{id}/availability", self._availability)
        return app

    @web.middleware
    async def _maybe_away(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(request.path)
        if self.away and request.path.startswith("/api"):
            return web.json_response({}, status=503)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _time(self, request: web.Request) -> web.Response:
        return web.json_response({"now": now().isoformat(timespec="milliseconds")})

    async def _campaigns(self, request: web.Request) -> web.Response:
        return web.json_response({"items": self.campaigns, "next": None})

    async def _availability(self, request: web.Request) -> web.Response:
        self.availability_asked.set()
        if self.answers_left is not None:
            self.answers_left -= 1
            self.away = self.answers_left <= 0
        identifier = request.match_info["id"]
        campaign = next(c for c in self.campaigns if c["id"] == identifier)
        if any(f"{identifier}/{s['id']}" not in self.remaining for s in campaign["showings"]):
            return web.json_response({}, status=503, headers={"Retry-After": "1"})
        showings = [
            {
                "id": showing["id"],
                "tickets": showing["tickets"],
                "remaining": self.remaining[f"{identifier}/{showing['id']}"],
            }
            for showing in campaign["showings"]
        ]
        return web.json_response({"showings": showings, "as_of": now().isoformat()})


def now() -> datetime:
    return datetime.now(LOCAL_ZONE)


def from_now(**delta: float) -> str:
    return (now() + timedelta(**delta)).isoformat(timespec="milliseconds")


@pytest.fixture
async def stub() -> StubApi:
    return StubApi()


@pytest.fixture
async def server(stub: StubApi) -> AsyncIterator[TestServer]:
    running = TestServer(stub.app())
    async with running:
        yield running


async def dom(url: object, profile: Path, virtual_ms: int = 2_500) -> str:
    """The page's markup after ``virtual_ms`` of its own time, errors of its script included."""
    if BROWSER is None:
        pytest.fail("chromium is missing: install it (on Debian: apt-get install chromium)")
    process = await asyncio.create_subprocess_exec(
        BROWSER,
        *BROWSER_FLAGS,
        f"--user-data-dir={profile}",
        f"--virtual-time-budget={virtual_ms}",
        "--enable-logging=stderr",
        "--dump-dom",
        str(url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, log = await asyncio.wait_for(process.communicate(), BROWSER_LIMIT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    complaints = [line for line in log.decode(errors="replace").splitlines() if "CONSOLE" in line]
    # A refused request is logged by the browser itself; anything else is our page's fault.
    faults = [line for line in complaints if "Failed to load resource" not in line]
    assert not faults, faults
    return out.decode()


def card(markup: str, identifier: str) -> str:
    """The text of one campaign's card; parts that are hidden are left out."""
    found = re.search(rf'<article[^>]*data-id="{identifier}".*?</article>', markup, re.DOTALL)
    assert found, f"no card of {identifier}"
    shown = re.sub(r'<(\w+)[^>]*\shidden=""[^>]*>.*?</\1>', "", found[0], flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown)).strip()


async def test_page_shows_each_state_in_words(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    stub.add("film", "open", remaining=640, closes_at="2035-05-20T17:00:00+08:00")
    stub.add("few", "open", remaining=1, price_fen=0)
    stub.add("gone", "open", remaining=0)
    stub.add("later", "scheduled", opens_at=from_now(hours=2), unions=["dongsi"])
    stub.add("pause", "paused")
    stub.add("repair", "recovering")
    stub.add("ended", "closed")
    stub.add("secret", "draft")

    markup = await dom(server.make_url("/"), tmp_path)

    assert "正在抢票" in card(markup, "film")
    assert "剩余 640 / 1,000 张" in card(markup, "film")
    assert "5 元/张" in card(markup, "film")
    assert "2035年5月20日 17:00 截止" in card(markup, "film")
    assert "免费 每卡限 3 张" in card(markup, "few")
    assert "仅剩 1 张" in card(markup, "few")
    assert "已售完" in card(markup, "gone")
    assert re.search(r"即将开抢.*限指定工会会员.*距开抢还有 01:59:\d\d", card(markup, "later"))
    assert "暂停售票" in card(markup, "pause")
    assert "暂停（系统检修中）" in card(markup, "repair")
    assert "已结束" in card(markup, "ended")
    assert "secret" not in markup


async def test_page_folds_and_counts_thirty_showings(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    classes = [
        {"id": f"class-{n}", "title": f"第{n}班", "starts_at": None, "tickets": 33}
        for n in range(30)
    ]
    stub.remaining["interest/class-7"] = 0
    stub.add("interest", "open", remaining=33, showings=classes)

    markup = await dom(server.make_url("/"), tmp_path)

    text = card(markup, "interest")
    assert "30 个场次/班级，29 个有票" in text
    assert "第7班 已满" in text
    assert "第8班 余 33" in text
    assert not re.search(r"<details[^>]*open", markup)


async def test_page_without_campaigns_says_so(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    markup = await dom(server.make_url("/"), tmp_path)

    assert re.search(r'<section id="empty" class="empty">', markup)
    assert re.search(r'<p id="trouble"[^>]*hidden', markup)


async def test_page_backs_off_while_the_server_is_away(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    stub.away = True

    markup = await dom(server.make_url("/"), tmp_path, virtual_ms=10_000)

    trouble = re.search(r'<p id="trouble"[^>]*>', markup)
    assert trouble
    assert "hidden" not in trouble[0]
    assert "正在重新连接" in markup
    assert 2 <= sum(path.startswith("/api") for path in stub.asked) <= 6


async def test_page_hides_old_figures_when_the_server_goes_away(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    stub.add("film", "open", remaining=640)
    stub.answers_left = 2

    markup = await dom(server.make_url("/"), tmp_path, virtual_ms=15_000)

    trouble = re.search(r'<p id="trouble"[^>]*>', markup)
    assert trouble
    assert "hidden" not in trouble[0]
    assert "640" not in card(markup, "film")


async def test_page_shows_others_if_a_campaign_cannot_be_read(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    stub.add("film", "open", remaining=5)
    stub.add("repair", "recovering")
    del stub.remaining["repair/general"]  # answered 503 below

    markup = await dom(server.make_url("/"), tmp_path)

    assert "仅剩 5" in card(markup, "film")
    assert "剩余" not in card(markup, "repair")
    assert re.search(r'<p id="trouble"[^>]*hidden', markup)


async def test_page_shows_markup_in_a_title_as_text(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    stub.add("film", "open", title="<img src=x onerror=alert(1)>")

    markup = await dom(server.make_url("/"), tmp_path)

    assert "&lt;img src=x onerror=alert(1)&gt;" in markup


async def test_page_changes_when_its_countdown_ends(
    stub: StubApi, server: TestServer, tmp_path: Path
) -> None:
    stub.add("film", "scheduled", opens_at=from_now(seconds=1))

    markup, _ = await asyncio.gather(
        dom(server.make_url("/"), tmp_path, virtual_ms=12_000), _open_when_watched(stub)
    )

    assert "正在抢票" in card(markup, "film")
    assert "film：已经开抢" in markup


async def _open_when_watched(stub: StubApi) -> None:
    async with asyncio.timeout(BROWSER_LIMIT_S):
        await stub.availability_asked.wait()
    stub.campaigns[0]["state"] = "open"
