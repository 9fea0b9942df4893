"""Answers what is refused before a route is found: by aiohttp, its parser, or for its head."""

from typing import Final

from aiohttp import web

from sale.api.charge import charged
from sale.api.problems import problem_answer, problem_response
from sale.bootstrap import Engine
from sale.domain.problem import Problem, Refused
from sale.http.head_rules import HeadFault
from sale.http.wire import rendered

_BY_STATUS: Final = {404: Problem.NOT_FOUND, 500: Problem.UNAVAILABLE}


class ProblemRefusals:
    """The refusals of ``aiohttp_handler.Refusals`` as problem documents; each is charged."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def of_head(self, request: web.BaseRequest, fault: HeadFault | None) -> web.Response:
        """Answer a request whose head is refused; None: it cannot be read."""
        if fault is None:
            refused = Refused(Problem.INVALID_REQUEST, "this is not a request that can be read")
        elif fault.allow:
            refused = Refused(Problem.METHOD_NOT_ALLOWED, allow=fault.allow)
        else:
            refused = Refused(
                Problem.INVALID_REQUEST, f"{fault.field}: {fault.why}", field=fault.field
            )
        return problem_response(charged(self._engine, request, refused))

    def of_status(self, request: web.BaseRequest, status: int) -> web.Response:
        """Answer what aiohttp itself refuses with a status."""
        refused = Refused(_BY_STATUS.get(status, Problem.INVALID_REQUEST))
        return problem_response(charged(self._engine, request, refused))

    def of_failure(self) -> web.Response:
        """Answer a fault of ours."""
        return problem_response(Refused(Problem.UNAVAILABLE))

    def of_crowding(self, wait_s: int) -> bytes:
        """Give the bytes that a connection beyond the bound is answered, as its last."""
        return overloaded_answer(wait_s, last=True)


def overloaded_answer(wait_s: int, last: bool) -> bytes:  # noqa: FBT001 - FastPath calls it
    """Word the refusal of an overloaded process."""
    refused = Refused(Problem.OVERLOADED, retry_after_s=wait_s)
    return rendered(*problem_answer(refused), last=last)
