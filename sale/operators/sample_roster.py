"""A synthetic roster: as many cards as asked for, the same ones for the same seed, no real people.

Names are drawn from characters that are common in names; shares of the subdistricts follow how they
differ in size, roughly (ours). Card numbers walk through their range by a step that has no factor
in common with its length, so they are unique without remembering those given out, and neighbours in
the roster belong to different unions.
"""

import random
from bisect import bisect
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Final, NamedTuple

from sale.domain.unions import DISTRICT

SAMPLE_MAX: Final = 100_000_000

SHARES: Final[dict[str, int]] = {
    "donghuamen": 62,
    "jingshan": 36,
    "jiaodaokou": 42,
    "andingmen": 40,
    "beixinqiao": 66,
    "dongsi": 40,
    "chaoyangmen": 42,
    "jianguomen": 42,
    "dongzhimen": 62,
    "hepingli": 122,
    "qianmen": 18,
    "chongwenmenwai": 54,
    "donghuashi": 64,
    "longtan": 62,
    "tiyuguanlu": 52,
    "tiantan": 56,
    "yongdingmenwai": 90,
}
"""Members of each subdistrict union, in thousandths or so of the district's."""

SUSPENDED_SHARE: Final = 0.012
CANCELLED_SHARE: Final = 0.008
NO_PIN_SHARE: Final = 0.15


class SampleCard(NamedTuple):
    """One line of a roster file."""

    card_no: str
    name: str
    union: str
    phone: str
    pin: str
    status: str


def sample(count: int, seed: int, unions: Mapping[str, str]) -> Iterator[SampleCard]:
    """Make ``count`` cards for the subdistricts among ``unions`` (code to name).

    A shorter sample of the same seed is the beginning of a longer one. Raises ValueError for a
    count above SAMPLE_MAX.
    """
    if not 0 <= count <= SAMPLE_MAX:
        raise ValueError(f"a sample has 0 to {SAMPLE_MAX} cards")
    source = random.Random(seed)  # noqa: S311 - made-up people, no secrets
    draw, bits = source.random, source.getrandbits
    codes = [code for code in unions if code != DISTRICT] or list(unions)
    bounds = list(accumulate(SHARES.get(code, 50) for code in codes))
    start = bits(40) % _CARD_RANGE
    for number in range(count):
        yield SampleCard(
            f"{_CARD_PREFIX}{(start + number * _CARD_STEP) % _CARD_RANGE:012d}",
            _name(bits(32)),
            codes[bisect(bounds, draw() * bounds[-1])],
            f"1{3 + bits(16) % 7}{bits(48) % 1_000_000_000:09d}",
            "" if draw() < NO_PIN_SHARE else f"{bits(32) % 1_000_000:06d}",
            _status(draw()),
        )


def _name(bits: int) -> str:
    surname = _SURNAMES[bits % len(_SURNAMES)]
    first = _GIVEN[(bits >> 8) % len(_GIVEN)]
    # One in four has a given name of one character.
    second = "" if (bits >> 30) == 0 else _GIVEN[(bits >> 16) % len(_GIVEN)]
    return surname + first + second


def _status(share: float) -> str:
    if share < SUSPENDED_SHARE:
        return "suspended"
    return "cancelled" if share < SUSPENDED_SHARE + CANCELLED_SHARE else "active"


_CARD_PREFIX: Final = "9901"
_CARD_RANGE: Final = 10**12
_CARD_STEP: Final = 618_033_988_749
# Common surnames stand several times, as they do in life.
_SURNAMES: Final = tuple(
    "王王王王王王王李李李李李李李张张张张张张刘刘刘刘刘陈陈陈陈杨杨杨赵赵赵黄黄周周吴吴徐徐孙孙"
    "胡胡朱朱高高林林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘"
    "杜戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段漕钱汤尹黎易常武乔"
)
_GIVEN: Final = tuple(
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华玉兰建国文慧红梅春燕志新海波丹宁晨曦雨欣"
    "子涵浩然梓轩思远佳怡嘉琪俊峰立群永康德胜金凤淑珍凯鹏飞雪莲晓东庆丰长河青山云峥若溪一诺"
)
