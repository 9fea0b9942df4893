"""``python -m loadtest report RUN.json [OTHER.json] [--out FILE]``: a record as one HTML file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest import record as records
from loadtest.record import RecordError
from loadtest.report.page import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """``report``: make the HTML of one or two records. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest report",
        description="Make one HTML file of a run's record, or of two side by side.",
    )
    parser.add_argument("run", type=Path, metavar="RUN.json", help="record, or its folder")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER.json", help="a second one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside RUN.json")
    given = parser.parse_args(argv)
    run = _record_file(given.run)
    out: Path = given.out or run.with_suffix(".html")
    try:
        first = records.read(run)
        second = None if given.other is None else records.read(_record_file(given.other))
        write_report(out, first, second)
    except RecordError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"report: cannot write {out}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(out)
    return 0


def _record_file(given: Path) -> Path:
    return given / records.RECORD_NAME if given.is_dir() else given


if __name__ == "__main__":
    sys.exit(main())
