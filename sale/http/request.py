"""Reading requests: what depends on HTTP alone. What is wrong is a ValueError, in words."""

import base64
import binascii
import hashlib
import re
from typing import Final, TypeVar

import msgspec
from aiohttp import hdrs, web
from multidict import istr

LIMIT_DEFAULT, LIMIT_MAX = 50, 200
CURSOR_MAX: Final = 2**53
KEY_HEADER: Final = istr("Idempotency-Key")
"""An ``istr`` folds its case once; on the way of a purchase headers are looked up by these."""

NO_STORE: Final[dict[str, str]] = {hdrs.CACHE_CONTROL: "no-store"}
Cursor = TypeVar("Cursor")


def bearer_token(authorization: str) -> str | None:
    """Give the token of a header ``Authorization``, or None."""
    if authorization.startswith("Bearer ") or authorization[:7].lower() == "bearer ":
        return authorization[7:]
    return None


def is_json(media_type: str) -> bool:
    """Whether this is JSON in UTF-8, whatever other parameters it has (RFC 9110, 8.3.1).

    Empty parameters, as of a semicolon at the end, count for nothing.
    """
    kind, _, parameters = media_type.partition(";")
    if kind.strip(" \t").lower() != "application/json":
        return False
    for parameter in parameters.split(";"):
        name, equals, value = parameter.strip(" \t").partition("=")
        if (name or equals) and not (name and value):
            return False
        if name.lower() == "charset" and value.strip('"').lower() not in _UTF8:
            return False
    return True


def is_plain(request: web.Request) -> bool:
    """Whether the body is sent without a Content-Encoding."""
    codings = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).lower().split(",")
    return all(coding.strip(" \t") in {"", "identity"} for coding in codings)


def is_current(request: web.Request, tag: str) -> bool:
    """Whether the client's copy has this strong tag, by all its If-None-Match (RFC 9110)."""
    return names_tag(",".join(request.headers.getall(hdrs.IF_NONE_MATCH, ())), tag)


def names_tag(if_none_match: str, tag: str) -> bool:
    """Whether an If-None-Match has a strong tag."""
    known = if_none_match.split(",")
    return any(each.strip(" \t").removeprefix("W/") in {tag, "*"} for each in known)


def entity_tag(body: bytes) -> str:
    """Give the strong tag of a body."""
    return f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'


def tagged_headers(tag: str, max_age_s: int) -> dict[str, str]:
    """Give the headers of an answer with an ETag, and of its 304."""
    return {"ETag": tag, "Cache-Control": f"public, max-age={max_age_s}"}


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client takes gzip, by its Accept-Encoding (RFC 9110, 12.5.3)."""
    weights: dict[str, float] = {}
    for element in accept_encoding.lower().split(","):
        coding, *parameters = (part.strip(" \t") for part in element.split(";"))
        weights[coding] = min((_weight(each) for each in parameters if each), default=1.0)
    named = [weights[coding] for coding in ("gzip", "x-gzip") if coding in weights]
    return max(named, default=weights.get("*", 0.0)) > 0


def read_limit(text: str) -> int:
    """Read how many items a page has at most."""
    plain = text.isascii() and text.isdigit() and len(text) <= len(str(LIMIT_MAX))
    if not plain or not 1 <= int(text) <= LIMIT_MAX:
        raise ValueError(f"must be from 1 to {LIMIT_MAX}")
    return int(text)


def read_flag(text: str) -> bool:
    """Read a parameter that is ``true`` or ``false``."""
    if text not in {"true", "false"}:
        raise ValueError("must be true or false")
    return text == "true"


def encode_cursor(value: object) -> str:
    """Word a cursor: opaque to clients."""
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")


def decode_cursor(kind: type[Cursor], text: str) -> Cursor:
    """Read a cursor. A number is from 0 to CURSOR_MAX, other types have bounds of their own."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
        value = msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, binascii.Error, ValueError):
        value = None
    if value is None or (isinstance(value, int) and not 0 <= value <= CURSOR_MAX):
        raise ValueError("not one that was given out")
    return value


def _weight(parameter: str) -> float:
    """Give the weight of ``q=…``; 0 where it cannot be read: the plain body suits everybody."""
    name, _, value = parameter.partition("=")
    return float(value) if name.strip() == "q" and _QVALUE.fullmatch(value.strip()) else 0.0


_QVALUE: Final = re.compile(r"[01](\.[0-9]{0,3})?")
_UTF8: Final = frozenset({"utf-8", "utf8"})
