"""`sale cards …` and `sale tokens`."""

import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import click
import msgspec

from sale.cli.runtime import (
    CommandContext,
    WholeNumber,
    card_number,
    command_context,
    echo,
    one_line,
    run,
)
from sale.cli.terminal import (
    as_utf8,
    echo_fields,
    echo_table,
    megabytes,
    nobody_reads,
    note,
    progress,
)
from sale.config import SettingsError
from sale.db.roster import Card
from sale.domain.clock import rfc3339, to_ms
from sale.domain.member import mask_card
from sale.domain.unions import default_unions_path, load_unions
from sale.files import Source, opened_large, shown
from sale.operators import roster
from sale.operators.roster_file import HEADER, STATUSES
from sale.operators.roster_import import (
    FILE_MAX_BYTES,
    READ_WITHIN_S,
    ImportReport,
    NamedLine,
    import_cards,
)
from sale.operators.sample_roster import SAMPLE_MAX, sample

PROGRESS_ROWS: Final = 1_000
LINES_SHOWN_MAX: Final = 5
COUNT: Final = WholeNumber(1, SAMPLE_MAX)
OUT: Final = click.Path(dir_okay=False, path_type=Path)


@click.group()
def cards() -> None:
    """The roster: who holds a card, and whose card may buy."""


@cards.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
@click.option(
    "--numbers-checked",
    is_flag=True,
    help="Take numbers that look rounded: somebody has compared them with the cards.",
)
@command_context
def import_(context: CommandContext, file: Path, *, dry_run: bool, numbers_checked: bool) -> None:
    """Import a roster file, all of it or nothing.

    FILE is CSV in UTF-8 with the header card_no,name,union,phone,pin,status; - reads it from stdin.
    Exit status 1 if a line is bad; then nothing has changed. A card that was revoked with `sale
    cards revoke` stays cancelled, whatever the file says. 182,850 cards take about ten seconds.
    """
    unions = frozenset(load_unions(default_unions_path()))
    key = context.signing_key()

    async def work(source: Source) -> ImportReport:
        async with context.pool() as pool:
            with progress("importing", megabytes) as move:
                return await import_cards(
                    pool,
                    key,
                    unions,
                    source,
                    actor=context.actor,
                    dry_run=dry_run,
                    numbers_checked=numbers_checked,
                    on_progress=lambda done, total: move(
                        done, total, "reading" if done < total else "read, now writing the roster"
                    ),
                    after_change=_after_change(context, pool, "the cards are imported"),
                )

    with opened_large(
        file, most=FILE_MAX_BYTES, within_s=READ_WITHIN_S
    ) as source:  # outside the event loop: Ctrl-C ends a wait for a pipe
        report = run(work(source))
    echo(context, report, lambda: _show_report(report))
    if report.bad_count:
        lines = "line is" if report.bad_count == 1 else "lines are"
        first = f"; line {report.bad[0].line}: {report.bad[0].reason}"
        raise click.ClickException(
            f"{source.name}: {report.bad_count} {lines} bad, nothing has changed{first}"
        )


@cards.command()
@click.argument("card_no", callback=card_number)
@click.option("--reason", required=True, help="Why, for the audit log.")
@command_context
def revoke(context: CommandContext, card_no: str, reason: str) -> None:
    """Cancel a card until `restore`, whatever a roster file says.

    The tokens of its holder end within a second.
    """
    _change(context, "the card is revoked", roster.revoke, card_no, reason=reason)


@cards.command()
@click.argument("card_no", callback=card_number)
@click.option("--reason", required=True, help="Why, for the audit log.")
@command_context
def restore(context: CommandContext, card_no: str, reason: str) -> None:
    """Make a suspended or cancelled card active again.

    The next import whose file names the card decides anew.
    """
    _change(context, "the card is active again", roster.restore, card_no, reason=reason)


@cards.command()
@click.argument("old", callback=card_number)
@click.argument("new", callback=card_number)
@click.option("--reason", required=True, help="Why, for the audit log.")
@command_context
def replace(context: CommandContext, old: str, new: str, reason: str) -> None:
    """Give the holder of card OLD the card NEW.

    Orders and limits stay the member's. The tokens of OLD end within a second, and a roster file
    that still holds OLD changes nothing for it.
    """
    _change(context, "the card is replaced", roster.replace, old, new, reason=reason)


@cards.command()
@click.argument("card_no", callback=card_number)
@command_context
def show(context: CommandContext, card_no: str) -> None:
    """Show a card and its member, with the last four digits alone."""

    async def work() -> Card:
        async with context.pool() as pool:
            return await roster.show(pool, card_no)

    _show_card(context, run(work()))


@cards.command("sample")
@click.argument("count", metavar="N", type=WholeNumber(0, SAMPLE_MAX))
@click.option(
    "--seed", type=int, default=1, show_default=True, help="The same seed, the same roster."
)
@click.option("--out", type=OUT, help="Where to (default stdout).")
@command_context
def sample_(context: CommandContext, count: int, seed: int, out: Path | None) -> None:
    """Write a made-up roster of N cards as CSV; no real people."""
    if context.as_json and out is None:
        raise click.UsageError("--json needs --out: the roster itself goes to stdout")
    unions = load_unions(default_unions_path())
    with _text_out(out) as file, progress("writing cards") as move:
        file.write(",".join(HEADER) + "\n")
        for number, card in enumerate(sample(count, seed, unions)):
            # No field of a sample holds a comma or a quote, so CSV needs no quoting.
            file.write(",".join(card) + "\n")
            if number % PROGRESS_ROWS == 0:
                move(number, count, "")
                if out is None and nobody_reads():
                    break
    if out is not None:
        echo(
            context,
            {"cards": count, "seed": seed, "file": shown(out)},
            lambda: note(f"{count} cards written to {shown(out)}"),
        )


@click.command()
@click.option("--cards", "count", type=COUNT, required=True, help="How many cards, by number.")
@click.option("--status", type=click.Choice(STATUSES), default="active", show_default=True)
@click.option("--out", type=OUT, help="Where to (default stdout). Made readable by you alone.")
@command_context
def tokens(context: CommandContext, count: int, status: str, out: Path | None) -> None:
    """Print member tokens for load tests.

    A JSON object a line: card_no, token, union. For thirty days a token has all the rights of its
    card: keep the file where nobody else can read it.
    """
    key = context.signing_key()

    async def work() -> int:
        written = 0
        async with context.pool() as pool:
            with _text_out(out) as file, progress("writing tokens") as move:
                async for entry in roster.tokens(pool, key, count, status, now_s=int(time.time())):
                    file.write(msgspec.json.encode(entry).decode() + "\n")
                    written += 1
                    if written % PROGRESS_ROWS == 0:
                        move(written, count, "")
                        if out is None and nobody_reads():
                            break
        return written

    written = run(work())
    if written == 0:
        raise click.ClickException(f"the roster has no {status} card")
    if written < count:
        note(f"the roster has only {written} {status} cards")
    if out is not None:
        echo(
            context,
            {"tokens": written, "file": shown(out)},
            lambda: note(f"{written} tokens written to {shown(out)}"),
        )


def _change(
    context: CommandContext,
    done: str,
    change: Callable[..., Awaitable[Card]],
    *numbers: str,
    reason: str,
) -> None:
    """Change one card, and show it afterwards."""

    async def work() -> Card:
        async with context.pool() as pool:
            after = _after_change(context, pool, done)
            return await change(
                pool, *numbers, actor=context.actor, reason=reason, after_change=after
            )

    _show_card(context, run(work()))


def _after_change(context: CommandContext, pool: Any, done: str) -> roster.AfterChange:  # noqa: ANN401
    """Make the function that copies a change of the roster to Redis at once (INV-9).

    If it fails, the scheduler does the same within a second. PostgreSQL has the change by then, so
    a failure is a note that begins with ``done``, and not an error.
    """

    async def copy_or_note() -> None:
        from sale.bootstrap import STORE_ERRORS

        try:
            await copy()
        except (*STORE_ERRORS, SettingsError) as error:
            note(
                f"{done}; running campaigns follow within a second once Redis is back "
                f"({one_line(error)})"
            )

    async def copy() -> None:
        from sale.bootstrap import store_urls
        from sale.db import deployment
        from sale.stock.connection import open_redis
        from sale.stock.scripts import Scripts
        from sale.trust.revocation import sync_all

        redis = open_redis(store_urls(context.settings)[0], max_connections=2)
        try:
            nonce = (await deployment.read(pool)).nonce
            await sync_all(redis, Scripts(redis, nonce), pool)
        finally:
            await redis.aclose()

    return copy_or_note


def _show_card(context: CommandContext, card: Card) -> None:
    fields = {
        "member": card.member_no,
        "card_tail": card.card_no[-4:],
        "replaced_by_tail": card.replaced_by and card.replaced_by[-4:],
        "name": card.name,
        "union": card.union_code,
        "phone": _mask_phone(card.phone),
        "has_pin": card.has_pin,
        "status": card.status,
        "revoked": card.revoked,
        "generation": card.generation,
        "updated_at": rfc3339(to_ms(card.updated_at)),
    }
    words = fields | {
        "card_tail": mask_card(card.card_no),
        "replaced_by_tail": mask_card(card.replaced_by) if card.replaced_by else "no",
        "revoked": "yes, until a person restores it" if card.revoked else "no",
    }
    names = {"card_tail": "card", "replaced_by_tail": "replaced by"}
    shown_words = [(names.get(name, name), value) for name, value in words.items()]
    echo(context, fields, lambda: echo_fields(shown_words))


def _mask_phone(phone: str) -> str:
    return (
        f"{phone[:3]}{'*' * (len(phone) - 7)}{phone[-4:]}" if len(phone) > 7 else "*" * len(phone)
    )


def _show_report(report: ImportReport) -> None:
    if report.bad:
        title = f"Bad lines: {report.bad_count}"
        if report.bad_count > len(report.bad):
            title += f", the first {len(report.bad)} of them"
        echo_table(["line", "why"], [(bad.line, bad.reason) for bad in report.bad], title=title)
        return
    verb = "would be imported" if report.dry_run else "imported"
    click.echo(
        f"{report.imported} cards {verb}: {report.added} new, {report.changed} changed, "
        f"{report.unchanged} unchanged"
    )
    if report.kept_revoked:
        click.echo(
            f"{report.kept_revoked} stay cancelled, revoked by a person, though the file says "
            f"otherwise (`sale cards restore` takes that back): "
            f"{_lines(report.kept_revoked, report.kept_revoked_lines)}"
        )
    if report.replaced:
        click.echo(
            f"{report.replaced} were passed over, replaced by other cards: "
            f"{_lines(report.replaced, report.replaced_lines)}"
        )
    if report.doubtful:
        click.echo(
            f"{report.doubtful} new numbers end in zeros from the 16th digit on, no more than "
            f"chance explains; if a spreadsheet has saved this file, compare them with the cards: "
            f"{_lines(report.doubtful, report.doubtful_lines)}"
        )


def _lines(total: int, lines: Sequence[NamedLine]) -> str:
    first = lines[:LINES_SHOWN_MAX]
    listed = ", ".join(f"line {each.line} (…{each.card_tail})" for each in first)
    return listed + (f" and {total - len(first)} more" if total > len(first) else "")


@contextmanager
def _text_out(path: Path | None) -> Iterator[IO[str]]:
    """Stdout, or a file that appears whole under its name, mode 0600, or not at all."""
    if path is None:
        as_utf8()
        yield sys.stdout
        sys.stdout.flush()
        return
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
        draft.replace(path)
    except OSError as error:
        if str(error.filename) != str(draft):
            raise
        # Name the file that the user gave, not the draft.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink(missing_ok=True)
