"""Reads campaigns from files and from the API's bodies, and names every fault in one go.

The fields, their types and bounds are those of ``Campaign``; what is wrong with a value is worded
from its type. msgspec's own decoder stops at the first fault, and an operator who mends one field
at a time sends a file many times. Rules over several fields stand in ``_broken_rules``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

import msgspec
from msgspec import inspect

from sale.domain.campaign import Campaign
from sale.domain.clock import parse_moment
from sale.domain.text import TITLE_MAX, shown_text
from sale.files import brief, parse_toml

FAULTS_TOLD_MAX: Final = 20


class InvalidCampaign(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A campaign file or body is wrong; ``problems`` maps each field to what is wrong with it."""

    def __init__(self, problems: dict[str, str]) -> None:
        told = [f"{field}: {what}" for field, what in problems.items()]
        more = len(told) - FAULTS_TOLD_MAX
        if more > 0:
            told[FAULTS_TOLD_MAX:] = [f"and {more} more"]
        super().__init__("; ".join(told))
        self.problems = problems


def parse_campaign_toml(text: str, unions: frozenset[str]) -> Campaign:
    """Read a campaign file. Raises InvalidCampaign naming every wrong field in one go."""
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise InvalidCampaign({"file": str(error)}) from None
    return parse_campaign(table, unions)


def parse_campaign(table: object, unions: frozenset[str]) -> Campaign:
    """Check a campaign given as a table (TOML, or JSON with RFC 3339 strings for times).

    ``unions`` are the known union codes. Raises InvalidCampaign naming every wrong field at once.
    """
    if not isinstance(table, dict):
        raise InvalidCampaign({"campaign": "must be an object"})
    reader = _Reader()
    values = reader.read(Campaign, table)
    for field, what in _broken_rules(values, unions):
        reader.problems.setdefault(field, what)
    if reader.problems:
        raise InvalidCampaign(reader.problems)
    return msgspec.convert(values, Campaign)


def request_type() -> type[msgspec.Struct]:
    """Give the type that describes a campaign as a body: ``Campaign`` as files may have it."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(Campaign):
        about = _fields(Campaign)[field.name]
        if not about.in_files:
            continue
        if about.up_to:
            fields.append((field.name, field.type | msgspec.UnsetType, msgspec.UNSET))
        elif about.required:
            fields.append((field.name, field.type))
        else:
            fields.append((field.name, field.type, field.default))
    return msgspec.defstruct(
        "CampaignRequest",
        fields,
        namespace={"__doc__": "A new campaign: the fields of the campaign file."},
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


def _broken_rules(values: Mapping[str, Any], unions: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Give each rule over several fields that is broken: a field, and what is wrong with it.

    A field that is wrong by itself is missing from ``values``.
    """
    if values.get("payment") == "none" and values.get("price_fen", 0) > 0:
        yield "payment", "none needs price_fen = 0"
    opens_at, closes_at = values.get("opens_at"), values.get("closes_at")
    if opens_at and closes_at and closes_at <= opens_at:
        yield "closes_at", "must be after opens_at"
    codes = values.get("unions", ())
    if "*" not in codes or len(codes) > 1:
        unknown = sorted({*codes} - unions)
        if unknown:
            yield "unions", f"unknown union: {brief(', '.join(unknown))[1:-1]}"
    owner = values.get("owner")
    if owner is not None and owner not in unions:
        yield "owner", f"{owner!r} is not a known union"
    seen: set[str] = set()
    for number, showing in enumerate(values.get("showings", ())):
        showing_id = showing.get("id", "")
        if showing_id in seen:
            yield f"showings[{number}].id", f"{showing_id!r} is there twice"
        seen.add(showing_id)


class _Field(NamedTuple):
    """A field of a struct, as the reader uses it."""

    name: str
    type: inspect.Type
    required: bool
    default: object
    description: str
    in_files: bool
    up_to: str


@lru_cache(maxsize=8)
def _fields(struct: type[msgspec.Struct]) -> dict[str, _Field]:
    """Give the fields of a struct, by name, with what their ``Meta`` says."""
    about = cast("inspect.StructType", inspect.type_info(struct))
    fields = {}
    for field in about.fields:
        bare, description, extra = _unwrapped(field.type)
        fields[field.name] = _Field(
            name=field.name,
            type=bare,
            required=field.required and "up_to" not in extra,
            default=field.default,
            description=description,
            in_files=extra.get("in_files", True),
            up_to=extra.get("up_to", ""),
        )
    return fields


def _unwrapped(about: inspect.Type) -> tuple[inspect.Type, str, dict[str, Any]]:
    """Give a type without its ``Meta`` and without ``| None``: type, description, extra."""
    description, extra = "", dict[str, Any]()
    while isinstance(about, inspect.Metadata | inspect.UnionType):
        if isinstance(about, inspect.Metadata):
            description = (about.extra_json_schema or {}).get("description", description)
            extra |= about.extra or {}
            about = about.type
        else:
            (about,) = (each for each in about.types if not isinstance(each, inspect.NoneType))
    return about, description, extra


class _Reader:
    """Reads tables by the fields of a struct, and gathers every fault."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}

    def read(
        self, struct: type[msgspec.Struct], table: Mapping[Any, Any], prefix: str = ""
    ) -> dict[str, Any]:
        """Give the values of the fields that are right; the faults of the others are noted."""
        fields = {name: each for name, each in _fields(struct).items() if each.in_files}
        for name in table:
            if name not in fields:
                self.problems[prefix + brief(str(name))[1:-1]] = "is not a known field"
        values: dict[str, Any] = {}
        for field in fields.values():
            at = prefix + field.name
            if field.name not in table:
                if field.required:
                    self.problems[at] = "is missing"
                elif not field.up_to:
                    values[field.name] = field.default
                elif field.up_to in values:
                    values[field.name] = values[field.up_to]
                continue
            try:
                values[field.name] = self._value(field, table[field.name], at, values)
            except ValueError as wrong:
                self.problems[at] = str(wrong)
        return values

    def _value(self, field: _Field, value: Any, at: str, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Give a value as the struct has it. Raises ValueError in words."""
        about = field.type
        if isinstance(about, inspect.VarTupleType) and isinstance(
            about.item_type, inspect.StructType
        ):
            most = about.max_length or 0
            if not isinstance(value, list) or not 1 <= len(value) <= most:
                raise ValueError(f"must be a list of 1 to {most} {field.name}")
            struct = about.item_type.cls
            return [self._row(struct, row, f"{at}[{n}]") for n, row in enumerate(value)]
        return _READERS[type(about)](field, value, values)

    def _row(self, struct: type[msgspec.Struct], row: object, at: str) -> dict[str, Any]:
        if isinstance(row, dict):
            return self.read(struct, row, f"{at}.")
        self.problems[at] = "must be a table"
        return {}


def _text(field: _Field, value: Any, _values: object) -> str:  # noqa: ANN401
    about = cast("inspect.StrType", field.type)
    length_max = about.max_length or TITLE_MAX
    if not isinstance(value, str):
        raise ValueError(f"must be a text of 1 to {length_max} characters")  # noqa: TRY004
    if about.pattern is None:
        return shown_text(value, length_max)
    if not re.fullmatch(about.pattern, value) or "\n" in value:
        raise ValueError(f"must be {field.description}")
    return value


def _integer(field: _Field, value: Any, values: Mapping[str, Any]) -> int:  # noqa: ANN401
    about = cast("inspect.IntType", field.type)
    low, high = cast("int", about.ge), cast("int", about.le)
    high = min(high, values.get(field.up_to, high))
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise ValueError(f"must be a whole number from {low} to {high}")


def _flag(_field: _Field, value: Any, _values: object) -> bool:  # noqa: ANN401
    if isinstance(value, bool):
        return value
    raise ValueError("must be true or false")


def _choice(field: _Field, value: Any, _values: object) -> str:  # noqa: ANN401
    choices = cast("inspect.LiteralType", field.type).values
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"must be one of {', '.join(map(str, choices))}")


def _moment(_field: _Field, value: Any, _values: object) -> datetime | None:  # noqa: ANN401
    return None if value is None else parse_moment(value)


def _codes(field: _Field, value: Any, _values: object) -> tuple[str, ...]:  # noqa: ANN401
    if isinstance(value, list) and value and all(isinstance(code, str) for code in value):
        return tuple(dict.fromkeys(value))
    raise ValueError(f"must be {field.description}")


_READERS: Final[dict[type[inspect.Type], Callable[[_Field, Any, Mapping[str, Any]], Any]]] = {
    inspect.StrType: _text,
    inspect.IntType: _integer,
    inspect.BoolType: _flag,
    inspect.LiteralType: _choice,
    inspect.DateTimeType: _moment,
    inspect.VarTupleType: _codes,
}
"""How a value of each type is read: it is given back as the struct has it, or ValueError says why.

A setting of another type fails the test of the reader, for want of an entry here.
"""
