"""The roster: imports are checked line by line and all or nothing; the feed misses no change."""

import asyncio
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from sale.db.roster import (
    changes_since,
    current_rev,
    generations_from,
    inactive_members,
    lock_member,
    set_status,
)
from sale.domain.campaign_file import parse_campaign_toml
from sale.domain.problem import Refused
from sale.domain.unions import default_unions_path, load_unions
from sale.files import opened_large
from sale.identity import MemberTokens, SigningKey
from sale.operators.diagnosis import diagnose
from sale.operators.roster import replace, restore, revoke, show, tokens
from sale.operators.roster_file import HEADER
from sale.operators.roster_import import ImportReport, import_cards
from sale.operators.sample_roster import sample

KEY = SigningKey(b"k" * 32)
UNIONS = load_unions(default_unions_path())
CODES = frozenset(UNIONS)
CARD = "622100000001"
OTHER = "622100000002"


def write(path: Path, *lines: str | bytes, header: str = ",".join(HEADER)) -> Path:
    encoded = (line if isinstance(line, bytes) else line.encode() for line in (header, *lines))
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


async def take(pool: Any, file: Path, **options: Any) -> ImportReport:
    with opened_large(file, most=1 << 30, within_s=60) as source:
        return await import_cards(pool, KEY, CODES, source, actor="cli:test", **options)


async def feed(pool: Any) -> list[tuple[int, int, bool]]:
    return [tuple(change) for change in await changes_since(pool, 0, 1_000)]  # type: ignore[misc]


async def count(pool: Any, table: str) -> int:
    found: int = await pool.fetchval(f"select count(*) from {table}")
    return found


async def test_import_puts_the_whole_file_into_the_roster(pool: Any, tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.csv",
        f'{CARD},"王, ""小""\\ 明",dongsi,13800001234,123456,active\r',
        f"{OTHER},李四,longtan,,,suspended",
        "",
    )
    seen: list[tuple[int, int]] = []
    report = await take(pool, file, on_progress=lambda done, total: seen.append((done, total)))
    assert (report.lines, report.imported, report.added, report.bad_count) == (2, 2, 2, 0)
    assert seen[-1] == (file.stat().st_size, file.stat().st_size)
    card = await show(pool, CARD)
    assert (card.name, card.union_code, card.has_pin) == ('王, "小"\\ 明', "dongsi", True)
    assert not (await show(pool, OTHER)).has_pin
    rows = await pool.fetch("select * from member join card using (member_no)")
    assert "123456" not in str(rows)
    assert (card.member_no, (await show(pool, OTHER)).member_no) == (1, 2)
    assert await feed(pool) == [(1, 2, False)]


async def test_import_of_the_same_file_touches_no_row(pool: Any, tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.csv", f"{CARD},甲,dongsi,,1234,active", f"{OTHER},乙,dongsi,,,active"
    )
    await take(pool, file)
    before = await pool.fetch("select xmin, ctid, * from member order by member_no")
    report = await take(pool, file)
    assert (report.added, report.changed, report.unchanged) == (0, 0, 2)
    assert await pool.fetch("select xmin, ctid, * from member order by member_no") == before
    assert await feed(pool) == []


async def test_dry_run_counts_changes_and_makes_none(pool: Any, tmp_path: Path) -> None:
    await take(pool, write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,active"))
    file = write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,suspended", f"{OTHER},乙,dongsi,,,active")
    report = await take(pool, file, dry_run=True)
    assert (report.added, report.changed, report.unchanged) == (1, 1, 0)
    assert (await show(pool, CARD)).status == "active"
    assert await count(pool, "card") == 1
    assert await count(pool, "audit_log") == 1
    assert await feed(pool) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("12345678901,甲,dongsi,,,active", "card_no: must be 12 to 19 digits"),
        ("6221000000x2,甲,dongsi,,,active", "card_no"),
        (" 622100000002,甲,dongsi,,,active", "card_no"),
        ("٦٢٢١٠٠٠٠٠٠٠٠,甲,dongsi,,,active", "card_no"),
        (f"{OTHER},,dongsi,,,active", "name"),
        (f"{OTHER},甲\x00,dongsi,,,active", "name"),
        (f"{OTHER},甲\t乙,dongsi,,,active", "name"),
        (f"{OTHER},{'x' * 65},dongsi,,,active", "name"),
        (f"{OTHER},甲,atlantis,,,active", "union: 'atlantis' is not a known union"),
        (f"{OTHER},甲,dongsi,1380000x,,active", "phone"),
        (f"{OTHER},甲,dongsi,,123,active", "pin: must be empty or 4 to 12 digits"),
        (f"{OTHER},甲,dongsi,,12345678901234,active", "pin"),
        (f"{OTHER},甲,dongsi,,,Active", "status"),
        (f"{OTHER},甲,dongsi,,active", "has 5 fields, must have 6"),
        (f"{OTHER},甲,dongsi,,,active,", "has 7 fields"),
        (f'{OTHER},"甲,dongsi,,,active', "is not CSV"),
        (b"622100000002,\xff,dongsi,,,active", "is not UTF-8 at byte 14"),
        (f"{OTHER},{'x' * 20_000},dongsi,,,active", "is longer than 4096 bytes"),
        (f"{CARD},甲,dongsi,,,active", "card_no: already on line 2"),
    ],
)
async def test_one_bad_line_is_named_and_nothing_changes(
    pool: Any, tmp_path: Path, line: str | bytes, reason: str
) -> None:
    first, last = f"{CARD},甲,dongsi,,,active", "622100000009,乙,dongsi,,,cancelled"
    report = await take(pool, write(tmp_path / "r.csv", first, line, last))
    assert report.bad_count == 1
    assert report.bad[0].line == 3
    assert report.bad[0].reason.startswith(reason)
    assert (report.lines, report.imported) == (3, 0)
    assert [await count(pool, table) for table in ("card", "member", "member_change")] == [0, 0, 0]


NAMES = [
    ("\u3000张　伟\u3000", "张　伟"),
    ("\u00a0王芳\u00a0\t", "王芳"),
    ("\ufeff\u200b李娜\u202c ", "李娜"),
    ("𠮷田", "𠮷田"),
    ("\U00031350\U000323af", "\U00031350\U000323af"),  # Unicode 15; some tables lack it
    ("\U0003347f", "\U0003347f"),  # nothing is there yet
    ("\ue863", "\ue863"),  # private use: rare Han of GBK
    ("阿卜杜拉·买买提", "阿卜杜拉·买买提"),
    ("e\u0301", "é"),
]


async def test_names_that_people_have_are_taken_trimmed(pool: Any, tmp_path: Path) -> None:
    cards = [f"62210000{number:04d}" for number in range(len(NAMES))]
    file = write(
        tmp_path / "r.csv",
        *(
            f"{card},{name},\u3000dongsi ,\u00a0 138 ,, active\u3000"
            for card, (name, _) in zip(cards, NAMES, strict=True)
        ),
    )
    report = await take(pool, file)
    assert report.bad == []
    for number, (_, kept) in zip(cards, NAMES, strict=True):
        card = await show(pool, number)
        assert (card.name, card.union_code, card.phone, card.status) == (
            *(kept, "dongsi"),
            *("138", "active"),
        )
    assert (await take(pool, file)).unchanged == len(cards)


DAMAGED = [
    ("6.93E+12", "in powers of ten"),
    ("6,93e12", "in powers of ten"),
    ("6.222020000112233E+18", "in powers of ten"),
    ("6221000000020.0", ".0 behind it"),
    ("622100000002.00", ".0 behind it"),
    ("'622100000002", "apostrophe"),
    ("’622100000002", "apostrophe"),
    ("\t622100000002", "spaces or invisible"),
    ("622100000002\u00a0", "spaces or invisible"),
    ("\u202d622100000002\u202c", "spaces or invisible"),
    ("６２２１００００００２２", "full width"),
    ("=622100000002", "is a formula"),
    ("6221 0000 0000 0002", "marks between"),
    ("6221-0000-0000-0002", "marks between"),
    ("22100000002", "drops zeros"),
    ("62210000000200000000", "has more"),
    ("", "is empty"),
]


async def test_numbers_that_a_program_changed_are_refused(pool: Any, tmp_path: Path) -> None:
    cells = [f'"{number}"' if "," in number else number for number, _ in DAMAGED]
    report = await take(
        pool, write(tmp_path / "r.csv", *(f"{cell},甲,dongsi,,,active" for cell in cells))
    )
    assert [bad.line for bad in report.bad] == list(range(2, 2 + len(DAMAGED)))
    for bad, (_, says) in zip(report.bad, DAMAGED, strict=True):
        assert bad.reason.startswith("card_no: must be 12 to 19 digits")
        assert says in bad.reason
    assert await count(pool, "card") == 0


def of_digits(digits: int, rounded: int, true: int) -> list[str]:
    """Lines of cards: ``rounded`` numbers as a spreadsheet leaves them, then ``true`` ones."""
    numbers = [f"{622200000000000 + n * 7_919:015d}" + "0" * (digits - 15) for n in range(rounded)]
    numbers += [
        f"{811100000000000 + n * 104_729:015d}" + "3579"[: digits - 15] for n in range(true)
    ]
    return [f"{number},甲,dongsi,,,active" for number in numbers]


@pytest.mark.parametrize(
    ("digits", "rounded", "true", "refused"),
    [
        (16, 40, 0, True),
        (16, 3, 0, True),
        (16, 30, 60, True),
        (16, 1, 0, False),  # one in ten true numbers ends so
        (16, 10, 90, False),
        (17, 1, 0, True),
        (18, 2, 40, True),
        (19, 1, 10, True),
        (19, 1, 3_000, False),
    ],
)
async def test_rounded_numbers_are_refused_beyond_chance(
    pool: Any, tmp_path: Path, digits: int, rounded: int, true: int, *, refused: bool
) -> None:
    file = write(tmp_path / "r.csv", *of_digits(digits, rounded, true))
    for dry_run in (True, False):
        report = await take(pool, file, dry_run=dry_run)
        assert report.bad_count == (rounded if refused else 0)
        assert report.doubtful == (0 if refused else rounded)
        named = report.bad if refused else report.doubtful_lines
        lines = [entry.line for entry in named]
        assert lines == list(range(2, 2 + min(rounded, len(lines))))
        assert await count(pool, "card") == (0 if refused or dry_run else rounded + true)
    if refused:
        assert f"so do {rounded} of {rounded + true} new ones of {digits}" in report.bad[0].reason
        assert (await take(pool, file, numbers_checked=True)).imported == rounded + true
    # Numbers that the roster holds are known to be true.
    assert (await take(pool, file)).unchanged == rounded + true


async def test_roster_saved_again_by_spreadsheet_is_refused(pool: Any, tmp_path: Path) -> None:
    numbers = [f"{6_222_020_000_000_001 + n * 7_919}" for n in range(300)]
    lines = [f"{number},甲,dongsi,,,active" for number in numbers]
    await take(pool, write(tmp_path / "r.csv", *lines))
    saved = [f"{number[:15]}0,甲,dongsi,,,active" for number in numbers]
    report = await take(pool, write(tmp_path / "r.csv", *saved))
    assert report.bad_count == sum(not number.endswith("0") for number in numbers)
    assert await count(pool, "card") == 300


async def test_numbers_rounded_to_floats_are_refused(pool: Any, tmp_path: Path) -> None:
    numbers = [int(float(6_222_020_000_112_233_445 + n * 99_991)) for n in range(20)]
    lines = [f"{number},甲,dongsi,,,active" for number in numbers]
    report = await take(pool, write(tmp_path / "r.csv", *lines))
    assert (report.bad_count, "64 bits" in report.bad[0].reason) == (20, True)


async def test_number_without_its_leading_zeros_is_refused(pool: Any, tmp_path: Path) -> None:
    await take(pool, write(tmp_path / "r.csv", "0012345678901234,甲,dongsi,,,active"))
    lines = ["12345678901234,甲,dongsi,,,active", "099999999999999,乙,dongsi,,,active"]
    lines.append("99999999999999,丙,dongsi,,,active")
    report = await take(pool, write(tmp_path / "r.csv", *lines))
    assert [(bad.line, "zeros at its beginning" in bad.reason) for bad in report.bad] == [
        (2, True),
        (4, True),
    ]


def another_kind() -> list[tuple[bytes, int, str]]:
    """Files that are no CSV in UTF-8; the line that is named, and a word of the complaint."""
    header, line = ",".join(HEADER), f"{CARD},张伟,dongsi,,,active\n"
    text = f"{header}\n{line}{line}"
    return [
        (text.encode("utf-16"), 1, "UTF-16"),
        (text.encode("utf-16-le"), 1, "UTF-16"),
        (text.encode("utf-16-be"), 1, "UTF-16"),
        (text.encode("gb18030"), 2, "GB18030"),
        (b"PK\x03\x04" + bytes(9_000), 1, "workbook"),
        (text.replace(",", ";").encode(), 1, "semicolons"),
        (text.replace(",", "\t").encode(), 1, "tabs"),
        (b"x" * 9_000 + b"\n" + line.encode(), 1, "header"),
        (bytes(9_000), 1, "NUL"),
        (b"", 1, "empty"),
        (b"\n", 1, "header"),
    ]


async def test_file_of_another_kind_gets_one_complaint(pool: Any, tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    for content, line, says in another_kind():
        file.write_bytes(content)
        report = await take(pool, file)
        assert [(bad.line, says in bad.reason) for bad in report.bad] == [(line, True)], report.bad


async def test_bad_lines_without_end_are_not_all_read(pool: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "r.csv", *["y"] * 200_000)
    seen: list[int] = []
    report = await take(pool, file, on_progress=lambda done, _total: seen.append(done))
    assert report.bad_count == 10_000
    assert seen[-1] < file.stat().st_size / 2


@pytest.mark.parametrize("text", ["", "card_no,name\n1,2\n", "622100000001,甲,dongsi,,,active\n"])
async def test_missing_header_is_one_problem(pool: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.csv"
    file.write_text(text)
    report = await take(pool, file)
    assert [(bad.line, "header" in bad.reason) for bad in report.bad] == [(1, True)]


async def test_byte_order_mark_before_the_header_is_accepted(pool: Any, tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.csv", f"{CARD},甲,dongsi,,,active", header="\ufeff" + ",".join(HEADER)
    )
    assert (await take(pool, file)).imported == 1


async def test_first_hundred_bad_lines_are_listed_in_order(pool: Any, tmp_path: Path) -> None:
    lines = [f"{CARD},甲,dongsi,,,active", "x"] * 150
    report = await take(pool, write(tmp_path / "r.csv", *lines))
    assert (report.bad_count, len(report.bad)) == (299, 100)
    assert [bad.line for bad in report.bad] == list(range(3, 103))


async def test_revocation_and_restoration_are_in_feed_and_audit_log(
    pool: Any, tmp_path: Path
) -> None:
    await take(pool, write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,active"))
    told: list[str] = []

    async def after_change() -> None:
        told.append("changed")

    options: dict[str, Any] = {"actor": "ann", "after_change": after_change}
    assert (await revoke(pool, CARD, reason="lost", **options)).status == "cancelled"
    await revoke(pool, CARD, reason="lost twice", **options)
    assert (await restore(pool, CARD, reason="found", **options)).status == "active"
    assert await feed(pool) == [(1, 1, False), (2, 1, True)]
    assert told == ["changed"] * 3
    rows = await pool.fetch("select actor, action, target, reason from audit_log order by id")
    target = "member 1, card ********0001"
    assert [tuple(row) for row in rows[1:]] == [
        ("ann", "card.revoke", target, "lost"),
        ("ann", "card.revoke", target, "lost twice"),
        ("ann", "card.restore", target, "found"),
    ]
    assert CARD not in str(await pool.fetch("select * from audit_log"))


@pytest.mark.parametrize("listed", ["active", "suspended", "cancelled"])
async def test_import_leaves_a_revoked_card_cancelled(
    pool: Any, tmp_path: Path, listed: str
) -> None:
    other = f"{OTHER},乙,dongsi,,,active"
    await take(pool, write(tmp_path / "a.csv", f"{CARD},甲,dongsi,,,active", other))
    await revoke(pool, CARD, actor="ann", reason="lost")
    file = write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,{listed}", other)
    kept = 0 if listed == "cancelled" else 1
    for dry_run in (True, False, False):
        report = await take(pool, file, dry_run=dry_run)
        assert (report.changed, report.unchanged, report.kept_revoked) == (0, 2, kept)
        assert [(each.line, each.card_tail) for each in report.kept_revoked_lines] == [
            (2, CARD[-4:])
        ] * kept
        card = await show(pool, CARD)
        assert (card.status, card.revoked) == ("cancelled", True)
    # Other fields of such a card are taken.
    moved = await take(pool, write(tmp_path / "m.csv", f"{CARD},甲,longtan,,,{listed}"))
    assert (moved.changed, moved.kept_revoked) == (1, kept)
    assert (await show(pool, CARD)).union_code == "longtan"
    assert await feed(pool) == [(1, 1, False)]
    restored = await restore(pool, CARD, actor="ann", reason="found")
    assert (restored.status, restored.revoked) == ("active", False)
    report = await take(pool, file)
    assert ((await show(pool, CARD)).status, report.kept_revoked) == (listed, 0)
    last = [] if listed == "active" else [(3, 1, False)]
    assert await feed(pool) == [(1, 1, False), (2, 1, True), *last]


@pytest.mark.parametrize("listed", ["active", "suspended", "cancelled"])
async def test_person_decides_on_a_card_of_any_status(
    pool: Any, tmp_path: Path, listed: str
) -> None:
    """The roster sets the status, a person restores it, revokes it, and the roster comes again."""
    file = write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,{listed}")
    active = write(tmp_path / "a.csv", f"{CARD},甲,dongsi,,,active")

    async def status() -> tuple[str, bool]:
        card = await show(pool, CARD)
        return card.status, card.revoked

    await take(pool, file)
    assert await status() == (listed, False)
    await restore(pool, CARD, actor="ann", reason="wrongly listed")
    assert await status() == ("active", False)
    await take(pool, file)  # the roster's own word is the newer one
    assert await status() == (listed, False)
    await revoke(pool, CARD, actor="ann", reason="lost")
    assert await status() == ("cancelled", True)
    await take(pool, active)
    assert await status() == ("cancelled", True)
    await restore(pool, CARD, actor="ann", reason="found")
    await take(pool, active)
    assert await status() == ("active", False)
    rows = await feed(pool)
    # A revocation of a card that was not active has its row too: it raises the generation.
    turns = [active for active, _ in groupby(active for _, _, active in rows)]
    assert turns == [bool(n % 2) for n in range(len(turns))]
    assert [rev for rev, _, _ in rows] == list(range(1, len(rows) + 1))


async def test_revoked_card_cannot_be_active_in_the_table(pool: Any, tmp_path: Path) -> None:
    await take(pool, write(tmp_path / "a.csv", f"{CARD},甲,dongsi,,,active"))
    await revoke(pool, CARD, actor="ann", reason="lost")
    with pytest.raises(asyncpg.CheckViolationError, match="member_revoked_is_cancelled"):
        await pool.execute("update member set status = 'active'")


async def test_revocation_during_an_import_stands(pool: Any, tmp_path: Path) -> None:
    await take(pool, write(tmp_path / "a.csv", f"{CARD},甲,dongsi,,,suspended"))
    lines = [",".join(card) for card in sample(400, 5, UNIONS)]
    file = write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,active", *lines)
    async with pool.acquire() as other:
        transaction = other.transaction()
        await transaction.start()
        member = await lock_member(other, CARD)
        assert member is not None
        await set_status(other, member, "cancelled", revoked=True)
        importing = asyncio.create_task(take(pool, file))
        waits = "select count(*) from pg_locks where not granted"
        while not await pool.fetchval(waits):  # noqa: ASYNC110 - the lock is in PostgreSQL
            await asyncio.sleep(0.01)
        await transaction.commit()
    await importing
    card = await show(pool, CARD)
    assert (card.status, card.revoked) == ("cancelled", True)


async def test_replaced_card_keeps_its_member(pool: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,1234,active")
    await take(pool, file)
    told: list[str] = []

    async def after_change() -> None:
        told.append("changed")

    card = await replace(pool, CARD, OTHER, actor="ann", reason="lost", after_change=after_change)

    assert (card.member_no, card.card_no, card.generation) == (1, OTHER, 1)
    assert (card.name, card.has_pin, card.status) == ("甲", True, "active")
    assert told == ["changed"]
    assert await generations_from(pool, 0, 9) == [(1, 1, 1)]
    old = await show(pool, CARD)
    assert (old.member_no, old.replaced_by) == (1, OTHER)
    row = await pool.fetchrow("select * from audit_log order by id desc limit 1")
    assert (row["actor"], row["action"], row["reason"]) == ("ann", "card.replace", "lost")
    assert row["target"] == "member 1, card ********0002"
    assert json.loads(row["data"]) == {"from": "********0001", "to": "********0002"}
    (entry,) = [entry async for entry in tokens(pool, KEY, 5, now_s=1_000)]
    member = MemberTokens(KEY, {1: 1}).verify(entry["token"], 1_001)
    assert (entry["card_no"], member.no, member.generation) == (OTHER, 1, 1)


async def test_replacing_is_refused_where_a_number_is_taken(pool: Any, tmp_path: Path) -> None:
    third = "622100000003"
    await take(
        pool,
        write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,active", f"{OTHER},乙,dongsi,,,active"),
    )
    how: dict[str, Any] = {"actor": "ann", "reason": "lost"}
    with pytest.raises(Refused, match=r"\*{8}0003 in the roster"):
        await replace(pool, third, CARD, **how)
    for new in (OTHER, CARD):
        with pytest.raises(Refused, match="in the roster already"):
            await replace(pool, CARD, new, **how)
    assert (await show(pool, CARD)).replaced_by is None
    await replace(pool, CARD, third, **how)
    for change in (
        replace(pool, CARD, "622100000004", **how),
        replace(pool, OTHER, CARD, **how),
        revoke(pool, CARD, **how),
        restore(pool, CARD, **how),
    ):
        with pytest.raises(Refused, match=r"replaced by card \*{8}0003|in the roster already"):
            await change
    assert await count(pool, "card") == 3
    assert await count(pool, "member") == 2


async def test_roster_with_a_replaced_card_makes_no_second_member(
    pool: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,active")
    await take(pool, file)
    await replace(pool, CARD, OTHER, actor="ann", reason="lost")
    both = write(
        tmp_path / "b.csv", f"{CARD},丙,longtan,,,suspended", f"{OTHER},乙,dongsi,,,active"
    )
    for given, changed in ((file, 0), (both, 1)):
        for dry_run in (True, False):
            report = await take(pool, given, dry_run=dry_run)
            assert (report.replaced, report.changed, report.added) == (1, changed, 0)
            assert report.imported == report.lines - 1
            assert [(each.line, each.card_tail) for each in report.replaced_lines] == [(2, "0001")]
    card = await show(pool, OTHER)
    assert (card.member_no, card.name, card.union_code) == (1, "乙", "dongsi")
    assert await count(pool, "member") == 1


async def test_numbers_are_dense_and_follow_on(pool: Any, tmp_path: Path) -> None:
    cards = [",".join(card) for card in sample(300, 3, UNIONS)]
    await take(pool, write(tmp_path / "bad.csv", *cards, "x"))  # refused: uses no number
    await take(pool, write(tmp_path / "a.csv", *cards[:200]))
    await take(pool, write(tmp_path / "b.csv", *cards))
    rows = await pool.fetch("select member_no from member order by 1")
    assert [row["member_no"] for row in rows] == list(range(1, 301))
    assert await count(pool, "card") == 300


async def test_only_a_first_revocation_raises_the_generation(pool: Any, tmp_path: Path) -> None:
    await take(pool, write(tmp_path / "a.csv", f"{CARD},甲,dongsi,,,active"))
    how: dict[str, Any] = {"actor": "ann", "reason": "lost"}
    generations = [
        (await change(pool, CARD, **how)).generation
        for change in (revoke, revoke, restore, restore, revoke)
    ]
    assert generations == [1, 1, 1, 1, 2]


async def test_unknown_card_or_missing_reason_is_refused_masked(pool: Any) -> None:
    with pytest.raises(Refused, match=r"\*{8}0001") as caught:
        await revoke(pool, CARD, actor="ann", reason="lost")
    assert CARD not in str(caught.value)
    with pytest.raises(Refused, match="reason"):
        await revoke(pool, CARD, actor="ann", reason="  ")
    assert await count(pool, "audit_log") == 0


async def test_changes_by_hand_are_in_the_feed_and_none_removes(pool: Any, tmp_path: Path) -> None:
    cards = [f"62210000000{digit}" for digit in range(4)]
    await take(pool, write(tmp_path / "r.csv", *(f"{card},甲,dongsi,,,active" for card in cards)))
    await pool.execute("update member set status = 'suspended' where member_no < 3")
    await pool.execute("update member set status = 'cancelled' where member_no < 3")
    await pool.execute("update member set generation = 2 where member_no = 4")
    assert await feed(pool) == [(1, 1, False), (2, 2, False), (3, 4, True)]
    assert await generations_from(pool, 0, 9) == [(3, 4, 2)]
    for statement, why in (
        ("delete from member", "never removed"),
        ("truncate member cascade", "never removed"),
        ("update member set member_no = 9 where member_no = 3", "number cannot change"),
        ("update member set generation = 1 where member_no = 4", "only rises"),
        ("delete from card", "never removed"),
        ("update card set card_no = '999999999999' where member_no = 3", "cannot change"),
        ("update card set member_no = 2 where member_no = 3", "cannot change"),
    ):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError, match=why):
            await pool.execute(statement)


async def test_doctor_counts_cards_in_use(pool: Any, redis: Redis, tmp_path: Path) -> None:
    await take(pool, write(tmp_path / "r.csv", f"{CARD},甲,dongsi,,,active"))
    await replace(pool, CARD, OTHER, actor="ann", reason="lost")
    assert (await diagnose(redis, pool)).cards == 1


async def test_feed_reader_misses_no_revision_of_many_writers(pool: Any, tmp_path: Path) -> None:
    cards = [f"6221000000{number:02d}" for number in range(30)]
    await take(pool, write(tmp_path / "r.csv", *(f"{card},甲,dongsi,,,active" for card in cards)))
    done = asyncio.Event()
    read: list[int] = []

    async def reader() -> None:
        while True:
            last = done.is_set()
            read.extend(change.rev for change in await changes_since(pool, len(read), 7))
            if last and len(read) == await current_rev(pool):
                return

    async with asyncio.TaskGroup() as group:
        group.create_task(reader())
        async with asyncio.TaskGroup() as writers:
            for card in cards:
                writers.create_task(revoke(pool, card, actor="ann", reason="test"))
        done.set()
    assert read == list(range(1, 31))


async def test_concurrent_imports_run_one_after_the_other(pool: Any, tmp_path: Path) -> None:
    rows = [",".join(card) for card in sample(500, 1, UNIONS)]
    forward = write(tmp_path / "a.csv", *rows)
    backward = write(tmp_path / "b.csv", *reversed(rows))
    reports = await asyncio.gather(take(pool, forward), take(pool, backward))
    assert sorted(report.added for report in reports) == [0, 500]


async def test_inactive_members_and_revision_come_in_one_snapshot(
    pool: Any, tmp_path: Path
) -> None:
    await take(
        pool, write(tmp_path / "r.csv", *(",".join(card) for card in sample(400, 7, UNIONS)))
    )
    rows = await pool.fetch("select member_no from member where status <> 'active' order by 1")
    expected = [row["member_no"] for row in rows]
    assert expected
    active = (
        "select card_no from card join member using (member_no) where status = 'active' limit 1"
    )
    async with pool.acquire() as reader, reader.transaction(isolation="repeatable_read"):
        rev = await current_rev(reader)
        await revoke(pool, await pool.fetchval(active), actor="ann", reason="meanwhile")
        found: list[int] = []
        while page := await inactive_members(reader, found[-1] if found else 0, 3):
            found += page
    assert found == expected
    assert rev == len(expected)
    assert await current_rev(pool) == rev + 1


async def test_tokens_are_those_of_the_first_cards_of_the_status(pool: Any, tmp_path: Path) -> None:
    await take(
        pool, write(tmp_path / "r.csv", *(",".join(card) for card in sample(300, 3, UNIONS)))
    )
    entries = [entry async for entry in tokens(pool, KEY, 20, now_s=1_000)]
    expected = await pool.fetch(
        "select card_no, union_code, member_no from card join member using (member_no)"
        " where status = 'active' order by card_no limit 20"
    )
    verify = MemberTokens(KEY).verify
    assert [
        (entry["card_no"], entry["union"], verify(entry["token"], 1_001).no) for entry in entries
    ] == [tuple(row) for row in expected]
    assert [entry async for entry in tokens(pool, KEY, 5_000, "cancelled", now_s=1_000)]


def test_sample_repeats_for_its_seed_and_resembles_the_district() -> None:
    cards = list(sample(20_000, 1, UNIONS))
    assert cards[:50] == list(sample(50, 1, UNIONS)) != list(sample(50, 2, UNIONS))
    assert len({card.card_no for card in cards}) == len(cards)
    assert {card.union for card in cards} == CODES - {"district"}
    share = {
        status: sum(card.status == status for card in cards) / len(cards)
        for status in ("suspended", "cancelled")
    }
    assert 0.008 < share["suspended"] < 0.016
    assert 0.005 < share["cancelled"] < 0.011
    assert all(len(card.card_no) == 16 and len(card.phone) == 11 for card in cards)


def test_every_sample_campaign_has_the_figures_of_the_facts() -> None:
    files = sorted((default_unions_path().parent / "campaigns").glob("*.toml"))
    campaigns = [parse_campaign_toml(file.read_text(), CODES) for file in files]
    assert {one.id: sum(showing.tickets for showing in one.showings) for one in campaigns} == {
        "children-theatre-may": 2_000,
        "five-yuan-films": 20_000,
        "green-gift": 8_000,
        "ice-snow-carnival": 6_400,
        "illusion-art": 2_400,
        "interest-classes": 990,
    }
    assert [file.stem for file in files] == [campaign.id for campaign in campaigns]
    assert len(UNIONS) == 18
