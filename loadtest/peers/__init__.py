"""Peers that the engine is measured against."""

import argparse

ORDER_BYTES = 330
"""Default size of a constant body; the benchmark gives the size of the engine's real answer."""


def options(about: str | None, *names: str) -> argparse.Namespace:
    """Read a peer's command line: its port, and options that it needs."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--body-bytes", type=int, default=ORDER_BYTES)
    for name in names:
        parser.add_argument(name, required=True)
    return parser.parse_args()


def constant_body(size: int) -> bytes:
    """A body of so many bytes, as an order might be."""
    return b'{"order_no":"' + b"0" * max(size - 15, 0) + b'"}'
