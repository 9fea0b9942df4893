"""The command line: every command of the contract, its output, its exit status, its one clear line.

Commands run in this process, beside the running system; a few are run as a person runs them.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from service import ADMIN, CARDS, PAST, ROOT, Client, Ran, Service, command, free_port, in_s

from sale.operators.steps import STEPS

GROUPS = {
    "campaign": ["create", "list", "show", *(step.command or name for name, step in STEPS.items())],
    "cards": ["import", "revoke", "restore", "show", "sample"],
    "operator": ["add", "list", "disable", "token"],
}
SINGLE = [
    *("up", "serve", "writer", "scheduler", "keeper", "migrate"),
    *("tokens", "audit", "recover", "losses", "rehearse", "doctor"),
]
COMMANDS = [
    *([name] for name in SINGLE),
    *([group, name] for group, names in GROUPS.items() for name in names),
]
NEEDS_ENGINE = [
    *(["campaign", name, "x"] for name in ("show", "schedule", "open", "resume", "close")),
    *(["campaign", name, "x", "--reason", "r"] for name in ("pause", "reopen")),
    ["campaign", "add-stock", "x", "general", "1", "--reason", "r"],
    ["campaign", "list"],
    ["campaign", "delete", "x"],
    ["cards", "show", "990100000000"],
    ["operator", "list"],
    ["operator", "token", "x"],
    ["operator", "add", "x", "--role", "admin"],
    ["recover", "x"],
    ["losses", "x"],
    ["rehearse", "--purge"],
    ["doctor"],
    ["migrate"],
]
CAMPAIGN = """
id = "{id}"
title = "五元看大片"
category = "culture"
price_fen = 500
payment = "counter"
card_limit = 3
{more}
[[showings]]
id = "general"
title = "通用券"
tickets = 10
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(id, "draft = true")``: a campaign file with one more line."""

    def write(identifier: str, more: str = f"opens_at = {PAST}") -> Path:
        file = tmp_path / f"{identifier}.toml"
        file.write_text(CAMPAIGN.format(id=identifier, more=more), "utf-8")
        return file

    return write


@pytest.fixture
def made(service: Service, write: Write) -> str:
    """A campaign that sells."""
    identifier = service.new_id("cli")
    created = service.sale("campaign", "create", write(identifier))
    assert created.status == 0, created
    return identifier


def one_line(ran: Ran, status: int = 1) -> str:
    """The complaint of a command that failed as it should: one line, no traceback, no result."""
    assert ran.status == status, ran
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran
    assert lines[0].startswith("sale: ")
    assert "Traceback" not in ran.err
    assert ran.out == ""
    return lines[0]


@pytest.mark.parametrize("words", [[], *([group] for group in GROUPS), *COMMANDS])
def test_help_describes_each_command(words: list[str]) -> None:
    ran = command(*words, "--help")
    assert ran.status == 0
    assert ran.out.startswith(f"Usage: sale {' '.join(words)}".rstrip())
    assert len(ran.out.splitlines()) >= 4
    assert ran.err == ""
    assert command(*words, "-h") == ran
    if not words or words[0] in GROUPS:
        assert "..." not in ran.out.partition("Commands:")[2]


def test_help_lists_every_command_of_the_contract() -> None:
    root = command("--help").out
    for name in (*SINGLE, *GROUPS):
        assert f"  {name} " in root, name
    for group, names in GROUPS.items():
        listed = command(group, "--help").out
        for name in names:
            assert f"  {name} " in listed, (group, name)


@pytest.mark.parametrize(
    "words",
    [
        ["nothing"],
        ["campaign", "nothing"],
        ["campaign", "show"],
        ["campaign", "show", "a", "b"],
        ["campaign", "pause", "x"],
        ["campaign", "reopen", "x"],
        ["campaign", "add-stock", "x", "general", "0", "--reason", "r"],
        ["campaign", "add-stock", "x", "general", "-1", "--reason", "r"],
        ["campaign", "add-stock", "x", "general", "one", "--reason", "r"],
        ["campaign", "add-stock", "x", "general", "1"],
        ["cards", "revoke", "990100000000"],
        ["cards", "restore", "990100000000"],
        ["cards", "show", "12"],
        ["cards", "show", "99010000000x"],
        ["cards", "sample", "-1"],
        ["cards", "sample", "x"],
        ["tokens"],
        ["tokens", "--cards", "0"],
        ["tokens", "--cards", "1", "--status", "lost"],
        ["operator", "add", "x"],
        ["operator", "add", "x", "--role", "king"],
        ["up", "--workers", "many"],
        ["up", "--workers", "0"],
        ["serve", "--listen", "x"],
        ["writer", "--metrics-listen", "x"],
        ["migrate", "--metrics-listen", "x"],
        ["doctor", "--nothing"],
        ["doctor", "--as", ""],
    ],
)
def test_bad_usage_exits_2_with_one_line(words: list[str]) -> None:
    one_line(command(*words), status=2)


def test_file_that_cannot_be_written_is_named_as_given(tmp_path: Path) -> None:
    out = tmp_path / "none" / "roster.csv"
    said = one_line(command("cards", "sample", "2", "--out", out))
    assert said == f"sale: {out}: No such file or directory"


def test_wrong_number_is_refused_in_plain_words() -> None:
    words = ("campaign", "add-stock", "x", "general", "ten", "--reason", "r")
    assert "'ten' is not a valid whole number" in one_line(command(*words), status=2)
    assert "'fast' is not a valid number" in one_line(
        command("rehearse", "x", "--rate", "fast"), status=2
    )


@pytest.mark.parametrize("words", NEEDS_ENGINE)
def test_commands_report_that_no_engine_is_running(words: list[str], tmp_path: Path) -> None:
    says = one_line(command(*words, "--data-dir", tmp_path / "none"))
    assert "no engine is running" in says
    assert str(tmp_path / "none") in says


def test_audit_without_an_engine_exits_3(tmp_path: Path) -> None:
    ran = command("audit", data_dir=tmp_path)
    assert "could not check" in one_line(ran, status=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SALE_WORKERS", "0"),
        ("SALE_WORKERS", "two"),
        ("SALE_LISTEN", "nowhere"),
        ("SALE_LISTEN", "127.0.0.1:99999"),
        ("SALE_REDIS_URL", "http://x"),
        ("SALE_DATABASE_URL", "mysql://x"),
        ("SALE_SIGNING_KEY", "short"),
        ("SALE_COLOUR", "red"),
    ],
)
def test_bad_setting_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for words in (["doctor"], ["up"], ["serve"]):
        assert name in one_line(command(*words))


def test_both_faults_of_a_settings_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "sale.toml"
    file.write_text('colour = "red"\nworkers = "x"\n')
    says = one_line(command("doctor", "--config", file))
    assert "colour" in says
    assert "workers" in says
    file.write_text("= nothing")
    assert str(file) in one_line(command("doctor", "--config", file))
    assert "none.toml" in one_line(command("doctor", "--config", tmp_path / "none.toml"))


@pytest.mark.parametrize("store", ["SALE_REDIS_URL", "SALE_DATABASE_URL"])
def test_unreachable_store_is_named(
    service: Service, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    port = free_port()
    url = {
        "SALE_REDIS_URL": f"redis://127.0.0.1:{port}/0",
        "SALE_DATABASE_URL": f"postgresql://nobody@127.0.0.1:{port}/none",
    }[store]
    monkeypatch.setenv(store, url)
    name = "Redis" if store == "SALE_REDIS_URL" else "PostgreSQL"
    for words in (["campaign", "list"], ["campaign", "show", "x"]):
        says = one_line(service.sale(*words))
        assert str(port) in says
        assert name in says
    doctor = service.sale("doctor")  # it goes on, and tells of the other store
    assert doctor.status == 1
    wrong = [line for line in doctor.out.splitlines() if line.startswith(f"  wrong: {name}")]
    assert len(wrong) == 1
    assert str(port) in wrong[0]
    assert "could not check" in one_line(service.sale("audit"), status=3)


def test_each_campaign_command_prints_the_new_state(service: Service, write: Write) -> None:
    identifier = service.new_id("cli")
    actor = ("--as", "wang", "--json")

    def state(*words: object) -> Any:
        ran = service.sale("campaign", *words, *actor)
        assert (ran.status, ran.err) == (0, ""), ran
        return ran.json()["state"]

    assert state("create", write(identifier, "draft = true")) == "draft"
    assert state("schedule", identifier, "--at", in_s(600), "--reason", "plan") == "scheduled"
    assert state("open", identifier, "--reason", "now") == "open"
    assert state("pause", identifier, "--reason", "lunch") == "paused"
    assert state("resume", identifier) == "open"
    assert state("add-stock", identifier, "general", 5, "--reason", "demand") == "open"
    assert state("close", identifier) == "closed"
    assert state("reopen", identifier, "--reason", "tickets came back") == "open"
    shown = service.sale("campaign", "show", identifier, "--json").json()
    assert (shown["id"], shown["state"]) == (identifier, "open")
    assert [(s["tickets"], s["remaining"]) for s in shown["showings"]] == [(15, 15)]
    listed = service.sale("campaign", "list", "--json").json()
    assert identifier in {campaign["id"] for campaign in listed}
    table = service.sale("campaign", "list")
    assert identifier in table.out
    assert table.err == ""
    words = service.sale("campaign", "show", identifier).out
    assert "open" in words
    assert "5.00 yuan" in words


def test_audit_log_has_actor_and_reason_of_a_step(
    service: Service, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib.request

    monkeypatch.setenv("LOGNAME", "zhao")
    service.sale("campaign", "pause", made, "--reason", "午休", "--as", "李主任")
    service.sale("campaign", "resume", made)
    request = urllib.request.Request(
        f"{service.url}/api/v1/admin/audit-log?campaign={made}",
        headers={"Authorization": f"Bearer {service.admin_token}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        entries = json.load(answer)["items"]
    who = {
        entry["action"].rpartition(".")[2]: (entry["actor"], entry["reason"]) for entry in entries
    }
    assert who["paused"] == ("李主任", "午休")
    assert who["resumed"] == ("cli:zhao", None)


def test_wrong_state_error_names_the_possible_step(service: Service, made: str) -> None:
    service.sale("campaign", "pause", made, "--reason", "r")
    says = one_line(service.sale("campaign", "open", made))
    assert "paused" in says
    assert "resume" in says
    assert "delete" in one_line(service.sale("campaign", "delete", made))


@pytest.mark.parametrize(
    "words", [words for words in NEEDS_ENGINE if words[0] in {"campaign", "recover"}]
)
def test_unknown_campaign_is_named(service: Service, words: list[str]) -> None:
    if words == ["campaign", "list"]:
        words = ["audit", "x"]
    wanted = ["nothing-there" if word == "x" else word for word in words]
    # The audit's 1 means a finding.
    status = 2 if words[0] == "audit" else 1
    assert "nothing-there" in one_line(service.sale(*wanted), status=status)


def test_bad_argument_of_a_step_is_one_line(service: Service, made: str, write: Write) -> None:
    stock = ("campaign", "add-stock", made)
    assert "balcony" in one_line(service.sale(*stock, "balcony", 1, "--reason", "r"))
    assert "10000000" in one_line(service.sale(*stock, "general", 10**7, "--reason", "r"))
    beyond = service.sale(*stock, "general", 10**30, "--reason", "r")
    assert "'N'" in one_line(beyond, status=2)
    assert "reason" in one_line(service.sale(*stock, "general", 1, "--reason", " "))
    draft = service.new_id("cli")
    service.sale("campaign", "create", write(draft, "draft = true"))
    assert "at" in one_line(service.sale("campaign", "schedule", draft, "--at", "tomorrow"))
    assert "at" in one_line(service.sale("campaign", "schedule", draft))


def test_draft_can_be_deleted(service: Service, write: Write) -> None:
    draft = service.new_id("cli")
    service.sale("campaign", "create", write(draft, "draft = true"))
    assert service.sale("campaign", "delete", draft, "--json").json() == {"deleted": draft}
    assert draft in one_line(service.sale("campaign", "show", draft))


@pytest.mark.parametrize("file", sorted((ROOT / "config" / "campaigns").glob("*.toml")), ids=str)
def test_each_sample_campaign_can_be_created(service: Service, tmp_path: Path, file: Path) -> None:
    text = file.read_text("utf-8")
    identifier = service.new_id("sample")
    copy = tmp_path / "copy.toml"
    copy.write_text(text.replace(f'id = "{file.stem}"', f'id = "{identifier}"', 1), "utf-8")
    made = service.sale("campaign", "create", copy, "--json")
    assert made.status == 0, made
    assert made.json()["state"] == "scheduled"
    assert made.json()["id"] == identifier


def test_every_wrong_field_of_a_campaign_file_is_named(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('id = "X"\nprice_fen = -1\npayment = "gold"\ncolour = 1\nshowings = []\n')
    says = one_line(service.sale("campaign", "create", file))
    for word in (
        *("bad.toml", "id", "title", "category", "price_fen", "payment", "card_limit"),
        *("colour", "showings"),
    ):
        assert word in says, word


@pytest.mark.parametrize("content", [b"= 1", b"\xff\xfe", b"\x00", b"", b'id = "a'])
def test_file_that_is_no_campaign_is_one_line(
    service: Service, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "odd.toml"
    file.write_bytes(content)
    one_line(service.sale("campaign", "create", file))


@pytest.mark.parametrize("words", [["campaign", "create"], ["cards", "import"]])
def test_missing_file_is_named(service: Service, tmp_path: Path, words: list[str]) -> None:
    assert "none.x" in one_line(service.sale(*words, tmp_path / "none.x"))
    assert str(tmp_path) in one_line(service.sale(*words, tmp_path))


def test_taken_campaign_id_is_named(service: Service, made: str, write: Write) -> None:
    assert made in one_line(service.sale("campaign", "create", write(made)))


def test_cards_commands_work_and_mask_card_numbers(service: Service, tmp_path: Path) -> None:
    file, card = tmp_path / "roster.csv", service.card()
    sampled = service.sale("cards", "sample", 20, "--seed", 7, "--out", file, "--json")
    assert sampled.json()["cards"] == 20
    assert command("cards", "sample", 20, "--seed", 7).out == file.read_text("utf-8")
    dry = service.sale("cards", "import", file, "--dry-run", "--json")
    assert (dry.status, dry.json()["dry_run"], dry.json()["added"]) == (0, True, 20)
    taken = service.sale("cards", "import", file, "--json")
    assert (taken.status, taken.json()["added"]) == (0, 20)
    assert service.sale("cards", "import", file, "--json").json()["unchanged"] == 20

    for words, status in (
        (["revoke", card.no, "--reason", "lost"], "cancelled"),
        (["show", card.no], "cancelled"),
        (["restore", card.no, "--reason", "found"], "active"),
    ):
        ran = service.sale("cards", *words, "--json")
        assert (ran.status, ran.json()["status"]) == (0, status), ran
        assert card.no not in ran.out + ran.err
        assert (ran.json()["member"], ran.json()["card_tail"]) == (card.member, card.no[-4:])
        assert card.no not in service.sale("cards", "show", card.no).out
    assert "no" in one_line(service.sale("cards", "show", "100000000000"))
    assert "100000000000" not in service.sale("cards", "show", "100000000000").err


def test_roster_from_stdin_and_under_any_name_is_imported(service: Service, tmp_path: Path) -> None:
    sampled = service.sale("cards", "sample", 20, "--seed", 99).out
    piped = service.run("cards", "import", "-", "--json", given=sampled.encode())
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert json.loads(piped.stdout)["added"] == 20
    file = tmp_path / os.fsdecode(b"\xc3\xfb\xb5\xa5.csv")  # as a GBK system names it
    file.write_text(sampled, "utf-8")
    for words in (["--dry-run"], []):
        ran = service.sale("cards", "import", file, *words, "--json")
        assert (ran.status, ran.json()["unchanged"]) == (0, 20), ran
    bad = "card_no,name,union,phone,pin,status\n" + "y\n" * 99
    file.write_text(bad)
    assert "\\xc3\\xfb" in one_line(service.sale("cards", "import", file)._replace(out=""))


def test_import_names_the_revoked_cards_that_it_keeps(service: Service, tmp_path: Path) -> None:
    card = service.card()
    assert service.sale("cards", "revoke", card.no, "--reason", "lost").status == 0
    file = service.data_dir / "roster.csv"
    for words in (["--dry-run"], []):
        ran = service.sale("cards", "import", file, *words)
        assert ran.status == 0, ran
        assert "stay cancelled, revoked by a person" in ran.out
        told = service.sale("cards", "import", file, *words, "--json").json()
        assert told["changed"] == 0
        assert card.no[-4:] in {each["card_tail"] for each in told["kept_revoked_lines"]}
    shown = service.sale("cards", "show", card.no)
    assert "yes, until a person restores it" in shown.out
    restored = service.sale("cards", "restore", card.no, "--reason", "found", "--json").json()
    assert (restored["status"], restored["revoked"]) == ("active", False)


def test_card_revoked_without_redis_has_a_note(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = service.card()
    with monkeypatch.context() as away:
        away.setenv("SALE_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
        ran = service.sale("cards", "revoke", card.no, "--reason", "lost", "--json")
    assert (ran.status, ran.json()["status"]) == (0, "cancelled"), ran
    assert ran.err.startswith("the card is revoked; running campaigns follow within a second")
    assert len(ran.err.splitlines()) == 1
    assert service.sale("cards", "show", card.no, "--json").json()["status"] == "cancelled"


def test_bad_roster_lines_are_named_and_nothing_changes(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(
        "card_no,name,union,phone,pin,status\n"
        "990300000001,甲,dongsi,,,active\n12,乙,dongsi,,,active\n990300000002,丙,nowhere,,,active\n"
    )
    ran = service.sale("cards", "import", file, "--json")
    assert ran.status == 1
    assert [bad["line"] for bad in ran.json()["bad"]] == [3, 4]
    assert "2 lines are bad, nothing has changed" in ran.err
    assert service.sale("cards", "show", "990300000001").status == 1
    file.write_text("a,b\n")
    assert str(file) in service.sale("cards", "import", file).err


def test_each_line_of_tokens_is_an_object_that_buys(service: Service, tmp_path: Path) -> None:
    lines = service.sale("tokens", "--cards", 3).out.splitlines()
    assert [list(json.loads(line)) for line in lines] == [["card_no", "token", "union"]] * 3
    file = tmp_path / "tokens.jsonl"
    told = service.sale("tokens", "--cards", CARDS * 2, "--out", file, "--json")
    assert told.json()["tokens"] == len(file.read_text().splitlines()) < CARDS * 2
    assert file.stat().st_mode & 0o777 == 0o600


def test_operator_commands_work(service: Service) -> None:
    name = service.new_id("op")
    added = service.sale("operator", "add", name, "--role", "operator", "--union", "dongsi")
    assert added.status == 0
    assert name in one_line(service.sale("operator", "add", name, "--role", "clerk"))
    assert "atlantis" in one_line(
        service.sale("operator", "add", name + "x", "--role", "clerk", "--union", "atlantis")
    )
    token = service.sale("operator", "token", name).out.strip()
    assert token.startswith("sale_op_")
    assert len(token.splitlines()) == 1
    row = next(row for row in service.sale("operator", "list", "--json").json()
               if row["name"] == name)  # fmt: skip
    assert (row["role"], row["union"], row["has_token"], row["disabled"]) == (
        *("operator", "dongsi"),
        *(True, False),
    )
    assert token not in service.sale("operator", "list").out
    assert service.sale("operator", "disable", name, "--json").status == 0
    assert "disabled" in one_line(service.sale("operator", "token", name))
    for step in ("disable", "token"):
        assert "nobody-x" in one_line(service.sale("operator", step, "nobody-x"))


def test_audit_and_doctor_approve_a_sound_system(service: Service, made: str) -> None:
    audit = service.sale("audit", made, "--json")
    assert audit.status == 0
    report = audit.json()
    assert list(report) == ["clean", "checked_at", "campaigns"]
    assert report["clean"]
    assert [(c["id"], c["clean"], c["findings"]) for c in report["campaigns"]] == [(made, True, [])]
    assert "clean" in service.sale("audit").out

    doctor = service.sale("doctor", "--json")
    assert doctor.status == 0
    assert re.fullmatch(r"(Redis|Valkey) \d+\.\d+\.\d+", doctor.json()["redis_version"])
    assert doctor.json()["faults"] == []
    assert "durability" in service.sale("doctor").out


def test_recover_of_a_sound_campaign_exits_0(service: Service, made: str) -> None:
    for words in ([], ["--dry-run"]):
        ran = service.sale("recover", made, *words, "--json")
        assert ran.status == 0, ran
        assert not ran.json()["changed"]


def test_migrate_has_nothing_to_do_on_a_current_schema(service: Service) -> None:
    assert service.sale("migrate", "--json").json() == {"applied": []}


def test_migrate_accepts_an_address_for_metrics(service: Service) -> None:
    ran = service.sale("migrate", "--metrics-listen", "127.0.0.1:0", "--json")
    assert (ran.status, ran.json()) == (0, {"applied": []})
    assert "nothing is served" in " ".join(command("migrate", "--help").out.split())


def test_address_in_use_is_one_line_of_each_part(service: Service, tmp_path: Path) -> None:
    unused = str(tmp_path / "data")  # a directory in use is told before the address
    with socket.create_server(("127.0.0.1", 0)) as other:
        busy, free = f"127.0.0.1:{other.getsockname()[1]}", "127.0.0.1:0"
        for words in (
            ["up", "--data-dir", unused, "--listen", busy, "--metrics-listen", free],
            ["up", "--data-dir", unused, "--listen", free, "--metrics-listen", busy],
            ["serve", "--listen", busy, "--metrics-listen", free],
            ["serve", "--listen", free, "--metrics-listen", busy],
            ["writer", "--metrics-listen", busy],
            ["scheduler", "--metrics-listen", busy],
            ["keeper", "--metrics-listen", busy],
        ):
            ran = service.sale(*words)
            # A part that serves already logs its begin and end; the error is one line all the same.
            lines = [line for line in ran.err.splitlines() if not line.startswith("{")]
            says = one_line(ran._replace(err="\n".join(lines)))
            assert busy in says, words
            assert "in use" in says.lower(), words
            option = words[words.index(busy) - 1]
            assert f"choose another with {option} (port 0: a free one)" in says


def test_console_script_behaves_as_in_this_process(service: Service, tmp_path: Path) -> None:
    """As a person runs it: ``python -m sale`` from elsewhere, with a reader that goes away."""
    listed = service.run("campaign", "list", "--json", cwd=tmp_path)
    assert (listed.returncode, listed.stderr) == (0, b"")
    json.loads(listed.stdout)
    unknown = service.run("campaign", "show", "nothing-there", cwd=tmp_path)
    assert unknown.returncode == 1
    assert (unknown.stdout, len(unknown.stderr.splitlines())) == (b"", 1)
    piped = subprocess.run(
        f"{sys.executable} -m sale cards sample 100000 | head -1",
        shell=True,
        cwd=tmp_path,
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert piped.stdout == "card_no,name,union,phone,pin,status\n"
    assert piped.stderr == ""


def test_commands_beside_a_running_system_are_quick(service: Service) -> None:
    started = time.monotonic()
    assert service.sale("campaign", "list").status == 0
    assert time.monotonic() - started < 5


async def test_command_line_and_api_show_the_same_campaign(
    service: Service, client: Client
) -> None:
    # given
    campaign = await client.campaign(closes_at="2040-01-01T00:00:00+08:00", unions=["dongsi"])
    await client.step(campaign, "pause")  # so that the clock's opening is recorded already
    # when
    told = await service.asale("campaign", "show", campaign, "--json")
    seen = await client.get(f"{ADMIN}/{campaign}", service.admin_token)
    # then
    assert json.loads(told.out) == seen.json()
    table = (await service.asale("campaign", "show", campaign)).out
    for name, value in seen.json().items():
        if value is not None and name not in {"showings", "unions", "price_fen"}:
            assert re.search(
                rf"^{name.replace('_', ' ')} +{re.escape(str(value))}$", table, re.MULTILINE
            )
    assert re.search(r"^price +5\.00 yuan$", table, re.MULTILINE)
