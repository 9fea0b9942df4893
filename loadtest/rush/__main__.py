"""``python -m loadtest rush``: an open loop against a running engine, with proof.

Exit status: 0 played, proved and clean; 1 anything else (books that do not balance, a proof that
failed, a threshold of ``--fail-if`` missed, a rush that was none, see `loadtest.thresholds`, or a
generator that was itself the limit, see `loadtest.summary`); 2 bad usage, among it a run that
has no books to be compared with and is not said to be ``--unproved``.
"""

import argparse
import asyncio
import math
import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest import record as records
from loadtest.books.check import so_many
from loadtest.books.ledger import BooksError
from loadtest.books.proof import books_of
from loadtest.client import AnswerError
from loadtest.engine import EngineError, cancelled_by_signals
from loadtest.record import Percentile, Record
from loadtest.rush.play import Plan, RushError, Stopped, only_loopback, play
from loadtest.summary import TOLD_SHARES
from loadtest.thresholds import RULES_HELP, missed, read_rules, told_outcome
from loadtest.wire import ProtocolError, Unreachable
from sale.config import SettingsError

PROBLEMS: Final = (
    EngineError, RushError, AnswerError, BooksError, ProtocolError, Unreachable, SettingsError,
    ValueError, OSError,
)  # fmt: skip
FINDINGS_SHOWN: Final = 20
WAITED_SHARE: Final = 0.01
_DEFAULT: Final = Plan(target="", campaign="")
_LEAST: Final = 0.001
_NUMBERS: Final = (
    ("duplicate_share", 0, 1), ("retries", 0, 101), ("connections", 1, math.inf),
    ("queue", 1, math.inf), ("warm", 0, math.inf), ("timeout", _LEAST, math.inf),
    ("give_up", _LEAST, math.inf), ("cards", 0, math.inf), ("first_card", 0, 10**12),
    ("rate", _LEAST, math.inf), ("seconds", _LEAST, math.inf), ("ledger_within", _LEAST, math.inf),
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
    what.add_argument("--showing", default="", metavar="ID", help="default: all in turn")
    what.add_argument("--quantity", type=int, default=1, help="tickets; 0 mixes 1 to 3")
    what.add_argument("--tokens", default="", metavar="FILE", help="as `sale tokens` writes it")
    what.add_argument(
        "--cards", type=int, default=0, help="distinct cards; default: all of the file, or minted"
    )
    what.add_argument(
        "--signing-key-file", default="", metavar="FILE", help="mint tokens (no --tokens)"
    )
    what.add_argument("--first-card", type=int, default=1, help="count minted cards from here")
    what.add_argument(
        "--duplicate-share",
        type=float,
        default=0.0,
        help="share of members that send their request twice, 0 to 1",
    )
    _when(made.add_argument_group("when"))
    _bounds(made.add_argument_group("bounds, of all processes together"))
    books = made.add_argument_group("comparison with PostgreSQL, and samples of the engine")
    books.add_argument(
        "--data-dir",
        default="",
        metavar="D",
        help="of a running `sale up`; without options, as the engine's settings have it",
    )
    books.add_argument("--database-url", default="", help="PostgreSQL of the engine")
    books.add_argument("--redis-url", default="", help="with --database-url: audits as well")
    books.add_argument("--config", type=Path, metavar="FILE", help="settings, as `sale --config`")
    books.add_argument("--metrics", default="", metavar="H:P", help="default: by --data-dir")
    books.add_argument(
        "--alone",
        action="store_true",
        help="nobody else buys and no ticket returns: check that too",
    )
    books.add_argument(
        *("--unproved", "--no-proof"),
        dest="no_proof",
        action="store_true",
        help="sell without comparing the answers with PostgreSQL",
    )
    books.add_argument("--ledger-within", type=float, default=_DEFAULT.ledger_within_s, metavar="S")
    out = made.add_argument_group("result")
    out.add_argument("--fail-if", action="append", default=[], metavar="RULE", help=RULES_HELP)
    out.add_argument(
        "--name", default="", help="of the run, in record and report; default: what was offered"
    )
    out.add_argument("--out", type=Path, metavar="DIR", help="write run.json and report.html")
    out.add_argument("--json", action="store_true", help="the record on stdout, progress on stderr")
    out.add_argument("--anywhere", action="store_true", help="load other machines than this one")
    return made


def _when(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--rate", type=float, default=_DEFAULT.rate, help="members a second")
    group.add_argument("--seconds", type=float, default=_DEFAULT.seconds)
    group.add_argument(
        "--arrivals",
        default=_DEFAULT.arrivals,
        metavar="KIND",
        help="constant, poisson, release, or file:PATH (offsets, or CSV t,count); default poisson",
    )
    group.add_argument("--seed", type=int, default=_DEFAULT.seed, help="of all random choices")
    group.add_argument(
        "--at-opening", action="store_true", help="start at the opening, by the engine's clock"
    )


def _bounds(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--processes", type=int, default=_DEFAULT.processes)
    group.add_argument("--connections", type=int, default=_DEFAULT.connections)
    group.add_argument(
        "--warm",
        type=int,
        default=_DEFAULT.warm,
        help="opened before the start; default: the busiest 0.1 s",
    )
    group.add_argument(
        "--queue", type=int, default=_DEFAULT.queue, help="members that may wait for a connection"
    )
    group.add_argument("--timeout", type=float, default=_DEFAULT.timeout_s, metavar="S")
    group.add_argument("--retries", type=int, default=_DEFAULT.retries, help="0 to 100")
    group.add_argument(
        "--give-up",
        type=float,
        default=_DEFAULT.give_up_s,
        metavar="S",
        help="seconds after which a member gives up",
    )


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan of a command line. Raises ValueError for what cannot be."""
    address = urlsplit(options.target)
    if address.scheme != "http" or not address.hostname or address.path.strip("/"):
        raise ValueError(f"--target {options.target}: not http://HOST:PORT")
    _check_numbers(options)
    if options.redis_url and not (options.database_url or options.data_dir):
        raise ValueError("--redis-url: give --database-url too")
    read_rules(options.fail_if)
    where = books_of(options.data_dir, options.database_url, options.redis_url, options.config)
    if not (where.known or options.no_proof):
        raise ValueError(
            "nothing to compare the answers with, so nothing was sold: give --data-dir or"
            " --database-url (or SALE_DATABASE_URL), or say --unproved to do without"
        )
    host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
    same = ("campaign", "arrivals", "rate", "seconds", "seed", "tokens", "cards")
    more = ("first_card", "quantity", "showing", "duplicate_share", "connections", "queue", "warm")
    rest = ("processes", "retries", "at_opening", "alone", "metrics")
    return Plan(
        **{name: getattr(options, name) for name in (*same, *more, *rest)},
        name=options.name or f"{options.arrivals}, {options.rate:,g}/s, {options.seconds:g} s",
        target=f"{host}:{address.port or 80}",
        key_file=options.signing_key_file,
        config=str(options.config or ""),
        fail_if=tuple(options.fail_if),
        timeout_s=options.timeout,
        give_up_s=options.give_up,
        proof=not options.no_proof,
        ledger_within_s=options.ledger_within,
        books=where,
    )


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least, below in _NUMBERS:
        given = getattr(options, name)
        if not least <= given < below:
            most = f" and below {below:g}" if below < math.inf else ""
            raise ValueError(f"--{name.replace('_', '-')} {given:g}: from {least:g}{most}")


def verdict(record: Record, *, proof_wanted: bool) -> list[str]:
    """Why a run does not count, a line each; none for a run that does."""
    why = []
    if record.not_played:
        why.append(f"the rush did not happen: {record.not_played}")
    if record.bottleneck:
        why.append(f"not reported, the generator itself was the limit: {record.bottleneck}")
    if record.not_proved:
        why.append(f"not proved: {record.not_proved}")
    elif proof_wanted and record.proof is None:
        why.append("not proved: give --data-dir or --database-url, or say --unproved to do without")
    if record.proof is not None and not record.proof.clean:
        why.append(f"the books do not balance: {so_many(record.proof.findings)}")
    return why + missed(record)


def remarks(record: Record) -> list[str]:
    """What a reader must know of a run that counts all the same, a line each."""
    lines = list(record.notes)
    waited, bound = record.plan.get("waited for a connection", 0), record.plan.get("connections")
    if isinstance(waited, int) and waited > WAITED_SHARE * record.offered:
        lines.append(
            f"{waited:,} waits for a connection, all {bound:,} were taken: the server never had"
            " more requests at once, and the wait counts as latency; raise --connections to press"
            " harder"
        )
    return lines


def table(record: Record) -> Table:
    """The run for people. Latencies are left out where they are not the server's."""
    made = Table(title=f"{record.name}: {record.campaign}", title_style="bold", show_header=False)
    made.add_column()
    made.add_column(justify="right")
    made.add_row("members offered", f"{record.offered:,} ({record.offered_rate:,.0f}/s)")
    made.add_row("requests sent, with repeats", f"{record.sent:,}")
    made.add_row("answers", f"{record.answered:,}")
    if not record.bottleneck:
        made.add_row("members settled a second", f"{record.achieved_rate:,.0f}")
    made.add_section()
    for code, count in sorted(record.outcomes.items(), key=lambda item: -item[1]):
        made.add_row(told_outcome(code), f"{count:,}")
    made.add_section()
    for title, latency in (("all", record.latency), ("sold", record.latency_sold)):
        if latency:
            shown = "  ".join(f"p{share * 100:g} {at(latency, share):.1f}" for share in TOLD_SHARES)
            made.add_row(f"ms from the intended moment, {title}", shown)
    made.add_section()
    for name, value in record.plan.items():
        if " " in name:
            made.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value}")
    made.add_section()
    for each in record.thresholds:
        sign = "[red]missed[/]" if each.missed else "[green]met[/]"
        made.add_row(f"fail if {each.rule}", f"{each.got}, {sign}")
    if record.proof is None:
        made.add_section()
        made.add_row("the books", Text(_unproved(record)))
    else:
        proof = record.proof
        made.add_section()
        made.add_row("orders in the campaign, tickets", f"{proof.orders:,}, {proof.tickets:,}")
        clean = "[green]clean[/]" if proof.clean else f"[red]{so_many(proof.findings)}[/]"
        made.add_row("every answer compared with PostgreSQL", clean)
        audit = {True: "[green]clean[/]", False: "[red]findings[/]", None: "not run"}
        made.add_row("sale audit", audit[proof.audit_clean])
        for finding in proof.findings[:FINDINGS_SHOWN]:
            made.add_row(f"[red]{finding.kind}[/]", finding.what)
    return made


def _unproved(record: Record) -> str:
    if record.not_proved:
        return f"not proved: {record.not_proved}"
    return "not looked at" + " (--unproved)" * (record.plan.get("proof") == 0)


def at(latency: list[Percentile], share: float) -> float:
    """Milliseconds that at least a share of the answers stayed within."""
    return next((each.ms for each in latency if each.share >= share), 0.0)


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
