"""The log of a service: one JSON object a line on stderr.

A room of its own, so that ``sale up`` can log before it imports what only its parts need.
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
    """One JSON object a line on stderr: time, level, a fixed action name, fields."""
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
    """A stream whose failures harm nobody: a log on a full disk must not stop a sale."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write, or lose the line."""
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        """Flush, or lose what was written."""
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Libraries(logging.Handler):
    """What libraries log by themselves, in the form of our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        log.log(
            record.levelno,
            "library.said",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out bytes that are not HTTP: any stranger can send them, and they are answered 400."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
