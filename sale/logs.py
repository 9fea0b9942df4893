"""The log of a service: one JSON object per line on stderr.

This is a module of its own so that ``sale up`` can log without importing what only its parts need.
"""

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog
from aiohttp.http_exceptions import HttpProcessingError

from sale.config import Settings

log = structlog.get_logger()


def set_up_logging(settings: Settings) -> None:
    """Log one JSON object per line on stderr: time, level, a fixed action name, fields."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("action"),
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Unfailing(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)
    logging.getLogger("asyncio").setLevel(logging.NOTSET)  # the command line keeps it quiet
    logging.getLogger("aiohttp.server").addFilter(_worth_a_line)


class _Unfailing:
    """A stream that ignores failures: a log on a full disk must not stop a sale."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write the text, or drop it on failure."""
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        """Flush, and ignore a failure."""
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Libraries(logging.Handler):
    """Write the log records of libraries in the form of our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record as ``library.said``."""
        log.log(
            record.levelno,
            "library.said",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Drop records about malformed HTTP: any client can send it, and aiohttp answers 400."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
