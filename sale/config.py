"""Settings: read once, at start, into one frozen struct.

A TOML file (``--config``, default ``config/sale.toml`` if it is there) is overridden by the
environment. An unknown key or a bad value is refused by name, all of them in one go, because an
operator who mends one setting at a time restarts a service many times.
"""

import os
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from sale.files import UnreadableFile, brief, read_toml, shown
from sale.store_urls import BadUrl, PostgresUrl, RedisUrl

DEFAULT_FILE = Path("config/sale.toml")
OLDEST_VERSIONS = {"Redis": (7, 0), "Valkey": (7, 2), "PostgreSQL": (14, 0)}
"""Stores that the engine works with, and the oldest (major, minor) of each."""
UNIX_PREFIX = "unix:"
UNIX_PROXY = "unix"
"""In ``trusted_proxies``: a proxy that comes by a unix socket."""

SIGNING_KEY_MIN_BYTES = 32
DRAIN_SPARE_S = 5.0  # for closing connections, after the deadline of purchases

Durability = Literal["fsync", "replicated", "relaxed"]
"""Levels of durability of an answered order; docs/OPERATIONS.md says what each level can lose."""


class SettingsError(ValueError):
    """One or more settings are wrong; the message names each."""


class BadOption(SettingsError):  # noqa: N818 - reads as a sentence where it is raised
    """One of them was given as an option of the command line."""


class StartError(Exception):
    """A part cannot start here, or not go on; the message is one line for people."""


def _between(least: int, most: int) -> msgspec.Meta:
    return msgspec.Meta(ge=least, le=most)


_SECRET = msgspec.Meta(extra={"secret": True})
"""Its value is never repeated in a message."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a deployment, with their bounds. Units stand last in each name.

    ``SALE_`` and the name in capitals is the variable of the environment.
    """

    redis_url: Annotated[str | None, _SECRET] = None
    database_url: Annotated[str | None, _SECRET] = None
    data_dir: Path = Path(".sale")
    listen: str = "127.0.0.1:8080"
    metrics_listen: str = "127.0.0.1:9108"
    workers: Annotated[int, _between(1, 256)] = 1
    signing_key: Annotated[str | None, _SECRET] = None
    signing_key_file: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # The batcher. A batch is bounded by design; the queue bound is one to two seconds of work at
    # the benchmark's rates, beyond which an honest 503 is kinder than a late answer.
    batch_max: Annotated[int, _between(1, 256)] = 256
    queue_max: Annotated[int, _between(1, 1_000_000)] = 16_384
    purchase_deadline_ms: Annotated[int, _between(100, 60_000)] = 5_000

    # Plain purchases are served without aiohttp (api/fast_path.py); off, aiohttp serves all.
    fast_path: bool = True

    # Overload (http/overload.py): beyond these a process refuses at once. Connections are
    # also bounded by the files that the process may open; for the others 0 is no bound.
    connections_max: Annotated[int, _between(1, 1_000_000)] = 50_000
    turn_max_ms: Annotated[int, _between(0, 10_000)] = 200
    waiting_max: Annotated[int, _between(0, 10_000_000)] = 32_768
    wait_max_ms: Annotated[int, _between(0, 60_000)] = 1_000

    # Rate limits (members/rate.py), in each process: so many a second and so many at once;
    # 0 a second is no limit. People do not notice them. Of an address only what no valid card
    # answers for is counted, in sums for a large office behind one address.
    card_campaign_per_s: Annotated[int, _between(0, 1_000_000)] = 10
    card_campaign_burst: Annotated[int, _between(1, 1_000_000)] = 100
    card_per_s: Annotated[int, _between(0, 1_000_000)] = 20
    card_burst: Annotated[int, _between(1, 1_000_000)] = 200
    address_per_s: Annotated[int, _between(0, 1_000_000)] = 50
    address_burst: Annotated[int, _between(1, 1_000_000)] = 500

    # Networks of the proxies whose X-Forwarded-For is believed, separated by commas.
    trusted_proxies: str | None = None

    # What Redis must be configured to do, and whether a host that finds it weaker takes no traffic.
    durability: Durability = "fsync"
    durability_check: Literal["refuse", "warn"] = "refuse"
    replicas_min: Annotated[int, _between(1, 10)] = 1
    # Below the socket's own limit, so that WAIT ends first, and never 0: that waits for ever.
    replica_timeout_ms: Annotated[int, _between(10, 4_000)] = 500

    # Below this much free space on Redis' disk nothing is sold; 0 turns the watch off.
    disk_free_min_mb: Annotated[int, _between(0, 1_000_000_000)] = 256

    # The writer. Retention keeps applied entries in Redis so that a PostgreSQL restored from a
    # backup can be filled up again; both bounds must be passed before an entry is trimmed.
    writer_batch_events: Annotated[int, _between(512, 100_000)] = 8_192
    ledger_retention_events: Annotated[int, _between(0, 100_000_000)] = 10_000
    ledger_retention_s: Annotated[int, _between(0, 30 * 86_400)] = 600

    # How far PostgreSQL may be behind before nothing more is sold: what it lacks is held in memory
    # by Redis and by the API processes.
    ledger_behind_max_events: Annotated[int, _between(1, 100_000_000)] = 1_000_000
    ledger_behind_max_s: Annotated[int, _between(1, 7 * 86_400)] = 900

    # The scheduler. It recovers a campaign by itself where nothing that was told is lost.
    auto_recover: bool = True
    audit_interval_s: Annotated[int, _between(1, 86_400)] = 60
    tick_interval_ms: Annotated[int, _between(10, 10_000)] = 250

    # Payments. The test provider takes no money, so it must never be on where tickets are real.
    test_provider: bool = False
    refunds_per_s: Annotated[int, _between(1, 10_000)] = 50

    @property
    def drain_limit_s(self) -> float:
        """How long a part may take to end: what is under way is known by the deadline."""
        return self.purchase_deadline_ms / 1000 + DRAIN_SPARE_S

    @property
    def replicas_awaited(self) -> tuple[int, int] | None:
        """How many replicas each answer waits for, and up to how many ms; None where for none."""
        if self.durability != "replicated":
            return None
        return self.replicas_min, self.replica_timeout_ms


ENVIRONMENT = {f"SALE_{name.upper()}": name for name in Settings.__struct_fields__}
"""Setting of each variable of the environment."""


def load(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    **overrides: Any,  # noqa: ANN401 - command-line options, checked by the struct like the rest
) -> Settings:
    """Read the settings: file, then environment, then ``overrides`` that are not None.

    Raises:
        SettingsError: an unknown key or a bad value, by name; all of them in one message.
        BadOption: the same, where one of ``overrides`` is among them.

    """
    problems: list[str] = []
    values: dict[str, _Given] = {}
    chosen = file or (DEFAULT_FILE if DEFAULT_FILE.is_file() else None)
    if chosen is not None:
        for key, value in _read_table(chosen).items():
            values[key] = _Given(value, f"{_name(key)} in {shown(chosen)}")
    for name, text in (os.environ if environment is None else environment).items():
        if name in ENVIRONMENT:
            values[ENVIRONMENT[name]] = _Given(text, name)
        elif name.startswith("SALE_"):
            problems.append(f"{name}: no such setting")
    for key, value in overrides.items():
        if value is not None:
            values[key] = _Given(value, _OPTION + key.replace("_", "-"))

    clean = {key: _checked(key, given, problems) for key, given in values.items()}
    if clean.get("signing_key") and clean.get("signing_key_file"):
        problems.append("SALE_SIGNING_KEY and SALE_SIGNING_KEY_FILE: give one of the two")
    if problems:
        by_option = any(problem.startswith(_OPTION) for problem in problems)
        kind = BadOption if by_option else SettingsError
        raise kind("bad settings: " + "; ".join(sorted(problems)))
    return Settings(**clean)


def as_environment(settings: Settings) -> dict[str, str]:
    """Give the settings as environment variables, for a child process that must have the same."""
    values = {name: getattr(settings, key) for name, key in ENVIRONMENT.items()}
    return {name: str(value) for name, value in values.items() if value is not None}


def proxy_networks(text: str | None) -> tuple[IPv4Network | IPv6Network, ...]:
    """Read ``10.0.0.0/8, fd00::/8, unix``; ``unix`` is left out. Raises ValueError in words."""
    names = [name.strip() for name in (text or "").split(",")]
    return tuple(ip_network(name) for name in names if name and name != UNIX_PROXY)


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` (``[::1]:80`` too). Raises ValueError in words."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{brief(address)} is not HOST:PORT")
    return host, int(port)


_FIELDS: dict[str, msgspec.structs.FieldInfo] = {
    field.name: field for field in msgspec.structs.fields(Settings)
}
_META: dict[str, msgspec.Meta] = {
    name: field.type.__metadata__[0]
    for name, field in _FIELDS.items()
    if hasattr(field.type, "__metadata__")
}
_OPTION = "--"
_URLS: dict[str, Callable[[str], object]] = {
    "redis_url": RedisUrl.read,
    "database_url": PostgresUrl.read,
}


class _Given(NamedTuple):
    """A value as it was given, and where."""

    value: Any
    source: str


def _name(key: str) -> str:
    return key if key in _FIELDS else brief(key).strip("'")


def _read_table(file: Path) -> dict[str, Any]:
    try:
        return read_toml(file)
    except UnreadableFile as error:
        raise SettingsError(f"settings file {error}") from None


def _checked(key: str, given: _Given, problems: list[str]) -> Any:  # noqa: ANN401 - any field's
    """Give the value in its type, or None and one more problem."""
    if key not in _FIELDS:
        problems.append(f"{given.source}: no such setting")
        return None
    meta = _META.get(key)
    try:
        value = msgspec.convert(
            given.value, _FIELDS[key].type, strict=False, dec_hook=lambda _type, text: Path(text)
        )
    except (msgspec.ValidationError, TypeError) as error:
        shown_value = "" if meta is _SECRET else f"{brief(given.value)}: "
        why = _beyond(meta, given.value) or f"{shown_value}{_plain(str(error))}"
        problems.append(f"{given.source}: {why}")
        return None
    complaint = _complaint(key, value)
    if complaint:
        problems.append(f"{given.source}: {complaint}")
    return value


def _beyond(meta: msgspec.Meta | None, given: object) -> str:
    """Say that a whole number is out of its bounds; '' where that is not what is wrong."""
    if meta is None or meta.ge is None:
        return ""
    try:
        number = msgspec.convert(given, int, strict=False)
    except msgspec.ValidationError:
        return ""
    return f"{brief(number)} is not between {meta.ge} and {meta.le}"


def _complaint(key: str, value: Any) -> str | None:  # noqa: ANN401 - any field's value
    """Say what is wrong with a value of the right type, or None."""
    if key == "metrics_listen" and value.startswith(UNIX_PREFIX):
        path = value.removeprefix(UNIX_PREFIX)
        return None if path.startswith("/") else f"{brief(value)} is not unix:/PATH"
    if key in {"listen", "metrics_listen"}:
        try:
            split_address(value)
        except ValueError as error:
            return str(error)
    if key in _URLS:
        try:
            _URLS[key](value)
        except BadUrl as error:
            return str(error)
    if key == "trusted_proxies":
        try:
            proxy_networks(value)
        except ValueError as error:
            return str(error)
    if key == "signing_key" and len(value.encode()) < SIGNING_KEY_MIN_BYTES:
        return f"shorter than {SIGNING_KEY_MIN_BYTES} bytes"
    return None


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:]
