"""Let only the API processes of one deployment share an address.

They share it through SO_REUSEPORT, which a rolling restart needs. The kernel lets any process of
the same user join them, so another deployment could take half of the requests. Therefore each
process claims the address before it listens: it binds an abstract unix socket whose name holds the
address and the deployment. Such a socket belongs to the same network namespace as the port, ends
with its process, and is listed in /proc/net/unix. A process first binds its claim and then looks
for others, so that of two processes that start together at least one sees the other.

Rejected: a lock file, because containers and services with a private /tmp do not see it; and a
request to the listener for its deployment, because a stopped or stopping one does not answer.
"""

import hashlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final, NamedTuple

from sale.config import StartError, split_address

_PREFIX: Final = "sale-api"
_LISTENING: Final = "0A"
_TABLES: Final = {
    socket.AF_INET: Path("/proc/net/tcp"),
    socket.AF_INET6: Path("/proc/net/tcp6"),
}
_CLAIMS: Final = Path("/proc/net/unix")

_Address = IPv4Address | IPv6Address


def first_address(listen: str) -> tuple[socket.AddressFamily, Any]:
    """Give the address to bind for ``host:port``: the first one that the host name resolves to.

    All processes use this function, because they must bind the same address. Raises OSError.
    """
    host, port = split_address(listen)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return found[0][0], found[0][4]


class _Claim(NamedTuple):
    """A process's claim to an address."""

    host: _Address
    owner: str


def claim(listener: socket.socket, deployment: str) -> socket.socket:
    """Claim the address of ``listener``, which is bound and does not listen yet.

    The claim holds until the returned socket is closed. Raises StartError if another deployment or
    another program has the address.
    """
    owner = _digest(deployment)
    own = _bind_claim(listener, owner)
    host, port = _address_of(listener)
    others = [each for each in _claims(port, but=own) if _overlap(each.host, host)]
    friends = [each for each in others if each.owner in {owner, _supervisor(os.getppid())}]
    api = [each for each in others if not each.owner.startswith("up-")]
    if any(each.owner != owner for each in api):
        own.close()
        raise StartError(f"address {_words(host, port)}: another deployment of sale has it")
    if not friends and (others or _listens(listener.family, host, port)):
        own.close()
        raise StartError(f"address {_words(host, port)}: Address already in use")
    return own


def reserve(holder: socket.socket) -> socket.socket:
    """Claim an address as the supervisor that reserves it for its children."""
    return _bind_claim(holder, _supervisor(os.getpid()))


def _supervisor(pid: int) -> str:
    return f"up-{pid}"


def _digest(deployment: str) -> str:
    return hashlib.sha256(deployment.encode()).hexdigest()[:16]


def _address_of(listener: socket.socket) -> tuple[_Address, int]:
    host, port = listener.getsockname()[:2]
    return ip_address(host.partition("%")[0]), port


def _words(host: _Address, port: int) -> str:
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"


def _bind_claim(listener: socket.socket, owner: str) -> socket.socket:
    host, port = _address_of(listener)
    claimed = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    claimed.bind(f"\0{_PREFIX}/{port}/{host}/{owner}/{secrets.token_hex(4)}")
    return claimed


def _claims(port: int, *, but: socket.socket) -> Iterator[_Claim]:
    own = but.getsockname()
    own = (own.decode() if isinstance(own, bytes) else own).replace("\0", "@")
    for line in _lines(_CLAIMS):
        path = line.rstrip().rpartition(" ")[2]
        if path.startswith(f"@{_PREFIX}/{port}/") and path != own:
            parts = path.split("/")
            try:
                yield _Claim(ip_address(parts[2]), parts[3])
            except (ValueError, IndexError):
                continue


def _listens(family: int, host: _Address, port: int) -> bool:
    """Whether a process listens on an address that overlaps this one."""
    lines = _lines(_TABLES[socket.AddressFamily(family)])
    next(lines, None)
    for line in lines:
        local, state = line.split()[1], line.split()[3]
        if state != _LISTENING:
            return False  # the kernel lists listening sockets first
        theirs, _, their_port = local.partition(":")
        if int(their_port, 16) == port and _overlap(_from_hex(theirs), host):
            return True
    return False


def _from_hex(text: str) -> _Address:
    words = (bytes.fromhex(text[at : at + 8]) for at in range(0, len(text), 8))
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return ip_address(packed)


def _overlap(one: _Address, other: _Address) -> bool:
    return one == other or one.is_unspecified or other.is_unspecified


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="ascii", errors="replace") as stream:
            yield from stream
    except OSError:  # without /proc, no other process can be found
        return
