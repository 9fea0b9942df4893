"""Requests for both paths: purchases of every kind, and other bytes that a port receives."""

import gzip
from collections.abc import Iterator

from fast_path_heads import Case, heads, one, starts
from fast_path_rig import LAST, TIME, WISH, Member

BODY_MAX = 16 * 1024


def states(m: Member) -> Iterator[Case]:
    """Purchases by the state of their campaign, card or order."""
    yield one("sold", m.buy())
    yield one("two sold", m.world.member().buy(body=b'{"quantity":2}'))
    for campaign in ("sold-out", "not-open", "paused", "closed", "draft", "theirs", "unknown"):
        yield one(campaign, m.buy(campaign))
    yield one("no such place", m.buy(target=b"/api/v1/nothing"))
    yield one("a hall", m.buy("halls", b'{"quantity":1,"showing":"a"}'))
    yield one("a full hall", m.buy("halls", b'{"quantity":1,"showing":"b"}'))
    yield one("no such hall", m.buy("halls", b'{"quantity":1,"showing":"z"}'))
    yield one("which hall", m.buy("halls"))
    for name, second in {"replayed": WISH, "another wish": b'{"quantity":2}'}.items():
        other = m.world.member()
        yield one(
            name, *(other.buy("open", body, Idempotency_Key=b"one") for body in (WISH, second))
        )
    other = m.world.member()
    yield one("over the limit", *(other.buy(body=b'{"quantity":%d}' % n) for n in (2, 2, 1, 1)))


def tokens(m: Member, revoked: str, expired: str, operator: str) -> Iterator[Case]:
    """Purchases with different tokens."""
    good = b"Bearer " + m.token.encode()
    for name, value in {
        "revoked": b"Bearer " + revoked.encode(),
        "expired": b"Bearer " + expired.encode(),
        "an operator's": b"Bearer " + operator.encode(),
        "garbage": b"Bearer garbage",
        "two dots": b"Bearer a.b.c",
        "tampered": good[:-2] + b"xx",
        "long": b"Bearer " + b"a" * 3_000,
        "no scheme": m.token.encode(),
        "another scheme": b"Basic " + m.token.encode(),
        "empty": b"",
        "the scheme alone": b"Bearer",
        "two blanks": b"Bearer  " + m.token.encode(),
        "a tab": b"Bearer\t" + m.token.encode(),
        "not ASCII": b"Bearer \xe4\xb8\xad",
    }.items():
        yield one(f"token: {name}", m.buy(Authorization=value))
    yield one("token: none", m.buy(drop=["Authorization"]))
    yield one("token: lower case", m.buy("sold-out", Authorization=b"bearer " + m.token.encode()))
    yield one("token: blanks behind", m.buy("sold-out", Authorization=good + b" \t "))
    yield one("token: none, bad body", m.buy(body=b"{", drop=["Authorization"]))
    yield one("token: none, unknown campaign", m.buy("unknown", drop=["Authorization"]))
    yield one("token: twice", m.buy("sold-out", WISH, b"authorization: " + good))


def keys(m: Member) -> Iterator[Case]:
    """The idempotency key."""
    for name, value in {
        "empty": b"",
        "blank": b" ",
        "over-long": b"a" * 65,
        "of another alphabet": b"a.b",
        "with a blank": b"a b",
        "not ASCII": b"\xe4\xb8\xad",
        "with a quote": b'"abc"',
        "with a comma": b"a,b",
    }.items():
        yield one(f"key: {name}", m.buy(Idempotency_Key=value))
    yield one("key: none", m.buy(drop=["Idempotency-Key"]))
    yield one("key: longest", m.buy("sold-out", Idempotency_Key=b"a" * 64))
    yield one("key: blanks around", m.buy("sold-out", Idempotency_Key=b" \t a \t "))
    yield one("key: twice", m.buy("sold-out", WISH, b"Idempotency-Key: other"))
    yield one("key: twice in two cases", m.buy("sold-out", WISH, b"IDEMPOTENCY-KEY: other"))


def media_types(m: Member) -> Iterator[Case]:
    """Content types and encodings of the body."""
    for value in (
        *(b"", b"text/plain", b"application/JSON", b"application/json; charset=utf-8"),
        *(b"application/json;charset=latin-1", b"application/json; charset=utf-8; a=b"),
        *(b"application/problem+json", b'application/json; charset="utf-8"', b"application/json;"),
        *(b"application/json; charset=utf8", b"application/json; charset=utf-8 ; ;"),
        *(b" application/json ", b"multipart/form-data", b"application/json, text/plain", b"\xff"),
    ):
        yield one(f"type: {value!r}", m.buy("sold-out", Content_Type=value))
    yield one("type: none", m.buy("sold-out", drop=["Content-Type"]))
    yield one("type: twice", m.buy("sold-out", WISH, b"content-type: text/plain"))
    yield one("type: packed", m.buy("sold-out", WISH, b"Content-Encoding: gzip"))
    yield one("type: as it is", m.buy("sold-out", WISH, b"Content-Encoding: identity"))
    for value in (b"deflate", b"br", b"zstd", b"identity, gzip", b"x", b"\xff", b""):
        yield one(
            f"type: packed by {value!r}", m.buy("sold-out", WISH, b"Content-Encoding: " + value)
        )
    yield one("type: well packed", m.buy("open", gzip.compress(WISH), b"Content-Encoding: gzip"))


def bodies(m: Member) -> Iterator[Case]:
    """Bodies that are JSON, and bodies that are not."""
    for body in (
        *(b"{}", b"", b"[]", b"null", b"1", b'"a"', b"{", b'{"quantity":1', b'{"quantity":1}}'),
        *(b'{"quantity":true}', b'{"quantity":"2"}', b'{"quantity":1e0}', b'{"quantity":1.0}'),
        *(b'{"quantity":1.5}', b'{"quantity":-0}', b'{"quantity":0}', b'{"quantity":-1}'),
        *(b'{"quantity":4}', b'{"quantity":01}', b'{"quantity":NaN}', b'{"quantity":Infinity}'),
        *(b'{"quantity":null}', b'{"quantity":[1]}', b'{"quantity":{}}', b"{'quantity':1}"),
        *(b'{"quantity":' + b"9" * 30 + b"}", b'{"quantity":' + b"9" * 5_000 + b"}"),
        *(b'{"quantity":1e999}', b'{"quantity":9223372036854775808}', b"[" * 5_000),
        *(b'{"quantity":1,"quantity":2}', b'{"quantity":1,"other":1}', b'{"QUANTITY":1}'),
        *(
            b'{"quantity":1,"showing":1}',
            b'{"quantity":1,"showing":null}',
            b'{"showing":"general"}',
        ),
        *(b'{"quantity":1,"showing":""}', b'{"quantity":1,"showing":"\\u0000"}'),
        *(b'{"quantity":1,"showing":"\\ud800"}', b'{"quantity":1,"showing":"\xff"}'),
        *(b'{"quantity":1,"showing":"' + "通用券".encode() + b'"}', b"\xef\xbb\xbf" + WISH),
        *(WISH.decode().encode("utf-16"), b"\xff\xfe", b"\x00", WISH + b"\x00", b"\r\n\r\n"),
        *(WISH + b"\n", b" \r\n\t" + WISH, b"/**/" + WISH, WISH[:-1] + b",}", b"a=b&c=d"),
        TIME,
    ):
        yield one(f"body: {body[:30]!r} {body[-9:]!r} ({len(body)})", m.buy("sold-out", body))
    for length in (BODY_MAX - 1, BODY_MAX):
        yield one(f"body: {length} bytes", m.buy("sold-out", WISH.ljust(length)))
        yield one(f"body: {length} bytes of nothing", m.buy("sold-out", b"a" * length))
    yield one("body: 16 KiB and 1", m.buy("sold-out", WISH.ljust(BODY_MAX + 1)))
    yield one("body: 100 KB", m.buy("sold-out", b"a" * 100_000))


def lengths(m: Member) -> Iterator[Case]:
    """Lengths of a body that are right, doubtful or wrong."""
    n = b"%d" % len(WISH)
    for name, value in {
        "nought before": b"0" + n,
        "many noughts before": b"0" * 100 + n,
        "blanks around": b" \t" + n + b" \t ",
    }.items():
        yield one(f"length: {name}", m.buy("sold-out", Content_Length=value))
    for name, value in {
        "negative": b"-1",
        "signed": b"+" + n,
        "empty": b"",
        "a word": b"abc",
        "hexadecimal": b"0x0e",
        "with a line": b"1_4",
        "twice in one": n + b"," + n,
        "twice with a blank": n + b" " + n,
        "beyond 64 bits": b"99999999999999999999",
        "a fraction": n + b".0",
        "Arabic digits": "١٤".encode(),
    }.items():
        yield one(f"length: {name}", m.buy("sold-out", Content_Length=value))
    for name, line in {
        "twice alike": b"Content-Length: " + n,
        "twice unlike": b"Content-Length: 0",
        "twice in two cases": b"content-length: " + n,
        "and chunked": b"Transfer-Encoding: chunked",
        "and identity": b"Transfer-Encoding: identity",
    }.items():
        yield one(f"length: {name}", m.buy("sold-out", WISH, line))
    yield one(
        "length: chunked and a length",
        m.buy(
            "sold-out",
            WISH,
            b"Content-Length: 14",
            drop=["Content-Length"],
            Transfer_Encoding=b"chunked",
        ),
    )
    yield one("length: none", m.buy("sold-out", b"", drop=["Content-Length"]))
    yield one("length: none, no host", m.buy("sold-out", b"", drop=["Content-Length", "Host"]))


def chunked(m: Member) -> Iterator[Case]:
    """Bodies in chunks: aiohttp's, with all that follows."""

    def packed(body: bytes, value: bytes = b"chunked", *extra: bytes) -> bytes:
        return m.buy("sold-out", body, *extra, drop=["Content-Length"], Transfer_Encoding=value)

    yield one("chunked", packed(b"e\r\n" + WISH + b"\r\n0\r\n\r\n"))
    yield one(
        "chunked in three",
        packed(b"2\r\n" + WISH[:2] + b"\r\nc;a=b\r\n" + WISH[2:] + b"\r\n0\r\n\r\n"),
    )
    yield one("chunked with a trailer", packed(b"e\r\n" + WISH + b"\r\n0\r\nA: b\r\n\r\n"))
    yield one("chunked, nothing", packed(b"0\r\n\r\n"))
    for name, body in {
        "bad size": b"zz\r\n" + WISH + b"\r\n0\r\n\r\n",
        "negative size": b"-e\r\n" + WISH + b"\r\n0\r\n\r\n",
        "huge size": b"f" * 17 + b"\r\n" + WISH + b"\r\n0\r\n\r\n",
        "bare LF": b"e\n" + WISH + b"\n0\n\n",
    }.items():
        yield one(f"chunked: {name}", packed(body))
    for value in (
        b"chunked, chunked",
        b"gzip, chunked",
        b"chunked, gzip",
        b"xchunked",
        b"Chunked",
        b"chunked ",
    ):
        yield one(
            f"chunked: {value!r}",
            packed(b"e\r\n" + WISH + b"\r\n0\r\n\r\n", value),
        )


def others(m: Member) -> Iterator[Case]:
    """Requests that are no purchases."""
    yield one("time", TIME)
    for path in (b"/healthz", b"/api/v1/orders", b"/openapi.json", b"/", b"/x"):
        yield one(f"get {path!r}", TIME.replace(b"/api/v1/time", path))
    yield one(
        "get with a body",
        b"GET /api/v1/time HTTP/1.1\r\nHost: sale\r\nContent-Length: 3\r\n\r\nabc",
    )
    yield one("login", b"POST /api/v1/login HTTP/1.1\r\nHost: sale\r\nContent-Length: 2\r\n\r\n{}")
    yield one(
        "own orders",
        TIME.replace(b"/api/v1/time", b"/api/v1/orders").replace(
            b"Host: sale", b"Host: sale\r\nAuthorization: Bearer " + m.world.member().token.encode()
        ),
    )


def reads(m: Member) -> Iterator[Case]:
    """Reads that many members repeat: a campaign, and its remaining tickets.

    Not the list of all: it has other tests' campaigns, which open and close meanwhile.
    """

    def get(campaign: str, tail: str = "", *lines: bytes, method: bytes = b"GET") -> bytes:
        target = f"/api/v1/campaigns/{m.world.campaigns.get(campaign, campaign)}{tail}".encode()
        return b"\r\n".join([method + b" " + target + b" HTTP/1.1", b"Host: sale", *lines, b"\r\n"])

    for tail in ("", "/availability"):
        for campaign in (
            *("sold-out", "not-open", "paused", "closed", "draft", "theirs", "unknown"),
            *("", ".", "UPPER", "%63losed", "a" * 48, "a" * 49, "x/y"),
        ):
            yield one(f"read: {campaign}{tail}", get(campaign, tail))
        for name, lines in {
            "any tag": (b"If-None-Match: *",),
            "another tag": (b'If-None-Match: "a", W/"b"',),
            "another tag and any": (b'if-none-match: "a",\t*',),
            "no tag": (b"If-None-Match:",),
            "a tag not ASCII": (b"If-None-Match: \xff",),
            "two lists of tags": (b'If-None-Match: "a"', b"If-None-Match: *"),
            "a date": (b"If-Modified-Since: Thu, 01 Jan 2099 00:00:00 GMT",),
            "a range": (b"Range: bytes=0-1",),
            "packed": (b"Accept-Encoding: gzip", b"Accept: text/html"),
            "a token": (b"Authorization: Bearer " + m.token.encode(),),
            "a wrong token": (b"Authorization: Bearer x",),
            "an id": (b"X-Request-Id: 5f0c",),
            "kept alive": (b"Connection: keep-alive",),
            "no length": (b"Content-Length: 0",),
        }.items():
            yield one(f"read{tail}: {name}", get("closed", tail, *lines))
        yield one(f"read{tail}: a body", get("closed", tail, b"Content-Length: 3") + b"abc")
        yield one(f"read{tail}: a query", get("closed", f"{tail}?a=b"))
        yield one(f"read{tail}: a slash", get("closed", f"{tail}/"))
        yield one(f"read{tail}: POST", get("closed", tail, b"Content-Length: 0", method=b"POST"))
        head = get("closed", tail, method=b"HEAD")
        yield Case(f"read{tail}: HEAD", (head,), 1, (True,))
        yield one(f"read{tail}: again and again", *[get("closed", tail)] * 4)
    yield one("read: two showings", get("halls"))
    yield one("read: what is bought", get("sold-out"), m.buy("sold-out"), get("closed"))


def behind(m: Member) -> Iterator[Case]:
    """Requests whose length a proxy might see otherwise: what follows is no part of them."""
    yield one("two", m.buy("sold-out"), TIME)
    for name, lines in {
        "h2c": (b"Connection: upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AA"),
        "a websocket": (b"Connection: upgrade", b"Upgrade: websocket"),
    }.items():
        raw = m.buy("sold-out", WISH, *lines)
        yield Case(f"behind {name}", (raw + TIME + m.buy("paused"),), 3, (False,) * 3)
    yield one("three", m.buy("sold-out"), m.buy("paused"), TIME)
    short = m.buy("sold-out", Content_Length=b"5")
    cut = short.index(b"\r\n\r\n") + 9
    yield one("too short a length", short[:cut], short[cut:] + b"\r\n\r\n")
    hidden = m.buy("sold-out", body=m.buy("paused"))
    yield one("a request for a body", hidden)


def all_cases(m: Member, *, revoked: str, expired: str, operator: str) -> list[Case]:
    """Everything, for one card; names tell cases apart."""
    cases = [
        *states(m),
        *tokens(m, revoked, expired, operator),
        *keys(m),
        *media_types(m),
        *bodies(m),
        *lengths(m),
        *chunked(m),
        *heads(m),
        *starts(m),
        *others(m),
        *reads(m),
        *behind(m),
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    assert all(LAST not in case.whole for case in cases)
    return cases
