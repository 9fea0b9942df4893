"""The rushes of the federation, as Locust plays them, and the campaign of a run.

``scenarios.toml`` has a table for each, named as its campaign file. A run plays a small part of the
real crowd, so the stock is cut by the same share unless ``--full-stock`` is given: a tenth of the
members meets a tenth of the tickets, and the sale ends as the real one did.
"""

import math
import secrets
import time
import tomllib
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec

from sale.files import UnreadableFile, read_toml

FOLDERS: Final = (Path("config/campaigns"), Path(__file__).parents[1] / "config/campaigns")
SELLS_FOR: Final = timedelta(days=1)


class Phases(msgspec.Struct, frozen=True):
    """Lengths in seconds, and the shares of all users that are there."""

    quiet_s: float
    gathering_s: float
    opening_s: float
    tail_s: float
    quiet_share: float = 0.05
    gathered_share: float = 0.85
    tail_share: float = 0.3

    @property
    def opens_after_s(self) -> float:
        """When the campaign opens, from the start."""
        return self.quiet_s + self.gathering_s

    @property
    def duration_s(self) -> float:
        """All four together."""
        return self.opens_after_s + self.opening_s + self.tail_s


class Mix(msgspec.Struct, frozen=True):
    """The mix of users, by weight. Members and bots have a card each, refreshers have none."""

    members: int = 1
    refreshers: int = 0
    bots: int = 0

    @property
    def all(self) -> int:
        """Sum of the weights."""
        return self.members + self.refreshers + self.bots


class Deeds(msgspec.Struct, frozen=True):
    """The operator's steps after the opening: stock added in all, in how many steps; pauses.

    ``raise_share`` is of the campaign's own stock, ``raise_tickets`` an absolute number.
    """

    raise_share: float = 0.0
    raise_tickets: int = 0
    raises: int = 0
    pauses: int = 0

    @property
    def any(self) -> bool:
        """Whether there is anything for an operator to do."""
        return self.raises + self.pauses > 0


class Scenario(msgspec.Struct, frozen=True):
    """A row of the table. ``crowd`` is how many come in the real rush, ``users`` in a run of ours.

    ``own_share`` of the cards belong to a union that may buy, where not every union may.
    """

    users: int
    crowd: int
    mix: Mix
    phases: Phases
    deeds: Deeds = Deeds()
    own_share: float = 1.0


SCENARIOS: Final = msgspec.convert(
    tomllib.loads(files("loadtest").joinpath("scenarios.toml").read_text("utf-8")),
    dict[str, Scenario],
)


class ScenarioError(Exception):
    """The scenario's campaign file is missing or wrong; the message is for people."""


def campaign_file(name: str) -> Path:
    """Find the campaign file of a scenario. Raises ScenarioError."""
    for folder in FOLDERS:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise ScenarioError(f"config/campaigns/{name}.toml is missing: run this in the project")


def read_campaign(name: str) -> dict[str, Any]:
    """Read the campaign file of a scenario as a table. Raises ScenarioError."""
    try:
        return read_toml(campaign_file(name))
    except UnreadableFile as error:
        raise ScenarioError(str(error)) from None


def run_name(scenario: str) -> str:
    """Make a campaign ID of its own for a run: 48 characters at most, never used twice."""
    return f"{scenario[:32]}-{int(time.time()):x}{secrets.token_hex(2)}"


def campaign_of_run(
    scenario: Scenario,
    table: dict[str, Any],
    *,
    identifier: str,
    opens_at: datetime,
    users: int,
    full_stock: bool,
) -> dict[str, Any]:
    """Turn a campaign file into the campaign of a run, as the admin API takes it."""
    share = 1.0 if full_stock else min(users / scenario.crowd, 1.0)
    kept = {key: value for key, value in table.items() if key not in ("draft", "showings")}
    showings = [
        {key: value for key, value in showing.items() if key != "starts_at"}
        | {"tickets": max(round(showing["tickets"] * share), 1)}
        for showing in table["showings"]
    ]
    return kept | {
        "id": identifier,
        "title": f"{table['title']}（压力测试）",
        "opens_at": opens_at.isoformat(),
        "closes_at": (opens_at + SELLS_FOR).isoformat(),
        "showings": showings,
    }


def cards_needed(mix: Mix, users: int, operators: int = 0) -> int:
    """How many cards ``users`` need at most, with what Locust's rounding may add."""
    seats = max(users - operators, 0)
    holders = mix.members + mix.bots
    if not mix.all or not holders:
        return 0
    if not mix.refreshers:
        return seats
    return min(seats, math.ceil(seats * holders / mix.all) + 2)
