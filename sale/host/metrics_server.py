"""``GET /metrics``: of one process, or of all processes of a supervisor together.

Every process serves its own metrics. A child of the supervisor serves them on a unix socket; the
supervisor reads these sockets and adds the values up. ``prometheus_client``'s multiprocess mode was
rejected: it keeps the files of dead processes for ever and needs an environment variable before the
first import.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import msgspec
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from sale.config import UNIX_PREFIX, StartError, split_address
from sale.metrics import SUMMED_GAUGES

POLL_INTERVAL_S = 1.0
SCRAPE_TIMEOUT_S = 0.8
SCRAPE_MAX_BYTES = 8 * 1024 * 1024
BACKLOG = 64
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_NUMBERS = itertools.count(1)

log = structlog.get_logger()

Source = CollectorRegistry | Callable[[], Awaitable[str]] | Callable[[], str]


class MetricsAddressError(StartError):
    """The process cannot listen on the metrics address; the message is one line for people."""


class MetricsAddress(msgspec.Struct, frozen=True):
    """A bound address for metrics; ``path`` is set for a unix socket.

    A unix socket is bound as ``bound_as`` and gets the name ``path`` when it is served: to the
    supervisor, a socket under that name means that the part works.
    """

    listeners: tuple[socket.socket, ...]
    real: str
    path: Path | None = None
    bound_as: Path | None = None


@contextlib.contextmanager
def bound_metrics(address: str) -> Iterator[MetricsAddress]:
    """Bind ``host:port`` (port 0 picks a free one) or ``unix:/path`` while the block runs.

    Raises:
        MetricsAddressError: the address is in use, or binding it is not permitted.

    """
    try:
        bound = _bind(address)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # Not ``error.strerror``: the library adds the address to it.
        why = os.strerror(number) if number is not None and number > 0 else error
        raise MetricsAddressError(f"metrics address {address}: {why}") from None
    try:
        yield bound
    finally:
        for listener in bound.listeners:
            listener.close()
        if bound.bound_as is not None:
            bound.bound_as.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def serving_metrics(address: str | MetricsAddress, source: Source) -> AsyncIterator[str]:
    """Serve ``GET /metrics`` on an address while the block runs; yields the bound address.

    ``source`` is a registry, or a function (async or not) that returns the text.

    Raises:
        MetricsAddressError: the address is in use, or binding it is not permitted.

    """
    app = web.Application()
    app.router.add_get("/metrics", _handler(source))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(bound_metrics(address)) if isinstance(address, str) else address
        try:
            await _serve(runner, bound, stack)
            yield bound.real
        finally:
            await runner.cleanup()


class MergedMetrics:
    """The metrics of several child processes, merged.

    Counters and histograms are summed by name and labels. The last values read from a child that
    died stay in the sum, so that a counter never falls. A gauge is the maximum over the running
    processes; the minimum if its name ends in ``_up``; the sum if it is in ``SUMMED_GAUGES``.
    """

    def __init__(self) -> None:
        self._sockets: dict[str, Path] = {}
        self._latest: dict[str, _Snapshot] = {}
        self._retired = _Snapshot()

    def follow(self, child: str, socket: Path) -> None:
        """Read ``child``'s metrics from ``socket``; retire an earlier process of that name."""
        self.retire(child)
        self._sockets[child] = socket

    def retire(self, child: str) -> None:
        """Stop reading ``child`` and keep its last counters in the sum."""
        self._sockets.pop(child, None)
        last = self._latest.pop(child, None)
        if last is not None:
            self._retired.add(last, gauges=False)

    async def poll(self) -> None:
        """Read the children every second until cancelled, so that a death loses 1 s at most."""
        while True:
            await self._read_all()
            await asyncio.sleep(POLL_INTERVAL_S)

    async def render(self) -> str:
        """All children's metrics as one text, with the last values of a child that is silent."""
        await self._read_all()
        total = _Snapshot()
        total.add(self._retired, gauges=False)
        for snapshot in self._latest.values():
            total.add(snapshot, gauges=True)
        return total.text()

    async def _read_all(self) -> None:
        await asyncio.gather(*(self._read(child) for child in list(self._sockets)))

    async def _read(self, child: str) -> None:
        socket = self._sockets[child]
        timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
        try:
            connector = aiohttp.UnixConnector(str(socket))
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get("http://child/metrics") as answer,
            ):
                answer.raise_for_status()
                body = b""
                while len(body) < SCRAPE_MAX_BYTES and (part := await answer.content.readany()):
                    body += part
            snapshot = _Snapshot.parse(body.decode())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.debug("metrics.unread", child=child, error=repr(error))
            return
        if self._sockets.get(child) == socket:
            self._latest[child] = snapshot


class _Family(msgspec.Struct):
    """One metric: samples by (name, labels)."""

    kind: str
    help: str
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]


class _Snapshot:
    """Metrics of one process at one moment, or the sum of several."""

    def __init__(self) -> None:
        self.families: dict[str, _Family] = {}

    @classmethod
    def parse(cls, text: str) -> "_Snapshot":
        """Read the text format. Raises ValueError."""
        snapshot = cls()
        for family in text_string_to_metric_families(text):
            samples = {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for sample in family.samples
            }
            snapshot.families[family.name] = _Family(family.type, family.documentation, samples)
        return snapshot

    def add(self, other: "_Snapshot", *, gauges: bool) -> None:
        """Add another's counters and histograms; merge its gauges if ``gauges`` is true."""
        for name, theirs in other.families.items():
            summed = theirs.kind in {"counter", "histogram", "summary"}
            if not summed and not gauges:
                continue
            ours = self.families.setdefault(name, _Family(theirs.kind, theirs.help, {}))
            for key, value in theirs.samples.items():
                if key not in ours.samples:
                    ours.samples[key] = value
                elif summed or name in SUMMED_GAUGES:
                    ours.samples[key] += value
                else:
                    choose = min if name.endswith("_up") else max
                    ours.samples[key] = choose(ours.samples[key], value)

    def text(self) -> str:
        """Render in Prometheus' text format, families sorted by name."""
        lines: list[str] = []
        for name, family in sorted(self.families.items()):
            shown = f"{name}_total" if family.kind == "counter" else name
            kind = "untyped" if family.kind == "unknown" else family.kind
            lines.append(f"# HELP {shown} {_escape(family.help)}")
            lines.append(f"# TYPE {shown} {kind}")
            for (sample, labels), value in family.samples.items():
                shown_labels = ",".join(f'{key}="{_escape_label(text)}"' for key, text in labels)
                braces = f"{{{shown_labels}}}" if labels else ""
                lines.append(f"{sample}{braces} {_number(value)}")
        return "\n".join(lines) + "\n"


def _handler(source: Source) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def metrics(_request: web.Request) -> web.Response:
        if isinstance(source, CollectorRegistry):
            body = generate_latest(source)
        else:
            text = source()
            body = (text if isinstance(text, str) else await text).encode()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    return metrics


def _bind(address: str) -> MetricsAddress:
    if address.startswith(UNIX_PREFIX):
        path = Path(address.removeprefix(UNIX_PREFIX))
        _remove_dead(path)
        # A short name: the kernel accepts at most 107 bytes of path.
        new = path.with_name(f".{os.getpid()}-{next(_NUMBERS)}")
        listener = socket.socket(socket.AF_UNIX)
        try:
            new.unlink(missing_ok=True)
            listener.bind(str(new))
        except OSError:
            listener.close()
            raise
        return MetricsAddress((listener,), address, path, new)
    host, port = split_address(address)
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, name in dict.fromkeys((each[0], str(each[4][0])) for each in found):
            # ``create_server`` listens at once: until then another process could bind it too.
            listener = socket.create_server((name, port), family=family, backlog=BACKLOG)
            stack.enter_context(listener)
            listeners.append(listener)
            port = listener.getsockname()[1]
        stack.pop_all()
    real = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return MetricsAddress(tuple(listeners), real)


def _remove_dead(path: Path) -> None:
    """Remove the socket of a process that has ended. Raises OSError if one still listens."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


async def _serve(runner: web.AppRunner, bound: MetricsAddress, stack: contextlib.ExitStack) -> None:
    if bound.path is None or bound.bound_as is None:
        for listener in bound.listeners:
            await web.SockSite(runner, listener).start()
        return
    assert runner.server is not None  # noqa: S101 - set up by the caller
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(runner.server, sock=bound.listeners[0])
    stack.callback(server.close)
    try:
        # A rename would replace the socket of a process that started meanwhile; a link fails.
        bound.path.hardlink_to(bound.bound_as)
    except OSError as error:
        raise MetricsAddressError(f"metrics address {bound.real}: {error.strerror}") from None
    stack.callback(bound.path.unlink, missing_ok=True)


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _escape_label(text: str) -> str:
    return _escape(text).replace('"', r"\"")
