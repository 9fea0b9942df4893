"""When members come: offsets in seconds from the start, made before the run.

An open loop sends at these moments, whatever the server does. They are made beforehand, from a seed
where chance is wanted, so that a run can be repeated and nothing is computed while it goes on.
"""

import csv
import io
import itertools
import math
import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sale.files import LARGE_MAX_BYTES, UnreadableFile, read_text

AT_ONCE: Final = "at-once"
"""All together, ``rate * seconds`` of them: what a closed loop plays."""

KINDS: Final = ("constant", "poisson", "release")
ARRIVALS_MAX: Final = 20_000_000
STEP_S: Final = 1.0
"""How long a count lasts that has no other beside it."""

RELEASE_TAIL_SHARE: Final = 0.15
"""How far into a release the rate has fallen to a third, as a share of its whole time."""


class ArrivalsError(ValueError):
    """The arrivals cannot be made; the message is for people."""


def make(kind: str, rate: float, seconds: float, seed: int) -> "array[float]":
    """Give the offsets of a kind, rising.

    ``constant``: evenly spaced. ``poisson``: independent members at a mean rate. ``release``: a
    Poisson crowd of the same size that comes at once and thins out, as at the second of opening.
    ``file:PATH``: what `recorded` reads; rate and seconds are then of no account.

    Raises:
        ArrivalsError: an unknown kind, or a rate or time that gives none or too many.

    """
    if kind.startswith("file:"):
        return recorded(Path(kind.removeprefix("file:")), seed)
    if not (rate > 0 and seconds > 0 and math.isfinite(rate * seconds)):
        raise ArrivalsError(f"arrivals: rate {rate} and seconds {seconds} must be above 0")
    _check_count(rate * seconds)
    rng = random.Random(seed)  # Python promises the same floats from a seed, on any version
    match kind:
        case "constant":
            made = array("d", (n / rate for n in range(math.ceil(rate * seconds))))
        case "poisson":
            made = array("d", _poisson(rng, rate, seconds))
        case "release":
            made = array("d", _release(rng, rate, seconds))
        case kind if kind == AT_ONCE:
            made = array("d", bytes(8 * round(rate * seconds)))
        case _:
            known = ", ".join(KINDS)
            raise ArrivalsError(f"arrivals {kind!r}: not one of {known}, file:PATH")
    if not made:
        raise ArrivalsError(f"arrivals: nobody comes at {rate}/s within {seconds} s")
    return made


def recorded(file: Path, seed: int) -> "array[float]":
    """Read a recording: an offset in seconds a line, or CSV ``t,count`` (members from second t on).

    A count is spread by chance over the time to the next ``t``, the last over as long as the one
    before it. Rows may stand in any order; the first is moved to 0. Raises ArrivalsError.
    """
    try:
        stream = io.StringIO(read_text(file, most=LARGE_MAX_BYTES), newline="")
        rows = [row for row in csv.reader(stream) if row and not row[0].startswith("#")]
    except UnreadableFile as error:
        raise ArrivalsError(f"arrivals file {error}") from None
    except csv.Error as error:
        raise ArrivalsError(f"arrivals file {file}: {error}") from None
    if rows and rows[0] in (["t", "count"], ["offset_s"]):
        del rows[0]
    told = [
        _row(row, f"arrivals file {file}, row {number}") for number, row in enumerate(rows, start=1)
    ]
    if not any(count for _, count, _ in told):
        raise ArrivalsError(f"arrivals file {file}: nobody comes")
    _check_count(sum(count for _, count, _ in told))
    lasts, rng = _lasts([at for at, _, spread in told if spread]), random.Random(seed)
    first = min(at for at, _, _ in told)
    made = array("d")
    for at, count, spread in told:
        width_s = lasts[at] if spread else 0.0
        made.extend(at - first + width_s * rng.random() for _ in range(count))
    return array("d", sorted(made))


def _row(row: list[str], where: str) -> tuple[float, int, bool]:
    """Moment, how many, and whether they are spread over a time."""
    try:
        at = float(row[0])
        count = int(row[1]) if len(row) == 2 else 1
    except ValueError:
        raise ArrivalsError(f"{where}: {','.join(row)!r} is no offset and no t,count") from None
    if len(row) > 2 or not math.isfinite(at) or count < 0:
        raise ArrivalsError(f"{where}: {','.join(row)!r} is no offset and no t,count")
    return at, count, len(row) == 2


def _lasts(moments: list[float]) -> dict[float, float]:
    """How long each counted step lasts: to the next one, the last as long as the one before it."""
    steps = sorted(set(moments))
    widths = [after - before for before, after in itertools.pairwise(steps)]
    widths.append(widths[-1] if widths else STEP_S)
    return dict(zip(steps, widths, strict=False))


def _poisson(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at = rng.expovariate(rate)
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


def _release(rng: random.Random, rate: float, seconds: float) -> list[float]:
    """``rate * seconds`` members in all, their density falling exponentially from the opening."""
    mean = seconds * RELEASE_TAIL_SHARE
    within = 1 - math.exp(-seconds / mean)
    count = max(round(rate * seconds), 1)
    return sorted(-mean * math.log(1 - rng.random() * within) for _ in range(count))


def _check_count(count: float) -> None:
    if count > ARRIVALS_MAX:
        raise ArrivalsError(f"arrivals: more than {ARRIVALS_MAX:,} members")
