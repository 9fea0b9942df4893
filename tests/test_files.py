"""Each read of a file that people name is bounded, and each error is one line that names it."""

import os
import threading
import time
from pathlib import Path

import pytest
from service import Ran, Service, command

from loadtest.bench.compare import Comparison
from loadtest.crowd.setup import SetupError, operator_token
from loadtest.members import read_members
from loadtest.record import RecordError
from loadtest.record import read as read_record
from loadtest.rush.arrivals import ArrivalsError, recorded
from loadtest.rush.asks import Asks, AsksError, Load
from sale import config
from sale.config import SettingsError
from sale.domain.campaign_file import InvalidCampaign, parse_campaign_toml
from sale.domain.unions import load_unions
from sale.files import (
    SMALL_MAX_BYTES,
    UnreadableFile,
    not_utf8,
    opened_large,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_text,
    read_toml,
    shown,
)
from sale.identity import load_or_create_signing_key

READERS = {
    "bytes": read_bytes,
    "text": read_text,
    "toml": read_toml,
    "json": lambda path: read_json(path, Comparison),
    "settings": config.load,
    "unions": load_unions,
    "signing key": lambda path: load_or_create_signing_key(
        config.Settings(signing_key_file=path, database_url="postgresql://x")
    ),
    "tokens": read_members,
    "operator token": lambda path: operator_token("", str(path)),
    "record": read_record,
    "arrivals": lambda path: recorded(path, 1),
    "asks": lambda path: Asks(
        Load(address="x", campaign="c", tokens=str(path), salt="s", showings=("g",), order_max=1)
    ),
}
COMPLAINTS = (ValueError, SetupError, RecordError, SettingsError, ArrivalsError, AsksError)


def complaint(name: str, path: Path) -> str:
    with pytest.raises(COMPLAINTS) as caught:
        READERS[name](path)
    says = str(caught.value)
    assert len(says.splitlines()) == 1
    assert len(says) < 1_000
    return says


@pytest.mark.parametrize("name", READERS)
def test_directory_missing_file_or_device_is_named(name: str, tmp_path: Path) -> None:
    assert str(tmp_path) in complaint(name, tmp_path)
    assert "none.x" in complaint(name, tmp_path / "none.x")
    assert "/dev/zero" in complaint(name, Path("/dev/zero"))


@pytest.mark.parametrize(
    "name", sorted(READERS.keys() - {"asks", "bytes", "json", "record", "signing key"})
)
def test_text_that_is_not_utf8_is_refused_with_its_encoding(name: str, tmp_path: Path) -> None:
    file = tmp_path / "odd"
    file.write_bytes('a = "五元看大片"'.encode("utf-16"))
    assert any(word in complaint(name, file) for word in ("UTF-16", "not UTF-8"))


def test_pipe_without_a_writer_is_refused_in_time(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    started = time.monotonic()
    with pytest.raises(UnreadableFile, match="does not end within"):
        read_bytes(pipe, within_s=0.2)
    with (
        pytest.raises(UnreadableFile, match="no data for"),
        opened_large(pipe, most=100, within_s=9, silence_s=0.2),
    ):
        pass
    assert time.monotonic() - started < 5
    assert "is not a regular file" in complaint("asks", pipe)


def test_device_is_refused_without_copying_it() -> None:
    for device in ("/dev/zero", "/dev/null"):
        with (
            pytest.raises(UnreadableFile, match="is a device"),
            opened_large(Path(device), most=1 << 30, within_s=9),
        ):
            pass


def test_pipe_with_writer_is_read_to_its_end(tmp_path: Path) -> None:
    pipe, text = tmp_path / "pipe", b"x" * 200_000
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text,))
    writer.start()
    with opened_large(pipe, most=300_000, within_s=30) as source:
        assert (source.stream.read(), source.size) == (text, len(text))
    writer.join()


def test_file_larger_than_its_bound_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(b"#" * (SMALL_MAX_BYTES + 1))
    with pytest.raises(UnreadableFile, match="is larger than 256 kB"):
        read_toml(file)
    file.write_bytes(b"#" * SMALL_MAX_BYTES)
    assert read_toml(file) == {}
    with (
        pytest.raises(UnreadableFile, match="is larger than"),
        opened_large(file, most=1_000, within_s=9),
    ):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "{a = " * 20_000 + "1" + "}" * 20_000,
        ".".join(["a"] * 100_000) + " = 1",
        "[" + " . ".join(['"a"'] * 20_000) + "]",
        "x = {" + ".".join(["a"] * 100_000) + " = 1}",
        "a = " + "9" * 5_000,
        "= nothing",
    ],
    ids=["arrays", "tables", "dotted", "header", "inline", "digits", "plain"],
)
def test_odd_toml_is_refused_at_once_in_one_line(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="not TOML") as caught:
        parse_toml(text)
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - started < 5
    with pytest.raises(InvalidCampaign, match="not TOML"):
        parse_campaign_toml(text, frozenset())


def test_error_about_a_long_name_or_value_is_short(tmp_path: Path) -> None:
    file = tmp_path / "sale.toml"
    for text in (
        "k" * 200_000 + " = 1",
        'workers = "' + "x" * 200_000 + '"',
        'listen = "' + "x" * 200_000 + '"',
        "workers = " + "[" * 200 + "]" * 200,
    ):
        file.write_text(text)
        assert "sale.toml" in complaint("settings", file)
    for text in ("k" * 200_000 + " = 1", "".join(f"k{n} = 1\n" for n in range(9_000))):
        with pytest.raises(InvalidCampaign) as caught:
            parse_campaign_toml(text, frozenset())
        assert len(str(caught.value)) < 2_000


def test_deep_json_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 200_000)
    file = tmp_path / "deep"
    file.write_bytes(b'{"x":' + b"[" * 100_000)
    for name in ("json", "tokens", "record", "asks"):
        assert str(file) in complaint(name, file)


def test_toml_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "sale.toml"
    file.write_bytes(b"\xef\xbb\xbfworkers = 3\n")
    assert config.load(file, {}).workers == 3
    assert parse_toml("\ufeffa = 1") == {"a": 1}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("card_no,张".encode("utf-16"), "is UTF-16,"),
        ("card_no,name,张伟".encode("utf-16-le"), "is UTF-16 without"),
        ("card_no,name,张伟".encode("utf-16-be"), "is UTF-16 without"),
        ("card_no,张伟,㐀𠮷".encode("gb18030"), "byte 9: it reads as GBK"),
        ("card_no,张伟".encode("gbk")[:-1], "it reads as GBK"),
        (b"card_no,\xff", "is not UTF-8 at byte 9"),
        (b"a\x00b", "is no text: byte 2 is NUL"),
        (b"PK\x03\x04", "workbook"),
        (b"\xef\xbb\xbf" + "张𠮷\ue863".encode(), None),
        (b"", None),
    ],
)
def test_encoding_of_non_utf8_bytes_is_named(raw: bytes, says: str | None) -> None:
    told = not_utf8(raw)
    assert says in told if told and says else told is says


def test_path_that_is_not_utf8_can_be_printed_and_stored() -> None:
    path = Path(os.fsdecode(b"/a/\xff\n\x1b[31m\xe4\xba\x94"))
    assert shown(path) == "/a/\\xff\\x0a\\x1b[31m五"
    shown(path).encode()


@pytest.mark.parametrize("words", [["campaign", "create"], ["cards", "import"], ["doctor"]])
def test_commands_refuse_odd_files_in_one_line(
    service: Service, tmp_path: Path, words: list[str]
) -> None:
    odd = tmp_path / os.fsdecode(b"odd-\xff")
    for content, says in (
        ("五元看大片".encode("utf-16"), "UTF-16"),
        (b"a = " + b"[" * 99_000, "header" if words[0] == "cards" else "nested too deeply"),
        (b"PK\x03\x04", "workbook"),
    ):
        odd.write_bytes(content)
        for file in (odd, Path("/dev/zero"), tmp_path):
            option = ["--config", file] if words == ["doctor"] else [file]
            ran: Ran = service.sale(*words, *option)
            assert ran.status == 1, (ran, content[:9])
            assert len(ran.err.strip().splitlines()) == 1, ran.err[:2_000]
            assert len(ran.err) < 1_000
            if file is odd:
                assert says in ran.err + ran.out, ran
                assert "odd-\\xff" in ran.err
    assert command("doctor", "--config", "/dev/null", data_dir=tmp_path).status == 1
