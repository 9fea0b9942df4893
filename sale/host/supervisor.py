"""``sale up``: the whole system on one machine, under one supervisor that restarts failed parts.

The parts are the commands that a real deployment runs (``serve``, ``writer``, ``scheduler``,
``keeper``, ``migrate``), as child processes. The kernel ends them when this process ends, for
whatever reason. The supervisor binds the API's port and never listens on it: this reserves the port
while the API processes, which share it through SO_REUSEPORT, are restarted.
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
from sale.host.embedded.child import end, launch_command
from sale.host.metrics_server import MergedMetrics, serving_metrics
from sale.lifetime import restart_on_signal, stop_on_signal
from sale.shared_port import first_address, reserve

COMMAND = (sys.executable, "-m", "sale")
MIGRATE_TIMEOUT_S = 300
READY_TIMEOUT_S = 120
READY_POLL_S = 0.05
REST_GRACE_S = 10  # for the other parts, after the first API process is ready
STOP_TIMEOUT_S = 15
STOP_SPARE_S = 5  # for a part whose work was cancelled (``lifetime.py``) to close its connections
UNREADY_RESTARTS_MAX = 3  # in a row, before the first ready: then a setting must be wrong

log = structlog.get_logger()


async def run(
    settings: Settings,
    *,
    on_ready: Callable[[str], None],
    command: Sequence[str] = COMMAND,
) -> None:
    """Run the whole system until SIGTERM or SIGINT; then stop all of it and return.

    SIGHUP renews the API processes, one after the other. When the API answers ready, ``on_ready``
    is called once with ``http://host:port``. ``command`` is the prefix of ``serve``, ``writer``,
    ``scheduler``, ``keeper`` and ``migrate``.

    Raises:
        SupervisorError: an address is in use, the migrations failed, or a part keeps failing.
        EmbeddedError: the data directory or an embedded server cannot be used.
        MetricsAddressError: the process cannot listen on the metrics address.

    """
    with stop_on_signal() as stop, restart_on_signal(stop) as restart:
        work = asyncio.ensure_future(_run(settings, on_ready, tuple(command), restart))
        waiting = asyncio.ensure_future(stop.wait())
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
        # Before the address: a second system on this directory is refused for the directory.
        directory = stack.enter_context(claimed(settings.data_dir))
        address = stack.enter_context(_reserved(settings.listen))
        metrics = MergedMetrics()
        metrics_address = await stack.enter_async_context(
            serving_metrics(settings.metrics_listen, metrics.render)
        )
        prepared: asyncio.Future[tuple[Settings, _Register, list[Child]]]
        prepared = asyncio.get_running_loop().create_future()

        async def prepare(servers: EmbeddedServers) -> None:
            """Start the parts held, so that they import their modules while the servers start."""
            complete = _complete(settings, address, servers.endpoints)
            register = _Register(complete.data_dir, servers, address, metrics_address)
            stack.callback(register.remove)
            children = _children(complete, command, servers.sockets, metrics, register)
            stack.push_async_callback(_stop, children)
            # The scheduler first: it verifies Redis while the other parts still import.
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
    """Fill in what the children need: the bound address, the stores' URLs, a signing key."""
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
    """Run ``migrate`` if a migration is missing; the check is cheaper than a process."""
    with contextlib.suppress(MigrationError, *POSTGRES_ERRORS):  # ``migrate`` reports these itself
        connection = await connect(settings.database_url or "", name="sale up")
        try:
            if not await pending(connection):
                return
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT_S)
    process = await asyncio.create_subprocess_exec(
        *launch_command("KILL", program=[*command, "migrate"]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,  # the log on stderr says the same
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
    """The parts in the order in which the supervisor stops them: the API first."""
    parts = [(f"serve-{number}", "serve") for number in range(1, settings.workers + 1)]
    parts += [("writer", "writer"), ("keeper", "keeper"), ("scheduler", "scheduler")]
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
    """Keep all parts running until cancelled, then stop them."""
    try:
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(child.keep_running())
    finally:
        await _stop(children)


async def _stop(children: list[Child]) -> None:
    """Stop the API, and after it the other parts."""
    api = _api_of(children)
    rest = [child for child in children if child not in api]
    for some in (api, rest):
        await asyncio.gather(*(child.stop() for child in some))


def _api_of(children: list[Child]) -> list[Child]:
    return [child for child in children if child.name.startswith("serve-")]


async def _renew_api(children: list[Child], restart: asyncio.Event) -> None:
    """Renew the API processes one by one each time ``restart`` is set, until cancelled.

    If a new process does not become ready, the remaining ones are not renewed.
    """
    while True:
        await restart.wait()
        restart.clear()
        log.info("supervisor.renewing")
        for child in _api_of(children):
            if not await child.renew():
                break
        else:
            log.info("supervisor.renewed")


async def _until_ready(address: str, children: list[Child]) -> None:
    """Wait until the API answers ready, and at most REST_GRACE_S more for the other parts.

    Raises SupervisorError if a part keeps failing, or after READY_TIMEOUT_S.
    """
    host, port = config.split_address(address)
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared
    url = f"http://{_join(reached, port)}/readyz"
    deadline = time.monotonic() + READY_TIMEOUT_S
    ready_since: float | None = None
    last_answer = "no answer"
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
                    last_answer = f"{answer.status} {(await answer.text())[:300]}"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                last_answer = str(error)
            await asyncio.sleep(READY_POLL_S)
    raise SupervisorError(f"not ready after {READY_TIMEOUT_S} s: {last_answer}")


class _Register:
    """``run/processes.json``: the running processes, for ``sale doctor`` and the fault tests."""

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
        """Record a child that was started."""
        self._children[name] = pid
        self._write()

    def drop(self, name: str, pid: int) -> None:
        """Remove a child whose process has ended, unless a new process has its name already."""
        if self._children.get(name) == pid:
            del self._children[name]
            self._write()

    def remove(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)

    async def refresh(self) -> None:
        """Record restarted servers too, within a second, until cancelled."""
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
    """Bind the API's port so that the children can share it, without listening.

    Yields the bound ``host:port``. Raises SupervisorError if another process has the port.
    """
    host, _ = config.split_address(listen)
    try:
        family, where = first_address(listen)
        with socket.socket(family) as probe:
            # Without SO_REUSEPORT: another system of the same user shares its port, so a bind
            # with that option would succeed and take half of that system's requests.
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
    """Raise the first error of a group alone: people need one line, not a tree."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error
