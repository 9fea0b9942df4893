"""Requests that are odd or wrong in their first line or a header."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fast_path_rig import TIME, WISH, Member

from sale.http.head_rules import ONCE


class Case(NamedTuple):
    """Bytes to send, in one piece or several; how many answers they are worth.

    ``heads`` says which answers come without their body.
    """

    name: str
    pieces: tuple[bytes, ...]
    count: int = 1
    heads: tuple[bool, ...] = (False,)

    @property
    def whole(self) -> bytes:
        return b"".join(self.pieces)


def one(name: str, *pieces: bytes) -> Case:
    """Each piece is a request."""
    return Case(name, pieces, len(pieces), (False,) * len(pieces))


def heads(m: Member) -> Iterator[Case]:
    """Heads that are odd, or wrong."""
    fine = {
        "lower case": lambda: _cased(m.buy("sold-out"), bytes.lower),
        "upper case": lambda: _cased(m.buy("sold-out"), bytes.upper),
        "no blank": lambda: m.buy("sold-out", WISH, b"X:y", b"Accept:*/*"),
        "empty value": lambda: m.buy("sold-out", WISH, b"X:", b"Y: "),
        "blanks around": lambda: m.buy("sold-out", WISH, b"X: \t y \t "),
        "not ASCII": lambda: m.buy("sold-out", WISH, "X: 中".encode(), b"Y: \xff"),
        "120 more": lambda: m.buy("sold-out", WISH, *(b"X-%d: y" % n for n in range(120))),
        "4,000 bytes": lambda: m.buy("sold-out", WISH, b"X: " + b"y" * 4_000),
        "8,180 bytes": lambda: m.buy("sold-out", WISH, b"X: " + b"y" * 8_180),
        "cookies": lambda: m.buy("sold-out", WISH, b"Cookie: a=b", b"Cookie: c=d"),
        "keep-alive": lambda: m.buy("sold-out", WISH, b"Connection: keep-alive"),
        "Keep-Alive": lambda: m.buy("sold-out", WISH, b"Connection: Keep-Alive"),
        "keep-alive header": lambda: m.buy("sold-out", WISH, b"Keep-Alive: timeout=5"),
        "no connection": lambda: m.buy("sold-out", WISH, b"Connection: "),
        "forwarded": lambda: m.buy("sold-out", WISH, b"X-Forwarded-For: 1.2.3.4, 5.6.7.8"),
        "forwarded twice": lambda: m.buy(
            "sold-out", WISH, b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-For: 5.6.7.8"
        ),
        "forwarded nonsense": lambda: m.buy("sold-out", WISH, b"X-Forwarded-For: \xff, ,"),
        "te": lambda: m.buy("sold-out", WISH, b"TE: trailers"),
        "empty host": lambda: m.buy("sold-out", Host=b""),
        "range": lambda: m.buy("sold-out", WISH, b"Range: bytes=0-1", b"If-None-Match: *"),
        "origin": lambda: m.buy("sold-out", WISH, b"Origin: null", b"Sec-Fetch-Mode: cors"),
        "smuggled name": lambda: m.buy("sold-out", WISH, b"Content_Length: 3"),
        "another method": lambda: m.buy("sold-out", WISH, b"X-HTTP-Method-Override: DELETE"),
        "id": lambda: m.buy("sold-out", WISH, b"X-Request-Id: 5f0c-A.b:c=+/@_"),
        "id, empty": lambda: m.buy("sold-out", WISH, b"X-Request-Id: "),
        "id, long": lambda: m.buy("sold-out", WISH, b"X-Request-Id: " + b"a" * 128),
        "id, too long": lambda: m.buy("sold-out", WISH, b"X-Request-Id: " + b"a" * 129),
        "id with a blank": lambda: m.buy("sold-out", WISH, b"X-Request-Id: a b"),
        "id with markup": lambda: m.buy("sold-out", WISH, b'X-Request-Id: <b>"a"'),
        "id, not ASCII": lambda: m.buy("sold-out", WISH, b"X-Request-Id: \xff"),
        "id, twice": lambda: m.buy("sold-out", WISH, b"X-Request-Id: a", b"X-Request-Id: b"),
        "lists in two lines": lambda: m.buy(
            "sold-out", WISH, *(b"Accept: */*", b"If-None-Match: *") * 2
        ),
        "upgrade nobody knows": lambda: m.buy("sold-out", WISH, b"Upgrade: h2c"),
    }
    for name, make in fine.items():
        yield one(f"head: {name}", make())
    wrong = {
        "folded": m.buy("sold-out", WISH, b"X: y\r\n z"),
        "folded key": m.buy("sold-out", Idempotency_Key=b"a\r\n b"),
        "bare LF": m.buy("sold-out").replace(b"\r\n", b"\n"),
        "one bare LF": m.buy("sold-out", WISH, b"X: y\nZ: a"),
        "bare CR": m.buy("sold-out", WISH, b"X: y\rZ: a"),
        "NUL": m.buy("sold-out", WISH, b"X: y\x00z"),
        "a bell": m.buy("sold-out", WISH, b"X: y\x07z"),
        "DEL": m.buy("sold-out", WISH, b"X: y\x7fz"),
        "blank before the colon": m.buy("sold-out", WISH, b"X : y"),
        "length with a blank": m.buy("sold-out", WISH, b"Content-Length : 0"),
        "blank in a name": m.buy("sold-out", WISH, b"X y: z"),
        "no colon": m.buy("sold-out", WISH, b"nothing"),
        "no name": m.buy("sold-out", WISH, b": y"),
        "not ASCII name": m.buy("sold-out", WISH, "中: y".encode()),
        "200 more": m.buy("sold-out", WISH, *(b"X-%d: y" % n for n in range(200))),
        "9,000 bytes": m.buy("sold-out", WISH, b"X: " + b"y" * 9_000),
        "20,000 bytes": m.buy("sold-out", WISH, b"X: " + b"y" * 20_000),
        "100,000 bytes": m.buy("sold-out", WISH, b"X: " + b"y" * 100_000),
        "90,000 bytes in lines": m.buy(
            "sold-out", WISH, *(b"X-%d: " % n + b"y" * 1_000 for n in range(90))
        ),
        "a long name": m.buy("sold-out", WISH, b"X" * 9_000 + b": y"),
        "two hosts": m.buy("sold-out", WISH, b"Host: other"),
        "no host": m.buy("sold-out", drop=["Host"]),
        "close": m.buy("sold-out", WISH, b"Connection: close"),
        "keep-alive, close": m.buy("sold-out", WISH, b"Connection: keep-alive, close"),
        "connection twice": m.buy(
            "sold-out", WISH, b"Connection: keep-alive", b"connection: close"
        ),
        "upgrade": m.buy(
            "sold-out", WISH, b"Connection: upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AA"
        ),
        "websocket": m.buy("sold-out", WISH, b"Connection: upgrade", b"Upgrade: websocket"),
        "old websocket": m.buy("sold-out", WISH, b"Sec-WebSocket-Key1: a"),
    }
    for name, raw in wrong.items():
        yield one(f"head: {name}", raw)
    for name in sorted(ONCE):
        line = name.encode() + b": 0"
        yield one(f"once: {name}", m.buy("sold-out", WISH, line, line.lower()))
        yield one(f"once: {name}, no purchase", TIME[:-2] + line + b"\r\n" + line + b"\r\n\r\n")
    for value in (
        b"100-Continue",
        b"xyz",
        b"\xff",
        b"<b>",
        b"100-continue, xyz",
        b"a=" + b"b" * 99,
    ):
        yield one(f"expect: {value[:20]!r}", m.buy("sold-out", WISH, b"Expect: " + value))
        yield one(f"expect: {value[:20]!r}, get", TIME[:-2] + b"Expect: " + value + b"\r\n\r\n")
    yield one("head: expect", m.buy("sold-out", WISH, b"Expect: 100-continue"))
    yield one("head: expect else", m.buy("sold-out", WISH, b"Expect: 200-ok"))


def _cased(raw: bytes, case: Callable[[bytes], bytes]) -> bytes:
    head, _, body = raw.partition(b"\r\n\r\n")
    start, *lines = head.split(b"\r\n")
    named = [line.partition(b": ") for line in lines]
    return b"\r\n".join(
        [start, *(case(name) + b": " + value for name, _, value in named), b"", body]
    )


def starts(m: Member) -> Iterator[Case]:
    """First lines."""
    orders = m.buy("sold-out").split()[1]
    for name, target in {
        "query": orders + b"?a=b",
        "empty query": orders + b"?",
        "fragment": orders + b"#a",
        "slash behind": orders + b"/",
        "two slashes": orders.replace(b"/api", b"//api"),
        "percent": orders.replace(b"/orders", b"/%6frders"),
        "percent in the name": orders.replace(b"sold", b"sol%64"),
        "percent slash": orders.replace(b"/orders", b"%2forders"),
        "dots": orders.replace(b"/orders", b"/./orders"),
        "dots up": orders.replace(b"/orders", b"/x/../orders"),
        "upper case": orders.upper(),
        "absolute": b"http://sale" + orders,
        "absolute elsewhere": b"https://other:1" + orders,
        "semicolon": orders + b";a=b",
        "a long name": b"/api/v1/campaigns/" + b"a" * 49 + b"/orders",
        "no name": b"/api/v1/campaigns//orders",
        "4,000 bytes": b"/" + b"a" * 4_000,
    }.items():
        yield one(f"target: {name}", m.buy(target=target))
    for name, target in {
        "asterisk": b"*",
        "authority": b"sale:80",
        "a blank": b"/a b",
        "nothing": b"",
        "not ASCII": "/中".encode(),
        "a tab": b"/a\tb",
        "NUL": b"/a\x00b",
        "10,000 bytes": b"/" + b"a" * 10_000,
        "no authority": b"http:///a",
        "absolute by another scheme": b"ftp://sale/a",
        "absolute of a port that is none": b"http://sale:99999/a",
        "absolute with no path": b"http://sale",
        "absolute with a query alone": b"http://sale?a=b",
    }.items():
        yield one(f"target: {name}", m.buy(target=target))
    for method in (b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"PURGE"):
        yield one(f"method: {method!r}", m.buy("sold-out", method=method))
        yield one(f"method: {method!r} alone", m.buy("sold-out", b"", method=method))
    for method in (
        b"post",
        b"P0ST",
        b"POSTT",
        b"",
        b"CONNECT",
        b"PRI",
        b"POST\x00",
        b"\r\nPOST\r\n",
    ):
        yield one(f"method: {method!r}", m.buy("sold-out", method=method))
    for target in (b"*", b"sale:80", b"/", b"http://sale"):
        for method in (b"OPTIONS", b"CONNECT", b"TRACE"):
            yield one(
                f"method: {method!r} {target!r}", m.buy(target=target, method=method, body=b"")
            )
    yield Case("method: HEAD", (m.buy("sold-out", method=b"HEAD"),), heads=(True,))
    yield Case("method: HEAD time", (TIME.replace(b"GET", b"HEAD"),), heads=(True,))
    yield one("empty lines before", b"\r\n\r\n" + m.buy("sold-out"))
    yield one("bare LF before", b"\n" + m.buy("sold-out"))
    for version in (
        b"HTTP/1.0",
        b"HTTP/1.2",
        b"HTTP/0.9",
        b"HTTP/2.0",
        b"HTTP/1.1 ",
        b"http/1.1",
        b"HTTP/11",
        b"RTSP/1.0",
        b"RTSP/1.1",
        b"ICE/1.0",
        b"",
    ):
        yield one(f"version: {version!r}", m.buy("sold-out", version=version))
    old = m.buy("sold-out", WISH, b"Connection: keep-alive", version=b"HTTP/1.0")
    yield one("version: 1.0 kept alive", old)
    yield one("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(27))
    yield one("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
