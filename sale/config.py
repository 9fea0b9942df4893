"""Settings: read once, at start, into one frozen struct.

A TOML file (``--config``, default ``config/sale.toml`` if it is there) is overridden by the
environment. An unknown key or a bad value is refused by name, all of them in one go, because an
operator who mends one setting at a time restarts a service many times.
"""

import os
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from sale.files import UnreadableFile, brief, read_toml, shown
from sale.store_urls import BadUrl, PostgresUrl, RedisUrl

DEFAULT_FILE = Path("config/sale.toml")
ENVIRONMENT = {
    "SALE_REDIS_URL": "redis_url",
    "SALE_DATABASE_URL": "database_url",
    "SALE_DATA_DIR": "data_dir",
    "SALE_LISTEN": "listen",
    "SALE_METRICS_LISTEN": "metrics_listen",
    "SALE_WORKERS": "workers",
    "SALE_SIGNING_KEY": "signing_key",
    "SALE_SIGNING_KEY_FILE": "signing_key_file",
    "SALE_LOG_LEVEL": "log_level",
    "SALE_AUDIT_INTERVAL_S": "audit_interval_s",
    "SALE_DURABILITY": "durability",
    "SALE_DURABILITY_CHECK": "durability_check",
    "SALE_REPLICAS_MIN": "replicas_min",
    "SALE_REPLICA_TIMEOUT_MS": "replica_timeout_ms",
    "SALE_LEDGER_RETENTION_EVENTS": "ledger_retention_events",
    "SALE_LEDGER_RETENTION_S": "ledger_retention_s",
    "SALE_BATCH_MAX": "batch_max",
    "SALE_QUEUE_MAX": "queue_max",
    "SALE_PURCHASE_DEADLINE_MS": "purchase_deadline_ms",
    "SALE_FAST_PATH": "fast_path",
    "SALE_CONNECTIONS_MAX": "connections_max",
    "SALE_TURN_MAX_MS": "turn_max_ms",
    "SALE_WAITING_MAX": "waiting_max",
    "SALE_WAIT_MAX_MS": "wait_max_ms",
    "SALE_CARD_CAMPAIGN_PER_S": "card_campaign_per_s",
    "SALE_CARD_CAMPAIGN_BURST": "card_campaign_burst",
    "SALE_CARD_PER_S": "card_per_s",
    "SALE_CARD_BURST": "card_burst",
    "SALE_ADDRESS_PER_S": "address_per_s",
    "SALE_ADDRESS_BURST": "address_burst",
    "SALE_TRUSTED_PROXIES": "trusted_proxies",
    "SALE_WRITER_BATCH_EVENTS": "writer_batch_events",
    "SALE_TICK_INTERVAL_MS": "tick_interval_ms",
    "SALE_LEDGER_BEHIND_MAX_EVENTS": "ledger_behind_max_events",
    "SALE_LEDGER_BEHIND_MAX_S": "ledger_behind_max_s",
    "SALE_AUTO_RECOVER": "auto_recover",
    "SALE_DISK_FREE_MIN_MB": "disk_free_min_mb",
}
OLDEST_VERSIONS = {"Redis": (7, 0), "Valkey": (7, 2), "PostgreSQL": (14, 0)}
"""Stores that the engine works with, and the oldest (major, minor) of each."""
UNIX_PREFIX = "unix:"
UNIX_PROXY = "unix"
"""In ``trusted_proxies``: a proxy that comes by a unix socket."""

SIGNING_KEY_MIN_BYTES = 32
DRAIN_SPARE_S = 5.0  # for closing connections, after the deadline of purchases

Durability = Literal["fsync", "replicated", "relaxed"]
"""What an answered order survives; docs/OPERATIONS.md says what each level can lose."""


class SettingsError(ValueError):
    """One or more settings are wrong; the message names each."""


class BadOption(SettingsError):  # noqa: N818 - reads as a sentence where it is raised
    """One of them was given as an option of the command line."""


class StartError(Exception):
    """A part cannot start here, or not go on; the message is one line for people."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a deployment. Units stand last in each name."""

    redis_url: str | None = None
    database_url: str | None = None
    data_dir: Path = Path(".sale")
    listen: str = "127.0.0.1:8080"
    metrics_listen: str = "127.0.0.1:9108"
    workers: int = 1
    signing_key: str | None = None
    signing_key_file: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # The batcher. A batch is bounded by design; the queue bound is one to two seconds of work at
    # the benchmark's rates, beyond which an honest 503 is kinder than a late answer.
    batch_max: int = 256
    queue_max: int = 16_384
    purchase_deadline_ms: int = 5_000

    # Plain purchases are served without aiohttp (api/fast_path.py); off, aiohttp serves all.
    fast_path: bool = True

    # Overload (http/overload.py): beyond these a process refuses at once. Connections are
    # also bounded by the files that the process may open; for the others 0 is no bound.
    connections_max: int = 50_000
    turn_max_ms: int = 200
    waiting_max: int = 32_768
    wait_max_ms: int = 1_000

    # Rate limits (members/rate.py), in each process: so many a second and so many at once;
    # 0 a second is no limit. People do not notice them. Of an address only what no valid card
    # answers for is counted, in sums for a large office behind one address.
    card_campaign_per_s: int = 10
    card_campaign_burst: int = 100
    card_per_s: int = 20
    card_burst: int = 200
    address_per_s: int = 50
    address_burst: int = 500

    # Networks of the proxies whose X-Forwarded-For is believed, separated by commas.
    trusted_proxies: str | None = None

    # What Redis must be configured to do, and whether a host that finds it weaker takes no traffic.
    durability: Durability = "fsync"
    durability_check: Literal["refuse", "warn"] = "refuse"
    replicas_min: int = 1
    replica_timeout_ms: int = 500

    # Below this much free space on Redis' disk nothing is sold; 0 turns the watch off.
    disk_free_min_mb: int = 256

    # The writer. Retention keeps applied entries in Redis so that a PostgreSQL restored from a
    # backup can be filled up again; both bounds must be passed before an entry is trimmed.
    writer_batch_events: int = 8_192
    ledger_retention_events: int = 10_000
    ledger_retention_s: int = 600

    # How far PostgreSQL may be behind before nothing more is sold: what it lacks is held in memory
    # by Redis and by the API processes.
    ledger_behind_max_events: int = 1_000_000
    ledger_behind_max_s: int = 900

    # The scheduler. It recovers a campaign by itself where nothing that was told is lost.
    auto_recover: bool = True
    audit_interval_s: int = 60
    tick_interval_ms: int = 250

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


_FIELD_TYPES: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(Settings)
}
_OPTION = "--"
_URLS: dict[str, Callable[[str], object]] = {
    "redis_url": RedisUrl.read,
    "database_url": PostgresUrl.read,
}
_SECRETS = {*_URLS, "signing_key"}
"""Never repeated in a message."""
_BOUNDS = {
    "workers": (1, 256),
    "batch_max": (1, 256),
    "queue_max": (1, 1_000_000),
    "purchase_deadline_ms": (100, 60_000),
    "connections_max": (1, 1_000_000),
    "turn_max_ms": (0, 10_000),
    "waiting_max": (0, 10_000_000),
    "wait_max_ms": (0, 60_000),
    "card_campaign_per_s": (0, 1_000_000),
    "card_campaign_burst": (1, 1_000_000),
    "card_per_s": (0, 1_000_000),
    "card_burst": (1, 1_000_000),
    "address_per_s": (0, 1_000_000),
    "address_burst": (1, 1_000_000),
    "replicas_min": (1, 10),
    # Below the socket's own limit, so that WAIT ends first, and never 0: that waits for ever.
    "replica_timeout_ms": (10, 4_000),
    "disk_free_min_mb": (0, 1_000_000_000),
    "writer_batch_events": (512, 100_000),
    "ledger_retention_events": (0, 100_000_000),
    "ledger_retention_s": (0, 30 * 86_400),
    "ledger_behind_max_events": (1, 100_000_000),
    "ledger_behind_max_s": (1, 7 * 86_400),
    "audit_interval_s": (1, 86_400),
    "tick_interval_ms": (10, 10_000),
}


class _Given(NamedTuple):
    """A value as it was given, and where."""

    value: Any
    source: str


def _name(key: str) -> str:
    return key if key in _FIELD_TYPES else brief(key).strip("'")


def _read_table(file: Path) -> dict[str, Any]:
    try:
        return read_toml(file)
    except UnreadableFile as error:
        raise SettingsError(f"settings file {error}") from None


def _checked(key: str, given: _Given, problems: list[str]) -> Any:  # noqa: ANN401 - any field's
    """Give the value in its type, or None and one more problem."""
    if key not in _FIELD_TYPES:
        problems.append(f"{given.source}: no such setting")
        return None
    try:
        value = msgspec.convert(
            given.value, _FIELD_TYPES[key], strict=False, dec_hook=lambda _type, text: Path(text)
        )
    except (msgspec.ValidationError, TypeError) as error:
        shown_value = "" if key in _SECRETS else f"{brief(given.value)}: "
        problems.append(f"{given.source}: {shown_value}{_plain(str(error))}")
        return None
    complaint = _complaint(key, value)
    if complaint:
        problems.append(f"{given.source}: {complaint}")
    return value


def _complaint(key: str, value: Any) -> str | None:  # noqa: ANN401 - any field's value
    """Say what is wrong with a value of the right type, or None."""
    if key in _BOUNDS:
        low, high = _BOUNDS[key]
        return None if low <= value <= high else f"{brief(value)} is not between {low} and {high}"
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
