"""The data directory: its lock, the versions that wrote its data, and its sockets.

A process locks it with ``flock`` while it uses it; the kernel releases the lock when that process
ends, for whatever reason. A pid file alone was rejected, because the kernel reuses pids.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sale.files import MissingFile, UnreadableFile, read_json
from sale.host.embedded.binaries import EmbeddedError

LOCK_WAIT_S = 1.0
SOCKET_PATH_MAX_BYTES = 107
SOCKET_NAME_MAX_BYTES = 24
LOCK_FILE = "sale.lock"
VERSIONS_FILE = "versions.json"
ENDPOINTS_FILE = "run/endpoints.json"
_OURS = {LOCK_FILE, VERSIONS_FILE, "signing.key", "run", "logs", "redis", "postgresql"}
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")  # needs no quoting in URLs and servers' settings


class Endpoints(msgspec.Struct, frozen=True):
    """URLs of the embedded servers; None for a server that is not embedded."""

    redis_url: str | None
    database_url: str | None


class DataDirectory:
    """A data directory that this process has locked. ``path`` and ``sockets`` are absolute."""

    def __init__(self, path: Path, sockets: Path) -> None:
        self.path = path
        self.sockets = sockets

    def made_by(self) -> dict[str, str]:
        """Versions that wrote the data: ``{"redis": "Valkey 9.1", "postgresql": "18", …}``."""
        file = self.path / VERSIONS_FILE
        try:
            made_by: dict[str, str] = read_json(file, dict[str, str])
        except MissingFile:
            pass
        except UnreadableFile as error:
            raise EmbeddedError(str(error)) from None
        else:
            return made_by
        for name in ("redis", "postgresql"):
            data = self.path / name
            if data.is_dir() and any(data.iterdir()):
                raise EmbeddedError(
                    f"{data} holds data, but {file}, which names the version that wrote it, is"
                    " missing: restore it, or use another data directory"
                )
        return {}

    def stamp(self, name: str, version: str) -> None:
        """Record that ``version`` of ``name`` writes this data; call it before the first write."""
        versions = self.made_by()
        if versions.get(name) != version:
            _replace(self.path / VERSIONS_FILE, versions | {name: version})

    def announce(self, endpoints: Endpoints) -> None:
        """Publish the servers' URLs for other commands on this machine (see ``find``)."""
        _replace(self.path / ENDPOINTS_FILE, endpoints)

    def withdraw(self) -> None:
        """Remove the published URLs."""
        (self.path / ENDPOINTS_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[DataDirectory]:
    """Lock the data directory ``path`` while the block runs; create it if it is missing.

    Raises:
        EmbeddedError: another process uses it, it is not writable, or it holds other files.

    """
    path = path.absolute()
    try:
        _make(path)
        descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EmbeddedError(f"data directory {path}: not writable: {error.strerror}") from None
    sockets = None
    try:
        _lock(descriptor, path)
        try:
            for name in ("run", "logs"):
                (path / name).mkdir(mode=0o700, exist_ok=True)
            sockets = _socket_directory(path)
            directory = DataDirectory(path, sockets)
            directory.withdraw()
        except OSError as error:
            raise EmbeddedError(f"data directory {path}: {error}") from None
        try:
            yield directory
        finally:
            directory.withdraw()
    finally:
        if sockets is not None and sockets != path / "run":
            _remove_sockets(sockets)
        os.close(descriptor)


def find(data_dir: Path) -> Endpoints | None:
    """Give the URLs of the running embedded servers of ``data_dir``, or None if none run.

    Raises EmbeddedError if the directory cannot be read.
    """
    try:
        descriptor = os.open(data_dir / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise EmbeddedError(f"data directory {data_dir}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _announced(data_dir)
    else:
        return None
    finally:
        os.close(descriptor)


def _announced(data_dir: Path) -> Endpoints | None:
    file = data_dir / ENDPOINTS_FILE
    try:
        endpoints: Endpoints = read_json(file, Endpoints)
    except MissingFile:
        return None
    except UnreadableFile as error:
        raise EmbeddedError(str(error)) from None
    return endpoints


def _make(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = set(os.listdir(path))  # noqa: PTH208 - names are wanted
    if names and not names & _OURS:
        raise EmbeddedError(
            f"data directory {path}: is not empty and no data directory of sale: use another one"
        )
    if stat.S_IMODE(path.stat().st_mode) != 0o700:
        path.chmod(0o700)


def _lock(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
                raise EmbeddedError(f"data directory {path}: in use by pid {holder}") from None
            time.sleep(0.02)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())


def _socket_directory(path: Path) -> Path:
    """Give ``run`` in the data directory; if its path cannot hold a socket, a private short one."""
    run = path / "run"
    longest = len(os.fsencode(run)) + 1 + SOCKET_NAME_MAX_BYTES
    if longest <= SOCKET_PATH_MAX_BYTES and _PLAIN_PATH.fullmatch(str(run)):
        return run
    name = f"sale-{os.getuid()}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - private and checked
        short = parent / name
        if len(os.fsencode(short)) + 1 + SOCKET_NAME_MAX_BYTES <= SOCKET_PATH_MAX_BYTES:
            break
    with contextlib.suppress(FileExistsError):
        short.mkdir(mode=0o700)
    found = short.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EmbeddedError(f"{short}: is no directory, or belongs to another user")
    short.chmod(0o700)
    (run / "sockets").write_text(f"{short}\n", "utf-8")
    return short


def _remove_sockets(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for inner in (directory / "pg", directory):
            for file in inner.iterdir() if inner.is_dir() else ():
                if not file.is_dir():
                    file.unlink()
            if inner.is_dir():
                inner.rmdir()


def _replace(file: Path, content: object) -> None:
    """Write a JSON file atomically: a reader, also after a crash, sees the old or the new file."""
    new = file.with_name(f".{file.name}.new")
    with new.open("wb") as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
