"""The programs that Locust starts beside itself, and the workers it must not leave behind."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import gevent
import msgspec
import psutil

from loadtest.record import Finding

WATCH_STOP_S: Final = 10.0
CHILDREN_S: Final = 3.0
CANNOT: Final = 3
"""Exit status where the books could not be checked."""

_PROOF: Final = (sys.executable, "-m", "loadtest.crowd.proof")


class About(msgspec.Struct):
    """The leading process's state of a run. ``alone``: nobody else bought in this campaign."""

    name: str
    campaign: str
    started_at: float
    ended_at: float
    alone: bool = False
    plan: dict[str, str | int | float] = {}
    findings: list[Finding] = []
    fail_if: list[str] = []


def program(arguments: list[str], within_s: float) -> subprocess.CompletedProcess[str]:
    """Run ``loadtest.crowd.proof`` to its end; its exit status and what it said."""
    command = [*_PROOF, *arguments]
    try:
        return subprocess.run(  # noqa: S603 - our own program
            command, capture_output=True, text=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, CANNOT, "", f"not done in {within_s:.0f} s\n")


class Watch:
    """Samples the engine in a process of its own; it ends when we close its input, or die."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._process: Any = None

    def start(self, metrics: str, campaign: str, data_dir: str) -> None:
        """Begin to sample. Raises OSError."""
        command = [*_PROOF, "watch", "--metrics", metrics, "--campaign", campaign]
        command += ["--data-dir", data_dir, "--out", str(self.file)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603

    def end(self) -> None:
        """Have it write down what it saw."""
        if self._process is None:
            return
        self._process.stdin.close()
        try:
            self._process.wait(timeout=WATCH_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def end_children() -> None:
    """End the workers that ``--processes`` started: without a master they would go on waiting."""
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    deadline = time.monotonic() + CHILDREN_S
    while time.monotonic() < deadline and any(child.is_running() for child in children):
        gevent.sleep(0.05)
