"""Shutdown and rolling restart: answered orders remain, a retry settles unknown outcomes."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from answer_book import Attempt
from own_api import own_api
from service import Client, Service, new_key
from waiting import until

from loadtest.books.answers import Spool
from loadtest.books.check import check
from loadtest.books.ledger import highest, load_books, wait_applied
from loadtest.client import Client as LoadClient
from loadtest.generator import closed
from loadtest.members import Member
from loadtest.wire import UNKNOWN, get_request, purchase_request

CONNECTIONS = 16
REQUESTS_MAX = 60_000
EXIT_SPARE_S = 4.0  # from the signal to the exit, on two busy cores


def bid(service: Service, address: str, campaign: str, key: str | None = None) -> bytes:
    return purchase_request(address, campaign, service.card().token, key or new_key(), 1, "general")


async def told(sock: socket.socket) -> tuple[int, bytes]:
    """Status and bytes of the next response; 0 if the connection ends without one."""
    loop, got = asyncio.get_running_loop(), b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(10):
            while part := await loop.sock_recv(sock, 65_536):
                got += part
                if b"\r\n\r\n" in got:
                    break
    return (int(got.split()[1]) if got else 0), got


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), 5)
    sock.setblocking(False)
    return sock


@pytest.mark.fault
async def test_stop_and_renewal_under_load_lose_no_order(service: Service, client: Client) -> None:
    campaign = await client.campaign(tickets=1_000_000, card_limit=1)
    address = service.url.removeprefix("http://")
    attempts: dict[int, Attempt] = {}
    spool = Spool(attempts.__getitem__)
    changed = asyncio.create_task(_end_one_then_renew_all(service))

    def raw(number: int) -> bytes:
        if number not in attempts and changed.done():
            return b""
        attempt = attempts.setdefault(number, _attempt(service, number))
        return attempt.raw(address, campaign)

    tally = await closed(address, raw, REQUESTS_MAX, CONNECTIONS, spool=spool, retries=20)
    await changed

    outcomes = tally.outcomes()
    assert set(outcomes) <= {"sold", "replayed", "not-sent"}, (
        f"an error that a retry with the same key does not resolve: {outcomes}"
    )
    answers = list(spool)
    assert {answer.status for answer in answers} <= {201, UNKNOWN, 429, 503}
    assert len({answer.key for answer in answers if answer.sold}) == len(attempts)
    # Kept connections get "Connection: close"; only a few may be cut off.
    lost = sum(answer.status == 0 for answer in answers)
    assert lost <= CONNECTIONS * 3, f"{lost} of {tally.retries} without an answer"
    await wait_applied(service.database_url, campaign, highest(answers))
    assert check(answers, await load_books(service.database_url, campaign), alone=True) == []


def _attempt(service: Service, number: int) -> Attempt:
    member_no = 20_000_000 + number
    member = Member(str(member_no), service.token(member_no), "district")
    return Attempt(member, new_key(), "general", 1)


async def _end_one_then_renew_all(service: Service) -> None:
    await asyncio.sleep(0.5)
    said_before = len(service.log_file.read_text("utf-8").splitlines())

    def pids() -> dict[str, int]:
        found: dict[str, int] = service.told()["processes"]
        return {name: pid for name, pid in found.items() if name.startswith("serve-")}

    async def all_new(old: dict[str, int]) -> None:
        async def there() -> bool:
            now = pids()
            return now.keys() == before.keys() and not set(now.values()) & set(old.values())

        await until(there, 30)

    before = pids()
    os.kill(before["serve-1"], signal.SIGTERM)
    await all_new({"serve-1": before["serve-1"]})
    before = pids()
    service.process.send_signal(signal.SIGHUP)
    await all_new(before)

    def log() -> str:
        return "\n".join(service.log_file.read_text("utf-8").splitlines()[said_before:])

    await until(lambda: '"supervisor.renewed"' in log(), 20)
    assert '"supervisor.child_ended"' in log()
    died = [line for line in log().splitlines() if "child_died" in line and '"serve-' in line]
    assert not died, "a requested stop is no failure"


async def test_stop_closes_kept_connections(
    service: Service, client: Client, short_path: Path
) -> None:
    campaign = await client.campaign()
    async with own_api(service, short_path) as api:
        buying, probing, idle = connect(api.address), connect(api.address), connect(api.address)
        loop = asyncio.get_running_loop()
        with buying, probing, idle:
            for each in (buying, probing, idle):
                await loop.sock_sendall(each, get_request(api.address, "/healthz"))
                assert (await told(each))[0] == 200
            api.stop()
            await api.said("api.stopping")
            key = new_key()
            await loop.sock_sendall(buying, bid(service, api.address, campaign, key))
            status, answer = await told(buying)
            assert status == 503
            assert b'"unavailable"' in answer
            assert b"\r\nRetry-After: " in answer
            assert b"\r\nConnection: close\r\n" in answer
            await loop.sock_sendall(probing, get_request(api.address, "/readyz"))
            status, answer = await told(probing)
            assert status == 503
            assert b"stopping" in answer
            with pytest.raises(ConnectionRefusedError):
                connect(api.address)
            assert await asyncio.wait_for(api.process.wait(), EXIT_SPARE_S) == 0
            assert await told(idle) == (0, b""), "closed without a response to no request"
    assert await client.remaining(campaign) == [100], "no ticket was sold"


@pytest.mark.fault
async def test_stop_answers_connections_not_yet_accepted(
    service: Service, client: Client, short_path: Path
) -> None:
    campaign = await client.campaign()
    async with own_api(service, short_path) as api:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            api.process.send_signal(signal.SIGSTOP)
            waiting = [stack.enter_context(connect(api.address)) for _ in range(40)]
            for each in waiting:
                await loop.sock_sendall(each, bid(service, api.address, campaign))
            api.stop()
            api.process.send_signal(signal.SIGCONT)
            answers = [(await told(each))[0] for each in waiting]
        assert await asyncio.wait_for(api.process.wait(), EXIT_SPARE_S) == 0
    assert set(answers) <= {201, 503}
    assert await client.remaining(campaign) == [100 - answers.count(201)]


@pytest.mark.fault
@pytest.mark.parametrize("redis_back", [True, False])
async def test_stop_answers_a_purchase_under_way(
    service: Service, client: Client, short_path: Path, redis_back: bool
) -> None:
    campaign = await client.campaign()
    deadline_s = 1.5
    settings = {"SALE_PURCHASE_DEADLINE_MS": str(int(deadline_s * 1_000))}
    async with own_api(service, short_path, **settings) as api:
        loop = asyncio.get_running_loop()
        with connect(api.address) as buying:
            first = bid(service, api.address, campaign)
            await loop.sock_sendall(buying, first)
            assert (await told(buying))[0] == 201
            with service.stopped("redis"):
                key = new_key()
                wish = bid(service, api.address, campaign, key)
                await loop.sock_sendall(buying, wish)
                await asyncio.sleep(0.2)
                started = time.monotonic()
                api.stop()
                if redis_back:
                    await asyncio.sleep(0.3)
                else:
                    status = (await told(buying))[0]
                    assert await asyncio.wait_for(api.process.wait(), 20) == 0
            if redis_back:
                status = (await told(buying))[0]
                assert await asyncio.wait_for(api.process.wait(), 20) == 0
            took_s = time.monotonic() - started
    assert status == (201 if redis_back else 503)
    assert took_s < deadline_s + EXIT_SPARE_S
    # The same key gives the outcome in either case.
    again = wish.replace(api.address.encode(), service.url.removeprefix("http://").encode())
    async with LoadClient(service.url.removeprefix("http://")) as other:
        assert (await other.request(again)).status == 201
    assert await client.remaining(campaign) == [98]
