"""What all handlers share: reading a request, wording an answer.

On the way of a purchase a header is looked up by an ``istr``, whose folding is done once, and a
body that has arrived whole is taken as it is: aiohttp's ``read`` waits for its end twice.
"""

import asyncio
import base64
import binascii
import hashlib
import re
from typing import Final, TypeVar

import msgspec
from aiohttp import hdrs, web
from multidict import istr

from sale.bootstrap import Engine
from sale.domain.order import IDEMPOTENCY_KEY
from sale.domain.problem import Problem, Refused
from sale.http.bounds import BODY_MAX, BODY_WITHIN_S

ENGINE: Final = web.AppKey("engine", Engine)
LIMIT_DEFAULT, LIMIT_MAX = 50, 200
CURSOR_MAX: Final = 2**53
NO_STORE: Final[dict[str, str]] = {hdrs.CACHE_CONTROL: "no-store"}
KEY_HEADER: Final = istr("Idempotency-Key")
ENCODER: Final = msgspec.json.Encoder()
Body = TypeVar("Body")


class BodyLate(Refused):
    """The body did not come in time; the rest of it would be in the way of what follows."""

    def __init__(self) -> None:
        super().__init__(Problem.INVALID_REQUEST, "the body did not arrive in time", field="body")


def bearer(request: web.BaseRequest) -> str | None:
    """Give the bearer token, or None."""
    return bearer_token(request.headers.get(hdrs.AUTHORIZATION, ""))


def bearer_token(authorization: str) -> str | None:
    """Give the token of a header ``Authorization``, or None."""
    if authorization.startswith("Bearer ") or authorization[:7].lower() == "bearer ":
        return authorization[7:]
    return None


def checked_key(key: str | None) -> str:
    """Give the idempotency key. Raises Refused where it is missing or malformed."""
    if key is None:
        raise Refused(
            Problem.MISSING_IDEMPOTENCY_KEY, "send a header Idempotency-Key, new for each order"
        )
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise Refused(
            Problem.INVALID_REQUEST,
            "Idempotency-Key: must be 1 to 64 of A-Z, a-z, 0-9, _ and -",
            field="Idempotency-Key",
        )
    return key


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Read and check a JSON body. Raises Refused for its type, size, syntax and fields."""
    check_media_type(request.headers.get(hdrs.CONTENT_TYPE, ""))
    check_coding(request)
    try:
        if request.content.is_eof():
            body = request.content.read_nowait()
        else:
            async with asyncio.timeout(BODY_WITHIN_S):
                body = await request.read()
    except TimeoutError:
        raise BodyLate from None
    except web.RequestPayloadError:
        raise Refused(Problem.INVALID_REQUEST, "the body cannot be read", field="body") from None
    except web.HTTPRequestEntityTooLarge:
        body = bytes(BODY_MAX + 1)
    return decode_body(body, decoder)


def check_media_type(media_type: str) -> None:
    """Take JSON only. Raises Refused."""
    if media_type != "application/json" and not _is_json(media_type):
        raise Refused(Problem.UNSUPPORTED_MEDIA_TYPE, "send application/json")


def check_coding(request: web.Request) -> None:
    """Take bodies as they are. Raises Refused: unpacking is work that a stranger could ask for."""
    codings = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).lower().split(",")
    if any(coding.strip(" \t") not in {"", "identity"} for coding in codings):
        raise Refused(Problem.UNSUPPORTED_MEDIA_TYPE, "send the body without Content-Encoding")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decode a body that is whole. Raises Refused for its size, syntax and fields."""
    if len(body) > BODY_MAX:
        raise Refused(Problem.PAYLOAD_TOO_LARGE, f"at most {BODY_MAX} bytes")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        field = _FIELD.search(message) or _UNKNOWN_FIELD.search(message)
        name = field[1] if field else "body"
        what = message.split(" - at ", maxsplit=1)[0].replace("`", "'")
        raise Refused(Problem.INVALID_REQUEST, f"{name}: {what}", field=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(Problem.INVALID_REQUEST, "the body is not JSON", field="body") from None


def page_limit(request: web.Request) -> int:
    """Give ``?limit=``, 1 to 200, default 50. Raises Refused."""
    text = request.query.get("limit")
    if text is None:
        return LIMIT_DEFAULT
    plain = text.isascii() and text.isdigit() and len(text) <= len(str(LIMIT_MAX))
    if not plain or not 1 <= int(text) <= LIMIT_MAX:
        raise Refused(
            Problem.INVALID_REQUEST, f"limit: must be from 1 to {LIMIT_MAX}", field="limit"
        )
    return int(text)


def encode_cursor(value: object) -> str:
    """Word a cursor: opaque to clients."""
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")


def decode_cursor(request: web.Request, kind: type[Body]) -> Body | None:
    """Read ``?cursor=``; a number is from 0 to CURSOR_MAX, other types bound themselves.

    Raises Refused where it is not one of ours.
    """
    text = request.query.get("cursor")
    if text is None:
        return None
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
        value = msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, binascii.Error, ValueError):
        value = None
    if value is None or (isinstance(value, int) and not 0 <= value <= CURSOR_MAX):
        raise Refused(Problem.INVALID_REQUEST, "cursor: not one that was given out", field="cursor")
    return value


def offset_cursor(request: web.Request) -> int:
    """Read ``?cursor=`` of a list that goes by position; 0 without one. Raises Refused."""
    return decode_cursor(request, int) or 0


def json_response(body: object, *, headers: dict[str, str] | None = None) -> web.Response:
    """Answer 200 with JSON."""
    return web.Response(body=ENCODER.encode(body), content_type="application/json", headers=headers)


def tagged_response(request: web.Request, body: object, *, max_age_s: int) -> web.Response:
    """Answer with an ETag, or 304 where the client has it already."""
    encoded = ENCODER.encode(body)
    tag = entity_tag(encoded)
    headers = tagged_headers(tag, max_age_s)
    if has_already(request, tag):
        return web.Response(status=304, headers=headers)
    return web.Response(body=encoded, content_type="application/json", headers=headers)


def entity_tag(body: bytes) -> str:
    """Give the strong tag of a body."""
    return f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'


def tagged_headers(tag: str, max_age_s: int) -> dict[str, str]:
    """Give the headers of an answer with an ETag, and of its 304."""
    return {"ETag": tag, "Cache-Control": f"public, max-age={max_age_s}"}


def has_already(request: web.Request, tag: str) -> bool:
    """Whether the client has what a strong tag stands for, by all its If-None-Match (RFC 9110)."""
    return names_tag(",".join(request.headers.getall(hdrs.IF_NONE_MATCH, ())), tag)


def names_tag(if_none_match: str, tag: str) -> bool:
    """Whether an If-None-Match has a strong tag."""
    known = if_none_match.split(",")
    return any(each.strip(" \t").removeprefix("W/") in {tag, "*"} for each in known)


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client takes gzip, by its Accept-Encoding (RFC 9110, 12.5.3)."""
    weights: dict[str, float] = {}
    for element in accept_encoding.lower().split(","):
        coding, *parameters = (part.strip(" \t") for part in element.split(";"))
        weights[coding] = min((_weight(each) for each in parameters if each), default=1.0)
    named = [weights[coding] for coding in ("gzip", "x-gzip") if coding in weights]
    return max(named, default=weights.get("*", 0.0)) > 0


def _weight(parameter: str) -> float:
    """Give the weight of ``q=…``; 0 where it cannot be read: the plain body suits everybody."""
    name, _, value = parameter.partition("=")
    return float(value) if name.strip() == "q" and _QVALUE.fullmatch(value.strip()) else 0.0


_QVALUE: Final = re.compile(r"[01](\.[0-9]{0,3})?")


def _is_json(media_type: str) -> bool:
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


_UTF8: Final = frozenset({"utf-8", "utf8"})
_FIELD: Final = re.compile(r"\$\.([a-z_]+)")
_UNKNOWN_FIELD: Final = re.compile(r"unknown field `([^`]{1,64})`")
