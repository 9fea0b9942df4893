"""`sale operator …`."""

from typing import Any

import click

from sale.cli.runtime import CommandContext, command_context, echo, run
from sale.cli.terminal import echo_table
from sale.db.operators import Operator
from sale.domain.clock import rfc3339, to_ms
from sale.domain.unions import default_unions_path, load_unions
from sale.operators import accounts


@click.group()
def operator() -> None:
    """Accounts of operators, clerks and auditors."""


@operator.command()
@click.argument("name")
@click.option("--role", type=click.Choice(accounts.ROLES), required=True)
@click.option("--union", help="The union it acts for (default: the district).")
@command_context
def add(context: CommandContext, name: str, role: str, union: str | None) -> None:
    """Make an account. It has no token until `sale operator token NAME`."""
    unions = frozenset(load_unions(default_unions_path()))

    async def work() -> Operator:
        async with context.pool() as pool:
            return await accounts.add_operator(
                pool, name, role, union=union, unions=unions, actor=context.actor
            )

    made = run(work())
    echo(
        context,
        _public(made),
        lambda: click.echo(f"{made.name} added as {role} for {made.union_code}"),
    )


@operator.command("list")
@command_context
def list_(context: CommandContext) -> None:
    """List the accounts."""

    async def work() -> list[Operator]:
        async with context.pool() as pool:
            return await accounts.list_operators(pool)

    rows = [_public(entry) for entry in run(work())]
    columns = ["name", "role", "union", "has_token", "disabled", "created_at"]
    echo(
        context,
        rows,
        lambda: echo_table(columns, [[_plain(row[column]) for column in columns] for row in rows]),
    )


@operator.command()
@click.argument("name")
@command_context
def disable(context: CommandContext, name: str) -> None:
    """Disable an account; its token ends at once."""

    async def work() -> None:
        async with context.pool() as pool:
            await accounts.disable_operator(pool, name, actor=context.actor)

    run(work())
    echo(context, {"name": name, "disabled": True}, lambda: click.echo(f"{name} disabled"))


@operator.command()
@click.argument("name")
@command_context
def token(context: CommandContext, name: str) -> None:
    """Print a new token for the admin API; the old one ends.

    It is shown this once.
    """

    async def work() -> str:
        async with context.pool() as pool:
            return await accounts.give_token(pool, name, actor=context.actor)

    new = run(work())
    echo(context, {"name": name, "token": new}, lambda: click.echo(new))


def _public(entry: Operator) -> dict[str, Any]:
    return {
        "name": entry.name,
        "role": entry.role,
        "union": entry.union_code,
        "has_token": entry.has_token,
        "disabled": entry.disabled,
        "created_at": rfc3339(to_ms(entry.created_at)),
    }


def _plain(value: object) -> object:
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
