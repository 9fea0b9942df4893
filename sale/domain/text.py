"""Texts and names that people read: one rule for what they may hold."""

import re
import unicodedata
from typing import Final, NamedTuple

TITLE_MAX: Final = 200
ACCOUNT_NAME_MAX: Final = 64
REASON_MAX: Final = 500


class Text(NamedTuple):
    """The same words in both languages."""

    zh: str
    en: str

    def of_field(self, field: str) -> "Text":
        """Give the words behind the name of the field that they are about."""
        return Text(f"{field}：{self.zh}", f"{field}: {self.en}")


class Wrong(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A value is wrong; ``text`` says in both languages what it must be."""

    def __init__(self, text: Text) -> None:
        super().__init__(text.en)
        self.text = text


def shown_text(text: str, length_max: int) -> str:
    """Give a text that people will read as it is kept: composed (NFC), no spaces around it.

    It must look like what it is: refused are control characters, halves of characters, what turns
    the direction of writing, and what is there and cannot be seen, because two texts that look the
    same would differ, or one text would look like another. Spaces of every width may stand inside,
    rare Han may stand anywhere (``str.isprintable`` refuses both). Raises Wrong.
    """
    if len(text) > 4 * length_max:  # bounds the work: composing makes one character of up to four
        raise Wrong(text_of_length(length_max))
    text = unicodedata.normalize("NFC", text)
    for number, character in enumerate(text, 1):
        if _is_hidden(character) and not _joins_emoji(text, number - 1):
            code = f"U+{ord(character):04X}"
            raise Wrong(
                Text(
                    f"不能含控制字符或看不见的字符（第 {number} 个是 {code}）",
                    "must not hold control characters or invisible ones: "
                    f"character {number} is {code}",
                )
            )
    text = text.strip()
    if not 1 <= len(text) <= length_max or not any(map(_is_seen, text)):
        raise Wrong(text_of_length(length_max))
    return text


def text_of_length(length_max: int) -> Text:
    """Say that a value must be a text of at most this length."""
    return Text(
        f"必须是 1 到 {length_max} 个字符的文字",
        f"must be a text of 1 to {length_max} characters",
    )


def account_name(text: str) -> str:
    """Give the one way of writing an account's name: full width and half, é of one part or two.

    Names stand in the audit log, so no two may look alike that are not the same (NFKC). Raises
    ValueError in words.
    """
    try:
        name = shown_text(unicodedata.normalize("NFKC", text), ACCOUNT_NAME_MAX)
    except ValueError as wrong:
        raise ValueError(f"a name {wrong}") from None
    if any(character.isspace() or _IN_EMOJI.match(character) for character in name):
        raise ValueError(f"a name is 1 to {ACCOUNT_NAME_MAX} characters without spaces")
    return name


_HIDDEN: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0\ufdd0-\ufdef\ufff0-\ufff8\U0001d159"
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
)
"""Fillers, tags and non-characters: nothing is seen of them, whatever their category."""
_JOINER: Final = "\u200d"
_EMOJI: Final = frozenset({"So", "Sk", "Mn"})
"""Categories of an emoji's last character: itself, a colour of skin, a selector."""
_IN_EMOJI: Final = re.compile("[\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Joiner and selectors of a variant: they change the character before them, an emoji or a Han."""


def _is_hidden(character: str) -> bool:
    """Whether nothing is seen of a character, or it changes what is seen around it."""
    return (
        unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        or ord(character) & 0xFFFE == 0xFFFE
        or _HIDDEN.match(character) is not None
    )


def _joins_emoji(text: str, at: int) -> bool:
    """Whether this character makes one emoji of those beside it: only there it may be joined."""
    beside = [unicodedata.category(each) for each in text[max(at - 1, 0) : at + 2]]
    return text[at] == _JOINER and len(beside) == 3 and beside[0] in _EMOJI and beside[2] == "So"


def _is_seen(character: str) -> bool:
    """Whether a character shows something by itself: marks and spaces do not."""
    return unicodedata.category(character) not in {"Zs", "Mn", "Mc", "Me", "Cf"}
