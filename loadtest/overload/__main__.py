"""``python -m loadtest overload``: what is sold while more is asked than can be done.

An engine of its own, one API process and Redis on one core, and an open loop on another.
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

import msgspec
import structlog
import uvloop
from rich.console import Console

from loadtest.bench.__main__ import bench_up
from loadtest.bench.figures import CLEAN
from loadtest.bench.measure import TINY
from loadtest.bench.offer import OfferError, wrk
from loadtest.bench.tables import wide_console
from loadtest.client import AnswerError, Unreachable
from loadtest.engine import EngineError
from loadtest.overload.half import Half, half, print_half
from loadtest.overload.idle import Idle, idle, print_idle
from loadtest.overload.measure import Overload, Overloading, Plan
from loadtest.overload.tables import print_overload
from loadtest.wire import ProtocolError
from sale.http.overload import files_allow

SECONDS_MIN = 1.0


async def measured(
    plan: Plan, half_rounds: int, connections: int, console: Console | None
) -> Overload | Half | Idle:
    """Measure a plan on an engine of its own. Raises EngineError, OfferError …"""
    async with bench_up(TINY, program=wrk(), console=console) as bench:
        if half_rounds:
            return await half(bench, plan.seconds, half_rounds)
        if connections:
            return await idle(bench, connections, plan.seconds)
        return await Overloading(bench, plan).run()


def _plan(arguments: Sequence[str] | None) -> tuple[Plan, int, int, bool]:
    parser = argparse.ArgumentParser(prog="overload", description=__doc__.splitlines()[0])
    default = Plan()
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of each multiple")
    for scene, what in (("far", "Redis answers late"), ("near", "nothing is slowed")):
        parser.add_argument(
            f"--{scene}",
            type=float,
            nargs="*",
            metavar="TIMES",
            default=getattr(default, scene),
            help=f"multiples of the capacity where {what}; none: not at all",
        )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--half",
        type=int,
        metavar="ROUNDS",
        help="no overload: latency at half of the capacity, beside the constant's",
    )
    instead.add_argument(
        "--idle",
        type=int,
        metavar="CONNECTIONS",
        help="no overload: what connections cost that are kept open and idle",
    )
    parser.add_argument("--connections", type=int, default=default.connections)
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    options = parser.parse_args(arguments)
    if options.seconds < SECONDS_MIN:
        parser.error(f"--seconds: at least {SECONDS_MIN:g}")
    if options.half is not None and options.half < 1:
        parser.error("--half: at least 1 round")
    if options.idle is not None and options.idle < 1:
        parser.error("--idle: at least 1 connection")
    if not (options.far or options.near or options.half or options.idle):
        parser.error("--far and --near: no multiple of either, so there is nothing to measure")
    if min((*options.far, *options.near), default=1.0) <= 0 or options.connections < 1:
        parser.error("multiples and connections are above 0")
    plan = Plan(
        seconds=options.seconds,
        far=tuple(options.far),
        near=tuple(options.near),
        connections=files_allow(options.connections),
    )
    return plan, options.half or 0, options.idle or 0, options.json


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    plan, half_rounds, connections, as_json = _plan(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console = None if as_json else wide_console()
    try:
        result = uvloop.run(measured(plan, half_rounds, connections, console))
    except (EngineError, OfferError, ProtocolError, AnswerError, Unreachable, OSError) as error:
        print(f"overload: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("overload: stopped", file=sys.stderr)
        sys.exit(130)
    if console is None:
        print(msgspec.json.encode(result).decode())
    elif isinstance(result, Half):
        print_half(result, console)
    elif isinstance(result, Idle):
        print_idle(result, console)
    else:
        print_overload(result, plan, console)
    measured_it = not isinstance(result, Half) or result.goal.got is not None
    sys.exit(0 if measured_it and result.audit == CLEAN else 1)


if __name__ == "__main__":
    main()
