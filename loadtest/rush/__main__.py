"""``python -m loadtest rush``: an open loop against a running engine, with proof.

Exit status: 0 played, proved and clean; 1 anything else (books that do not balance, a proof that
failed, a threshold of ``--fail-if`` missed, a rush that was none, see `loadtest.thresholds`, or a
generator that was itself the limit, see `loadtest.summary`); 2 bad usage, among it a run that
has no books to be compared with and is not said to be ``--unproved``.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import uvloop
from rich.console import Console

from loadtest import record as records
from loadtest.books.ledger import BooksError
from loadtest.books.proof import books_of
from loadtest.client import AnswerError
from loadtest.engine import EngineError, cancelled_by_signals
from loadtest.record import Record
from loadtest.rush.plan import Plan, RushError, Stopped, add_options, check_bounds
from loadtest.rush.play import only_loopback, play
from loadtest.rush.told import remarks, table, verdict
from loadtest.thresholds import RULES_HELP, read_rules
from loadtest.wire import ProtocolError, Unreachable
from sale.config import SettingsError

PROBLEMS: Final = (
    EngineError, RushError, AnswerError, BooksError, ProtocolError, Unreachable, SettingsError,
    ValueError, OSError,
)  # fmt: skip


class _Interrupted(Exception):  # noqa: N818 - says what it is
    """Ctrl-C or SIGTERM; the message says how far the run was."""


def parser() -> argparse.ArgumentParser:
    """The command line of ``rush``."""
    made = argparse.ArgumentParser(
        prog="python -m loadtest rush",
        description="Send purchases to a running engine in an open loop; compare all answers.",
        epilog="@FILE reads options from a file, one a line: URLs with passwords belong there.",
        fromfile_prefix_chars="@",
    )
    what = made.add_argument_group("what is bought, and by whom")
    what.add_argument("--target", required=True, metavar="http://H:P", help="the engine")
    what.add_argument("--campaign", required=True, metavar="ID")
    add_options(what, "showing quantity tokens cards signing_key_file first_card duplicate_share")
    add_options(made.add_argument_group("when"), "rate seconds arrivals seed at_opening")
    bounds = made.add_argument_group("bounds, of all processes together")
    add_options(bounds, "processes connections warm queue timeout_s retries give_up_s")
    books = made.add_argument_group("comparison with PostgreSQL, and samples of the engine")
    for name, metavar, words in (
        ("data-dir", "D", "of a running `sale up`; without options, as the settings have it"),
        ("database-url", "URL", "PostgreSQL of the engine"),
        ("redis-url", "URL", "with --database-url: audits as well"),
        ("config", "FILE", "settings, as `sale --config`"),
    ):
        books.add_argument(f"--{name}", default="", metavar=metavar, help=words)
    add_options(books, "metrics alone ledger_within_s")
    unproved = "sell without comparing the answers with PostgreSQL"
    books.add_argument(
        *("--unproved", "--no-proof"), dest="proof", action="store_false", help=unproved
    )
    out = made.add_argument_group("result")
    out.add_argument("--fail-if", action="append", default=[], metavar="RULE", help=RULES_HELP)
    out.add_argument("--name", default="", help="of the run; default: what was offered")
    out.add_argument("--out", type=Path, metavar="DIR", help="write run.json and report.html")
    out.add_argument("--json", action="store_true", help="the record on stdout, progress on stderr")
    out.add_argument("--anywhere", action="store_true", help="load other machines than this one")
    return made


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan of a command line. Raises ValueError for what cannot be."""
    address = urlsplit(options.target)
    if address.scheme != "http" or not address.hostname or address.path.strip("/"):
        raise ValueError(f"--target {options.target}: not http://HOST:PORT")
    check_bounds(options)
    if options.redis_url and not (options.database_url or options.data_dir):
        raise ValueError("--redis-url: give --database-url too")
    read_rules(options.fail_if)
    config = Path(options.config) if options.config else None
    where = books_of(options.data_dir, options.database_url, options.redis_url, config)
    if not (where.known or not options.proof):
        raise ValueError(
            "nothing to compare the answers with, so nothing was sold: give --data-dir or"
            " --database-url (or SALE_DATABASE_URL), or say --unproved to do without"
        )
    host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
    given = {name: value for name, value in vars(options).items() if name in Plan.__struct_fields__}
    name = f"{options.arrivals}, {options.rate:,g}/s, {options.seconds:g} s"
    return Plan(
        **given
        | {
            "name": options.name or name,
            "target": f"{host}:{address.port or 80}",
            "fail_if": tuple(options.fail_if),
            "books": where,
        }
    )


async def _rush(options: argparse.Namespace, plan: Plan, console: Console) -> Record:
    cancelled_by_signals()
    if not options.anywhere and (why := only_loopback(plan.target)):
        raise RushError(f"{why}: say --anywhere if it is yours to load")

    def note(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    try:
        return await play(plan, note)
    except Stopped as stopped:
        offered, answered = stopped.args
        raise _Interrupted(
            f"stopped: {offered:,} members offered and {answered:,} answers, as last counted;"
            " the orders made were not checked"
        ) from None
    except asyncio.CancelledError:
        raise _Interrupted("stopped; orders made, if any, were not checked") from None


def main() -> None:
    """Run the command line; exit status as the module says."""
    made = parser()
    options = made.parse_args()
    try:
        plan = plan_of(options)
    except ValueError as error:
        made.error(str(error))
    console = Console(stderr=True)
    unwritten = ""
    try:
        if options.out is not None:
            records.make_folder(options.out)
        record = uvloop.run(_rush(options, plan, console))
        if options.out is not None:
            unwritten = _write(options.out, record)
    except PROBLEMS as error:
        print(f"rush: {error or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError, _Interrupted) as error:
        print(f"rush: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    if options.out is not None and not unwritten:
        console.print(f"report: {options.out / records.REPORT_NAME}", highlight=False)
    if options.json:
        sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    else:
        Console().print(table(record))
    for line in remarks(record):
        print(f"rush: note: {line}", file=sys.stderr)
    why = verdict(record, proof_wanted=plan.proof) + [unwritten] * bool(unwritten)
    for line in why:
        print(f"rush: {line}", file=sys.stderr)
    sys.exit(1 if why else 0)


def _write(folder: Path, record: Record) -> str:
    """Write record and report; say why not, or nothing: the run is told all the same."""
    from loadtest.report.page import keep

    try:
        keep(folder, record)
    except OSError as error:
        return f"--out {folder}: not written: {error.strerror or error}"
    return ""


if __name__ == "__main__":
    main()
