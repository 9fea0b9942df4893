"""A campaign's head in Redis: the names of its fields, and how they are parsed and written.

No other module spells a field. The scripts do (``lua/_ledger.lua`` says what each one holds); what
they decide by is one field, ``rules``: the settings that ``Campaign`` marks with ``RULE``, by their
names, as MessagePack.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast, get_type_hints

import msgspec
from msgspec import inspect
from redis.asyncio import Redis

from sale.domain.campaign import Campaign
from sale.domain.clock import to_ms
from sale.stock import survey
from sale.stock.dormant import DORMANT
from sale.stock.keys import campaign_keys

_INTEGER_MAX: Final = 2**63


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The fields read of a head; a field that was not read, or is not there, has its default.

    ``seq`` is None where there is no head. ``config_seq`` and ``made`` are the numbers of the
    events that gave the campaign its configuration and that created it.
    """

    seq: int | None = None
    chain: str = ""
    epoch: int = 0
    clock: int = 0
    state: str = ""
    opens_at: int | None = None
    closes_at: int | None = None
    recovering: str = ""
    recovering_by: str = ""
    config: bytes = b""
    rules: bytes = b""
    config_seq: int = 0
    made: int = 0
    nonce: str = ""
    run_id: str = ""
    replid: str = ""
    roster_rev: int | None = None
    roster_load: str = ""
    applied: int = 0
    behind_since: int | None = None
    grace_until: int | None = None

    @property
    def dormant(self) -> bool:
        """Whether the campaign changes only by an event (``dormant.py``)."""
        return self.seq is not None and self.state in DORMANT and not self.recovering

    @property
    def identity(self) -> str:
        """The Redis that the head names, ``run_id:replid``."""
        return f"{self.run_id}:{self.replid}"

    @property
    def incarnation(self) -> str:
        """That Redis and the epoch of its data, ``run_id:replid:epoch``."""
        return f"{self.identity}:{self.epoch}"


class Part:
    """Some fields of a head that are read together."""

    def __init__(self, *fields: str) -> None:
        self.fields = fields

    def parse(self, values: Sequence[bytes | None], *, lenient: bool = False) -> Head:
        """Parse the reply to an HMGET of ``fields``.

        A number that is damaged is left out where ``lenient``. Raises ValueError elsewhere.
        """
        found: dict[str, Any] = {}
        for field, value in zip(self.fields, values, strict=True):
            if not value:
                continue
            if field in _BYTES:
                found[field] = value
            elif field in _TEXTS:
                found[field] = value.decode(errors="replace" if lenient else "strict")
            elif not lenient or value.isdigit():
                found[field] = integer(value)
        return Head(**found)

    async def read(self, redis: Redis, campaign_id: str) -> Head:
        """Read this part of a campaign's head. Raises ValueError, and redis-py's errors."""
        return self.parse(await self._values(redis, campaign_id))

    async def read_texts(self, redis: Redis, campaign_id: str) -> list[str]:
        """Read this part of a head that may be damaged, as it is; '' for what is not there."""
        values = await self._values(redis, campaign_id)
        return [(value or b"").decode(errors="replace") for value in values]

    async def _values(self, redis: Redis, campaign_id: str) -> list[bytes | None]:
        values: Any = await redis.hmget(campaign_keys(campaign_id).head, list(self.fields))
        return values  # type: ignore[no-any-return]


async def read_heads(
    redis: Redis, campaign_ids: Sequence[str], part: Part
) -> list[Head | Exception]:
    """Read the same part of campaigns' heads, in one round trip.

    Gives the error in the place of a head that cannot be read. Raises redis-py's errors.
    """
    async with redis.pipeline(transaction=False) as pipe:
        survey.add_reads(pipe, [campaign_keys(each).head for each in campaign_ids], part.fields)
        replies = await pipe.execute(raise_on_error=False)
    return [parsed(part, reply) for reply in survey.replies_by_key(replies, len(campaign_ids))]


def parsed(part: Part, reply: Any, *, lenient: bool = False) -> Head | Exception:  # noqa: ANN401
    """Give the head of one reply to a survey, or what is wrong with it."""
    if isinstance(reply, Exception):
        return reply
    try:
        return part.parse(reply, lenient=lenient)
    except ValueError as error:
        return error


SEQ: Final = "seq"
WRITER: Final = Part("seq", "state", "recovering")
POSITION: Final = Part("seq", "chain")
TRUST: Final = Part(
    "seq", "chain", "epoch", "run_id", "replid", "nonce", "recovering", "applied"
)  # fmt: skip
"""Which Redis was verified, and how far the ledger is."""
REPORTED: Final = Part(
    "seq", "chain", "epoch", "run_id", "replid", "recovering", "applied", "config_seq"
)  # fmt: skip
"""Fields that an API process reads some times a second."""
MARK: Final = Part("seq", "chain", "epoch", "recovering", "recovering_by")
EXAMINED: Final = Part(
    "seq", "chain", "epoch", "clock", "recovering", "nonce", "run_id", "replid"
)  # fmt: skip
ROSTER: Final = Part("state", "roster_rev")
LAG: Final = Part("seq", "state", "recovering", "applied", "behind_since")
CONFIG: Final = Part("config")
RULES: Final = Part("rules", "config_seq")
SNAPSHOT: Final = Part(
    "config", "config_seq", "state", "opens_at", "closes_at", "recovering", "seq", "chain",
    "epoch", "roster_rev", "clock",
)  # fmt: skip
"""Fields that the catalogue reads."""


def frozen(why: str, by: str) -> dict[Any, Any]:
    """Give the fields that mark a campaign as recovering."""
    return {"recovering": why, "recovering_by": by}


def packed(
    campaign: Campaign, config: bytes, opens_at_ms: int | None, closes_at_ms: int | None
) -> bytes:
    """Pack what a script writes into a head when it makes a campaign, by name (MessagePack).

    ``config`` is the configuration as the ledger has it (JSON); the moments are the window's now.
    """
    return msgspec.msgpack.encode(
        {
            "config": config.decode(),
            "rules": rules_of(campaign),
            "opens_at": opens_at_ms,
            "closes_at": closes_at_ms,
            "tickets": [showing.tickets for showing in campaign.showings],
        }
    )


def rules_of(campaign: Campaign) -> dict[str, int | str | bool | list[int]]:
    """Give the settings that the scripts decide by, in the form that Lua reads.

    Moments are UTC milliseconds; several codes are ``,code,code,``, or ``*`` for all; a setting
    that is None is left out, and is nil to Lua. ``showing_limits`` is there where any showing has a
    limit of its own.
    """
    values = {name: getattr(campaign, name) for name in RULE_NAMES}
    rules: dict[str, int | str | bool | list[int]] = {
        name: _for_lua(value) for name, value in values.items() if value is not None
    }
    limits = [showing.showing_limit for showing in campaign.showings]
    if any(limit is not None for limit in limits):
        rules["showing_limits"] = [limit or campaign.card_limit for limit in limits]
    return rules


def unpacked_rules(rules: bytes) -> Mapping[str, Any]:
    """Read packed rules; none where there are none. Raises msgspec.DecodeError."""
    return _RULES.decode(rules) if rules else {}


def _for_lua(value: Any) -> int | str | bool:  # noqa: ANN401 - any setting's
    if isinstance(value, datetime):
        return to_ms(value)
    if isinstance(value, tuple):
        return "*" if "*" in value else f",{','.join(value)},"
    return value  # type: ignore[no-any-return]


def integer(value: bytes) -> int:
    """Read a number that can be told as JSON. Raises ValueError."""
    number = int(value)
    if not -_INTEGER_MAX <= number < _INTEGER_MAX:
        raise ValueError(f"{number} is beyond any number of the engine")
    return number


def _marked_as_rules() -> tuple[str, ...]:
    about = cast("inspect.StructType", inspect.type_info(Campaign))
    return tuple(
        field.name
        for field in about.fields
        if isinstance(field.type, inspect.Metadata) and (field.type.extra or {}).get("rule")
    )


RULE_NAMES: Final = _marked_as_rules()
_RULES: Final = msgspec.msgpack.Decoder(dict[str, Any])
_TYPES: Final = get_type_hints(Head)
_TEXTS: Final = frozenset(name for name, type_ in _TYPES.items() if type_ is str)
_BYTES: Final = frozenset(name for name, type_ in _TYPES.items() if type_ is bytes)
