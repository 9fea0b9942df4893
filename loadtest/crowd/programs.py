"""The programs that Locust starts beside itself, and the workers it must not leave behind."""

import contextlib
import subprocess
import sys
import time
from typing import Any, Final

import gevent
import msgspec
import psutil

from loadtest.books.proof import Where
from loadtest.record import Finding

WATCH_STOP_S: Final = 10.0
CHILDREN_S: Final = 3.0
CANNOT: Final = 3
"""Exit status where the books could not be checked."""

_PROOF: Final = (sys.executable, "-m", "loadtest.crowd.proof")


class Errand(msgspec.Struct, kw_only=True):
    """A task for `loadtest.crowd.proof`, on its standard input: ``probe``, ``watch`` or ``prove``.

    ``alone``: nobody else bought in this campaign. ``seen`` is the file of what `watch` saw, and
    ``out`` the folder for record and report.
    """

    what: str
    where: Where = Where()
    campaign: str = ""
    within_s: float = 5.0
    metrics: str = ""
    seen: str = ""
    name: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    alone: bool = False
    plan: dict[str, str | int | float] = {}
    findings: list[Finding] = []
    fail_if: list[str] = []
    answers: str = ""
    out: str = ""

    @property
    def line(self) -> bytes:
        """It as the program reads it."""
        return msgspec.json.encode(self) + b"\n"


def program(errand: Errand, within_s: float) -> tuple[int, str]:
    """Run an errand to its end; its exit status and what it said."""
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            _PROOF,
            input=errand.line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=within_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return CANNOT, f"not done in {within_s:.0f} s\n"
    return done.returncode, done.stdout.decode("utf-8", "replace")


class Watch:
    """Samples the engine in a process of its own; it ends when we close its input, or die."""

    def __init__(self) -> None:
        self._process: Any = None

    def start(self, errand: Errand) -> None:
        """Begin to sample. Raises OSError."""
        self._process = subprocess.Popen(_PROOF, stdin=subprocess.PIPE)  # noqa: S603
        self._process.stdin.write(errand.line)
        self._process.stdin.flush()

    def end(self) -> None:
        """Have it write down what it saw."""
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        try:
            process.wait(timeout=WATCH_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_children() -> None:
    """End the workers that ``--processes`` started: without a master they would go on waiting."""
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    deadline = time.monotonic() + CHILDREN_S
    while time.monotonic() < deadline and any(child.is_running() for child in children):
        gevent.sleep(0.05)
