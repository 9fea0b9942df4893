"""``python -m loadtest.books``: the check of the books, of a file of answers."""

import argparse
import asyncio
import sys
from pathlib import Path

from loadtest.books.answers import read_answers
from loadtest.books.check import check, so_many
from loadtest.books.ledger import BooksError, highest, load_books, wait_applied
from loadtest.engine import EngineError, find_database
from loadtest.record import Finding


async def _main(options: argparse.Namespace) -> list[Finding]:
    answers = read_answers(options.answers)
    url = options.database_url or find_database(options.data_dir)
    await wait_applied(url, options.campaign, highest(answers))
    return check(answers, await load_books(url, options.campaign), alone=options.alone)


def main() -> None:
    """Check a file of answers; exit 0 clean, 1 with findings, 3 where it cannot be checked."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.books", description="Compare clients' answers with PostgreSQL."
    )
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines, one an answer")
    parser.add_argument("--campaign", required=True)
    parser.add_argument("--alone", action="store_true", help="nobody else bought")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--database-url")
    where.add_argument("--data-dir", type=Path, help="of a running sale up")
    try:
        findings = asyncio.run(_main(parser.parse_args()))
    except (BooksError, EngineError, ValueError) as error:
        print(f"books: {error}", file=sys.stderr)
        sys.exit(3)
    for finding in findings:
        print(f"{finding.kind}: {finding.what}")
    print(f"books: {so_many(findings)}" if findings else "books: clean")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
