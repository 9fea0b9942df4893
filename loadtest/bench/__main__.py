"""The benchmark: what the engine does, as a share of what its HTTP stack can do at all.

Goal: figures of one run, with everything switched on, that stand beside each other: the constant
peer, purchases, replays and refusals are offered in turn by the same client to the same core, and
of several rounds the one with the median ratio is reported. Not a goal: figures of a network, or of
a bigger machine.

API and Redis share one core; PostgreSQL, writer, scheduler and client have the other. Closed loop.

``--compare`` puts the peers of ``loadtest/peers`` beside it, ``--durable SECONDS`` counts orders in
PostgreSQL with every process on all cores.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
import uvloop
from rich.console import Console

from loadtest.bench.cases import CONNECTIONS, FULL, MILLION, TINY, Bench, Plan
from loadtest.bench.compare import Comparing, Comparison
from loadtest.bench.durable import SECONDS_MIN, Durable, Lasting
from loadtest.bench.figures import Result
from loadtest.bench.offer import OfferError, wrk
from loadtest.bench.peers import CACHE
from loadtest.bench.rig import rig_up
from loadtest.client import AnswerError
from loadtest.engine import EngineError, cancelled_by_signals
from loadtest.tables import CLEAN, wide_console
from loadtest.wire import ProtocolError

T = TypeVar("T")


@contextlib.asynccontextmanager
async def bench_up(
    plan: Plan, *, program: str | None, console: Console | None
) -> AsyncIterator[Bench]:
    """Run an engine in a directory of its own, ready to be measured. Raises EngineError …"""
    cancelled_by_signals()
    allowed = sorted(os.sched_getaffinity(0))
    server, client = {allowed[0]}, {allowed[min(1, len(allowed) - 1)]}
    os.sched_setaffinity(0, client)
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, allowed)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sale-bench-")))
        note: Callable[[str], None] = _line
        if console is not None and console.is_terminal:
            note = stack.enter_context(console.status("starting")).update
        note("starting")
        async with rig_up(folder, server_cores=server, client_cores=client) as rig:
            yield Bench(rig, plan, program, note)


def _line(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


def measured_by(
    name: str,
    measure: Callable[[Console | None], Coroutine[Any, Any, T]],
    show: Callable[[T, Console], None],
    *,
    as_json: bool,
) -> T:
    """Measure, and print the result; exit status 1 where it could not be measured."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console = None if as_json else wide_console()
    try:
        result = uvloop.run(measure(console))
    except (EngineError, OfferError, ProtocolError, AnswerError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    if console is None:
        print(msgspec.json.encode(result).decode())
    else:
        show(result, console)
    return result


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Plan, str | None]:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="a few seconds, to see that it works")
    add("--seconds", type=int, help="of each measurement")
    add("--rounds", type=int, help="of which the median is reported")
    add("--connections", type=int, default=CONNECTIONS, help="open at a time (%(default)s)")
    add("--million", action="store_true", help="growth up to 1,000,000 sold")
    add("--client", choices=("wrk", "ours"), help="default: wrk if installed")
    add("--json", action="store_true", help="one JSON value on stdout")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--compare", action="store_true", help="beside the peers")
    words = "orders in PostgreSQL, all cores for all"
    kind.add_argument("--durable", type=int, metavar="SECONDS", help=words)
    add("--workers", type=int, choices=(1, 2), default=1, help="API processes of --durable")
    add("--plots", type=Path, metavar="DIR", help="draw --compare there, as PNG")
    add("--cache", type=Path, default=CACHE, help="where the Node peer is kept (%(default)s)")
    options = parser.parse_args(arguments)
    if options.plots and not options.compare:
        parser.error("--plots draws a --compare")
    if options.durable is not None and options.durable < SECONDS_MIN:
        parser.error(f"--durable: at least {SECONDS_MIN} seconds")
    program = None if options.client == "ours" else wrk()
    if options.client == "wrk" and program is None:
        parser.error("wrk is not installed")
    base = TINY if options.tiny else FULL
    plan = replace(
        base,
        seconds=options.seconds or base.seconds,
        rounds=options.rounds or base.rounds,
        growth=(*base.growth, MILLION) if options.million else base.growth,
        connections=options.connections,
    )
    return options, plan, program


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    options, plan, program = _options(arguments)

    async def measured(console: Console | None) -> Result | Comparison | Durable:
        if options.plots:
            from loadtest.bench import plots  # before the run, so that it does not fail after it

            options.plots.mkdir(parents=True, exist_ok=True)
        async with bench_up(plan, program=program, console=console) as bench:
            if options.durable:
                return await Lasting(bench, options.durable, options.workers).run()
            if not options.compare:
                return await bench.run()
            result = await Comparing(bench, options.cache).run()
        if options.plots:
            plots.draw(result, options.plots)
        return result

    result = measured_by(
        "bench", measured, lambda told, console: told.show(console), as_json=options.json
    )
    sound = not isinstance(result, Durable) or result.check == CLEAN
    sys.exit(0 if sound and result.audit == CLEAN else 1)


if __name__ == "__main__":
    main()
