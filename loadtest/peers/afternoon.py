"""The peer of an afternoon: FastAPI, pydantic, PyJWT and redis.asyncio under uvicorn.

As its own manual would have it written: a model for the request and one for the answer, the member
as a dependency, a Lua script (``lua/buy.lua``) for stock and limit; uvicorn with uvloop, httptools
and no access log. The token's signature is checked. It leaves out: batches, replay of a repeated
key, opening times, revoked cards and unions, the hash chain, the books in PostgreSQL, and any check
that the Redis which answers is the one that it was.
"""

import contextlib
import secrets
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Annotated

import jwt
import redis.asyncio
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from loadtest.peers import options

CARD_LIMIT = 3
PRICE_FEN = 500
REDIS_CONNECTIONS = 512
SCRIPT = files("loadtest.peers").joinpath("lua/buy.lua").read_text()


class Purchase(BaseModel):
    """A member's request."""

    quantity: int = Field(ge=1, le=CARD_LIMIT)
    showing: str = "general"


class Ticket(BaseModel):
    """One ticket of an order."""

    no: int
    code: str


class Order(BaseModel):
    """The answer to a member."""

    order_no: str
    campaign: str
    showing: str
    quantity: int
    state: str
    amount_fen: int
    pay_before: str | None
    tickets: list[Ticket]
    card_remaining: int


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold Redis open while the server runs."""
    pool = redis.asyncio.ConnectionPool(
        connection_class=redis.asyncio.UnixDomainSocketConnection,
        path=app.state.redis_socket,
        max_connections=REDIS_CONNECTIONS,
    )
    async with redis.asyncio.Redis(connection_pool=pool) as client:
        app.state.buy = client.register_script(SCRIPT)
        yield
    await pool.aclose()


app = FastAPI(lifespan=lifespan)


async def member(
    request: Request, bearer: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]
) -> str:
    """Card number of who asks. Raises HTTPException 401."""
    try:
        key = request.app.state.signing_key
        claims = jwt.decode(bearer.credentials, key, algorithms=["HS256"], audience="member")
    except jwt.InvalidTokenError as error:
        raise HTTPException(401, detail=str(error)) from error
    return str(claims["sub"])


@app.post("/api/v1/campaigns/{campaign}/orders", status_code=201)
async def buy(
    campaign: str,
    purchase: Purchase,
    request: Request,
    response: Response,
    card: Annotated[str, Depends(member)],
    idempotency_key: Annotated[str, Header()],
) -> Order:
    """Sell, or say why not."""
    code, quantity = secrets.token_hex(16), purchase.quantity
    outcome, *rest = await request.app.state.buy(
        keys=[f"stock:{campaign}", f"cards:{campaign}", f"orders:{campaign}"],
        args=[card, quantity, CARD_LIMIT, idempotency_key, purchase.showing, code],
    )
    if outcome == -2:
        raise HTTPException(404, detail={"code": "not-found"})
    if outcome == -1:
        raise HTTPException(409, detail={"code": "limit-exceeded", "card_remaining": rest[0]})
    if outcome == 0:
        raise HTTPException(409, detail={"code": "sold-out", "remaining": rest[0]})
    order_no = f"{campaign}.{rest[0].decode()}"
    response.headers["Location"] = f"/api/v1/orders/{order_no}"
    return Order(
        order_no=order_no,
        campaign=campaign,
        showing=purchase.showing,
        quantity=quantity,
        state="confirmed",
        amount_fen=quantity * PRICE_FEN,
        pay_before=None,
        tickets=[Ticket(no=no, code=f"{code}-{no}") for no in range(1, quantity + 1)],
        card_remaining=rest[1],
    )


def main() -> None:
    """Serve until SIGTERM."""
    told = options(__doc__, "--redis-socket", "--signing-key")
    app.state.redis_socket = told.redis_socket
    app.state.signing_key = told.signing_key
    uvicorn.run(app, host="127.0.0.1", port=told.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
