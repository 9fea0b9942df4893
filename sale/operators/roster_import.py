"""The roster's import: a file of cards into the roster, all of it or nothing.

An import streams: each line of the file is checked by itself and goes to a temporary table by COPY,
so memory does not grow with the file; a query on that table finds cards that occur twice. All of it
is one transaction, and one bad line changes nothing. Quoted fields may hold commas and quotes but
no line breaks, so a forgotten quote spoils one line and not the rest of the file. The alternative,
Python's csv over the whole file, reads everything after such a quote as one field.
"""

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from sale.db import operators as accounts
from sale.db import roster as table
from sale.files import Source
from sale.identity import SigningKey
from sale.operators.roster import AfterChange
from sale.operators.roster_file import (
    BAD_LINES_LISTED,
    CHANCE_MAX,
    LINE_MAX_BYTES,
    PLAIN,
    ZEROS,
    BadLine,
    Checker,
    chance,
    share_by_chance,
)

FILE_MAX_BYTES: Final = 2 << 30
READ_WITHIN_S: Final = 3_600.0
"""How long a pipe may take to give the whole file."""

CHUNK_LINES: Final = 2_000
LISTED_MAX: Final = 20
"""Lines of each kind that a report names beside the bad ones."""


class NamedLine(msgspec.Struct, frozen=True):
    """A line of the file that an operator should check, with the card's last four digits."""

    line: int
    card_tail: str


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of an import, or with ``dry_run`` the effect that it would have.

    ``lines`` counts the cards read; ``added`` + ``changed`` + ``unchanged`` = ``imported``, which
    is 0 where there is a bad line. ``kept_revoked`` counts cards that the file gives as active or
    suspended and that stay cancelled, because a person has revoked them. ``replaced`` counts cards
    that another card has replaced: they are read and not imported. ``doubtful`` counts new cards
    whose number may have been rounded: by chance so many true ones look so. The first LISTED_MAX
    lines of each are named.
    """

    lines: int
    imported: int
    added: int
    changed: int
    unchanged: int
    bad_count: int
    bad: list[BadLine]
    kept_revoked: int
    kept_revoked_lines: list[NamedLine]
    replaced: int
    replaced_lines: list[NamedLine]
    doubtful: int
    doubtful_lines: list[NamedLine]
    dry_run: bool


async def import_cards(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    key: SigningKey,
    unions: frozenset[str],
    source: Source,
    *,
    actor: str,
    dry_run: bool = False,
    numbers_checked: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    after_change: AfterChange | None = None,
) -> ImportReport:
    """Take a roster file (CSV, header ``card_no,name,union,phone,pin,status``) into the roster.

    All or nothing; may be repeated; rows that read the same are not touched. ``on_progress`` gets
    bytes done and in total. A card that the roster does not have gets a new member. Cards that the
    file does not name stay as they are, a card that a person has revoked stays cancelled, and one
    that was replaced is passed over. New numbers that a program has rounded, by how many of them
    look so, are bad lines, unless ``numbers_checked``: somebody has compared them with the cards.
    """
    checker = Checker(key, unions)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await table.copy_incoming(connection, _stream(source, checker, on_progress))
            report = await _take_in(
                connection, checker, dry_run=dry_run, numbers_checked=numbers_checked
            )
            keep = not dry_run and not report.bad_count
            if keep:
                await accounts.write_audit(
                    connection,
                    actor=actor,
                    action="cards.import",
                    target=f"roster file {Path(source.name).name}",
                    data={
                        "lines": report.lines,
                        "added": report.added,
                        "changed": report.changed,
                        "kept_revoked": report.kept_revoked,
                        "replaced": report.replaced,
                        "numbers_checked": numbers_checked,
                    },
                )
        except BaseException:
            await transaction.rollback()
            raise
        if not keep:
            await transaction.rollback()
            return report
        await transaction.commit()
    if after_change is not None:
        await after_change()
    return report


async def _take_in(
    connection: Any,  # noqa: ANN401
    checker: Checker,
    *,
    dry_run: bool,
    numbers_checked: bool,
) -> ImportReport:
    await table.lock_roster(connection)
    duplicates = await table.find_duplicates(connection, BAD_LINES_LISTED)
    numbers = await _look_at_numbers(connection, checked=numbers_checked)
    bad_count = checker.bad_count + duplicates.total + numbers.bad_count
    kept = await table.incoming(connection, "kept_revoked", LISTED_MAX)
    replaced = await table.incoming(connection, "replaced", LISTED_MAX)
    added = changed = imported = 0
    if not bad_count:
        imported = checker.lines - replaced.total
        added, changed = await table.count_incoming(connection)
        if not dry_run:
            await table.apply_incoming(connection)
    twice = [BadLine(line, f"card_no: already on line {first}") for line, first in duplicates.lines]
    bad = sorted(checker.bad + twice + numbers.bad, key=lambda entry: entry.line)
    return ImportReport(
        lines=checker.lines,
        imported=imported,
        added=added,
        changed=changed,
        unchanged=imported - added - changed,
        bad_count=bad_count,
        bad=bad[:BAD_LINES_LISTED],
        kept_revoked=kept.total,
        kept_revoked_lines=_named(kept),
        replaced=replaced.total,
        replaced_lines=_named(replaced),
        doubtful=numbers.doubtful,
        doubtful_lines=sorted(numbers.doubtful_lines, key=lambda entry: entry.line)[:LISTED_MAX],
        dry_run=dry_run,
    )


class _Numbers(msgspec.Struct):
    """Bad and doubtful numbers among the new cards."""

    bad_count: int = 0
    bad: list[BadLine] = []
    doubtful: int = 0
    doubtful_lines: list[NamedLine] = []


async def _look_at_numbers(connection: Any, *, checked: bool) -> _Numbers:  # noqa: ANN401
    """Find numbers of new cards that a program has changed.

    A number that ends in zeros may be true: of 16 digits one in ten is. So the file decides: where
    more of its new numbers look so than chance explains, all that look so are bad. Cards that the
    roster has already are not asked, their numbers are known.
    """
    found = _Numbers()
    if checked:
        return found
    groups = await table.new_numbers(connection)
    for group in groups:
        if group.looks == PLAIN:
            continue
        of = sum(each.cards for each in groups if each.digits == group.digits)
        share = share_by_chance(group.digits, group.looks)
        lines = await table.incoming(
            connection, "new_of_look", group.digits, group.looks, BAD_LINES_LISTED
        )
        if chance(group.cards, of, share) <= CHANCE_MAX:
            so = (
                "ends in zeros from the 16th digit on, as a spreadsheet rounds"
                if group.looks == ZEROS
                else "is rounded to a float of 64 bits"
            )
            says = f"card_no: {so}; so do {group.cards} of {of} new ones of {group.digits} digits"
            found.bad_count += lines.total
            found.bad += [BadLine(each.line, says) for each in lines.lines]
        elif group.looks == ZEROS:
            found.doubtful += lines.total
            found.doubtful_lines += _named(lines)
    lost = await table.incoming(connection, "zeros_lost", BAD_LINES_LISTED)
    says = "card_no: is the number of another card without the zeros at its beginning"
    found.bad_count += lost.total
    found.bad += [BadLine(each.line, says) for each in lost.lines]
    return found


def _named(incoming: table.Incoming) -> list[NamedLine]:
    return [NamedLine(each.line, each.card_no[-4:]) for each in incoming.lines[:LISTED_MAX]]


async def _stream(
    source: Source, checker: Checker, on_progress: Callable[[int, int], None]
) -> AsyncIterator[bytes]:
    """Good lines of the file in COPY's text format, some thousand at a time."""
    chunks = _chunks(source, checker)
    try:
        for chunk, done, total in chunks:
            on_progress(done, total)
            yield chunk
    finally:
        chunks.close()


def _chunks(source: Source, checker: Checker) -> Generator[tuple[bytes, int, int], None, None]:
    """Check the file line by line; yield COPY lines, bytes done and bytes in total."""
    done = 0
    chunk: list[str] = []
    for line, raw in _numbered_lines(source.stream, source.size):
        done += len(raw)
        copied = checker.check(line, raw)
        if copied is not None:
            chunk.append(copied)
        if line % CHUNK_LINES == 0:
            yield "".join(chunk).encode(), done, source.size
            chunk.clear()
        if checker.ended:
            break
    checker.end()
    yield "".join(chunk).encode(), done, max(done, source.size)


def _numbered_lines(stream: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """Number the lines up to ``size``: what is written to the file meanwhile is not read.

    A line too long to be true is cut, so that it cannot fill the memory.
    """
    line = 0
    while stream.tell() < size and (raw := stream.readline(LINE_MAX_BYTES + 1)):
        line += 1
        yield line, raw
        while len(raw) > LINE_MAX_BYTES and not raw.endswith(b"\n"):
            raw = stream.readline(LINE_MAX_BYTES + 1)
