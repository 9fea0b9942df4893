"""Request smuggling: bytes that hide a purchase from one of two parsers."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fast_path_rig import WISH, Member


class Attack(NamedTuple):
    """Bytes that hide a purchase of ``victim`` from one of two parsers.

    ``requests`` is what a strict proxy would pass on of them; 0 where it must refuse.
    """

    name: str
    raw: bytes
    victim: Member
    requests: int


def attacks(m: Member) -> Iterator[Attack]:
    """Request smuggling, as proxies and servers have fallen for it."""

    def hiding(
        name: str, *lines: bytes, body: Callable[[bytes], bytes], requests: int = 0
    ) -> Attack:
        victim = m.world.member()
        hidden = victim.buy("open", Idempotency_Key=b"hidden")
        content = body(hidden)
        lines = tuple(line.replace(b"%d", b"%d" % len(content)) for line in lines)
        drop = [] if lines == () or b"_" in lines[0] else ["Content-Length"]
        return Attack(name, m.buy("sold-out", content, *lines, drop=drop), victim, requests)

    def chunks(hidden: bytes) -> bytes:
        return b"0\r\n\r\n" + hidden

    yield hiding("in a body", body=bytes, requests=1)
    yield hiding(
        "in a body of its length", b"Content-Length: 5", body=lambda h: WISH[:5] + h, requests=2
    )
    for value in (
        *(
            b"chunked",
            b" chunked",
            b"\tchunked",
            b"chunked ",
            b"Chunked",
            b"xchunked",
            b"chunked\x00",
        ),
        *(b"\x0bchunked", b"chunked, identity", b"identity, chunked", b"identity", b'"chunked"'),
        *(b"chunked;a=b", b"cow", b"\r\n chunked", b"chunked\r\n\t, identity", b"gzip, chunked"),
    ):
        yield hiding(
            f"length and Transfer-Encoding:{value!r}",
            b"Transfer-Encoding:" + value,
            b"Content-Length: %d",
            body=chunks,
        )
    # llhttp takes an empty one for none: what a proxy passes on of this has its length too.
    yield hiding(
        "length and no coding",
        *(b"Transfer-Encoding:", b"Content-Length: %d"),
        body=chunks,
        requests=1,
    )
    for line in (
        *(
            b"Transfer-Encoding : chunked",
            b" Transfer-Encoding: chunked",
            b"Transfer-Encoding\t: chunked",
        ),
        *(b"X: y\nTransfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked"),
        *(
            b"X: y\x00Transfer-Encoding: chunked",
            b"Transfer-Encoding",
            b"\x00Transfer-Encoding: chunked",
        ),
        *(
            b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
            b"Transfer\xc2\xadEncoding: chunked",
        ),
    ):
        yield hiding(f"length and {line!r}", line, b"Content-Length: %d", body=chunks)
    yield hiding("another name", b"Transfer_Encoding: chunked", body=chunks, requests=1)
    for first, second in ((b"0", b"%d"), (b"%d", b"0"), (b"5", b"5"), (b"%d", b"%d")):
        yield hiding(
            f"lengths {first!r} and {second!r}",
            b"Content-Length: " + first,
            b"Content-length: " + second,
            body=bytes,
        )
    for value in (
        b"0, %d",
        b"+0",
        b"-0",
        b"0x0",
        b"0 0",
        b"0;",
        b"\x0b0",
        b"0\x00",
        b"0_0",
        b"00000000000000000000000",
    ):
        fine = value.strip(b"0") == b""
        yield hiding(
            f"length {value!r}", b"Content-Length: " + value, body=bytes, requests=2 if fine else 0
        )
    for line in (
        b"Content-Length\t: 0",
        b"Content-Length : 0",
        b" Content-Length: 0",
        b"X: y\nContent-Length: 0",
    ):
        yield hiding(f"length in {line!r}", line, body=bytes)
    yield hiding("length in a fold", b"X: y\r\n Content-Length: 0", body=bytes)
    chunked = (b"Transfer-Encoding: chunked",)
    for name, body in {
        "chunk size with a line": lambda h: b"1_0\r\n" + h,
        "chunk size signed": lambda h: b"+0\r\n\r\n" + h,
        "chunk size hexadecimal": lambda h: b"0x0\r\n\r\n" + h,
        "chunk ended by LF": lambda h: b"1\na\n0\n\n" + h,
        "chunk extension with LF": lambda h: b"1;a\nb\r\na\r\n0\r\n\r\n" + h,
        "chunk without its end": lambda h: b"1\r\nab\r\n0\r\n\r\n" + h,
        "chunk size of 17 digits": lambda h: b"10000000000000000\r\n" + h,
    }.items():
        yield hiding(name, *chunked, body=body)
    yield hiding("behind a last chunk", *chunked, body=chunks, requests=2)
