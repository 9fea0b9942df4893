"""Shared by all commands: options, output, the database, and errors as one clear line.

The root command and each subcommand take ``--data-dir``, ``--config``, ``--as`` and ``--json``, so
people may write them before or after the subcommand; the later one counts.
"""

import getpass
import logging
import os
import re
import sys
import unicodedata
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import click
import msgspec
import structlog

from sale import config
from sale.cli.terminal import echo_json, note, take_any_character
from sale.config import BadOption, Settings, SettingsError, StartError
from sale.domain.member import CARD_NO
from sale.domain.problem import Refused
from sale.domain.text import ACCOUNT_NAME_MAX, shown_text
from sale.files import shown
from sale.identity import SigningKey, load_or_create_signing_key

if TYPE_CHECKING:
    from sale.bootstrap import Stores
    from sale.operators.campaigns import CampaignDesk


class WholeNumber(click.IntRange):
    """A whole number with bounds; click calls a wrong one "not a valid integer range"."""

    name = "whole number"


class Number(click.FloatRange):
    """A number with bounds."""

    name = "number"


EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130

P = ParamSpec("P")
T = TypeVar("T")


class CommandContext(msgspec.Struct, frozen=True, kw_only=True):
    """The context of a command. ``actor`` is the name in the audit log (INV-10)."""

    settings: Settings
    as_json: bool
    actor: str

    def database_url(self) -> str:
        """The database of the settings, or of the engine that runs on the data directory.

        Raises click.ClickException if there is neither.
        """
        if self.settings.database_url is not None:
            return self.settings.database_url
        from sale.host import embedded

        endpoints = embedded.find(self.settings.data_dir)
        if endpoints is None or endpoints.database_url is None:
            raise click.ClickException(
                f"no engine is running on {self.settings.data_dir}: start `sale up`, "
                "or set SALE_DATABASE_URL"
            )
        return endpoints.database_url

    def signing_key(self) -> SigningKey:
        """Give the deployment's key. Raises click.ClickException if no engine is running."""
        self.database_url()  # first, because without an engine the key is missing too
        return load_or_create_signing_key(self.settings)

    @asynccontextmanager
    async def pool(self) -> AsyncIterator[Any]:
        """A small pool on that database, closed at the end."""
        from sale.db.pool import close_pool, open_pool

        pool = await open_pool(self.database_url(), max_size=2)
        try:
            yield pool
        finally:
            await close_pool(pool)

    @asynccontextmanager
    async def campaign_desk(self) -> AsyncIterator[tuple["CampaignDesk", "Stores"]]:
        """The operators' steps on the stores of the settings, and these stores."""
        from sale.bootstrap import open_stores
        from sale.operators.campaigns import CampaignDesk

        async with open_stores(self.settings, pool_size=2) as stores:
            yield CampaignDesk(stores.redis, stores.scripts, stores.pool), stores


def card_number(_context: click.Context, _param: click.Parameter, value: str) -> str:
    """Check a card number given on the command line (a callback of click).

    The message does not repeat a wrong number, because it may be a real one with a typing error.
    """
    if not CARD_NO.fullmatch(value):
        raise click.BadParameter("a card number is 12 to 19 digits")
    return value


def shared_options(function: Callable[..., T]) -> Callable[..., T]:
    """Add the options that every command takes; the function gets them as keyword arguments."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def remember_options(function: Callable[..., T]) -> Callable[..., T]:
    """For the root command: take the shared options and keep them for the subcommands."""

    @wraps(function)
    def wrapper(*args: Any, **options: Any) -> T:  # noqa: ANN401 - click's options
        context = click.get_current_context()
        context.ensure_object(dict)
        for name in _OPTION_NAMES:
            value = options.pop(name)
            if value is not None:
                context.obj[name] = value
        return function(*args, **options)

    return shared_options(wrapper)


def command_context(
    function: Callable[Concatenate[CommandContext, P], T],
) -> Callable[..., T]:
    """For a subcommand: take the shared options, read the settings, pass a CommandContext first.

    An option that is also a setting (``listen``, ``metrics_listen``, ``workers``) overrides it if
    the command names it in ``overriding``.
    """
    return overriding()(function)


def overriding(
    *names: str,
) -> Callable[[Callable[Concatenate[CommandContext, P], T]], Callable[..., T]]:
    """Like ``command_context``; options of these names override settings and are not passed on."""

    def decorate(function: Callable[Concatenate[CommandContext, P], T]) -> Callable[..., T]:
        @wraps(function)
        def wrapper(*args: Any, **options: Any) -> T:  # noqa: ANN401 - click's options
            shared = dict(click.get_current_context().obj or {})
            for name in _OPTION_NAMES:
                value = options.pop(name)
                if value is not None:
                    shared[name] = value
            overrides = {name: options.pop(name) for name in names}
            return function(_context(shared, overrides), *args, **options)

        return shared_options(wrapper)

    return decorate


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a command's work on an event loop. Errors become click.ClickException in one line."""
    import uvloop

    try:
        return uvloop.run(coroutine)
    except (click.ClickException, BrokenPipeError):
        raise
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        raise click.ClickException(line) from error


def one_line(error: BaseException) -> str | None:
    """Give the line for an error that people can act on; None for a fault of the program."""
    import asyncpg
    import redis

    from sale.db.errors import NO_SCHEMA, POSTGRES_SAYS
    from sale.db.migrate import MigrationError
    from sale.host.embedded import EmbeddedError

    if isinstance(error, Refused):
        return error.detail or error.problem.value
    if isinstance(error, asyncpg.UndefinedTableError):
        return NO_SCHEMA
    # A server that dies in mid-call is an internal error to asyncpg.
    if isinstance(error, POSTGRES_SAYS):
        return f"PostgreSQL: {_first_line(error)}"
    if isinstance(error, redis.RedisError):
        return f"Redis: {_first_line(error)}"
    if isinstance(error, TimeoutError):
        return f"no answer in time {_first_line(error)}".strip()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{shown(str(error.filename))}: {error.strerror}"
    if isinstance(error, StartError | EmbeddedError | MigrationError | OSError | ValueError):
        line = _first_line(error)
        if _TAKEN in line.lower():
            option = "--metrics-listen" if "metrics" in line.lower() else "--listen"
            line += f": choose another with {option} (port 0: a free one)"
        return line
    return None


def echo(context: CommandContext, value: object, show: Callable[[], None]) -> None:
    """Print ``value`` as one JSON value with ``--json``, else call ``show``."""
    if context.as_json:
        echo_json(value)
    else:
        show()


def main_entry(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run the root command; return the exit status. Every error is one line on stderr."""
    take_any_character()
    # Stdout is for results alone. Services set their own logging up when they start.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    # asyncpg leaves failed futures that nobody awaits; asyncio would log them.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        status = command.main(
            list(arguments) if arguments is not None else None,
            prog_name="sale",
            standalone_mode=False,
        )
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.NoSuchOption as error:
        given = sys.argv[1:] if arguments is None else arguments
        below = next((word for word in given if _BELOW_ZERO.fullmatch(word)), None)
        says = (
            f"{below}: a number below zero is not taken here" if below else error.format_message()
        )
        note(f"sale: {' '.join(says.split())}")
        return error.exit_code
    except click.ClickException as error:
        note(f"sale: {' '.join(error.format_message().split())}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`); Python would report it again at the last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        note(f"sale: {line}")
        return EXIT_FAILED
    return status if isinstance(status, int) else 0


def _context(shared: dict[str, Any], overrides: dict[str, Any]) -> CommandContext:
    try:
        settings = config.load(
            shared.get("config_file"), data_dir=shared.get("data_dir"), **overrides
        )
    except BadOption as error:
        raise click.UsageError(str(error)) from None
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    return CommandContext(
        settings=settings,
        as_json=bool(shared.get("as_json")),
        actor=shared.get("actor") or f"cli:{_login_name()}",
    )


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without an entry
        return f"uid-{os.getuid()}"


def _actor(_context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return shown_text(unicodedata.normalize("NFKC", value), ACCOUNT_NAME_MAX)
    except ValueError as wrong:
        raise click.BadParameter(f"a name {wrong}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_BELOW_ZERO: Final = re.compile(r"-[0-9][0-9.,_]*")
_TAKEN: Final = "address already in use"
_PATH: Final = click.Path(path_type=Path)
_OPTIONS: Final = (
    click.option("--data-dir", type=_PATH, help="Data directory (default .sale)."),
    click.option("--config", "config_file", type=_PATH, help="Settings file, TOML."),
    click.option(
        "--as", "actor", metavar="NAME", callback=_actor, help="Who acts, for the audit log."
    ),
    click.option("--json", "as_json", is_flag=True, default=None, help="One JSON value on stdout."),
)
_OPTION_NAMES: Final = ("data_dir", "config_file", "actor", "as_json")
