"""Checks a roster file line by line: a line is accepted, repaired if that is certain, or refused.

Spaces around a field are removed; names keep any visible character. A card number is accepted only
as it is printed: a number that a spreadsheet has rounded, shortened or decorated is refused and
never guessed. A rounded number may look like a true one, so ``looks`` notes its form, and
``roster_import.py`` decides for the file as a whole.
"""

import csv
import math
import re
import unicodedata
from typing import Final

import msgspec

from sale.domain.member import CARD_NO
from sale.domain.text import shown_text
from sale.files import brief, not_utf8
from sale.identity import SigningKey, pin_mac

HEADER: Final = ("card_no", "name", "union", "phone", "pin", "status")
STATUSES: Final = ("active", "suspended", "cancelled")
BAD_LINES_LISTED: Final = 100
BAD_LINES_MAX: Final = 10_000
"""After so many bad lines the rest of the file is not read."""

LINE_MAX_BYTES: Final = 4_096
NAME_MAX: Final = 64
PHONE_MAX: Final = 20

PLAIN: Final = 0
ZEROS: Final = 1
"""Zeros from the 16th digit on: a spreadsheet keeps 15 digits of a number."""

DOUBLE: Final = 2
"""A number that a float of 64 bits holds exactly: other programs keep 53 bits of a number."""

CHANCE_MAX: Final = 0.0105
"""A file is refused where its numbers, were they true, would look so with at most this chance.

One in a hundred, as two of two numbers of 16 digits have that end in 0, and some for the rounding.
"""


class BadLine(msgspec.Struct, frozen=True):
    """A line of the file (the header is line 1) and why it cannot be taken."""

    line: int
    reason: str


def looks(card_no: str) -> int:
    """Say how a card number looks: PLAIN, or as one that a program may have rounded."""
    if len(card_no) <= _SPREADSHEET_DIGITS:
        return PLAIN
    if not card_no[_SPREADSHEET_DIGITS:].strip("0"):
        return ZEROS
    if len(card_no) in _DOUBLE_SHARE and int(float(card_no)) == int(card_no):
        return DOUBLE
    return PLAIN


def share_by_chance(digits: int, look: int) -> float:
    """Share of true numbers of so many digits that look so, at most."""
    if look == ZEROS:
        return 10.0 ** (_SPREADSHEET_DIGITS - digits)
    return _DOUBLE_SHARE[digits]


def chance(found: int, of: int, share: float) -> float:
    """Upper bound of the chance that ``found`` of ``of`` true numbers look so (Chernoff)."""
    part = found / of
    if part <= share:
        return 1.0
    distance = part * math.log(part / share)
    if part < 1:
        distance += (1 - part) * math.log((1 - part) / (1 - share))
    return math.exp(-of * distance)


class Checker:
    """Checks the lines of one file, counts them, and keeps the first bad ones."""

    def __init__(self, key: SigningKey, unions: frozenset[str]) -> None:
        self.lines = 0
        self.bad_count = 0
        self.bad: list[BadLine] = []
        self.ended = False
        """The rest of the file need not be read: one complaint says what is wrong with it."""
        self._unions = unions
        self._pin_key = key.derive("pin")
        self._begun = False
        self._utf8_seen = False

    def check(self, line: int, raw: bytes) -> str | None:
        """The line for COPY, or None where it is the header, blank, or bad."""
        if line > 1 and not raw.strip():
            return None
        try:
            if line == 1:
                self._begun = True
                self._check_header(raw)
                return None
            self.lines += 1
            if not raw.isascii() and not self._utf8_seen:
                self._check_encoding(raw)
            return self._copy_line(line, _split(raw))
        except _BadFieldError as error:
            self._note(line, str(error))
            return None

    def end(self) -> None:
        """Complain of a file that ended before its header."""
        if not self._begun:
            self._note(1, f"the file is empty: the header {_HEADER_TEXT} is missing")

    def _check_header(self, raw: bytes) -> None:
        # Without its header every line would be bad for the same reason: one is enough.
        self.ended = True
        wrong = not_utf8(raw)
        if wrong is not None:
            raise _BadFieldError(f"the file {wrong}")
        text = raw.decode().removeprefix("\ufeff").strip()
        if len(raw) > LINE_MAX_BYTES or _fields(text) != HEADER:
            for mark, name in _OTHER_MARKS.items():
                if tuple(field.strip('" ') for field in text.split(mark)) == HEADER:
                    raise _BadFieldError(f"fields are separated by {name}, must be by commas")
            raise _BadFieldError(f"the header must be {_HEADER_TEXT}")
        self.ended = False

    def _check_encoding(self, raw: bytes) -> None:
        """Tell a file in another encoding by its first line with other characters than ASCII."""
        wrong = not_utf8(raw)
        self._utf8_seen = wrong is None
        if wrong is not None and "GBK" in wrong:
            self.ended = True
            raise _BadFieldError(wrong)

    def _copy_line(self, line: int, fields: list[str]) -> str:
        if len(fields) != len(HEADER):
            raise _BadFieldError(f"has {len(fields)} fields, must have {len(HEADER)}")
        card_no = fields[0]
        name, union, phone, pin, status = map(_trimmed, fields[1:])
        if not CARD_NO.fullmatch(card_no):
            raise _BadFieldError(f"card_no: must be 12 to 19 digits{_damage(card_no)}")
        try:
            name = shown_text(name, NAME_MAX)
        except ValueError as wrong:
            raise _BadFieldError(f"name: {wrong}") from None
        if union not in self._unions:
            raise _BadFieldError(f"union: {brief(union)} is not a known union")
        if phone and (len(phone) > PHONE_MAX or not set(phone) <= _PHONE_CHARACTERS):
            raise _BadFieldError(
                f"phone: must be empty or up to {PHONE_MAX} digits, +, - or spaces"
            )
        # No message quotes the PIN: reports are read by people and kept in logs.
        if pin and not (4 <= len(pin) <= 12 and pin.isascii() and pin.isdigit()):
            raise _BadFieldError("pin: must be empty or 4 to 12 digits")
        if status not in STATUSES:
            raise _BadFieldError(f"status: must be one of {', '.join(STATUSES)}")
        mac = "\\\\x" + pin_mac(self._pin_key, card_no, pin).hex() if pin else "\\N"
        if "\\" in name:
            name = name.replace("\\", "\\\\")
        return f"{line}\t{card_no}\t{name}\t{union}\t{phone}\t{mac}\t{status}\t{looks(card_no)}\n"

    def _note(self, line: int, reason: str) -> None:
        self.bad_count += 1
        if self.bad_count == BAD_LINES_MAX:
            self.ended = True
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


def _fields(text: str) -> tuple[str, ...]:
    try:
        return tuple(_trimmed(field) for field in next(csv.reader([text], strict=True), ()))
    except csv.Error:
        return ()


def _trimmed(field: str) -> str:
    """The field without spaces of any width and invisible marks around it."""
    if field.isascii() and field.isalnum():
        return field
    return field.strip(_AROUND)


def _damage(card_no: str) -> str:
    """Say what a program has made of a card number, where that can be seen."""
    bare = card_no.strip(_AROUND)
    if not bare:
        return ", is empty"
    for pattern, says in _DAMAGES:
        if pattern.fullmatch(bare):
            return says
    if CARD_NO.fullmatch(bare):
        return ", has spaces or invisible characters around it"
    if CARD_NO.fullmatch(unicodedata.normalize("NFKC", bare)):
        return ", is written in full width"
    return ""


_HEADER_TEXT: Final = ",".join(HEADER)
_OTHER_MARKS: Final = {";": "semicolons", "\t": "tabs"}
_PHONE_CHARACTERS: Final = frozenset("0123456789+- ")
_SPREADSHEET_DIGITS: Final = 15
# The distance of neighbouring floats of 64 bits at 10^16, 10^17 and 10^18 is 2, 16 and 128.
_DOUBLE_SHARE: Final = {17: 1 / 2, 18: 1 / 16, 19: 1 / 128}
# Spaces of every width, and marks without width that come along when a cell is copied.
_AROUND: Final = (
    "\t\n\v\f\r \x85\xa0\xad\u061c\u1680\u180e\u2028\u2029\u202f\u205f\u3000\ufeff"
    + "".join(map(chr, (*range(0x2000, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070))))
)
_DAMAGES: Final = (
    (
        re.compile(r"[+-]?[0-9]+([.,][0-9]*)?[eE][+-]?[0-9]+"),
        ": a spreadsheet has written it in powers of ten, its digits are lost",
    ),
    (re.compile(r"[0-9]+[.,]0*"), ": a program has taken it for a quantity and put .0 behind it"),
    (re.compile(r"['’‘`´＇].*"), ", begins with an apostrophe, as a spreadsheet marks text"),
    (re.compile(r'=.*|".*'), ", is a formula"),
    (
        re.compile(r"[0-9]{1,11}"),
        ", has fewer: a spreadsheet drops zeros at the beginning",
    ),
    (re.compile(r"[0-9]{20,}"), ", has more"),
    (re.compile(r"[0-9]+([ ,.\u00a0\u202f\u3000-][0-9]+)+"), ", has marks between its digits"),
)
