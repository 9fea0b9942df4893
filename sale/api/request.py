"""Shared by all handlers: reading a request, wording an answer.

For purchases, headers are looked up by an ``istr``, which is folded once, and a body that has
arrived is taken without aiohttp's ``read``, which waits for its end twice.
"""

import asyncio
from typing import Final, TypeVar

import msgspec
from aiohttp import hdrs, web

from sale.bootstrap import Engine
from sale.domain.fields import decoder_fault
from sale.domain.order import IDEMPOTENCY_KEY
from sale.domain.problem import Problem, Refused
from sale.http.bounds import BODY_MAX, BODY_WITHIN_S
from sale.http.request import (
    bearer_token,
    entity_tag,
    is_current,
    is_json,
    is_plain,
    tagged_headers,
)

ENGINE: Final = web.AppKey("engine", Engine)
ENCODER: Final = msgspec.json.Encoder()
Body = TypeVar("Body")


class LastAnswer(Refused):
    """A refusal behind which the connection is closed."""


class BodyLate(LastAnswer):
    """The body did not come in time. Its rest would be read as the next request."""

    def __init__(self) -> None:
        super().__init__(Problem.INVALID_REQUEST, "the body did not arrive in time", field="body")


def bearer(request: web.BaseRequest) -> str | None:
    """Give the bearer token, or None."""
    return bearer_token(request.headers.get(hdrs.AUTHORIZATION, ""))


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


async def read_body(
    request: web.Request, decoder: msgspec.json.Decoder[Body], *, absent_is_empty: bool = False
) -> Body:
    """Read and check a JSON body. Raises Refused for its type, size, syntax and fields.

    ``absent_is_empty``: a request without a body is one whose body is ``{}``.
    """
    if absent_is_empty and not request.can_read_body:
        return decode_body(b"{}", decoder)
    check_media_type(request.headers.get(hdrs.CONTENT_TYPE, ""))
    return decode_body(await read_raw(request), decoder)


async def read_raw(request: web.Request) -> bytes:
    """Read a body as it was sent; of one that is too large, one byte more than is allowed.

    Raises Refused.
    """
    if not is_plain(request):  # unpacking is work that any client could cause
        raise Refused(Problem.UNSUPPORTED_MEDIA_TYPE, "send the body without Content-Encoding")
    try:
        if request.content.is_eof():
            return request.content.read_nowait()
        async with asyncio.timeout(BODY_WITHIN_S):
            return await request.read()
    except TimeoutError:
        raise BodyLate from None
    except web.RequestPayloadError:
        raise Refused(Problem.INVALID_REQUEST, "the body cannot be read", field="body") from None
    except web.HTTPRequestEntityTooLarge:
        return bytes(BODY_MAX + 1)


def check_media_type(media_type: str) -> None:
    """Take JSON only. Raises Refused."""
    if media_type != "application/json" and not is_json(media_type):
        raise Refused(Problem.UNSUPPORTED_MEDIA_TYPE, "send application/json")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decode a body that is whole. Raises Refused for its size, syntax and fields."""
    if len(body) > BODY_MAX:
        raise Refused(Problem.PAYLOAD_TOO_LARGE, f"at most {BODY_MAX} bytes")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        field, what = decoder_fault(str(error), decoder.type)
        raise Refused(Problem.INVALID_REQUEST, what.of_field(field), field=field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(Problem.INVALID_REQUEST, "the body is not JSON", field="body") from None


def tagged_response(request: web.Request, body: object, *, max_age_s: int) -> web.Response:
    """Answer with an ETag, or 304 where the client has it already."""
    encoded = ENCODER.encode(body)
    tag = entity_tag(encoded)
    headers = tagged_headers(tag, max_age_s)
    if is_current(request, tag):
        return web.Response(status=304, headers=headers)
    return web.Response(body=encoded, content_type="application/json", headers=headers)
