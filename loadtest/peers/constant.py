"""The benchmark's yardstick: aiohttp on uvloop that reads the body and answers a constant 201.

It does no work at all and keeps no access log, so it is the most that a handler on this stack can
answer on this machine; the engine is measured as a share of it.
"""

import argparse

import uvloop
from aiohttp import web

ORDER_BYTES = 330
"""Default size of the body; the benchmark gives the size of the engine's real answer."""


def application(body_bytes: int) -> web.Application:
    """Build the server that answers every purchase with the same ``body_bytes`` bytes."""
    body = b'{"order_no":"' + b"0" * max(body_bytes - 15, 0) + b'"}'
    headers = {"Location": "/api/v1/orders/five-yuan-films.1f4.0a1b2c"}

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=201, body=body, headers=headers, content_type="application/json")

    app = web.Application()
    app.router.add_post("/api/v1/campaigns/{campaign}/orders", answer)
    return app


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--body-bytes", type=int, default=ORDER_BYTES)
    options = parser.parse_args()
    uvloop.install()
    web.run_app(
        application(options.body_bytes),
        host="127.0.0.1",
        port=options.port,
        access_log=None,
        print=None,
    )


if __name__ == "__main__":
    main()
