"""Files that people name: one guarded reader for settings, campaigns, rosters, tokens.

Every read has a bound of size and of time, so that a device, a pipe that nobody writes to, or a
file without an end is refused in one clear line. A pipe is opened without blocking and polled;
Python's ``open`` would wait in the kernel for a writer, where no time limit of ours reaches.
"""

import contextlib
import os
import re
import select
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import msgspec

STDIN: Final = Path("-")
SMALL_MAX_BYTES: Final = 256 << 10
"""Bound of files that are written by hand: settings, campaigns, unions."""

LARGE_MAX_BYTES: Final = 512 << 20
"""Bound of files that programs write: tokens, records of a run, recorded arrivals."""

SILENCE_S: Final = 30.0
"""How long a pipe may say nothing."""

WITHIN_S: Final = 60.0
"""How long a small file may take as a whole."""

KEY_PARTS_MAX: Final = 64
"""Parts of a dotted TOML key; ``tomllib`` needs time in the square of them."""

VALUE_SHOWN_MAX: Final = 80


class UnreadableFile(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A file cannot be read; the message is one line that names it and says why."""


class MissingFile(UnreadableFile):
    """There is no such file."""


class Source(NamedTuple):
    """An open file of any size, to be read from its beginning, and its size in bytes."""

    stream: BinaryIO
    size: int
    name: str


def shown(path: Path | str) -> str:
    """Give a path as it may be printed and stored.

    A name that is not UTF-8 keeps its odd bytes as ``\\xff``; control characters are escaped too.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(_escaped(character) for character in text)


def brief(value: object) -> str:
    """Give a value as it may stand in a complaint: its ``repr``, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= VALUE_SHOWN_MAX else f"{text[: VALUE_SHOWN_MAX - 1]}…"


def read_bytes(path: Path, *, most: int = SMALL_MAX_BYTES, within_s: float = WITHIN_S) -> bytes:
    """Read a whole file of at most ``most`` bytes. Raises UnreadableFile."""
    with _opened(path) as descriptor:
        return b"".join(_parts(descriptor, shown(path), most, within_s))


def read_text(path: Path, *, most: int = SMALL_MAX_BYTES) -> str:
    """Read a text in UTF-8, with or without a byte order mark. Raises UnreadableFile."""
    raw = read_bytes(path, most=most)
    wrong = not_utf8(raw)
    if wrong is not None:
        raise UnreadableFile(f"{shown(path)}: {wrong}")
    return raw.decode().removeprefix("\ufeff")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UnreadableFile."""
    text = read_text(path)
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UnreadableFile(f"{shown(path)}: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML document. Raises ValueError in one line."""
    if _LONG_KEY.search(text):
        raise ValueError(f"not TOML: a key of more than {KEY_PARTS_MAX} parts")
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("not TOML: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and a number of thousands of digits
        raise ValueError(f"not TOML: {error}") from None


def read_json(path: Path, type_: Any, *, most: int = SMALL_MAX_BYTES) -> Any:  # noqa: ANN401
    """Read a JSON file as a type that msgspec knows. Raises UnreadableFile."""
    raw = read_bytes(path, most=most)
    try:
        return parse_json(raw, type_)
    except ValueError as error:
        raise UnreadableFile(f"{shown(path)}: {error}") from None


def parse_json(raw: bytes, type_: Any = Any) -> Any:  # noqa: ANN401 - any type that msgspec knows
    """Decode JSON as a type. Raises ValueError in one line."""
    try:
        return msgspec.json.decode(raw, type=type_)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"JSON is not UTF-8 at byte {error.start + 1}") from None


@contextlib.contextmanager
def opened_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file that must be a regular one, as it is mapped or read twice.

    Raises UnreadableFile.
    """
    with _opened(path) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableFile(f"{shown(path)}: is not a regular file")
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            yield stream


@contextlib.contextmanager
def opened_large(
    path: Path, *, most: int, within_s: float, silence_s: float = SILENCE_S
) -> Iterator[Source]:
    """Open a file of up to ``most`` bytes; ``-`` is stdin.

    What is no regular file is first copied, whole, to a temporary file that has no name: its reader
    can then hold a transaction open without waiting for a pipe. Raises UnreadableFile.
    """
    name = "stdin" if path == STDIN else shown(path)
    with _opened(path) as descriptor:
        about = os.fstat(descriptor)
        if path != STDIN and stat.S_ISREG(about.st_mode) and about.st_size:
            if about.st_size > most:
                raise _too_large(name, most)
            with os.fdopen(os.dup(descriptor), "rb") as stream:
                yield Source(stream, about.st_size, name)
            return
        if stat.S_ISCHR(about.st_mode) and not os.isatty(descriptor):
            raise UnreadableFile(f"{name}: is a device, not a file")
        with tempfile.TemporaryFile() as copy:
            for part in _parts(descriptor, name, most, within_s, silence_s):
                try:
                    copy.write(part)
                except OSError as error:
                    raise UnreadableFile(f"{name}: cannot be kept: {error.strerror}") from None
            size = copy.tell()
            copy.seek(0)
            yield Source(copy, size, name)


def not_utf8(raw: bytes) -> str | None:
    """Say why bytes are no text in UTF-8, and what they are instead where that shows; else None."""
    if raw.startswith(_UTF_16_MARKS):
        return "is UTF-16, not UTF-8: save it as UTF-8"
    if raw.startswith(_WORKBOOK_MARKS):
        return "is a spreadsheet's workbook, not text: save it as CSV in UTF-8"
    even, odd = raw[0:64:2].count(0), raw[1:64:2].count(0)
    if max(even, odd) > 8 * min(even, odd) and max(even, odd) * 3 > min(len(raw), 64):
        return "is UTF-16 without a byte order mark, not UTF-8: save it as UTF-8"
    if b"\x00" in raw:
        return f"is no text: byte {raw.index(0) + 1} is NUL"
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        says = f"is not UTF-8 at byte {error.start + 1}"
        return f"{says}: it reads as GBK or GB18030, save it as UTF-8" if _is_gbk(raw) else says
    return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file without waiting, for reading. Raises UnreadableFile for what cannot be read."""
    try:
        descriptor = (
            os.dup(0)
            if path == STDIN
            else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        )
    except OSError as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else UnreadableFile
        raise kind(f"{shown(path)}: {error.strerror}") from None
    except ValueError as error:  # NUL in a name that a settings file gave
        raise UnreadableFile(f"{shown(path)}: {error}") from None
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise UnreadableFile(f"{shown(path)}: is a directory")
        yield descriptor
    finally:
        os.close(descriptor)


def _parts(
    descriptor: int, name: str, most: int, within_s: float, silence_s: float = SILENCE_S
) -> Iterator[bytes]:
    """Read to the end, within the bounds. Raises UnreadableFile."""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    ends_at, seen = time.monotonic() + within_s, 0
    if os.isatty(descriptor):
        silence_s = within_s
    while True:
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            raise UnreadableFile(f"{name}: has no end after {within_s:.0f} s")
        if not ready.poll(min(left_s, silence_s) * 1000):
            if silence_s < left_s:
                raise UnreadableFile(f"{name}: nothing came for {silence_s:.0f} s")
            continue
        try:
            part = os.read(descriptor, _PART_BYTES)
        except BlockingIOError:
            continue
        except OSError as error:
            raise UnreadableFile(f"{name}: {error.strerror}") from None
        if not part:
            return
        seen += len(part)
        if seen > most:
            raise _too_large(name, most)
        yield part


def _too_large(name: str, most: int) -> UnreadableFile:
    size = f"{most >> 20} MB" if most >= 1 << 20 else f"{most >> 10} kB"
    return UnreadableFile(f"{name}: is larger than {size}")


def _is_gbk(raw: bytes) -> bool:
    """Whether bytes read as Chinese in GB18030, of which GBK and GB2312 are parts."""
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError as error:
        if error.end < len(raw):  # a piece of a longer text may be cut amid a character
            return False
        text = raw[: error.start].decode("gb18030")
    wide = [character for character in text if character > "\x7f"]
    return bool(wide) and all(
        "\u3000" <= character <= "\uffee" or character >= "\U00020000" for character in wide
    )


def _escaped(character: str) -> str:
    if character.isprintable() or character > "\xff":
        return character
    return f"\\x{ord(character):02x}"


_PART_BYTES: Final = 1 << 20
_UTF_16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_WORKBOOK_MARKS: Final = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
_KEY_PART: Final = r"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+"""
# Begins at the beginning of a word, so that a long word is not looked at from each of its letters.
_LONG_KEY: Final = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_KEY_PART}\.[ \t]*+){{{KEY_PARTS_MAX}}}")
