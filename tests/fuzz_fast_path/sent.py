"""Generated input: sound, odd and damaged requests, cut anywhere."""

from hypothesis import strategies as st

CAMPAIGN = "films"
ORDERS = f"/api/v1/campaigns/{CAMPAIGN}/orders"
READS = (f"/api/v1/campaigns/{CAMPAIGN}", f"/api/v1/campaigns/{CAMPAIGN}/availability")


_METHODS = st.sampled_from(
    [b"POST"] * 12 + [b"GET"] * 4 + [b"HEAD", b"PUT", b"OPTIONS", b"post", b"CONNECT", b"PRI", b""]
)
_TARGETS = st.sampled_from(
    [ORDERS.encode()] * 12
    + [read.encode() for read in READS] * 3
    + [
        *(b"/other", b"/", b"*", b"http://sale/other", b"http:///x", b"//sale/x", b"/a b", b""),
        *(ORDERS.encode() + tail for tail in (b"/", b"?a=b", b"#c", b"%20")),
        *(b"/api/v1/campaigns/none/orders", b"/api/v1/campaigns/fil%6ds/orders", b"/\xe4\xb8\xad"),
        b"/" + b"a" * 8_200,
    ]
)
_VERSIONS = st.sampled_from(
    [b"HTTP/1.1"] * 14 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 ", b"http/1.1", b"HTTP/1.10", b""]
)
_NAMES = st.sampled_from(
    [
        *(b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Expect", b"Upgrade"),
        *(b"Idempotency-Key", b"Authorization", b"Content-Type", b"X-Forwarded-For", b"Accept"),
        *(b"X-Request-Id", b"authorization", b"Host"),
        *(b"content-length", b"IDEMPOTENCY-KEY", b"Keep-Alive", b"TE", b"Trailer", b"User-Agent"),
        *(
            b"Content-Encoding",
            b"Content_Length",
            b"Sec-WebSocket-Key1",
            b"X",
            b"",
            b"X\x00",
            b"\t",
        ),
        *(b"Content-Length ", b" Host", b"X\xe4", b"a" * 300),
    ]
)
_VALUES = st.one_of(
    st.sampled_from(
        [
            *(
                b"",
                b"5",
                b"0",
                b"-1",
                b"+5",
                b" 5",
                b"05",
                b"5,5",
                b"5 ",
                b"\t5",
                b"0x5",
                b"5_0",
                b"chunked",
            ),
            *(b"Chunked, identity", b"close", b"keep-alive", b"Keep-Alive ", b"keep-alive, close"),
            *(
                b"upgrade",
                b"100-continue",
                b"h2c",
                b"websocket",
                b"gzip",
                b"a\x00b",
                b"a\rb",
                b"a\nb",
            ),
            *(
                b"99999999999999999999",
                b"18446744073709551615",
                b"\xe4\xb8\xad",
                b"\xff",
                b" \t a \t ",
            ),
            *(
                b"a\r\n b",
                b"a" * 8_200,
                b"0" * 5_000 + b"5",
                b"key",
                b"Bearer x",
                b"application/json",
            ),
        ]
    ),
    st.binary(max_size=6),
)
_ENDINGS = st.sampled_from(
    [
        *(b"+5", b"-1", b" 5", b"5 ", b"05", b"5_0", b"0x5", b"5,5", b"\t5", b"", b"5" * 10),
        *(b"close", b"keep-alive, close", b"Keep-alive", b"upgrade", b"keep-alive\x00"),
    ]
)
_SEPARATORS = st.sampled_from([b": "] * 8 + [b":", b" : ", b":\t", b"", b":  "])
_ENDS = st.sampled_from([b"\r\n"] * 20 + [b"\n", b"\r", b"\r\n\r\n", b"\r\r\n", b""])
_EVIL = b"POST /evil HTTP/1.1\r\nHost: sale\r\nContent-Length: 0\r\n\r\n"
_BODIES = st.one_of(
    st.just(b'{"quantity":1}'),
    st.sampled_from(
        [b"", _EVIL, b"\r\n\r\n", b"5\r\n" + _EVIL[:5] + b"\r\n0\r\n\r\n", b"0\r\n\r\n"]
    ),
    st.binary(max_size=40),
)


@st.composite
def plain_purchases(draw: st.DrawFn) -> bytes:
    """A request that the fast path must serve, its headers in any order and case."""
    body = draw(_BODIES)
    fields = [
        (b"Host", b"sale"),
        (b"Idempotency-Key", b"k%d" % draw(st.integers(0, 999))),
        (b"Content-Length", b"%d" % len(body)),
        (b"Authorization", b"Bearer token"),
        (b"Content-Type", b"application/json"),
        *draw(st.sampled_from([(), ((b"Accept", b"*/*"),), ((b"Connection", b"keep-alive"),)])),
    ]
    case = draw(st.sampled_from([bytes, bytes.lower, bytes.upper]))
    lines = [case(name) + b": " + value for name, value in draw(st.permutations(fields))]
    return b"\r\n".join([b"POST " + ORDERS.encode() + b" HTTP/1.1", *lines, b"", body])


@st.composite
def plain_reads(draw: st.DrawFn) -> bytes:
    """A read that the fast path must serve."""
    fields = [
        (b"Host", b"sale"),
        *draw(st.lists(st.sampled_from(_READ_FIELDS), unique_by=lambda field: field[0].lower())),
    ]
    case = draw(st.sampled_from([bytes, bytes.lower, bytes.upper]))
    lines = [case(name) + b": " + value for name, value in draw(st.permutations(fields))]
    start = b"GET " + draw(st.sampled_from(READS)).encode() + b" HTTP/1.1"
    return b"\r\n".join([start, *lines, b"", b""])


_READ_FIELDS = [
    (b"Accept", b"*/*"),
    (b"Connection", b"keep-alive"),
    (b"If-None-Match", b"*"),
    (b"If-None-Match", b'"a", W/"b"'),
    (b"Idempotency-Key", b"k"),
    (b"Authorization", b"Bearer token"),
    (b"User-Agent", b"a phone"),
]


@st.composite
def other_requests(draw: st.DrawFn) -> bytes:
    """A sound request that is aiohttp's."""
    kind = draw(st.sampled_from(["get", "put", "chunked", "old", "closing", "unknown"]))
    path, n = b"/other/%d" % draw(st.integers(0, 999)), draw(_BODIES)
    match kind:
        case "get":
            return b"GET " + path + b" HTTP/1.1\r\nHost: sale\r\n\r\n"
        case "put":
            return b"PUT %b HTTP/1.1\r\nHost: sale\r\nContent-Length: %d\r\n\r\n%b" % (
                path,
                len(n),
                n,
            )
        case "chunked":
            return (
                b"POST %b HTTP/1.1\r\nHost: sale\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"%x\r\n%b\r\n0\r\n\r\n" % (ORDERS.encode(), len(n) + 1, n + b"x")
            )
        case "old":
            return b"GET " + path + b" HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        case "closing":
            return b"GET " + path + b" HTTP/1.1\r\nHost: sale\r\nConnection: close\r\n\r\n"
        case _:
            return b"POST /api/v1/campaigns/none/orders HTTP/1.1\r\nHost: sale\r\n\r\n"


@st.composite
def odd_requests(draw: st.DrawFn) -> bytes:
    """Anything that looks like a request: mostly wrong in one or two places."""
    body = draw(_BODIES)
    lines = [(b"Host", b": ", b"sale", b"\r\n")] * draw(st.sampled_from([1] * 9 + [0, 2]))
    if draw(st.integers(0, 4)):
        lines.append((b"Content-Length", b": ", b"%d" % len(body), b"\r\n"))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        lines.append((draw(_NAMES), draw(_SEPARATORS), draw(_VALUES), draw(_ENDS)))
    if not draw(st.integers(0, 40)):
        lines += [(b"X-%d" % n, b":", b"", b"\r\n") for n in range(140)]
    lines = draw(st.permutations(lines)) if len(lines) < 10 else lines
    start = draw(_METHODS) + b" " + draw(_TARGETS) + b" " + draw(_VERSIONS) + draw(_ENDS)
    return start + b"".join(b"".join(line) for line in lines) + b"\r\n" + body


@st.composite
def damaged(draw: st.DrawFn, requests: st.SearchStrategy[bytes]) -> bytes:
    """A request with a few bytes changed, put in, or taken out."""
    data = bytearray(draw(requests))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        byte = draw(st.sampled_from(list(b"\r\n :\t\x00,0\x7f\x80aC")) | st.integers(0, 255))
        match draw(st.sampled_from(["in", "out", "other"])):
            case "in":
                data.insert(at, byte)
            case "out":
                del data[at : at + 1]
            case _:
                data[at : at + 1] = bytes([byte])
    return bytes(data)


@st.composite
def revalued(draw: st.DrawFn, request: bytes) -> bytes:
    """A request with another value of one header, most often one that says where it ends."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    framing = [n for n, line in enumerate(lines) if line[:2].lower() == b"co" and n]
    any_line = st.integers(1, len(lines) - 1)
    at = draw(st.sampled_from(framing) | any_line if framing else any_line)
    value = draw(_ENDINGS if at in framing else _VALUES)
    lines[at] = lines[at].partition(b":")[0] + draw(_SEPARATORS) + value
    return b"\r\n".join([*lines, b"", body])


SOUND = plain_purchases() | plain_reads() | other_requests()
ANY = SOUND | odd_requests() | damaged(SOUND)
WITH_DAMAGE = (plain_purchases() | plain_reads()).flatmap(
    lambda request: st.tuples(st.just(request), damaged(st.just(request)) | revalued(request))
)
"""A purchase or a read, and the same one damaged."""

CUTS = st.lists(st.floats(0, 1), max_size=8) | st.integers(1, 5)
"""Where to cut: at these shares of the whole, or every so many bytes."""


STREAMS = st.builds(
    lambda sound, any_ones: b"".join([*sound, *any_ones]),
    st.lists(SOUND, max_size=4),
    st.lists(ANY, max_size=3),
)


def pieces_of(data: bytes, cuts: list[float] | int) -> list[bytes]:
    """Cut some requests in a row."""
    if isinstance(cuts, int):
        at = list(range(0, len(data), cuts))
    else:
        at = sorted({0, *(int(share * len(data)) for share in cuts)})
    return [data[start:end] for start, end in zip(at, [*at[1:], len(data)], strict=False)]
