"""Options of ours beside Locust's own."""

import argparse
from typing import Any, Final, TypeVar

import msgspec

from loadtest.scenarios import SCENARIOS, Deeds, Mix, Phases, Scenario
from loadtest.thresholds import RULES_HELP

Changeable = TypeVar("Changeable", Mix, Deeds)

RAISES: Final = 4
STOP_S: Final = 3.0
"""For so long users may end what they are at; workers are ready for another run only after it."""


def add_options(parser: Any, **_: object) -> None:  # noqa: ANN401 - locust's parser
    """Add ours; the workers get them from the master."""

    def add(*names: str, **more: Any) -> None:  # noqa: ANN401
        parser.add_argument(*names, include_in_web_ui=False, **more)

    add("--scenario", default="", choices=["", *SCENARIOS], help="one of " + ", ".join(SCENARIOS))
    add("--campaign", default="", env_var="CAMPAIGN", help="play this one instead of a new one")
    add(
        "--tokens",
        default="",
        env_var="LOADTEST_TOKENS",
        help="file of `sale tokens`; without it, from the roster in --data-dir",
    )
    add("--data-dir", default="", env_var="LOADTEST_DATA_DIR", help="of the running sale up")
    add("--database-url", default="", env_var="LOADTEST_DATABASE_URL", help="where the books are")
    add("--redis-url", default="", env_var="LOADTEST_REDIS_URL", help="for sale audit as well")
    add("--metrics", default="", help="host:port of the engine's metrics, for the report")
    add("--operator-token-file", default="", help="without it, a new one of account loadtest")
    add("--out", default="", help="folder for run.json, report.html and answers.jsonl")
    add("--full-stock", action="store_true", help="all tickets, though only a part of the crowd")
    for name in ("quiet", "gathering", "opening", "tail"):
        add(f"--{name}", type=_seconds, help=f"seconds of the scenario's {name}")
    for name in ("members", "refreshers", "bots"):
        add(f"--{name}", type=_count, help=f"weight of {name} among the users")
    add("--raise-stock", type=_count, help="tickets that the operator adds after the opening")
    add("--pauses", type=_count, help="how often the operator pauses and resumes")
    add("--fail-if", action="append", default=[], metavar="RULE", help=RULES_HELP)
    parser.set_defaults(stop_timeout=STOP_S)


def mix_of(told: Any, scenario: Scenario | None) -> Mix:  # noqa: ANN401 - locust's options
    """The mix of users: the scenario's, or members alone; options override it."""
    return _changed(scenario.mix if scenario else Mix(), told, "members", "refreshers", "bots")


def deeds_of(told: Any, scenario: Scenario | None) -> Deeds:  # noqa: ANN401
    """The operator's steps: the scenario's, or none; options override them."""
    deeds = _changed(scenario.deeds if scenario else Deeds(), told, "pauses")
    if told.raise_stock is None:
        return deeds
    return msgspec.structs.replace(
        deeds, raise_tickets=told.raise_stock, raises=min(told.raise_stock, RAISES)
    )


def phases_of(told: Any, scenario: Scenario, opens_in_s: float | None) -> Phases:  # noqa: ANN401
    """When they come; a campaign that there is already opens in so many seconds."""
    lengths = {
        f"{name}_s": getattr(told, name)
        for name in ("quiet", "gathering", "opening", "tail")
        if getattr(told, name) is not None
    }
    phases = msgspec.structs.replace(scenario.phases, **lengths)
    if opens_in_s is None:
        return phases
    gathering_s = min(phases.gathering_s, opens_in_s)
    return msgspec.structs.replace(
        phases, gathering_s=gathering_s, quiet_s=opens_in_s - gathering_s
    )


def _changed(usual: Changeable, told: Any, *names: str) -> Changeable:  # noqa: ANN401
    given = {name: getattr(told, name) for name in names if getattr(told, name) is not None}
    return msgspec.structs.replace(usual, **given)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 3_600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return number


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1000000")
    return int(text)
