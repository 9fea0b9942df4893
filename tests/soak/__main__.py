"""``python -m tests.soak --seeds N --seconds S [--seed FIRST] [--lossy] [--keep] [--plan]``."""

import argparse
import asyncio
import logging
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import structlog

from loadtest.engine import cancelled_by_signals
from soak.run import run_seeds
from soak.schedule import plan


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long members come")
    parser.add_argument("--seed", type=int, help="the first one (default: a random one)")
    parser.add_argument("--lossy", action="store_true", help="lose files too")
    parser.add_argument("--keep", action="store_true", help="keep the data of what breaks")
    parser.add_argument("--plan", action="store_true", help="print the schedules, run nothing")
    return parser.parse_args()


def _print_plans(options: argparse.Namespace) -> None:
    first = options.seed or 0
    for seed in range(first, first + options.seeds):
        print(f"== seed {seed}")
        for line in plan(seed, options.seconds, lossy=options.lossy).lines():
            print(line)


async def _main(options: argparse.Namespace, folder: Path) -> int:
    cancelled_by_signals()
    first = options.seed if options.seed is not None else secrets.randbits(31)
    print(f"seeds {first} to {first + options.seeds - 1}, {options.seconds:g} s each", flush=True)
    broken = await run_seeds(
        range(first, first + options.seeds),
        options.seconds,
        folder,
        lossy=options.lossy,
        keep=options.keep,
        say=lambda line: print(line, flush=True),
    )
    seeds = ", ".join(str(told.schedule.seed) for told in broken)
    print(f"{options.seeds} seeds: {f'{len(broken)} broke: {seeds}' if broken else 'all clean'}")
    return 1 if broken else 0


def main() -> None:
    """Run the seeds; exit with 1 if one fails."""
    options = _options()
    if options.plan:
        _print_plans(options)
        return
    quiet = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=quiet)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        status = asyncio.run(_main(options, folder))
    except (KeyboardInterrupt, asyncio.CancelledError):
        status = 130
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
