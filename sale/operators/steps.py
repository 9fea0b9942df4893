"""The operators' steps as a table: one entry has all that is known of a step.

The command of ``sale campaign``, the HTTP route with its body and its place in the OpenAPI
document, and the checks before the script are made from it. Whether the campaign's state allows the
step is decided by the script alone.

A request's type says whether a reason is needed: ``StepRequest`` takes one, ``ReasonedRequest``
requires it. Its other fields are what the step needs besides the campaign. On the command line a
required field is an argument and an optional one is an option; ``metavar`` and ``help`` of an
annotation are for the command line.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from sale.domain.campaign import STOCK_MAX, Identifier
from sale.domain.campaign_view import CampaignNow
from sale.domain.clock import parse_moment, to_ms
from sale.domain.order import Time
from sale.domain.problem import Problem, Refused
from sale.domain.text import REASON_MAX, Text, Wrong, shown_text
from sale.stock.scripts import Operation, OperationReply, Scripts

RUNNERS: Final = frozenset({"admin", "operator"})
"""Roles that change campaigns; the others only read."""

Reason = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=REASON_MAX,
        extra={"help": "Why, for the audit log."},
        extra_json_schema={
            "pattern": r"\S",
            "description": "Visible text: no control characters, no invisible ones, and none that "
            "turn the direction of writing. Spaces around it are taken off.",
        },
    ),
]


def checked_reason(reason: str) -> str:
    """Give a reason as it is kept. Raises Refused.

    HTTP and the command line both come here: a text that PostgreSQL cannot hold would stop the
    ledger's writer.
    """
    try:
        return shown_text(reason, REASON_MAX)
    except Wrong as wrong:
        text = wrong.text.of_field("reason")
        raise Refused(Problem.INVALID_REQUEST, text, field="reason") from None


class StepRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step that needs nothing but the campaign."""

    reason: Reason | None = None

    def content(self) -> str:
        """Give what the step does, apart from the reason. Equal requests have equal content."""
        fields = msgspec.structs.asdict(self)
        return msgspec.json.encode(
            {name: fields[name] for name in fields if name != "reason"}
        ).decode()


class ReasonedRequest(StepRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step that needs a reason."""

    reason: Reason


class ScheduleRequest(StepRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to open; without ``at``, at the campaign's ``opens_at``."""

    at: Annotated[
        Time | None,
        Meta(
            description="Opening moment; without it, the campaign's `opens_at`.",
            extra={
                "metavar": "TIME",
                "help": "Opening moment, RFC 3339 with offset; without it, that of its file.",
            },
        ),
    ] = None

    @property
    def opens_at_ms(self) -> int | None:
        """The opening moment in UTC milliseconds. Raises Refused."""
        if self.at is None:
            return None
        try:
            return to_ms(parse_moment(self.at))
        except Wrong as wrong:
            text = wrong.text.of_field("at")
            raise Refused(Problem.INVALID_REQUEST, text, field="at") from None

    def content(self) -> str:
        """Give the moment: two ways of writing it are one content."""
        return str(self.opens_at_ms)


class StockRequest(ReasonedRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tickets to add to a showing."""

    showing: Identifier
    add: Annotated[int, Meta(ge=1, le=STOCK_MAX, extra={"metavar": "N"})]


class StepCall(NamedTuple):
    """The arguments of a step's script. ``now`` is the campaign as it was read before."""

    step: "Step"
    scripts: Scripts
    now: CampaignNow
    operation: Operation
    request: Any


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step.

    ``name`` is the last segment of its HTTP path, and the action that the script knows; ``command``
    is its name on the command line where that differs. ``invalid``: the field that is wrong where
    the script answers INVALID, and why. ``instead``: what to do in a state that does not allow it.
    ``removes``: the campaign is gone afterwards, and over HTTP the step is DELETE.
    """

    name: str
    title: Text
    script: Callable[[StepCall], Awaitable[OperationReply]]
    request: type[StepRequest] = StepRequest
    command: str = ""
    roles: frozenset[str] = RUNNERS
    invalid: tuple[str, str] = ("", "")
    instead: Mapping[str, str] = {}
    removes: bool = False

    @property
    def needs_body(self) -> bool:
        """Whether there is a field that must be given."""
        return any(field.required for field in msgspec.structs.fields(self.request))


async def _change_state(call: StepCall) -> OperationReply:
    return await call.scripts.transition(call.now.campaign.id, call.step.name, call.operation)


async def _schedule(call: StepCall) -> OperationReply:
    request: ScheduleRequest = call.request
    return await call.scripts.transition(
        call.now.campaign.id, call.step.name, call.operation, request.opens_at_ms
    )


async def _add_stock(call: StepCall) -> OperationReply:
    request: StockRequest = call.request
    campaign = call.now.campaign
    showing = campaign.showing_numbers.get(request.showing)
    if showing is None:
        there = campaign.showings_in_words
        raise Refused(
            Problem.INVALID_REQUEST,
            Text(
                f"showing：没有 {request.showing!r}，只有 {there.zh}",
                f"showing: there is no {request.showing!r}; there is {there.en}",
            ),
            field="showing",
        )
    return await call.scripts.add_stock(campaign.id, call.operation, showing, request.add)


SCHEDULE: Final = Step(
    name="schedule",
    title=Text("安排开抢时间", "Schedule a draft, or move the opening"),
    script=_schedule,
    request=ScheduleRequest,
    invalid=("at", "give an opening moment that is before closes_at"),
    instead={"open": "it is open already"},
)
OPEN: Final = Step(
    name="open",
    title=Text("立即开抢", "Open it now, also before its opening moment"),
    script=_change_state,
    instead={
        "paused": "resume it instead",
        "open": "it is open already",
        "closed": "reopen it instead",
    },
)
PAUSE: Final = Step(
    name="pause",
    title=Text("暂停售票", "Stop selling for a while"),
    script=_change_state,
    request=ReasonedRequest,
    instead={
        "scheduled": "it does not sell yet: close it, or schedule it for later",
        "paused": "it is paused already",
    },
)
RESUME: Final = Step(
    name="resume",
    title=Text("恢复售票", "Continue to sell after a pause"),
    script=_change_state,
    instead={
        "open": "it is open already",
        "closed": "reopen it instead",
        "scheduled": "open it instead",
    },
)
CLOSE: Final = Step(
    name="close",
    title=Text("结束售票", "End the sale"),
    script=_change_state,
    instead={"closed": "it is closed already", "draft": "delete the draft instead"},
)
REOPEN: Final = Step(
    name="reopen",
    title=Text("重新开放", "Open a closed campaign again"),
    script=_change_state,
    request=ReasonedRequest,
    instead={"paused": "resume it instead", "open": "it is open already"},
)
STOCK: Final = Step(
    name="stock",
    command="add-stock",
    title=Text("加票", "Add tickets to a showing, while it sells too"),
    script=_add_stock,
    request=StockRequest,
    invalid=("add", f"the showing would pass {STOCK_MAX} tickets"),
)
DELETE: Final = Step(
    name="delete", title=Text("删除草稿", "Delete a draft"), script=_change_state, removes=True
)

STEPS: Final = {
    step.name: step for step in (SCHEDULE, OPEN, PAUSE, RESUME, CLOSE, REOPEN, STOCK, DELETE)
}
