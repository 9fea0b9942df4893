"""Output at a terminal and elsewhere: nothing is cut, and every character can be written."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import pytest
from service import PAST, ROOT, Service, command
from test_cli import CAMPAIGN, one_line

from sale.cli.terminal import echo_table, progress


def at_terminal(service: Service, columns: int, *words: str) -> str:
    """Give the output of a command to a terminal of ``columns`` columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "sale", *words],
        env={**service.environment(TERM="xterm"), "COLUMNS": "", "NO_COLOR": "1"},
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert child.wait(60) == 0, seen
    return seen.decode()


def write_campaign(folder: Path, identifier: str, title: str = "五元看大片") -> Path:
    file = folder / "campaign.toml"
    text = CAMPAIGN.format(id=identifier, more=f"opens_at = {PAST}")
    file.write_text(text.replace("五元看大片", title), "utf-8")
    return file


def test_ids_and_times_are_not_cut_at_any_width(service: Service, tmp_path: Path) -> None:
    identifier = (service.new_id("wide") + "-" + "x" * 48)[:48]
    title = "一个很长的标题" * 20
    made = service.sale("campaign", "create", write_campaign(tmp_path, identifier, title))
    assert made.status == 0, made
    for seen in (
        at_terminal(service, 80, "campaign", "list"),
        at_terminal(service, 30, "campaign", "list"),
        service.sale("campaign", "list").out,
    ):
        row = next(line for line in seen.splitlines() if identifier in line)
        assert "2020-01-01T00:00:00.000+08:00" in row
        assert "…" not in seen
    assert title in service.sale("campaign", "list").out
    assert identifier in at_terminal(service, 80, "doctor")
    assert identifier in at_terminal(service, 80, "audit", identifier)


def test_table_does_not_cut_a_single_word(capsys: pytest.CaptureFixture[str]) -> None:
    word = "a" * 64
    echo_table(("id", "why"), [(word, "一" * 300), ("", None)], title="[Title]")
    out = capsys.readouterr().out
    assert word in out
    assert "一" * 300 in out


@pytest.mark.parametrize(
    "more",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "latin-1", "C"],
)
def test_command_succeeds_if_output_cannot_be_encoded(
    service: Service, tmp_path: Path, more: dict[str, str]
) -> None:
    file = write_campaign(tmp_path, service.new_id("enc"), "五元看大片 𠮷 é")
    made = service.run("campaign", "create", file, "--as", "wang", **more)
    assert (made.returncode, made.stderr.count(b"\n")) == (0, 1), made
    listed = service.run("campaign", "list", "--json", **more)
    assert listed.returncode == 0
    assert "五元看大片 𠮷 é" in {each["title"] for each in json.loads(listed.stdout)}
    assert service.run("campaign", "list", **more).returncode == 0
    sampled = service.run("cards", "sample", "3", **more)
    assert sampled.stdout.decode("utf-8") == service.sale("cards", "sample", 3).out
    refused = service.run("campaign", "show", "没有", **more)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)


def test_help_explains_shell_completion(service: Service) -> None:
    assert "_SALE_COMPLETE=bash_source" in command("--help").out
    told = service.run(_SALE_COMPLETE="bash_source")
    assert b"_sale_completion" in told.stdout
    assert "_SALE_COMPLETE" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "words",
    [
        ["campaign", "add-stock", "x", "general", "-5", "--reason", "r"],
        ["campaign", "add-stock", "x", "general", "--reason", "r", "-5"],
        ["cards", "sample", "-5"],
        ["cards", "show", "-5"],
    ],
)
def test_negative_number_is_refused_as_such(words: list[str]) -> None:
    assert "-5: a number below zero" in one_line(command(*words), status=2)
    assert "--nope" in one_line(command(*words[:2], "--nope"), status=2)


def test_audit_of_unknown_campaign_is_bad_usage(service: Service) -> None:
    assert "nothing-there" in one_line(service.sale("audit", "nothing-there"), status=2)
    assert "2 no such campaign" in " ".join(command("audit", "--help").out.split())


def test_piped_rehearsal_names_only_missing_options(service: Service, tmp_path: Path) -> None:
    identifier = service.new_id("piped")
    assert service.sale("campaign", "create", write_campaign(tmp_path, identifier)).status == 0
    words = ("rehearse", identifier, "--cards", 2, "--beside-real-sales")
    target = ("--target", service.url.removeprefix("http://"))
    for given, lacks in (
        ((), "give --reason R and --yes"),
        (("--reason", "r"), "give --yes"),
        (("--yes",), "give --reason R"),
    ):
        ran = service.run(*words, *target, *given)
        assert ran.returncode == 2, ran
        assert ran.stderr.decode().rstrip().endswith(lacks), ran


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("importing", every_s=0.05) as move:
        move(3, 9, "reading")
        time.sleep(0.3)
    err = capsys.readouterr().err
    assert len(err.splitlines()) >= 2
    assert err.splitlines()[-1].startswith("importing: reading, 3 of 9, ")
    with progress("quick") as move:
        move(1, 1, "")
    assert capsys.readouterr().err == ""


def test_documents_say_how_long_slow_commands_take() -> None:
    operations = (ROOT / "docs/OPERATIONS.md").read_text("utf-8")
    section = operations.partition("## How long commands take")[2].partition("\n## ")[0]
    for words in ("cards import", "cards sample", "tokens", "audit", "recover", "rehearse", "up"):
        assert f"`sale {words}" in section, words


def test_every_command_is_listed_without_being_cut() -> None:
    from sale.cli.main import sale

    context = click.Context(sale, info_name="sale")
    for name in sale.list_commands(context):
        found = sale.get_command(context, name)
        assert found is not None
        assert found.get_short_help_str(66).endswith("."), name
        assert not found.get_short_help_str(66).endswith("..."), name
