"""The tables of all load tests, on a console: grids of figures, facts, goals, and the verdict."""

import os
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

CLEAN: Final = "clean"
WIDTH: Final = 116


class Goal(msgspec.Struct, frozen=True):
    """A target of the project and this run's figure; None: it was not measured."""

    what: str
    goal: float
    got: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether this run reached it."""
        if self.got is None:
            return None
        return self.got <= self.goal if self.at_most else self.got >= self.goal

    @property
    def row(self) -> tuple[str, ...]:
        """It as a row of `goals`."""
        sign = "≤" if self.at_most else "≥"
        got = "" if self.got is None else f"{self.got:.2f}"
        told = {True: "[green]met[/]", False: "[red]not met[/]", None: "not measured"}
        return self.what, f"{sign} {self.goal:g}", got, told[self.met]


def wide_console() -> Console:
    """A console on which the tables fit, also where the output is a file."""
    console = Console()
    return console if console.width >= WIDTH else Console(width=WIDTH)


def grid(
    title: str, headings: str, rows: Iterable[Sequence[str]], caption: str = "", left: str = ""
) -> Table:
    """A table of figures. ``headings`` are separated by "|", their first column is aligned left,
    and so are those that ``left`` names.
    """
    table = Table(title=title, caption=caption or None)
    for number, heading in enumerate(headings.split("|")):
        aligned = not number or heading in left.split("|")
        table.add_column(heading, justify="left" if aligned else "right")
    for row in rows:
        table.add_row(*row)
    return table


def figures(
    title: str, columns: dict[str, str], things: Iterable[object], caption: str = ""
) -> Table:
    """A table of things: each column's heading, and how its cell is worded ("{.rate:,.0f}")."""
    rows = ([words.format(thing) for words in columns.values()] for thing in things)
    return grid(title, "|".join(columns), rows, caption)


def facts(title: str, *sections: Iterable[tuple[str, str]]) -> Table:
    """Names and figures, in sections."""
    table = Table(title=title or None, title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for section in map(list, sections):
        for number, (name, figure) in enumerate(section, start=1):
            table.add_row(name, figure, end_section=number == len(section))
    return table


def goals_table(all_goals: Iterable[Goal]) -> Table:
    """Targets, and what this run reached of them."""
    return grid("goals", "|goal|this run|", (goal.row for goal in all_goals))


def coloured(words: object, *, good: bool) -> str:
    """Markup of words, green or red."""
    return f"[{'green' if good else 'red'}]{escape(str(words))}[/]"


def verdict(words: str) -> str:
    """Markup of a check's result, green for `CLEAN` alone."""
    return coloured(words, good=words == CLEAN)


def other_core() -> str:
    """Where the client of a benchmark runs, as seen from the server's core."""
    if len(os.sched_getaffinity(0)) > 1:
        return "another"
    return "the same: there is only one, so nothing here is a figure"
