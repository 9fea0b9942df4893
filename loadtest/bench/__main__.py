"""The benchmark: what the engine does, as a share of what its HTTP stack can do at all.

Goal: figures of one run, with everything switched on, that stand beside each other: the constant
peer, purchases, replays and refusals are offered in turn by the same client to the same core, and
of several rounds the one with the median ratio is told. Not a goal: figures of a network, or of a
bigger machine.

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
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import structlog
import uvloop
from rich.console import Console

from loadtest.bench.compare import Comparing, Comparison
from loadtest.bench.durable import SECONDS_MIN, Durable, Lasting
from loadtest.bench.figures import CLEAN, Result
from loadtest.bench.measure import FULL, MILLION, TINY, Bench, Plan
from loadtest.bench.offer import OfferError, wrk
from loadtest.bench.peers import CACHE
from loadtest.bench.rig import rig_up
from loadtest.bench.tables import print_comparison, print_durable, print_result, wide_console
from loadtest.client import Unreachable
from loadtest.engine import EngineError, cancelled_by_signals
from loadtest.wire import ProtocolError


@contextlib.asynccontextmanager
async def bench_up(
    plan: Plan, *, program: str | None, console: Console | None
) -> AsyncIterator[Bench]:
    """Run an engine in a directory of its own, ready to be measured. Raises EngineError …"""
    cancelled_by_signals()
    server, client, everywhere = _cores()
    os.sched_setaffinity(0, client)
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, everywhere)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sale-bench-")))
        note = _progress(stack, console)
        note("starting")
        async with rig_up(folder, server_cores=server, client_cores=client) as rig:
            yield Bench(rig, plan, program, note)


def _progress(stack: contextlib.ExitStack, console: Console | None) -> Callable[[str], None]:
    """Give a function that tells of each step: a spinner on a terminal, else a line on stderr."""
    if console is None or not console.is_terminal:
        return _line
    return stack.enter_context(console.status("starting")).update


def _cores() -> tuple[set[int], set[int], set[int]]:
    """The server's core, the other, and all that we may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return {allowed[0]}, {allowed[min(1, len(allowed) - 1)]}, set(allowed)


def _line(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


async def measured(
    options: argparse.Namespace, plan: Plan, program: str | None, console: Console | None
) -> Result | Comparison | Durable:
    """Measure what the command line asks for. Raises EngineError, OfferError …"""
    async with bench_up(plan, program=program, console=console) as bench:
        if options.compare:
            return await Comparing(bench, options.cache).run()
        if options.durable:
            return await Lasting(bench, options.durable, options.workers).run()
        return await bench.run()


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Plan, str | None]:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--seconds", type=int, help="of each measurement")
    parser.add_argument("--rounds", type=int, help="of which the median is told")
    parser.add_argument("--million", action="store_true", help="growth up to 1,000,000 sold")
    parser.add_argument("--client", choices=("wrk", "ours"), help="default: wrk if installed")
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--compare", action="store_true", help="beside the peers")
    kind.add_argument(
        "--durable", type=int, metavar="SECONDS", help="orders in PostgreSQL, all cores for all"
    )
    parser.add_argument(
        "--workers", type=int, choices=(1, 2), default=1, help="API processes of --durable"
    )
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw --compare there, as PNG and SVG"
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where the Node peer is kept (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.plots and not options.compare:
        parser.error("--plots draws a --compare")
    if options.durable is not None and options.durable < SECONDS_MIN:
        parser.error(f"--durable: at least {SECONDS_MIN} seconds")
    program = None if options.client == "ours" else wrk()
    if options.client == "wrk" and program is None:
        parser.error("wrk is not installed")
    base = TINY if options.tiny else FULL
    plan = Plan(
        seconds=options.seconds or base.seconds,
        rounds=options.rounds or base.rounds,
        backlog=base.backlog,
        cards=base.cards,
        growth=(*base.growth, MILLION) if options.million else base.growth,
    )
    return options, plan, program


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    options, plan, program = _options(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console = None if options.json else wide_console()
    if options.plots:
        from loadtest.bench import plots  # before the run, so that it does not fail after it
    try:
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
        result = uvloop.run(measured(options, plan, program, console))
        if options.plots and isinstance(result, Comparison):
            plots.draw(result, options.plots)
    except (EngineError, OfferError, ProtocolError, Unreachable, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench: stopped", file=sys.stderr)
        sys.exit(130)
    _tell(result, console)
    sound = result.check == CLEAN if isinstance(result, Durable) else True
    sys.exit(0 if sound and result.audit == CLEAN else 1)


def _tell(result: Result | Comparison | Durable, console: Console | None) -> None:
    if console is None:
        print(msgspec.json.encode(result).decode())
    elif isinstance(result, Comparison):
        print_comparison(result, console)
    elif isinstance(result, Durable):
        print_durable(result, console)
    else:
        print_result(result, console)


if __name__ == "__main__":
    main()
