"""Metrics over all workers, readiness, and logs."""

import asyncio
import json
import os
import platform
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from redis.asyncio import Redis
from service import ADMIN, CAMPAIGNS, ORDERS, Client, Service, metric, new_key, read_metrics
from waiting import until

from sale import __version__
from sale.config import Settings
from sale.trust import readiness
from sale.trust.readiness import reasons

NAMES = {
    "sale_purchases_total": "counter",
    "sale_purchase_seconds": "histogram",
    "sale_batch_size": "histogram",
    "sale_stock_remaining": "gauge",
    "sale_ledger_lag_events": "gauge",
    "sale_ledger_lag_seconds": "gauge",
    "sale_ledger_written_total": "counter",
    "sale_audit_findings": "gauge",
    "sale_redis_up": "gauge",
    "sale_postgres_up": "gauge",
    "sale_holds": "gauge",
    "sale_expired_total": "counter",
    "sale_cancelled_tickets_total": "counter",
    "sale_payments_total": "counter",
    "sale_refunds": "gauge",
}
"""The metrics of the contract, and their types."""


async def test_each_metric_of_the_contract_is_exposed(service: Service, client: Client) -> None:
    campaign = await client.campaign(tickets=5)
    await client.buy(campaign, service.card().token)

    async def seen() -> bool:
        return f'sale_stock_remaining{{campaign="{campaign}"' in await service.metrics()

    await until(seen)
    text = await service.metrics()
    for name, kind in NAMES.items():
        if name == "sale_audit_findings":  # exposed after the first audit
            continue
        assert f"# TYPE {name} {kind}" in text, name
    labels = {
        "sale_purchases_total": {"campaign", "outcome"},
        "sale_stock_remaining": {"campaign", "showing"},
        "sale_ledger_lag_events": {"campaign"},
        "sale_ledger_lag_seconds": {"campaign"},
        "sale_ledger_written_total": set(),
        "sale_redis_up": set(),
        "sale_postgres_up": set(),
    }
    for name, expected in labels.items():
        lines = re.findall(rf"^{name}(?:\{{(.*)\}})? ", text, re.MULTILINE)
        assert lines, name
        for line in lines:
            assert set(re.findall(r'(\w+)="', line)) == expected, name
    assert metric(text, "sale_redis_up") == 1
    assert metric(text, "sale_postgres_up") == 1


async def test_each_part_exposes_its_build_and_process(service: Service) -> None:
    text = await service.metrics()
    versions = f'python="{platform.python_version()}"', f'version="{__version__}"'
    for role in ("serve", "writer", "scheduler", "keeper"):
        (line,) = re.findall(rf'^sale_build_info{{(.*role="{role}".*)}} 1\.0$', text, re.MULTILINE)
        assert set(versions) < set(line.split(",")), line
    assert metric(text, "process_cpu_seconds_total") > 0
    assert metric(text, "process_start_time_seconds") > 0
    resident = sum(
        int(Path(f"/proc/{pid}/statm").read_text().split()[1])  # noqa: ASYNC240
        for name, pid in service.told()["processes"].items()
        if name not in {"redis", "postgresql"}
    )
    told = metric(text, "process_resident_memory_bytes") / os.sysconf("SC_PAGESIZE")
    assert told == pytest.approx(resident, rel=0.3)


async def test_each_part_exposes_whether_it_reaches_the_stores(service: Service) -> None:
    found = set()
    for path in sorted((service.data_dir / "run").glob("m-*")):
        text = await read_metrics(path)
        assert metric(text, "sale_redis_up") == metric(text, "sale_postgres_up") == 1, path
        found.add(path.name.split("-")[1])
    assert found == {"serve", "writer", "scheduler", "keeper"}


async def test_counts_of_two_workers_add_up(
    service: Service, client: Client, spread: Client
) -> None:
    before = await service.metrics()
    campaign = await client.campaign(tickets=30, card_limit=1)
    cards = service.cards(50)
    keys = [new_key() for _ in cards]
    await asyncio.gather(
        *(spread.buy(campaign, card.token, key=key) for card, key in zip(cards, keys, strict=True))
    )
    again = await asyncio.gather(
        *(spread.buy(campaign, card.token, key=key) for card, key in zip(cards, keys, strict=True))
    )
    replayed = sum("Idempotency-Replayed" in one.headers for one in again)
    holder = next(card for card, one in zip(cards, again, strict=True) if one.status == 201)
    assert (await spread.buy(campaign, holder.token)).code == "limit-exceeded"
    await client.step(campaign, "pause")
    assert (await spread.buy(campaign, holder.token)).code == "paused"

    text = await service.metrics()

    by_outcome = {
        outcome: metric(text, "sale_purchases_total", campaign, outcome)
        for outcome in ("sold", "replayed", "sold-out", "limit-exceeded", "paused")
    }
    assert by_outcome == {
        "sold": 30, "replayed": 30, "sold-out": 40, "limit-exceeded": 1, "paused": 1,
    }  # fmt: skip
    assert replayed == 30
    assert metric(text, "sale_purchases_total", campaign) == 102
    assert all(count > 0 for count in await service.purchases_by_worker(campaign))
    assert sum(await service.purchases_by_worker(campaign)) == 102
    counted = metric(text, "sale_purchase_seconds_count") - metric(
        before, "sale_purchase_seconds_count"
    )
    assert counted == 102
    assert metric(text, "sale_batch_size_count") > metric(before, "sale_batch_size_count")
    assert metric(text, "sale_batch_size_sum") > metric(before, "sale_batch_size_sum")


async def test_stock_and_ledger_lag_are_exposed(service: Service, client: Client) -> None:
    campaign = await client.campaign(tickets=10)
    await client.buy(campaign, service.card().token, 3)

    async def told() -> bool:
        text = await service.metrics()
        return (
            f'sale_stock_remaining{{campaign="{campaign}",showing="general"}} 7' in text
            and f'sale_ledger_lag_events{{campaign="{campaign}"}} 0' in text
        )

    await until(told)
    written = metric(await service.metrics(), "sale_ledger_written_total")
    await client.buy(campaign, service.card().token)

    async def more() -> bool:
        return metric(await service.metrics(), "sale_ledger_written_total") > written

    await until(more)


async def test_sound_system_is_healthy_and_ready(client: Client) -> None:
    for path in ("/healthz", "/readyz"):
        seen = await client.get(path)
        assert (seen.status, seen.json()) == (200, {"status": "ok"})
        assert seen.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("insert into schema_migration values ('9999_next', repeat('0', 64))", "9999_next"),
        ("update schema_migration set sha256 = repeat('0', 64)", "reads differently"),
    ],
)
async def test_other_schema_version_is_unready_with_a_reason(
    pool: Any, redis_client: Redis, change: str, says: str
) -> None:
    stores: Any = SimpleNamespace(redis=redis_client, pool=pool, settings=Settings(), nonce="")
    assert await reasons(stores) == []
    await pool.execute(change)
    (reason,) = await reasons(stores)
    assert reason.startswith("postgres: ")
    assert says in reason


async def test_concurrent_probes_share_one_check_of_the_stores(
    pool: Any, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: Any = SimpleNamespace(redis=redis_client, pool=pool, settings=Settings(), nonce="")
    looked = mock.AsyncMock(side_effect=reasons)
    monkeypatch.setattr(readiness, "reasons", looked)
    looks = readiness.Readiness(stores)
    for _ in range(2):  # at the same time, and again while the result is fresh
        told = await asyncio.gather(*(looks.reasons() for _ in range(500)))
        assert told == [[]] * 500
        assert looked.await_count == 1
    monkeypatch.setattr(readiness, "FRESH_S", 0.0)
    looks._fresh_until = 0.0
    late = [asyncio.create_task(looks.reasons()) for _ in range(3)]
    await asyncio.sleep(0)
    late[0].cancel()  # its client has left, the others still wait
    assert await asyncio.gather(*late[1:]) == [[], []]
    assert looked.await_count == 2


async def test_failed_check_is_unready_and_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        readiness, "reasons", mock.AsyncMock(side_effect=KeyError("a fault of ours"))
    )
    monkeypatch.setattr(readiness, "log", mock.Mock())
    looks = readiness.Readiness(mock.Mock())
    told = await asyncio.gather(*(looks.reasons() for _ in range(50)))
    assert told == [["the stores could not be looked at (KeyError)"]] * 50
    assert readiness.log.exception.call_count == 1


def log_lines(service: Service) -> list[dict[str, Any]]:
    lines = service.log_file.read_text("utf-8").splitlines()
    strange = [line for line in lines if not line.startswith("{")]
    assert not strange
    return [json.loads(line) for line in lines]


async def test_log_lines_are_json_without_card_numbers(service: Service, client: Client) -> None:
    campaign, card = await client.campaign(), service.card()
    await client.buy(campaign, card.token)
    await service.asale("cards", "revoke", card.no, "--reason", "lost")
    await client.step(campaign, "pause")
    lines = log_lines(service)
    assert lines
    for line in lines:
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", line["action"]), line
        assert line["level"] in {"debug", "info", "warning", "error", "critical"}
        assert line["timestamp"].endswith("Z")
    text = service.log_file.read_text("utf-8")
    assert card.no not in text
    assert card.token not in text
    assert service.key.secret.decode() not in text
    assert not re.search(r"\b9901\d{12}\b", text)


async def test_purchases_are_not_logged(service: Service, client: Client, spread: Client) -> None:
    campaign = await client.campaign(tickets=20)
    await client.buy(campaign, service.card().token)
    before = len(log_lines(service))
    await asyncio.gather(*(spread.buy(campaign, card.token) for card in service.cards(150)))
    await asyncio.gather(*(spread.buy(campaign, "x") for _ in range(20)))
    await asyncio.gather(*(spread.get(f"{CAMPAIGNS}/{campaign}") for _ in range(20)))
    await spread.get(ORDERS)
    await spread.get(ADMIN)
    assert len(log_lines(service)) - before < 10


def test_secrets_in_the_data_directory_are_private(service: Service) -> None:
    assert (service.data_dir / "signing.key").stat().st_mode & 0o777 == 0o600
