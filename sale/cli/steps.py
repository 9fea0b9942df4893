"""Makes a command of `sale campaign` from each of the operators' steps.

A required field of the step's request becomes an argument, an optional one an option; the reason
is an option in both cases.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import msgspec
from msgspec import inspect

from sale.cli.runtime import CommandContext, WholeNumber, command_context, run
from sale.domain.campaign_view import CampaignNow
from sale.domain.fields import decoder_fault
from sale.operators.campaigns import Actor
from sale.operators.steps import Step, StepRequest

Show = Callable[[CommandContext, Step, str, CampaignNow | None], None]


def step_command(step: Step, show: Show) -> click.Command:
    """Make the command of a step; ``show`` prints the campaign afterwards."""
    command = click.command(step.command or step.name, help=f"{step.title.en}.")(
        command_context(partial(_take, step, show))
    )
    fields = [field for field in _fields(step.request) if field.name != "reason"]
    reason = next(field for field in _fields(step.request) if field.name == "reason")
    command.params[:0] = [
        click.Argument(["campaign_id"], metavar="ID"),
        *(_argument(field) for field in fields if field.required),
        *(_option(field) for field in fields if not field.required),
        _option(reason),
    ]
    return command


def _take(
    step: Step, show: Show, context: CommandContext, campaign_id: str, **fields: object
) -> None:
    request = _request(step, fields)
    show(context, step, campaign_id, run(_taken(context, step, campaign_id, request)))


def _request(step: Step, fields: dict[str, object]) -> StepRequest:
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return msgspec.convert(given, step.request)
    except msgspec.ValidationError as error:
        field, what = decoder_fault(str(error), step.request)
        raise click.ClickException(what.of_field(field).en) from None


async def _taken(
    context: CommandContext, step: Step, campaign_id: str, request: StepRequest
) -> CampaignNow | None:
    async with context.campaign_desk() as (desk, _):
        return await desk.take(step, campaign_id, request, Actor(context.actor), None)


def _fields(request: type[StepRequest]) -> tuple[inspect.Field, ...]:
    declared = inspect.type_info(request)
    assert isinstance(declared, inspect.StructType)  # noqa: S101 - it is declared as one
    return declared.fields


def _argument(field: inspect.Field) -> click.Argument:
    of, about = _meaning(field)
    return click.Argument(
        [field.name], metavar=about.get("metavar", field.name.upper()), type=_click_type(of)
    )


def _option(field: inspect.Field) -> click.Option:
    of, about = _meaning(field)
    return click.Option(
        [f"--{field.name.replace('_', '-')}"],
        metavar=about.get("metavar"),
        help=about.get("help"),
        required=field.required,
        type=_click_type(of),
    )


def _meaning(field: inspect.Field) -> tuple[inspect.Type, dict[str, Any]]:
    """Give the type of a field that is not null, and what its annotations say of it."""
    about: dict[str, Any] = {}
    of = field.type
    while isinstance(of, inspect.Metadata | inspect.UnionType):
        if isinstance(of, inspect.UnionType):
            of = next(each for each in of.types if not isinstance(each, inspect.NoneType))
        else:
            about = {**(of.extra_json_schema or {}), **(of.extra or {}), **about}
            of = of.type
    return of, about


def _click_type(of: inspect.Type) -> click.ParamType[Any]:
    match of:
        case inspect.IntType(ge=low, le=high):
            return WholeNumber(low, high)
        case inspect.StrType():
            return click.STRING
        case _:
            raise TypeError(f"no option is made for a field of {of}")
