"""The HTTP application, as a list of its parts, and the process that serves it."""

import asyncio
import gc
import socket
from typing import Final

import structlog
from aiohttp import web

from sale.api.admin import add_admin_routes
from sale.api.exchange import BODY_MAX, ENGINE
from sale.api.health import add_health_routes
from sale.api.member import add_member_routes
from sale.api.pages import add_page_routes
from sale.api.problems import problem_response
from sale.api.routing import add_fallback
from sale.bootstrap import Engine, first_address
from sale.config import StartError
from sale.domain import Problem, Refused

BACKLOG: Final = 4_096
KEEPALIVE_TIMEOUT_S: Final = 75.0
SHUTDOWN_TIMEOUT_S: Final = 10.0

log = structlog.get_logger()


def make_app(engine: Engine) -> web.Application:
    """Put the application together. There is no middleware: see ``routing.py``."""
    app = web.Application(client_max_size=BODY_MAX)
    app[ENGINE] = engine
    add_member_routes(app, engine.desk)
    add_admin_routes(app)
    add_page_routes(app)
    add_health_routes(app)
    add_fallback(app)
    return app


async def serve(engine: Engine, stop: asyncio.Event) -> None:
    """Serve on ``settings.listen`` until ``stop``, then answer what is under way, bounded."""
    runner = web.AppRunner(make_app(engine), shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    address = engine.stores.settings.listen
    listener = listen_on(address)
    spare_collector()
    loop = asyncio.get_running_loop()

    def connection() -> web.RequestHandler:
        assert runner.server is not None  # noqa: S101 - set up above
        return Connection(
            runner.server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type] # as AppRunner passes it
            keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        )

    server = await loop.create_server(connection, sock=listener, backlog=BACKLOG)
    try:
        log.info("api.listening", address=address)
        await stop.wait()
        log.info("api.stopping")
    finally:
        server.close()
        await runner.cleanup()
        listener.close()


class Connection(web.RequestHandler):
    """aiohttp's connection, whose own refusals (what is not HTTP) are problem documents too."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer in fixed words: nothing of what was sent comes back."""
        super().handle_error(request, status, exc, message)  # logs, and sees that nothing was sent
        problem = Problem.UNAVAILABLE if status >= 500 else Problem.INVALID_REQUEST
        response = problem_response(Refused(problem, "this is not a request that can be read"))
        response.force_close()
        return response


def spare_collector() -> None:
    """Let the garbage collector look less often, and never at what lives as long as the process.

    Requests that wait for their batch are thousands of live objects; the default thresholds walk
    them again and again. Turning the collector off altogether was no faster than this. Memory stays
    bounded: collections still come, only further apart.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def listen_on(address: str) -> socket.socket:
    """Bind with SO_REUSEPORT: any number of API processes share one address. Raises StartError."""
    listener = None
    try:
        family, where = first_address(address)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(where)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise StartError(f"address {address}: {error.strerror or error}") from None
    return listener
