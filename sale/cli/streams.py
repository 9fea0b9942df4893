"""The three streams of a command: each one is open, and a reader that goes away is no error.

A step must not fail after it was done because its result cannot be printed, and ``sale up`` must
not end because the process that waited for its ``ready`` has ended. So a lost reader (``| head``)
is ignored. Any other failure to write is an error, such as a full disk under ``> file``.
"""

import contextlib
import io
import os
import sys
from typing import Any, Final, TextIO

_STREAMS: Final = (0, 1, 2)


class _Forgiving(io.FileIO):
    """A file whose bytes are dropped once its reader has gone."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def keep_streams() -> None:
    """Open the streams that the caller closed, before a socket takes their numbers."""
    for number in _STREAMS:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = _forgiving(1, sys.stdout)
    sys.stderr = _forgiving(2, sys.stderr)


def last_words(status: int) -> int:
    """Flush stdout; give the exit status, which is not 0 if the result could not be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        with contextlib.suppress(OSError):
            sys.stderr.write(f"sale: the output cannot be written: {error.strerror}\n")
        return status or 1
    return status


def _forgiving(number: int, stream: TextIO | None) -> TextIO:
    given: dict[str, Any] = {"line_buffering": number == 2 or os.isatty(number)}
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        given |= {"encoding": stream.encoding, "errors": stream.errors}
    return io.TextIOWrapper(io.BufferedWriter(_Forgiving(number, "w", closefd=False)), **given)
