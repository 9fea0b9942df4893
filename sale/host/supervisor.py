"""``sale up``: everything on one machine, under one parent that restarts what dies.

The parts are the same commands that a real deployment runs (``serve``, ``writer``, ``scheduler``,
``migrate``), as child processes that end with this one however it ends. The API's port is bound
here once and held without listening, so that it stays ours while the API processes, which share
it by SO_REUSEPORT, come and go.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import aiohttp
import msgspec
import structlog

from sale import config, identity
from sale.config import Settings
from sale.db.errors import POSTGRES_ERRORS
from sale.db.migrate import MigrationError, pending
from sale.db.pool import CONNECT_TIMEOUT_S, connect
from sale.host.children import Child, SupervisorError
from sale.host.embedded import EmbeddedServers, Endpoints, claimed, running_in
from sale.host.embedded.servers import end, launch_command
from sale.host.metrics_server import MergedMetrics, serving_metrics
from sale.lifetime import told_to_restart, told_to_stop
from sale.shared_port import first_address, reserve

COMMAND = (sys.executable, "-m", "sale")
MIGRATE_TIMEOUT_S = 300
READY_TIMEOUT_S = 120
READY_POLL_S = 0.05
REST_GRACE_S = 10  # for the parts beside the first API process, once that is ready
STOP_TIMEOUT_S = 15
STOP_SPARE_S = 5  # for a part that was cut short (``lifetime.py``) to close what it has open
UNREADY_RESTARTS_MAX = 3  # in a row, before the first ready: a wrong setting, not an accident

log = structlog.get_logger()


async def run(
    settings: Settings,
    *,
    on_ready: Callable[[str], None],
    command: Sequence[str] = COMMAND,
) -> None:
    """Run the whole system until SIGTERM or SIGINT; then stop all of it and return.

    SIGHUP renews the API processes, one after the other.

    ``on_ready`` is called once with ``http://host:port`` when the API answers ready. ``command``
    is put before ``serve``, ``writer``, ``scheduler`` and ``migrate``.

    Raises:
        SupervisorError: an address is in use, the migrations failed, or a part keeps dying.
        EmbeddedError: the data directory or an embedded server cannot be used.
        MetricsAddressError: the metrics address cannot be listened on.

    """
    with told_to_stop() as told, told_to_restart(told) as restart:
        work = asyncio.ensure_future(_run(settings, on_ready, tuple(command), restart))
        waiting = asyncio.ensure_future(told.wait())
        try:
            await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            work.cancel()
            await asyncio.wait({work, waiting})
    if not work.cancelled():
        _raise_first(work.exception())


async def _run(
    settings: Settings,
    on_ready: Callable[[str], None],
    command: tuple[str, ...],
    restart: asyncio.Event,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        # First: a second system on this directory would find the address taken too.
        directory = stack.enter_context(claimed(settings.data_dir))
        address = stack.enter_context(_reserved(settings.listen))
        metrics = MergedMetrics()
        metrics_address = await stack.enter_async_context(
            serving_metrics(settings.metrics_listen, metrics.render)
        )
        prepared: asyncio.Future[tuple[Settings, _Register, list[Child]]]
        prepared = asyncio.get_running_loop().create_future()

        async def prepare(servers: EmbeddedServers) -> None:
            """Have the parts imported while the servers start: held, they do nothing else."""
            complete = _complete(settings, address, servers.endpoints)
            register = _Register(complete.data_dir, servers, address, metrics_address)
            stack.callback(register.remove)
            children = _children(complete, command, servers.sockets, metrics, register)
            stack.push_async_callback(_stop, children)
            # The scheduler first: a Redis that came back is verified while the others are imported.
            for child in reversed(children):
                await child.prepare()
            prepared.set_result((complete, register, children))

        servers = await stack.enter_async_context(
            running_in(
                directory,
                redis=settings.redis_url is None,
                postgres=settings.database_url is None,
                meanwhile=prepare,
            )
        )
        settings, register, children = prepared.result()
        await _migrate(settings, command)
        async with asyncio.TaskGroup() as group:
            group.create_task(servers.watch())
            group.create_task(metrics.poll())
            group.create_task(register.refresh())
            group.create_task(_supervise(children))
            await _until_ready(address, children)
            log.info("supervisor.ready", listen=address, metrics=metrics_address)
            on_ready(f"http://{address}")
            group.create_task(_renew_api(children, restart))


def _complete(settings: Settings, address: str, endpoints: Endpoints) -> Settings:
    """Settings as the children get them: real address, real URLs, a signing key."""
    settings = msgspec.structs.replace(
        settings,
        listen=address,
        data_dir=settings.data_dir.absolute(),
        redis_url=settings.redis_url or endpoints.redis_url,
        database_url=settings.database_url or endpoints.database_url,
    )
    if settings.signing_key is None and settings.signing_key_file is None:
        identity.load_or_create_signing_key(settings, create=True)
        settings = msgspec.structs.replace(
            settings, signing_key_file=settings.data_dir / "signing.key"
        )
    return settings


async def _migrate(settings: Settings, command: tuple[str, ...]) -> None:
    """Migrate where anything is missing; to ask costs less than a process that finds nothing."""
    with contextlib.suppress(MigrationError, *POSTGRES_ERRORS):  # the process says it in words
        connection = await connect(settings.database_url or "", name="sale up")
        try:
            if not await pending(connection):
                return
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT_S)
    process = await asyncio.create_subprocess_exec(
        *launch_command("KILL", program=[*command, "migrate"]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,  # its result in words; the log has the same
        env=_environment(settings),
    )
    try:
        async with asyncio.timeout(MIGRATE_TIMEOUT_S):
            status = await process.wait()
    except TimeoutError:
        raise SupervisorError(f"migrations took longer than {MIGRATE_TIMEOUT_S} s") from None
    finally:
        await end(process, signal.SIGTERM, STOP_TIMEOUT_S)
    if status != 0:
        raise SupervisorError(f"migrations failed (exit status {status})")


def _environment(settings: Settings) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SALE_")}
    return ours | config.as_environment(settings)


def _children(
    settings: Settings,
    command: tuple[str, ...],
    sockets: Path,
    metrics: MergedMetrics,
    register: "_Register",
) -> list[Child]:
    """The parts in the order in which they are stopped: the API first."""
    parts = [(f"serve-{number}", "serve") for number in range(1, settings.workers + 1)]
    parts += [("writer", "writer"), ("scheduler", "scheduler")]
    environment = _environment(settings)
    return [
        Child(
            name,
            [*command, part],
            environment,
            sockets=sockets,
            metrics=metrics,
            put=register.put,
            drop=register.drop,
            stop_timeout_s=settings.drain_limit_s + STOP_SPARE_S,
        )
        for name, part in parts
    ]


async def _supervise(children: list[Child]) -> None:
    """Keep all running until cancelled, then stop the API, and after it the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(child.keep_running())
    finally:
        await _stop(children)


async def _stop(children: list[Child]) -> None:
    """Stop the API, and after it the rest; those that have ended stay as they are."""
    api = _api_of(children)
    rest = [child for child in children if child not in api]
    for some in (api, rest):
        await asyncio.gather(*(child.stop() for child in some))


def _api_of(children: list[Child]) -> list[Child]:
    return [child for child in children if child.name.startswith("serve-")]


async def _renew_api(children: list[Child], told: asyncio.Event) -> None:
    """Each time it is told to, renew the API processes one by one, until cancelled.

    Where a new one does not come up, those not yet renewed stay as they are.
    """
    while True:
        await told.wait()
        told.clear()
        log.info("supervisor.renewing")
        for child in _api_of(children):
            if not await child.renew():
                break
        else:
            log.info("supervisor.renewed")


async def _until_ready(address: str, children: list[Child]) -> None:
    """Wait until the API answers ready, and a little longer for the other parts.

    Raises SupervisorError when it cannot get there.
    """
    host, port = config.split_address(address)
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared
    url = f"http://{_join(reached, port)}/readyz"
    deadline = time.monotonic() + READY_TIMEOUT_S
    ready_since: float | None = None
    said = "no answer"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while time.monotonic() < deadline:
            for child in children:
                if child.failures >= UNREADY_RESTARTS_MAX:
                    raise SupervisorError(f"{child.name} does not start; its error is above")
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        ready_since = ready_since or time.monotonic()
                        late = time.monotonic() - ready_since > REST_GRACE_S
                        if late or all(child.listening for child in children):
                            return
                    said = f"{answer.status} {(await answer.text())[:300]}"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                said = str(error)
            await asyncio.sleep(READY_POLL_S)
    raise SupervisorError(f"not ready after {READY_TIMEOUT_S} s: {said}")


class _Register:
    """``run/processes.json``: who runs, for ``sale doctor`` and the fault tests."""

    def __init__(
        self, data_dir: Path, servers: EmbeddedServers, listen: str, metrics_listen: str
    ) -> None:
        self._file = data_dir / "run" / "processes.json"
        self._servers = servers
        self._addresses = {"listen": listen, "metrics_listen": metrics_listen}
        self._children: dict[str, int] = {}
        self._written = b""
        self._failing = False

    def put(self, name: str, pid: int) -> None:
        """A child was started."""
        self._children[name] = pid
        self._write()

    def drop(self, name: str, pid: int) -> None:
        """A child's process is gone; it may have a successor already."""
        if self._children.get(name) == pid:
            del self._children[name]
            self._write()

    def remove(self) -> None:
        """All is over."""
        self._file.unlink(missing_ok=True)

    async def refresh(self) -> None:
        """Write down restarted servers too, within a second, until cancelled."""
        while True:
            self._write()
            await asyncio.sleep(0.5)

    def _write(self) -> None:
        content = msgspec.json.encode(
            {
                "supervisor": os.getpid(),
                **self._addresses,
                "processes": self._servers.pids | self._children,
            }
        )
        if content == self._written:
            return
        new = self._file.with_name(".processes.json.new")
        try:
            new.write_bytes(content)
            new.replace(self._file)
        except OSError as error:  # a full disk must not end the system; ``refresh`` tries again
            if not self._failing:
                log.error("supervisor.register_failed", error=str(error))  # noqa: TRY400 - one line
            self._failing = True
            return
        self._failing = False
        self._written = content


@contextlib.contextmanager
def _reserved(listen: str) -> Iterator[str]:
    """Hold the API's port: bound so that the children may share it, but not listening.

    Yields the real ``host:port``. Raises SupervisorError where someone else has it.
    """
    host, _ = config.split_address(listen)
    try:
        family, where = first_address(listen)
        with socket.socket(family) as probe:
            # Another system of the same user shares its port too, so sharing alone would succeed
            # and take half of its requests.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
        holder = socket.socket(family)
    except OSError as error:
        raise SupervisorError(f"address {listen}: {error.strerror or error}") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(holder)
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(where)
        except OSError as error:
            raise SupervisorError(f"address {listen}: {error.strerror or error}") from None
        stack.enter_context(reserve(holder))
        yield _join(host, holder.getsockname()[1])


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _raise_first(error: BaseException | None) -> None:
    """Raise the first error of a group as itself: people want one line, not a tree."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error
