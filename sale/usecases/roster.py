"""The roster: import, revoke, restore, show, and members' tokens.

An import streams: each line of the file is checked by itself and goes to a temporary table by COPY,
so memory does not grow with the file; whether a card stands twice is asked of that table. All of it
is one transaction, and one bad line changes nothing. Quoted fields may hold commas and quotes but
no line breaks, so a forgotten quote spoils one line and not the rest of the file. The alternative,
Python's csv over the whole file, reads everything after such a quote as one field.
"""

import csv
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from sale.db import operators as accounts
from sale.db import roster as table
from sale.db.roster import Card, changes_since, current_rev, inactive_cards
from sale.domain import (
    CARD_NO,
    REASON_MAX,
    REHEARSAL_CARDS,
    Problem,
    Refused,
    is_made_up,
    mask_card,
    shown_text,
)
from sale.identity import SigningKey, card_tag, issue_member_token, pin_mac

__all__ = [
    "BadLine",
    "Card",
    "ImportReport",
    "changes_since",
    "current_rev",
    "import_cards",
    "inactive_cards",
    "restore",
    "revoke",
    "show",
    "tokens",
]

HEADER: Final = ("card_no", "name", "union", "phone", "pin", "status")
STATUSES: Final = ("active", "suspended", "cancelled")
BAD_LINES_LISTED: Final = 100
LINE_MAX_BYTES: Final = 4_096
NAME_MAX: Final = 64
PHONE_MAX: Final = 20
CHUNK_LINES: Final = 2_000

AfterChange = Callable[[], Awaitable[None]]
"""Called after the commit of what changed who may buy: it takes the feed on to Redis (INV-9)."""


class BadLine(msgspec.Struct, frozen=True):
    """A line of the file (the header is line 1) and why it cannot be taken."""

    line: int
    reason: str


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an import did, or with ``dry_run`` would do.

    ``lines`` counts the cards read; ``added`` + ``changed`` + ``unchanged`` = ``imported``, which
    is 0 where there is a bad line.
    """

    lines: int
    imported: int
    added: int
    changed: int
    unchanged: int
    bad_count: int
    bad: list[BadLine]
    dry_run: bool


async def import_cards(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    key: SigningKey,
    unions: frozenset[str],
    file: Path,
    *,
    actor: str,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    after_change: AfterChange | None = None,
) -> ImportReport:
    """Take a roster file (CSV, header ``card_no,name,union,phone,pin,status``) into the roster.

    All or nothing; may be repeated; rows that read the same are not touched. ``on_progress`` gets
    bytes done and in total. Cards that the file does not name stay as they are.

    Raises:
        OSError: the file cannot be read.

    """
    checker = _Checker(key, unions)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await table.copy_incoming(connection, _stream(file, checker, on_progress))
            report = await _take_in(connection, checker, dry_run=dry_run)
            keep = not dry_run and not report.bad_count
            if keep:
                await accounts.write_audit(
                    connection,
                    actor=actor,
                    action="cards.import",
                    target=f"roster file {file.name}",
                    data={"lines": report.lines, "added": report.added, "changed": report.changed},
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


async def revoke(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    key: SigningKey,
    card_no: str,
    *,
    actor: str,
    reason: str,
    after_change: AfterChange | None = None,
) -> Card:
    """Cancel a card; it buys nothing from then on (INV-9). May be repeated.

    Raises Refused: NOT_FOUND, or INVALID_REQUEST for a bad reason.
    """
    return await _set_status(
        pool, key, card_no, "cancelled", "card.revoke", actor, reason, after_change
    )


async def restore(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    key: SigningKey,
    card_no: str,
    *,
    actor: str,
    reason: str,
    after_change: AfterChange | None = None,
) -> Card:
    """Make a card active again. May be repeated. Raises as ``revoke`` does."""
    return await _set_status(
        pool, key, card_no, "active", "card.restore", actor, reason, after_change
    )


async def show(pool: Any, card_no: str) -> Card:  # noqa: ANN401 - an asyncpg pool
    """One card. Raises Refused (NOT_FOUND)."""
    async with pool.acquire() as connection:
        card = await table.find_card(connection, card_no)
    if card is None:
        raise Refused(Problem.NOT_FOUND, f"there is no card {mask_card(card_no)} in the roster")
    return card


async def tokens(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    key: SigningKey,
    count: int,
    status: str = "active",
    *,
    now_s: int,
) -> AsyncIterator[dict[str, str]]:
    """Tokens of the roster's first ``count`` cards of a status: ``card_no``, ``token``, ``union``.

    Streams; fewer where the roster has fewer.
    """
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        async for card_no, union in table.cards_of_status(connection, status, count):
            token = issue_member_token(key, card_no, union, now_s=now_s)
            yield {"card_no": card_no, "token": token, "union": union}


async def _set_status(
    pool: Any,  # noqa: ANN401 - an asyncpg pool
    key: SigningKey,
    card_no: str,
    status: str,
    action: str,
    actor: str,
    reason: str,
    after_change: AfterChange | None,
) -> Card:
    try:
        reason = shown_text(reason, REASON_MAX)
    except ValueError as wrong:
        raise Refused(Problem.INVALID_REQUEST, f"reason: {wrong}", field="reason") from None
    async with pool.acquire() as connection, connection.transaction():
        before = await table.set_status(connection, card_no, status)
        if before is None:
            raise Refused(Problem.NOT_FOUND, f"there is no card {mask_card(card_no)} in the roster")
        await accounts.write_audit(
            connection,
            actor=actor,
            action=action,
            target=f"card {mask_card(card_no)} {card_tag(key, card_no)}",
            reason=reason,
            data={"from": before, "to": status},
        )
    # Also where nothing changed: a repeat is how an operator mends a hand-over that failed.
    if after_change is not None:
        await after_change()
    return await show(pool, card_no)


async def _take_in(connection: Any, checker: "_Checker", *, dry_run: bool) -> ImportReport:  # noqa: ANN401
    duplicates = await table.find_duplicates(connection, BAD_LINES_LISTED)
    bad_count = checker.bad_count + duplicates.total
    added = changed = imported = 0
    if not bad_count:
        imported = checker.lines
        added, changed = await table.count_incoming(connection)
        if not dry_run:
            await table.apply_incoming(connection)
    twice = [
        BadLine(line, f"card_no: stands on line {first} already")
        for line, first in duplicates.lines
    ]
    bad = sorted(checker.bad + twice, key=lambda entry: entry.line)[:BAD_LINES_LISTED]
    return ImportReport(
        lines=checker.lines,
        imported=imported,
        added=added,
        changed=changed,
        unchanged=imported - added - changed,
        bad_count=bad_count,
        bad=bad,
        dry_run=dry_run,
    )


async def _stream(
    file: Path, checker: "_Checker", on_progress: Callable[[int, int], None]
) -> AsyncIterator[bytes]:
    """Good lines of the file in COPY's text format, some thousand at a time."""
    chunks = _chunks(file, checker)
    try:
        for chunk, done, total in chunks:
            on_progress(done, total)
            yield chunk
    finally:
        chunks.close()


def _chunks(file: Path, checker: "_Checker") -> Generator[tuple[bytes, int, int], None, None]:
    """Check the file line by line; yield COPY lines, bytes done and bytes in total."""
    with file.open("rb") as source:
        total = file.stat().st_size
        done = 0
        chunk: list[str] = []
        for line, raw in _numbered_lines(source):
            done += len(raw)
            copied = checker.check(line, raw)
            if copied is not None:
                chunk.append(copied)
            if line % CHUNK_LINES == 0:
                yield "".join(chunk).encode(), done, total
                chunk.clear()
        checker.end()
        yield "".join(chunk).encode(), done, max(done, total)


def _numbered_lines(source: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number the lines. One too long to be true is cut, so that it cannot fill the memory."""
    line = 0
    while raw := source.readline(LINE_MAX_BYTES + 1):
        line += 1
        yield line, raw
        while len(raw) > LINE_MAX_BYTES and not raw.endswith(b"\n"):
            raw = source.readline(LINE_MAX_BYTES + 1)


class _Checker:
    """Checks the lines of one file, counts them, and keeps the first bad ones."""

    def __init__(self, key: SigningKey, unions: frozenset[str]) -> None:
        self.lines = 0
        self.bad_count = 0
        self.bad: list[BadLine] = []
        self._unions = unions
        self._pin_key = key.derive("pin")
        self._header_seen = False
        self._header_wrong = False

    def check(self, line: int, raw: bytes) -> str | None:
        """The line for COPY, or None where it is the header, blank, or bad."""
        if self._header_wrong or (line > 1 and not raw.strip()):
            return None
        try:
            if line == 1:
                self._check_header(_split(raw.removeprefix(b"\xef\xbb\xbf")))
                return None
            self.lines += 1
            return self._copy_line(line, _split(raw))
        except _BadFieldError as error:
            self._note(line, str(error))
            return None

    def end(self) -> None:
        """Complain of a file that ended before its header."""
        if not self._header_seen and not self._header_wrong:
            self._note(1, f"the file is empty: the header {','.join(HEADER)} is missing")

    def _check_header(self, fields: list[str]) -> None:
        if tuple(field.strip() for field in fields) != HEADER:
            # Without its header every line would be bad for the same reason: one is enough.
            self._header_wrong = True
            raise _BadFieldError(f"the header must be {','.join(HEADER)}")
        self._header_seen = True

    def _copy_line(self, line: int, fields: list[str]) -> str:
        if len(fields) != len(HEADER):
            raise _BadFieldError(f"has {len(fields)} fields, must have {len(HEADER)}")
        card_no, name, union, phone, pin, status = fields
        if not CARD_NO.fullmatch(card_no):
            raise _BadFieldError("card_no: must be 12 to 19 digits")
        if is_made_up(card_no):
            raise _BadFieldError(
                f"card_no: numbers from {REHEARSAL_CARDS}… are kept for rehearsals"
            )
        if not name.strip() or len(name) > NAME_MAX or not name.isprintable():
            raise _BadFieldError(f"name: must be 1 to {NAME_MAX} printable characters")
        if union not in self._unions:
            raise _BadFieldError(f"union: {union[:48]!r} is not a known union")
        if phone and (len(phone) > PHONE_MAX or not set(phone) <= _PHONE_CHARACTERS):
            raise _BadFieldError(
                f"phone: must be empty or up to {PHONE_MAX} digits, +, - or spaces"
            )
        # The PIN itself is never told: reports are read by people and kept in logs.
        if pin and not (4 <= len(pin) <= 12 and pin.isascii() and pin.isdigit()):
            raise _BadFieldError("pin: must be empty or 4 to 12 digits")
        if status not in STATUSES:
            raise _BadFieldError(f"status: must be one of {', '.join(STATUSES)}")
        mac = "\\\\x" + pin_mac(self._pin_key, card_no, pin).hex() if pin else "\\N"
        if "\\" in name:
            name = name.replace("\\", "\\\\")
        return f"{line}\t{card_no}\t{name}\t{union}\t{phone}\t{mac}\t{status}\n"

    def _note(self, line: int, reason: str) -> None:
        self.bad_count += 1
        if len(self.bad) < BAD_LINES_LISTED:
            self.bad.append(BadLine(line, reason))


class _BadFieldError(Exception):
    """Why a line is bad."""


def _split(raw: bytes) -> list[str]:
    """The fields of one line. Raises _BadFieldError."""
    if len(raw) > LINE_MAX_BYTES:
        raise _BadFieldError(f"is longer than {LINE_MAX_BYTES} bytes")
    try:
        text = raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _BadFieldError(f"is not UTF-8 at byte {error.start + 1}") from None
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise _BadFieldError(f"is not CSV: {error}") from None


_PHONE_CHARACTERS: Final = frozenset("0123456789+- ")
