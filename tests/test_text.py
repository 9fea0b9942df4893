"""Texts that people read, and names of accounts: misleading characters are refused or removed."""

from pathlib import Path

import pytest
from test_campaign import faults

from sale.domain.text import REASON_MAX, account_name, shown_text
from sale.domain.unions import load_unions

FOOLING = [
    *("", " ", "\u3000", "\xa0\u3000 "),
    *("\u200b", "\u2060\ufeff", "\xad", "\u3164", "\u115f\u1160", "\uffa0", "\u2800", "\u034f"),
    *("\u0301", "\ufe0f", "\U000e0100", "\u200d"),
    *("a\u200bb", "a\ufeff", "a\xadb", "a\u3164b", "a\u2800", "a\u200c", "a\u200d", "五\u200d元"),
    *("🙂\u200d", "\u200d🙂", "a\U000e0061", "a\u180e"),
    *("a\u202eb", "\u202aa\u202c", "a\u2066b\u2069", "a\u2067", "a\u200f", "\u200ea", "a\u061cb"),
    *("a\x00", "a\nb", "a\n", "a\tb", "\x1b[31m", "a\x7f", "a\x85b", "a\u2028b", "a\u2029"),
    *("\ud800", "a\udcff", "a\ufffe", "a\U0001ffff", "a\ufdd0"),
    *("x" * (REASON_MAX + 1), "e\u0301" * (REASON_MAX + 1), "\u0301" * 1_000_000),
]
FINE = [
    *(
        "五元看大片",
        "通用券　第一场",
        "A\xa0B",
        "第 1 场 / Hall 2",
        "a" * REASON_MAX,
        "\xe9" * REASON_MAX,
    ),
    *("䶮", "𠮷野家", "𰻝𰻝面", "\U00031350", "\U0002ebf0", "葛\U000e0100飾", "王\ue863"),
    *("🙂", "👨\u200d👩\u200d👧", "❤\ufe0f\u200d🔥", "🧑🏽\u200d💻", "عربي", "한국어", "ﾃｽﾄ", "1️⃣"),
]


@pytest.mark.parametrize("text", FOOLING, ids=lambda text: ascii(text[:9]))
def test_fooling_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must (be a text of 1 to 500|not hold .* U\+)"):
        shown_text(text, REASON_MAX)


@pytest.mark.parametrize("text", FINE, ids=lambda text: ascii(text[:9]))
def test_honest_text_is_kept(text: str) -> None:
    assert shown_text(text, REASON_MAX) == text


def test_text_is_composed_and_trimmed() -> None:
    assert shown_text("\u3000 \xa0Cafe\u0301　一楼\u3000", REASON_MAX) == "Caf\xe9　一楼"


@pytest.mark.parametrize("text", ["\u200b", "a\u202eb", "\u3000", "a\x00", "\u0301"], ids=ascii)
def test_campaign_names_each_fooling_title(text: str) -> None:
    told = faults(title=text, showings=[{"id": "a", "title": text, "tickets": 1}])
    assert set(told) == {"title", "showings[0].title"}


@pytest.mark.parametrize("name", ["\u200b", "东城\u202e区", "\u3000"], ids=ascii)
def test_unions_file_refuses_fooling_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / "unions.toml"
    file.write_text(f'[[unions]]\ncode = "district"\nname = "{name}"\n', "utf-8")
    with pytest.raises(ValueError, match=r"unions\.toml: must "):
        load_unions(file)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("ａｎｎ", "ann"),
        ("Ａｎｎ０１", "Ann01"),
        ("Rene\u0301", "Ren\xe9"),
        ("ﬁona", "fiona"),
        ("ﾃｽﾄ", "テスト"),
        ("\u1112\u1161\u11ab", "한"),
        ("李主任", "李主任"),
        ("𠮷野", "𠮷野"),
        ("王\u9fb4", "王\u9fb4"),
    ],
    ids=ascii,
)
def test_account_name_has_one_form(written: str, name: str) -> None:
    assert account_name(written) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "a b", "a\u3000b", "a\xa0b", "a\n", "x" * 65, "ﷺ" * 4),
        *("a\u200b", "\u3164", "a\u202eb", "葛\U000e0100", "a\ufe0f", "\u0301", "\udcff"),
    ],
    ids=ascii,
)
def test_fooling_account_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^a name "):
        account_name(name)
