"""Output for people: tables, progress, and text in any encoding.

A table does not cut IDs and times: it becomes wider than 80 columns instead, and wraps running text
only. Progress is a bar at a terminal, and elsewhere a line every few seconds. It goes to stderr,
as all output that is not the result.
"""

import contextlib
import io
import json
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import click
import msgspec

LINE_EVERY_S: Final = 5.0
WORD_MAX: Final = 64
"""Longest word that is never broken: an order number."""

Move = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and the step's name."""


def take_any_character() -> None:
    """Let stdout and stderr write what they cannot encode as an escape, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def as_utf8() -> None:
    """Make stdout UTF-8 for data that another program reads, whatever the terminal's encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")


def nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def note(text: str) -> None:
    """Print a message beside the result, on stderr; a failure to write is ignored."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def echo_json(value: object) -> None:
    """Print one JSON value on stdout, in ASCII where stdout is not UTF-8."""
    raw = msgspec.json.encode(value)
    if (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8":
        click.echo(raw.decode())
    else:
        click.echo(json.dumps(json.loads(raw), separators=(",", ":")))


def echo_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print names and values, a line each."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        click.echo(f"{name:<{width}}  {'' if value is None else value}")


def echo_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Print a table on stdout. Text is wrapped to a terminal's width, IDs and times never are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [["" if value is None else str(value) for value in row] for row in rows]
    width = Console().width if sys.stdout.isatty() else None
    widths = _widths([columns, *cells], width)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, column_width in zip(columns, widths, strict=True):
        table.add_column(name, width=column_width, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(width=max(sum(widths) + _frame(widths), _NARROW)).print(table, crop=False)


@contextlib.contextmanager
def progress(
    what: str, amount: Callable[[int], str] = "{:,}".format, *, every_s: float = LINE_EVERY_S
) -> Iterator[Move]:
    """Show how far something is, on stderr; yields the function to call on the way."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if console.is_terminal and sys.stderr.isatty():
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=console,
        ) as bar:
            task = bar.add_task(what, total=None, amount="")

            def move(done: int, total: int, step: str = "") -> None:
                shown = f"{amount(done)} of {amount(total)}"
                bar.update(
                    task, description=step or what, completed=done, total=total, amount=shown
                )

            yield move
        return
    state, ended, began = ["begun"], threading.Event(), time.monotonic()

    def keep(done: int, total: int, step: str = "") -> None:
        state[0] = f"{step + ', ' if step else ''}{amount(done)} of {amount(total)}"

    def report() -> None:
        while not ended.wait(every_s):
            note(f"{what}: {state[0]}, {time.monotonic() - began:.0f} s")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield keep
    finally:
        ended.set()
        reporter.join()


def megabytes(count: int) -> str:
    """Word a number of bytes."""
    return f"{count / 1e6:,.1f} MB"


def _widths(rows: Sequence[Sequence[str]], most: int | None) -> list[int]:
    """Width of each column: its longest cell, less where the terminal is narrower.

    The widest column gives way first, down to its longest word.
    """
    from rich.cells import cell_len

    columns = list(zip(*rows, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    if most is None:
        return widths
    least = [
        max((len(word) for cell in column for word in _WORD.findall(cell)), default=1)
        for column in columns
    ]
    left = most - _frame(widths)
    while sum(widths) > left:
        wide = [n for n, width in enumerate(widths) if width > least[n]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _frame(widths: Sequence[int]) -> int:
    """Cells of a row beside its contents: a space at each side of a column, and one between two."""
    return 3 * len(widths) + 1


_NARROW: Final = 40
_WORD: Final = re.compile(rf"[!-~]{{1,{WORD_MAX}}}")
