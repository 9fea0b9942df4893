"""The benchmark's yardstick: aiohttp on uvloop that reads the body and answers a constant 201.

It does no work at all and keeps no access log, so it is the most that a handler on this stack can
answer on this machine; the engine is measured as a share of it.
"""

import uvloop
from aiohttp import web

from loadtest.peers import constant_body, options


def application(body_bytes: int) -> web.Application:
    """Build the server that answers every purchase with the same ``body_bytes`` bytes."""
    body = constant_body(body_bytes)
    headers = {"Location": "/api/v1/orders/five-yuan-films.1f4.0a1b2c"}

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=201, body=body, headers=headers, content_type="application/json")

    app = web.Application()
    app.router.add_post("/api/v1/campaigns/{campaign}/orders", answer)
    return app


def main() -> None:
    """Serve until SIGTERM."""
    told = options(__doc__)
    uvloop.install()
    app = application(told.body_bytes)
    web.run_app(app, host="127.0.0.1", port=told.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
