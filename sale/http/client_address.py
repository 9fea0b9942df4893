"""The client's address of a request: the peer's own, or the one that a trusted proxy reports.

Any client can send ``X-Forwarded-For``. So the header is read only if the peer is a trusted proxy,
from the right, and only past hops that are trusted too: the first untrusted hop is the client.
Empty list elements are ignored (RFC 9110, 5.6.1). An element that is no address ends the walk; then
the hop that passed it on is the client. The header ``Forwarded`` is not read: a proxy writes one of
the two headers, and a client could forge the other.

An IPv6 client owns 2^64 addresses, so its key is the /64.
"""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from sale.config import UNIX_PROXY, proxy_networks

HOPS_MAX: Final = 16
_ADDRESSES: Final = 16_384
_IPV6_BITS: Final = 64


class ClientAddresses:
    """Finds clients' addresses. ``trusted_proxies`` is the setting; None or '' trusts no proxy."""

    def __init__(self, trusted_proxies: str | None) -> None:
        text = trusted_proxies or ""
        self._trusted = proxy_networks(text)
        self._trusts_unix = UNIX_PROXY in {name.strip() for name in text.split(",")}
        self.trusts_any = bool(self._trusted) or self._trusts_unix
        self._is_trusted = lru_cache(_ADDRESSES)(self._look_up)

    def of(self, peer: str, forwarded_for: str | None = None) -> str:
        """Give the client's address. ``peer`` is the connection's, '' on a unix socket.

        ``forwarded_for`` is the header X-Forwarded-For; several headers are joined by commas.
        """
        if not self.trusts_any or not forwarded_for or not self._is_trusted(peer):
            return grouped(peer)
        client = peer
        for hop in reversed(forwarded_for.rsplit(",", HOPS_MAX)[-HOPS_MAX:]):
            address = _without_port(hop.strip(" \t"))
            if not address:
                continue
            if _parsed(address) is None:
                break
            client = address
            if not self._is_trusted(address):
                break
        return grouped(client)

    def _look_up(self, text: str) -> bool:
        if not text:
            return self._trusts_unix
        address = _parsed(text)
        return address is not None and any(address in network for network in self._trusted)


@lru_cache(_ADDRESSES)
def grouped(text: str) -> str:
    """Give the key of an address: an IPv4 address itself, the /64 of IPv6, ``unix`` for ''."""
    if not text:
        return UNIX_PROXY
    address = _parsed(text)
    if isinstance(address, IPv6Address):
        return str(ip_network((int(address) >> _IPV6_BITS << _IPV6_BITS, _IPV6_BITS)))
    return text if address is None else str(address)


def first_of(peername: object) -> str:
    """Give the peer of a transport's ``peername``: the host, or '' on a unix socket."""
    if isinstance(peername, Sequence) and not isinstance(peername, str | bytes) and peername:
        return str(peername[0])
    return ""


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _without_port(hop: str) -> str:
    """Remove the port that some proxies append (``1.2.3.4:80``, ``[::1]:80``)."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    host, colon, port = hop.partition(":")
    return host if colon and port.isascii() and port.isdigit() else hop
