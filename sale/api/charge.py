"""Refuses requests before work is done for them, and charges those that are faulty.

The dispatcher (``dispatch.py``) does both for every route. The fast path charges by the same rule
and refuses by itself.
"""

import time
from typing import Final

from aiohttp import web

from sale.api.request import ENGINE, bearer
from sale.bootstrap import Engine
from sale.domain.problem import Problem, Refused
from sale.http.client_address import first_of
from sale.http.overload import TURN
from sale.identity import operator_token_hash
from sale.members.rate import Limited, TooFast

CHARGED: Final = frozenset(
    {
        Problem.INVALID_REQUEST,
        Problem.MISSING_IDEMPOTENCY_KEY,
        Problem.UNAUTHENTICATED,
        Problem.FORBIDDEN,
        Problem.NOT_FOUND,
        Problem.METHOD_NOT_ALLOWED,
        Problem.PAYLOAD_TOO_LARGE,
        Problem.UNSUPPORTED_MEDIA_TYPE,
    }
)
"""Faults of a request itself; an address is charged for each."""


def admit(engine: Engine) -> None:
    """Let a request in that waits in no queue. Raises Refused (overloaded)."""
    now = time.monotonic()
    if engine.overload.turn_is_over(now):
        raise Refused(Problem.OVERLOADED, retry_after_s=engine.overload.refuse(TURN, now))


def charge(
    engine: Engine, problem: Problem, token: str | None, peer: str, forwarded_for: str | None
) -> Limited | None:
    """Charge a faulty request to the member of its valid ``token``, else to its address.

    Gives the limit that is passed, which is answered instead, or None. Never raises.
    """
    if problem not in CHARGED:
        return None
    now = time.monotonic()
    if token:
        try:
            member_no = engine.tokens.verify(token, time.time()).no
        except Refused:
            if engine.limits.vouches(operator_token_hash(token), now):
                return None
        else:
            return engine.limits.spend_card(member_no, now)
    return engine.limits.spend_address(engine.addresses.of(peer, forwarded_for), now)


def charged(engine: Engine, request: web.BaseRequest, refused: Refused) -> Refused:
    """Charge a refusal; give it, or the refusal for a limit that is passed."""
    if refused.problem not in CHARGED:
        return refused
    limited = charge(
        engine, refused.problem, bearer(request), peer_of(request), forwarded_for(request)
    )
    return refused if limited is None else TooFast(limited)


def refuse_guessers(request: web.Request, token: str) -> None:
    """Refuse unknown tokens of an address that sent too many wrong ones. Raises TooFast.

    PostgreSQL is not read for them. A token that was valid before passes, so that others at the
    same address do not shut operators out.
    """
    engine = request.app[ENGINE]
    if engine.limits.remembers(operator_token_hash(token)):
        return
    address = engine.addresses.of(peer_of(request), forwarded_for(request))
    limited = engine.limits.address_is_out(address, time.monotonic())
    if limited is not None:
        raise TooFast(limited)


def refuse_exhausted(request: web.Request) -> None:
    """Refuse a member or an address whose limit is used up, before a store is read. Raises TooFast.

    For requests that are charged only if they turn out to be faulty.
    """
    engine, now = request.app[ENGINE], time.monotonic()
    try:
        member_no = engine.tokens.verify(bearer(request) or "", time.time()).no
    except Refused:
        address = engine.addresses.of(peer_of(request), forwarded_for(request))
        limited = engine.limits.address_is_out(address, now)
    else:
        limited = engine.limits.card_is_out(member_no, now)
    if limited is not None:
        raise TooFast(limited)


def peer_of(request: web.BaseRequest) -> str:
    """Give the host at the other end of the connection; '' on a unix socket, or when it is gone."""
    return first_of(None if request.transport is None else request.get_extra_info("peername"))


def forwarded_for(request: web.BaseRequest) -> str | None:
    """Give all of X-Forwarded-For: proxies that add their own line add it last."""
    lines = request.headers.getall("X-Forwarded-For", None)
    return None if lines is None else ",".join(lines)
