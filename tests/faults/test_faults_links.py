"""Bytes between two processes are lost, late, cut in half or held."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from proxy import Direction, Proxy
from rig import Rig
from waiting import until

from loadtest.wire import Response
from sale.stock.scripts import APPLIED, PURCHASE

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

RIG = {"workers": 2, "proxied": [("*", "redis"), ("*", "postgres")]}
WAIT_S = 5.0


@pytest.mark.parametrize("gone", ["serve-1", "redis"])
async def test_retry_finds_the_order_after_a_lost_answer(rig: Rig, gone: str) -> None:
    campaign = await rig.campaign(tickets=5)
    phone, link = rig.phone(campaign), rig.link("serve-1", "redis")
    attempt = phone.attempt(2)
    # Another member buys first, so that the next call on this link is the script.
    assert (await rig.phone(campaign).buy(of="serve-1")).status == 201
    sold_before = await rig.sold(campaign)

    link.trap(PURCHASE.sha.encode(), holding="down")
    first = asyncio.create_task(phone.ask(attempt, of="serve-1"))
    await asyncio.wait_for(link.sprung.wait(), WAIT_S)
    await until(lambda: has_sold(rig, campaign, sold_before + 1))
    rig.kill(gone)
    link.drop()
    link.heal()
    if gone == "redis":
        await rig.start("redis")
    answers = [await first]
    if gone == "serve-1":
        assert answers[0].status == 0
    answers += [await certain(lambda: phone.ask(attempt, of="serve-2")) for _ in range(2)]

    told = [phone.read(attempt, answer) for answer in answers if answer.status == 201]
    assert len(told) >= 2
    assert {answer.order_no for answer in told} == {told[0].order_no}
    assert all(answer.replayed for answer in told[-2:])
    await rig.settle()
    assert await rig.sold(campaign) >= sold_before + 1
    assert await rig.verdict(campaign) == []
    assert await remaining(rig, campaign) == 5 - 1 - 2


async def test_retry_elsewhere_and_late_answer_are_one_order(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=5)
    phone, link = rig.phone(campaign), rig.link("serve-1", "redis")
    attempt = phone.attempt(3)
    assert (await rig.phone(campaign).buy(of="serve-1")).status == 201

    link.trap(PURCHASE.sha.encode(), holding="down")
    first = asyncio.create_task(phone.ask(attempt, of="serve-1"))
    await asyncio.wait_for(link.sprung.wait(), WAIT_S)
    second = await certain(lambda: phone.ask(attempt, of="serve-2"))
    link.release()
    answers = [phone.read(attempt, await first), phone.read(attempt, second)]

    assert [answer.status for answer in answers] == [201, 201]
    assert answers[0].order_no == answers[1].order_no
    await rig.settle()
    assert await rig.verdict(campaign) == []


async def test_delayed_request_after_its_retry_sells_nothing(rig: Rig) -> None:
    """A delayed first attempt cannot sell after its retry was answered with a refusal."""
    campaign = await rig.campaign(tickets=2, card_limit=2)
    phone, link = rig.phone(campaign, timeout_s=20.0), rig.link("serve-1", "redis")
    assert (await rig.phone(campaign).buy(of="serve-1")).status == 201

    link.trap(PURCHASE.sha.encode(), holding="up")
    first = asyncio.create_task(phone.ask(phone.attempt(1), of="serve-1"))
    await asyncio.wait_for(link.sprung.wait(), WAIT_S)
    other = rig.phone(campaign)
    assert (await other.buy(1, of="serve-2")).status == 201
    assert (await rig.phone(campaign).buy(1, of="serve-2")).status == 409
    link.release()
    assert (await first).status in {409, 503}
    await rig.settle()
    assert await rig.verdict(campaign) == []
    assert await remaining(rig, campaign) == 0


@pytest.mark.parametrize("part", ["serve-1", "writer-1", "scheduler-1"])
@pytest.mark.parametrize("server", ["redis", "postgres"])
async def test_any_link_failure_in_a_rush_loses_nothing(rig: Rig, part: str, server: str) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign, rate=100)
    await asyncio.sleep(0.4)
    link = rig.link(part, server)
    for fail, lasts_s in FAULTS:
        fail(link)
        await asyncio.sleep(lasts_s)
        link.heal()
    assert await rig.selling(campaign, within_s=5.0) < 5.0
    await load.finish()
    await rig.settle()
    assert load.sold() > 100
    assert await rig.verdict(campaign) == []


async def test_failure_of_all_links_at_once_loses_nothing(rig: Rig) -> None:
    campaign = await rig.campaign(tickets=100_000, card_limit=30)
    load = await rig.rush(campaign, rate=100)
    await asyncio.sleep(0.4)
    links = [*rig.links("redis"), *rig.links("postgres")]
    for fail, lasts_s in FAULTS:
        for link in links:
            fail(link)
        await asyncio.sleep(lasts_s)
        for link in links:
            link.heal()
    took_s = await rig.selling(campaign, within_s=6.0)
    print(f"selling {took_s:.2f} s after all links were whole")
    await load.finish()
    await rig.settle()
    assert await rig.verdict(campaign) == []


@pytest.mark.parametrize(
    ("server", "word", "holding"),
    [
        pytest.param("postgres", b"COMMIT", "up", id="before-the-commit"),
        pytest.param("postgres", b"COMMIT", "down", id="after-the-commit"),
        pytest.param("redis", APPLIED.sha.encode(), "up", id="before-it-is-told"),
        pytest.param("redis", b"XTRIM", "up", id="before-the-trim"),
        pytest.param("redis", b"XTRIM", "down", id="after-the-trim"),
    ],
)
async def test_killed_writer_leaves_each_event_written_once(
    rig: Rig, server: str, word: bytes, holding: Direction
) -> None:
    campaign = await rig.campaign(tickets=1_000, card_limit=30)
    await rig.settle()
    with trimming_at_once(rig):
        await rig.restart("writer-1")
        link = rig.link("writer-1", server)
        link.trap(word, holding=holding)
        load = await rig.rush(campaign, rate=100)
        await asyncio.wait_for(link.sprung.wait(), WAIT_S)
        await asyncio.sleep(0.3)
        rig.kill("writer-1")
        link.heal()
        await rig.start("writer-1")
        await asyncio.sleep(0.3)
        await load.finish()
        await rig.settle()
    assert load.sold() > 20
    assert await rig.verdict(campaign) == []
    await rig.restart("writer-1")


@contextlib.contextmanager
def trimming_at_once(rig: Rig) -> Iterator[None]:
    """Make parts that start in the block trim the stream as soon as it is applied."""
    kept = dict(rig.settings)
    rig.settings |= {"SALE_LEDGER_RETENTION_EVENTS": "0", "SALE_LEDGER_RETENTION_S": "0"}
    try:
        yield
    finally:
        rig.settings = kept


FAULTS: list[tuple[Callable[[Proxy], None], float]] = [
    (lambda link: link.halve(100, "down"), 0.4),
    (lambda link: link.halve(100, "up"), 0.4),
    (lambda link: link.swallow("down"), 0.5),
    (lambda link: link.swallow("up"), 0.5),
    (lambda link: link.delay(0.2), 0.6),
    (lambda link: link.hold("down"), 0.6),
    (lambda link: link.hold("up"), 0.6),
    (lambda link: link.cut(), 0.6),
]


async def certain(ask: Callable[[], Awaitable[Response]], within_s: float = 10.0) -> Response:
    """Retry until the outcome is known."""
    deadline = time.monotonic() + within_s
    while (answer := await ask()).status in {0, 503}:
        assert time.monotonic() < deadline, "its outcome stays unknown"
        await asyncio.sleep(0.1)
    return answer


async def has_sold(rig: Rig, campaign: str, seq: int) -> bool:
    return await rig.sold(campaign) >= seq


async def remaining(rig: Rig, campaign: str) -> int:
    status, live = await rig.admin("GET", f"/{campaign}/live")
    assert status == 200, live
    return sum(showing["remaining"] for showing in live["showings"])
