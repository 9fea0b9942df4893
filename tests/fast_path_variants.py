"""Variants of the same requests: headers reordered, recased or added; bytes in pieces."""

import random
from collections.abc import Callable

from fast_path_requests import Case

Lines = list[bytes]
Change = Callable[[Lines, random.Random], Lines]

BROWSERS = (
    b"User-Agent: Mozilla/5.0 (Linux; Android 14) AppleWebKit/537.36 Mobile Safari/537.36",
    b"Accept: application/json, text/plain, */*",
    b"Accept-Encoding: gzip, deflate, br, zstd",
    b"Accept-Language: zh-CN,zh;q=0.9",
    b"Cache-Control: no-cache",
    b"Cookie: a=b; c=d",
    b"Origin: https://sale.example",
    b"Referer: https://sale.example/campaigns",
    b"Sec-Fetch-Mode: cors",
    b"X-Forwarded-For: 203.0.113.7",
    b"X-Request-Id: 5f0c",
)


def _shuffled(lines: Lines, rng: random.Random) -> Lines:
    return rng.sample(lines, len(lines))


def _cased(case: Callable[[bytes, random.Random], bytes]) -> Change:
    def change(lines: Lines, rng: random.Random) -> Lines:
        named = [line.partition(b":") for line in lines]
        return [case(name, rng) + colon + value for name, colon, value in named]

    return change


def _mixed(name: bytes, rng: random.Random) -> bytes:
    return bytes(rng.choice(bytes([each]).lower() + bytes([each]).upper()) for each in name)


def _as_browsers(lines: Lines, rng: random.Random) -> Lines:
    more = list(lines)
    for line in rng.sample(BROWSERS, rng.randint(1, len(BROWSERS))):
        more.insert(rng.randint(0, len(more)), line)
    return more


def _kept_alive(lines: Lines, rng: random.Random) -> Lines:
    at = rng.randint(0, len(lines))
    return [*lines[:at], rng.choice([b"Connection: keep-alive", b"connection: Keep-Alive"]),
            *lines[at:]]  # fmt: skip


CHANGES: dict[str, Change] = {
    "in another order": _shuffled,
    "in lower case": _cased(lambda name, _: name.lower()),
    "in upper case": _cased(lambda name, _: name.upper()),
    "in any case": _cased(_mixed),
    "as browsers send it": _as_browsers,
    "kept alive": _kept_alive,
    "in another order and any case, as browsers send it": lambda lines, rng: _shuffled(
        _cased(_mixed)(_as_browsers(lines, rng), rng), rng
    ),
}
"""Ways to rewrite the header lines."""


def changed(case: Case, change: str, rng: random.Random) -> Case:
    """The case with other header lines in each of its requests."""
    pieces = []
    for piece in case.pieces:
        head, end, body = piece.partition(b"\r\n\r\n")
        start, *lines = head.split(b"\r\n")
        lines = CHANGES[change](lines, rng)
        pieces.append(b"\r\n".join([start, *lines]) + end + body)
    return case._replace(pieces=tuple(pieces))


def cut(data: bytes, times: int, rng: random.Random) -> list[bytes]:
    """Cut bytes at so many places."""
    cuts = sorted(rng.sample(range(1, len(data)), min(times, len(data) - 1)))
    return [data[at:to] for at, to in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def in_steps(data: bytes, step: int) -> list[bytes]:
    """Cut bytes after every so many."""
    return [data[at : at + step] for at in range(0, len(data), step)]
