"""Finds the sender of a request, a member or an operator, by the bearer token."""

import time

from aiohttp import web

from sale.api.charge import refuse_guessers
from sale.api.request import ENGINE, bearer
from sale.domain.problem import Problem, Refused
from sale.http.routes import Access
from sale.identity import Member, operator_token_hash
from sale.members.rate import TooFast
from sale.operators.accounts import authenticate_operator
from sale.operators.campaigns import Actor


def member_of(request: web.Request) -> Member:
    """Give whose token this is, and charge the card. Raises Refused (unauthenticated), TooFast."""
    engine = request.app[ENGINE]
    member = engine.tokens.verify(bearer(request) or "", time.time())
    limited = engine.limits.spend_card(member.no, time.monotonic())
    if limited is not None:
        raise TooFast(limited)
    return member


async def actor_of(request: web.Request, access: Access) -> Actor:
    """Give the operator of a request.

    Raises Refused: 401 without a valid token, 403 for a member's token or a role that may not.
    """
    engine = request.app[ENGINE]
    token = bearer(request) or ""
    if _is_member(request, token):  # known without reading PostgreSQL
        raise Refused(Problem.FORBIDDEN, "a member's token does not open this")
    refuse_guessers(request, token)
    try:
        operator = await authenticate_operator(engine.stores.pool, token)
    except Refused:
        engine.limits.forget(operator_token_hash(token))
        raise
    engine.limits.remember(operator_token_hash(token), time.monotonic())
    if operator.role not in access.roles:
        raise Refused(
            Problem.FORBIDDEN,
            f"the role {operator.role!r} may not do this; it is for {_in_words(access)}",
        )
    # An account may be named "clock" or "cli:root": the prefix says where a name is from (INV-10).
    return Actor(f"operator:{operator.name}", operator.role, operator.union_code)


def _is_member(request: web.Request, token: str) -> bool:
    try:
        request.app[ENGINE].tokens.verify(token, time.time())
    except Refused:
        return False
    return True


def _in_words(access: Access) -> str:
    return ", ".join(sorted(access.roles))
