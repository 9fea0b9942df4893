"""Parse the URLs of Redis and PostgreSQL, for all modules.

The drivers parse a URL leniently: a word in place of a database number becomes database 0, options
override our limits, and PG* variables, ``.pgpass`` and service files of the process's account fill
what a URL omits. Here the URL is complete, and the driver gets every argument from us.

No message repeats any part of a URL, because a wrongly quoted password may appear in any part.
"""

import os
import pwd
import re
import ssl
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec

REDIS_PORT: Final = 6_379
POSTGRES_PORT: Final = 5_432
REDIS_DB_MAX: Final = 65_535
TLS_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SESSIONS: Final = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")


class BadUrl(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A URL cannot be used; the message continues a line that begins with the setting's name."""


class RedisUrl(msgspec.Struct, frozen=True, kw_only=True):
    """The address of Redis: a unix socket's ``path``, or ``host`` and ``port``."""

    path: str = ""
    host: str = ""
    port: int = REDIS_PORT
    db: int = 0
    username: str = ""
    password: str = ""
    tls: bool = False
    tls_options: dict[str, Any] = {}

    @classmethod
    def read(cls, url: str) -> "RedisUrl":
        """Read ``redis://``, ``rediss://`` or ``unix://``. Raises BadUrl."""
        parts = _split(url, ("redis", "rediss", "unix"))
        unix = parts.scheme == "unix"
        options = _options(parts, _REDIS_TLS if parts.scheme == "rediss" else {"db"})
        if not unix and not _DB_PATH.fullmatch(parts.path):
            raise BadUrl(f"has something other than a database number after the host {_HINT}")
        given = {options.pop("db", None), None if unix else parts.path.strip("/") or None}
        numbers = given - {None}
        if len(numbers) > 1:
            raise BadUrl("has two different database numbers")
        where: dict[str, Any] = (
            {"path": _socket_path(parts)} if unix else _host_and_port(parts, REDIS_PORT)
        )
        return cls(
            **where,
            db=_whole(numbers.pop() or "", REDIS_DB_MAX, "db") if numbers else 0,
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            tls=parts.scheme == "rediss",
            tls_options=_redis_tls(options),
        )

    def connection(self) -> dict[str, Any]:
        """Give the arguments that redis-py's connections take."""
        where: dict[str, Any] = (
            {"path": self.path} if self.path else {"host": self.host, "port": self.port}
        )
        login = {"username": self.username or None, "password": self.password or None}
        return {**where, **login, "db": self.db, **self.tls_options}


class PostgresUrl(msgspec.Struct, frozen=True, kw_only=True):
    """The address of PostgreSQL: hosts (or directories of unix sockets) and their ports."""

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    user: str
    password: str
    database: str
    tls_mode: str
    tls_files: dict[str, str]
    session: str

    @classmethod
    def read(cls, url: str) -> "PostgresUrl":
        """Read ``postgresql://``. Raises BadUrl."""
        parts = _split(url, ("postgresql", "postgres"))
        options = _options(parts, _POSTGRES_OPTIONS)
        host = parts.netloc.rpartition("@")[2] or options.get("host", "")
        hosts, ports = _hosts(host, options.get("port", ""), POSTGRES_PORT)
        user = unquote(parts.username or "") or options.get("user") or _login_name()
        database = unquote(parts.path.removeprefix("/")) or options.get("dbname") or user
        if "/" in database:
            raise BadUrl(f"the name of its database has a / {_HINT}")
        mode = options.get("sslmode", "prefer")
        if mode not in TLS_MODES:
            raise BadUrl(f"sslmode is none of {', '.join(TLS_MODES)}")
        session = options.get("target_session_attrs", "any")
        if session not in SESSIONS:
            raise BadUrl(f"target_session_attrs is none of {', '.join(SESSIONS)}")
        files = {name: value for name, value in options.items() if name in _POSTGRES_TLS}
        if mode in {"verify-ca", "verify-full"} and "sslrootcert" not in files:
            raise BadUrl(f"sslmode {mode} needs sslrootcert")
        return cls(
            hosts=hosts,
            ports=ports,
            user=user,
            password=unquote(parts.password or "") or options.get("password", ""),
            database=database,
            tls_mode=mode,
            tls_files=files,
            session=session,
        )

    @property
    def place(self) -> str:
        """Hosts and ports for messages, without user and password."""
        pairs = zip(self.hosts, self.ports, strict=True)
        return ", ".join(
            f"{host} port {port}" if host.startswith("/") else f"{host}:{port}"
            for host, port in pairs
        )

    @property
    def tls_is_optional(self) -> bool:
        """Whether a server without TLS is accepted."""
        return self.tls_mode in {"allow", "prefer"} and not all(
            host.startswith("/") for host in self.hosts
        )

    def connection(self) -> dict[str, Any]:
        """Give all arguments that asyncpg would otherwise take from the environment.

        Raises OSError if a file that the URL names cannot be read.
        """
        return {
            "host": list(self.hosts),
            "port": list(self.ports),
            "user": self.user,
            "password": self.password,
            "database": self.database,
            "ssl": False if self.tls_mode == "disable" else self._tls(),
            "direct_tls": False,
            "target_session_attrs": self.session,
            "krbsrvname": "postgres",
            "gsslib": "gssapi",
        }

    def _tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["postgresql"])
        root = self.tls_files.get("sslrootcert")
        context.check_hostname = self.tls_mode == "verify-full"
        if root is not None and not self.tls_is_optional:
            context.load_verify_locations(cafile=root)
        else:
            context.verify_mode = ssl.CERT_NONE
        if "sslcert" in self.tls_files:
            context.load_cert_chain(
                self.tls_files["sslcert"],
                self.tls_files.get("sslkey"),
                password=self.tls_files.get("sslpassword", ""),
            )
        return context


def _split(url: str, schemes: tuple[str, ...]) -> SplitResult:
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise BadUrl("contains white space")
    if not url.startswith(tuple(f"{scheme}://" for scheme in schemes)):
        raise BadUrl(f"not a URL that begins with {' or '.join(f'{s}://' for s in schemes)}")
    if "#" in url:
        raise BadUrl(f"contains a # {_HINT}")
    scheme, _, rest = url.partition("://")
    before, _, query = rest.partition("?")
    netloc, slash, path = before.partition("/")
    try:  # each host alone: from Python 3.14 on, urlsplit refuses brackets amid a list of hosts
        user, at, hosts = netloc.rpartition("@")
        for host in hosts.split(","):
            urlsplit(f"{scheme}://{user}{at}{host}")
    except ValueError:  # its message may repeat the user and password
        raise BadUrl(f"its host cannot be read {_HINT}") from None
    return SplitResult(scheme, netloc, slash + path, query, "")


def _options(parts: SplitResult, known: frozenset[str] | set[str]) -> dict[str, str]:
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise BadUrl(f"has something other than options after its ? {_HINT}") from None
    options = dict(pairs)
    if len(options) < len(pairs):
        raise BadUrl("has the same option twice")
    if not options.keys() <= known:
        raise BadUrl(f"has an option other than {', '.join(sorted(known))} {_HINT}")
    empty = sorted(name for name, value in options.items() if not value)
    if empty:
        raise BadUrl(f"its option {empty[0]} is empty")
    return options


def _host_and_port(parts: SplitResult, default_port: int) -> dict[str, Any]:
    hosts, ports = _hosts(parts.netloc.rpartition("@")[2], "", default_port)
    if len(hosts) > 1 or hosts[0].startswith("/"):
        raise BadUrl(f"its host cannot be read {_HINT}")
    return {"host": hosts[0], "port": ports[0]}


def _hosts(listed: str, ports: str, default_port: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if not listed:
        raise BadUrl(f"names no host {_HINT}")
    hosts, own_ports = [], []
    for each in listed.split(","):
        found = _HOST.fullmatch(each)
        name = unquote((found["v6"] or found["name"] or found["path"]) if found else "")
        if found is None or not (name.startswith("/") or found["v6"] or _NAME.fullmatch(name)):
            raise BadUrl(f"its host or port cannot be read {_HINT}")
        hosts.append(name)
        own_ports.append(found["port"])
    defaults = [each for each in ports.split(",") if each] or [str(default_port)]
    if len(defaults) == 1:
        defaults *= len(hosts)
    if len(defaults) != len(hosts):
        raise BadUrl("needs one port for all hosts, or one for each")
    return tuple(hosts), tuple(
        _whole(default if own is None else own, 65_535, "port")
        for own, default in zip(own_ports, defaults, strict=True)
    )


def _socket_path(parts: SplitResult) -> str:
    if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
        raise BadUrl(f"is not unix:///PATH {_HINT}")
    return unquote(parts.path)


def _whole(text: str, most: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > most:
        raise BadUrl(f"its {what} is not a number from 0 to {most} {_HINT}")
    return int(text)


def _redis_tls(options: dict[str, str]) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(options)
    if arguments.get("ssl_cert_reqs", "none") not in {"none", "optional", "required"}:
        raise BadUrl("ssl_cert_reqs is none of none, optional, required")
    if "ssl_check_hostname" in arguments:
        if arguments["ssl_check_hostname"] not in {"true", "false"}:
            raise BadUrl("ssl_check_hostname is neither true nor false")
        arguments["ssl_check_hostname"] = arguments["ssl_check_hostname"] == "true"
    return arguments


def _login_name() -> str:
    # Not getpass.getuser(), which reads LOGNAME and USER first.
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise BadUrl("names no user") from None


_HINT: Final = (
    "(in a user or password, write / as %2F, ? as %3F, # as %23, @ as %40, : as %3A and % as %25)"
)
_DB_PATH: Final = re.compile(r"/?|/[0-9]+/?")
_HOST: Final = re.compile(
    r"(?P<path>/.*)"
    r"|(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%25\w+)?)\]|(?P<name>[\w.%-]+))(?::(?P<port>.*))?"
)
_NAME: Final = re.compile(r"[\w.-]+")
_REDIS_TLS: Final = frozenset(
    {
        "db",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
    }
)
_POSTGRES_TLS: Final = frozenset({"sslcert", "sslkey", "sslpassword", "sslrootcert"})
_POSTGRES_OPTIONS: Final = _POSTGRES_TLS | {
    "dbname",
    "host",
    "password",
    "port",
    "sslmode",
    "target_session_attrs",
    "user",
}
