"""`sale doctor` names every fault, even if a store does not answer."""

import time

import pytest
from service import Ran, Service, command, free_port


@pytest.fixture
def deployment(
    redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """Both stores, with the schema, and no process of the engine."""
    monkeypatch.setenv("SALE_REDIS_URL", redis_url)
    monkeypatch.setenv("SALE_DATABASE_URL", database_url)
    return monkeypatch


def examined(ran: Ran) -> tuple[dict[str, object], str]:
    told = ran.json()
    return told, "; ".join(told["missing"])


def test_doctor_finds_no_fault_in_a_sound_system(service: Service) -> None:
    # A process that an earlier test ended, and the trouble it made, count for some seconds more.
    ends_at = time.monotonic() + 40
    while True:
        ran = service.sale("doctor", "--json")
        told, missing = examined(ran)
        if told["api"] == "2 reported within 5 s" and ran.status == 0:
            break
        assert time.monotonic() < ends_at, ran
        time.sleep(0.5)
    assert not missing
    for part in ("writer", "scheduler", "keeper"):
        assert " works" in str(told[part])
    assert "API processes" in service.sale("doctor").out


def test_doctor_names_every_missing_role(deployment: pytest.MonkeyPatch) -> None:
    ran = command("doctor", "--json")
    told, missing = examined(ran)
    assert ran.status == 1
    for words in (
        "no API process runs",
        "no writer works",
        "no scheduler works",
        "no keeper works",
    ):
        assert words in missing
    assert told["redis_version"]
    assert told["postgres_version"]
    in_words = command("doctor")
    assert in_words.status == 1
    assert in_words.err == ""
    assert "wrong: no API process runs: nothing is sold (sale serve)" in in_words.out


@pytest.mark.parametrize("away", ["redis", "postgres", "both"])
def test_doctor_goes_on_past_a_dead_store(deployment: pytest.MonkeyPatch, away: str) -> None:
    if away in {"redis", "both"}:
        deployment.setenv("SALE_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    if away in {"postgres", "both"}:
        deployment.setenv("SALE_DATABASE_URL", f"postgresql://sale@127.0.0.1:{free_port()}/x")
    ran = command("doctor", "--json")
    told, missing = examined(ran)
    assert ran.status == 1
    assert ("Redis does not answer" in missing) is (away != "postgres")
    assert ("PostgreSQL at 127.0.0.1" in missing) is (away != "redis")
    assert ("no API process" in missing) is (away == "postgres")
    assert ("no writer works" in missing) is (away == "redis")
    assert bool(told["redis_version"]) is (away == "postgres")
    assert bool(told["postgres_version"]) is (away == "redis")
    in_words = command("doctor")
    assert (in_words.status, in_words.err) == (1, "")
    assert "unknown: see below" in in_words.out


def test_doctor_without_a_schema_says_migrate(
    deployment: pytest.MonkeyPatch, server_database_url: str
) -> None:
    deployment.setenv("SALE_DATABASE_URL", server_database_url.replace("/sale?", "/postgres?"))
    ran = command("doctor", "--json")
    assert ran.status == 1
    assert "run `sale migrate`" in examined(ran)[1]
