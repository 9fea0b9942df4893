"""The HTTP application, as a list of its parts, and the process that serves it."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import asyncpg
import structlog
from aiohttp import web
from redis.exceptions import RedisError

from sale.api.admin import add_admin_routes
from sale.api.health import add_health_routes
from sale.api.member import BODY_MAX, ENGINE, add_member_routes
from sale.api.pages import add_page_routes
from sale.api.problems import problem_response
from sale.bootstrap import Engine
from sale.config import split_address
from sale.domain import Problem, Refused

BACKLOG: Final = 4_096
KEEPALIVE_TIMEOUT_S: Final = 75.0
SHUTDOWN_TIMEOUT_S: Final = 10.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger()


def make_app(engine: Engine) -> web.Application:
    """Put the application together."""
    app = web.Application(middlewares=[problems], client_max_size=BODY_MAX)
    app[ENGINE] = engine
    add_member_routes(app)
    add_admin_routes(app)
    add_page_routes(app)
    add_health_routes(app)
    return app


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn everything that goes wrong into a problem document; never show how it went wrong."""
    try:
        return await handler(request)
    except Refused as refused:
        return problem_response(refused)
    except web.HTTPRequestEntityTooLarge:
        return problem_response(Refused(Problem.PAYLOAD_TOO_LARGE))
    except web.HTTPMethodNotAllowed as error:
        return problem_response(Refused(Problem.METHOD_NOT_ALLOWED, allow=error.allowed_methods))
    except web.HTTPNotFound:
        return problem_response(Refused(Problem.NOT_FOUND))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return problem_response(Refused(Problem.INVALID_REQUEST, error.reason))
    except (RedisError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as e:
        log.warning("request.store_failed", path=request.path, error=type(e).__name__)
        return problem_response(Refused(Problem.UNAVAILABLE))
    except Exception:
        log.exception("request.failed", path=request.path)
        return problem_response(Refused(Problem.UNAVAILABLE))


async def serve(engine: Engine, stop: asyncio.Event) -> None:
    """Serve on ``settings.listen`` until ``stop``, then answer what is under way, bounded."""
    runner = web.AppRunner(
        make_app(engine),
        access_log=None,
        keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        handle_signals=False,
    )
    await runner.setup()
    host, port = split_address(engine.stores.settings.listen)
    listener = listen_on(host, port)
    try:
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        log.info("api.listening", address=f"{host}:{port}")
        await stop.wait()
        log.info("api.stopping")
    finally:
        await runner.cleanup()
        listener.close()


def listen_on(host: str, port: int) -> socket.socket:
    """Bind with SO_REUSEPORT: any number of API processes share one address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener
