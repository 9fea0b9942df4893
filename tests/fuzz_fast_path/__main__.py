"""Run until the time is over or something is found."""

import argparse
import asyncio
import random
import sys
import time

from .properties import properties, quiet_logs

EACH = 1_000


def main() -> int:
    """Run until the time is over or something is found."""
    wish = argparse.ArgumentParser(description="Fuzz the fast path.")
    wish.add_argument("--minutes", type=float, default=10.0)
    wish.add_argument("--seed", type=int, default=random.randrange(2**32))
    asked = wish.parse_args()
    print(f"seed {asked.seed}", flush=True)
    ends_at, examples, seed = time.monotonic() + asked.minutes * 60, 0, asked.seed

    with quiet_logs(), asyncio.Runner() as runner:
        while time.monotonic() < ends_at:
            for prove in properties(runner, EACH, seed):
                prove()
                examples += EACH
            seed += 1
            print(f"\r{examples} examples", end="", flush=True)
    print(f"\n{examples} examples, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
