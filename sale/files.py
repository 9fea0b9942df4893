"""Read files that people name: settings, campaigns, rosters, tokens.

Every read is bounded in size and in time, so that a device, a pipe without a writer, or an endless
file is refused with one clear line. A pipe is opened without blocking and polled, because Python's
``open`` waits for a writer inside the kernel, where no time limit can interrupt it.
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
"""Largest file that people write by hand: settings, campaigns, unions."""

LARGE_MAX_BYTES: Final = 512 << 20
"""Largest file that programs write: tokens, records of a run, recorded arrivals."""

SILENCE_S: Final = 30.0
"""Longest wait for the next bytes of a pipe."""

WITHIN_S: Final = 60.0
"""Longest time to read a small file."""

KEY_PARTS_MAX: Final = 64
"""Most parts of a dotted TOML key; ``tomllib`` takes time quadratic in their number."""

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
    """Give a path in a form that can be printed and stored.

    Bytes that are not UTF-8, and control characters, are escaped as ``\\xff``.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(_escaped(character) for character in text)


def brief(value: object) -> str:
    """Give a value for an error message: its ``repr``, cut at VALUE_SHOWN_MAX characters."""
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
    """Read UTF-8 text, with or without a byte order mark. Raises UnreadableFile."""
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
    """Open a regular file, for callers that map it or read it twice. Raises UnreadableFile."""
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

    A pipe is first copied to an unnamed temporary file, so that the caller can read it inside a
    transaction without waiting. Raises UnreadableFile.
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
                    raise UnreadableFile(
                        f"{name}: cannot be copied to {tempfile.gettempdir()}: {error.strerror}"
                    ) from None
            size = copy.tell()
            copy.seek(0)
            yield Source(copy, size, name)


def not_utf8(raw: bytes) -> str | None:
    """Say why bytes are not UTF-8 text and, if it can be told, what they are; else None."""
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
    """Open a file for reading, without blocking. Raises UnreadableFile."""
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
    """Yield the file's parts to its end, within the bounds. Raises UnreadableFile."""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    ends_at, seen = time.monotonic() + within_s, 0
    if os.isatty(descriptor):
        silence_s = within_s
    while True:
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            raise UnreadableFile(f"{name}: does not end within {within_s:.0f} s")
        if not ready.poll(min(left_s, silence_s) * 1000):
            if silence_s < left_s:
                raise UnreadableFile(f"{name}: no data for {silence_s:.0f} s")
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
    """Whether bytes decode to Chinese in GB18030, which includes GBK and GB2312."""
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError as error:
        if error.end < len(raw):  # only the end of a piece may be cut within a character
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
# Matches only from the start of a word, so that a long word is not searched from each letter.
_LONG_KEY: Final = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_KEY_PART}\.[ \t]*+){{{KEY_PARTS_MAX}}}")
