"""The naive peer: aiohttp and redis.asyncio on uvloop, one EVALSHA for each request.

What most write first, and it is right as far as it goes: Redis decides stock and limit in a script
(``lua/buy.lua``) and keeps the order in a stream, as durably as ours. It leaves out: batches, the
token's signature (the card is read from its claims as they stand), replay of a repeated key,
opening times, revoked cards and unions, the hash chain, the books in PostgreSQL, and any check
that the Redis which answers is the one that it was.
"""

import base64
import json
import secrets
from collections.abc import AsyncIterator
from importlib.resources import files

import redis.asyncio
import uvloop
from aiohttp import web
from redis.commands.core import AsyncScript

from loadtest.peers import options

CARD_LIMIT = 3
PRICE_FEN = 500
REDIS_CONNECTIONS = 512
REDIS: web.AppKey[redis.asyncio.Redis] = web.AppKey("redis", redis.asyncio.Redis)
BUY: web.AppKey[AsyncScript] = web.AppKey("buy", AsyncScript)


def card_of(authorization: str) -> str:
    """The card that a token names; nobody checks who signed it."""
    claims = authorization.split(".")[1]
    return str(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"])


def problem(code: str, status: int, **more: int) -> web.Response:
    """Answer a refusal."""
    content = {"type": f"/problems/{code}", "status": status, "code": code, **more}
    return web.json_response(content, status=status, content_type="application/problem+json")


async def buy(request: web.Request) -> web.Response:
    """POST /api/v1/campaigns/{campaign}/orders."""
    try:
        card = card_of(request.headers["Authorization"])
        key = request.headers["Idempotency-Key"]
        content = await request.json()
        quantity, showing = int(content["quantity"]), str(content.get("showing", "general"))
    except (LookupError, ValueError, TypeError):
        return problem("invalid-request", 400)
    if not 1 <= quantity <= CARD_LIMIT:
        return problem("invalid-request", 400)
    campaign = request.match_info["campaign"]
    code = secrets.token_hex(16)
    outcome, *rest = await request.app[BUY](
        keys=[f"stock:{campaign}", f"cards:{campaign}", f"orders:{campaign}"],
        args=[card, quantity, CARD_LIMIT, key, showing, code],
    )
    if outcome == -2:
        return problem("not-found", 404)
    if outcome == -1:
        return problem("limit-exceeded", 409, card_remaining=rest[0])
    if outcome == 0:
        return problem("sold-out", 409, remaining=rest[0])
    order_no = f"{campaign}.{rest[0].decode()}"
    order = {
        "order_no": order_no,
        "campaign": campaign,
        "showing": showing,
        "quantity": quantity,
        "state": "confirmed",
        "amount_fen": quantity * PRICE_FEN,
        "pay_before": None,
        "tickets": [{"no": no, "code": f"{code}-{no}"} for no in range(1, quantity + 1)],
        "card_remaining": rest[1],
    }
    return web.json_response(order, status=201, headers={"Location": f"/api/v1/orders/{order_no}"})


def application(redis_socket: str) -> web.Application:
    """Build the server; ``redis_socket`` is the path of Redis' socket."""

    async def with_redis(app: web.Application) -> AsyncIterator[None]:
        pool = redis.asyncio.ConnectionPool(
            connection_class=redis.asyncio.UnixDomainSocketConnection,
            path=redis_socket,
            max_connections=REDIS_CONNECTIONS,
        )
        client = app[REDIS] = redis.asyncio.Redis(connection_pool=pool)
        app[BUY] = client.register_script(
            files("loadtest.peers").joinpath("lua/buy.lua").read_text()
        )
        yield
        await client.aclose()
        await pool.aclose()

    app = web.Application()
    app.cleanup_ctx.append(with_redis)
    app.router.add_post("/api/v1/campaigns/{campaign}/orders", buy)
    return app


def main() -> None:
    """Serve until SIGTERM."""
    told = options(__doc__, "--redis-socket")
    uvloop.install()
    app = application(told.redis_socket)
    web.run_app(app, host="127.0.0.1", port=told.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
