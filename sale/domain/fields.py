"""Reads tables by the fields of a struct, and names every fault in both languages.

The fields, their types and bounds are those of the struct; what is wrong with a value is worded
from its type. msgspec's own decoder stops at the first fault and words it in its own English; an
operator who mends one field at a time sends a file many times.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeGuard, cast

import msgspec
from msgspec import inspect

from sale.domain.clock import MOMENT_FORM, parse_moment
from sale.domain.text import TITLE_MAX, Text, Wrong, shown_text, text_of_length
from sale.files import brief

UNKNOWN: Final = Text("没有这个字段", "is not a known field")
MISSING: Final = Text("没有填写", "is missing")
NOT_AN_OBJECT: Final = Text("必须是一个对象", "must be an object")


class Field(NamedTuple):
    """A field of a struct, as the reader uses it."""

    name: str
    type: inspect.Type
    required: bool
    default: object
    about: Mapping[str, Any]
    """What its ``Meta`` says besides bounds: ``extra`` and ``extra_json_schema``."""

    @property
    def in_files(self) -> bool:
        """Whether a file or a body may name it."""
        return bool(self.about.get("in_files", True))

    @property
    def up_to(self) -> str:
        """The setting that bounds it, and that it equals where it is left out; or ''."""
        return str(self.about.get("up_to", ""))


@lru_cache(maxsize=32)
def fields_of(struct: type[msgspec.Struct]) -> dict[str, Field]:
    """Give the fields of a struct, by name."""
    declared = cast("inspect.StructType", inspect.type_info(struct))
    fields = {}
    for field in declared.fields:
        bare, about = _unwrapped(field.type)
        required = field.required and "up_to" not in about
        fields[field.name] = Field(field.name, bare, required, field.default, about)
    return fields


def _unwrapped(declared: inspect.Type) -> tuple[inspect.Type, dict[str, Any]]:
    """Give a type without its ``Meta`` and without ``| None``, and what its ``Meta`` says."""
    about: dict[str, Any] = {}
    while isinstance(declared, inspect.Metadata | inspect.UnionType):
        if isinstance(declared, inspect.Metadata):
            about |= (declared.extra_json_schema or {}) | (declared.extra or {})
            declared = declared.type
        else:
            (declared,) = (e for e in declared.types if not isinstance(e, inspect.NoneType))
    return declared, about


def requirement(field: Field, high: int | None = None) -> Text:
    """Say what a value of this field must be; ``high`` is a lower bound than the declared one."""
    if field.about.get("format") == "date-time":
        return MOMENT_FORM
    match field.type:
        case inspect.IntType(ge=least, le=most):
            most = most if high is None else high
            return Text(
                f"必须是 {least} 到 {most} 的整数", f"must be a whole number from {least} to {most}"
            )
        case inspect.StrType(pattern=None, max_length=None):
            return Text("必须是文字", "must be a text")
        case inspect.StrType(pattern=None, max_length=length_max):
            return text_of_length(cast("int", length_max))
        case inspect.BoolType():
            return Text("必须是 true 或 false", "must be true or false")
        case inspect.LiteralType(values=values):
            choices = ", ".join(map(str, values))
            return Text(f"必须是其中之一：{choices}", f"must be one of {choices}")
        case inspect.DateTimeType():
            return MOMENT_FORM
        case inspect.VarTupleType(item_type=inspect.StructType(), max_length=most):
            return Text(
                f"必须是 1 到 {most} 项的列表", f"must be a list of 1 to {most} {field.name}"
            )
        case _:
            return Text(f"必须是 {field.about['zh']}", f"must be {field.about['description']}")


class Reader:
    """Reads tables by the fields of structs, and gathers every fault by the field's place."""

    def __init__(self) -> None:
        self.faults: dict[str, Text] = {}

    def read(
        self, struct: type[msgspec.Struct], table: Mapping[Any, Any], prefix: str = ""
    ) -> dict[str, Any]:
        """Give the values of the fields that are right; the faults of the others are noted."""
        fields = {name: each for name, each in fields_of(struct).items() if each.in_files}
        for name in table:
            if name not in fields:
                self.faults[prefix + brief(str(name))[1:-1]] = UNKNOWN
        values: dict[str, Any] = {}
        for field in fields.values():
            at = prefix + field.name
            if field.name not in table:
                if field.required:
                    self.faults[at] = MISSING
                elif not field.up_to:
                    values[field.name] = field.default
                elif field.up_to in values:
                    values[field.name] = values[field.up_to]
                continue
            if table[field.name] is None and field.default is None:
                values[field.name] = None
                continue
            try:
                values[field.name] = self._value(field, table[field.name], at, values)
            except Wrong as wrong:
                self.faults[at] = wrong.text
        return values

    def _value(self, field: Field, value: Any, at: str, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Give a value as the struct has it. Raises Wrong."""
        declared = field.type
        if isinstance(declared, inspect.VarTupleType) and isinstance(
            declared.item_type, inspect.StructType
        ):
            if not isinstance(value, list) or not 1 <= len(value) <= (declared.max_length or 0):
                raise Wrong(requirement(field))
            struct = declared.item_type.cls
            return [self._row(struct, row, f"{at}[{n}]") for n, row in enumerate(value)]
        return _READERS[type(declared)](field, value, values)

    def _row(self, struct: type[msgspec.Struct], row: object, at: str) -> dict[str, Any]:
        if isinstance(row, dict):
            return self.read(struct, row, f"{at}.")
        self.faults[at] = NOT_AN_OBJECT
        return {}


def _text(field: Field, value: Any, _values: object) -> str:  # noqa: ANN401
    declared = cast("inspect.StrType", field.type)
    if not isinstance(value, str):
        raise Wrong(requirement(field))
    if declared.pattern is None:
        return shown_text(value, declared.max_length or TITLE_MAX)
    if not re.fullmatch(declared.pattern, value) or "\n" in value:
        raise Wrong(requirement(field))
    return value


def _integer(field: Field, value: Any, values: Mapping[str, Any]) -> int:  # noqa: ANN401
    declared = cast("inspect.IntType", field.type)
    low, high = cast("int", declared.ge), cast("int", declared.le)
    high = min(high, values.get(field.up_to, high))
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise Wrong(requirement(field, high))


def _flag(field: Field, value: Any, _values: object) -> bool:  # noqa: ANN401
    if isinstance(value, bool):
        return value
    raise Wrong(requirement(field))


def _choice(field: Field, value: Any, _values: object) -> str:  # noqa: ANN401
    choices = cast("inspect.LiteralType", field.type).values
    if isinstance(value, str) and value in choices:
        return value
    raise Wrong(requirement(field))


def _moment(_field: Field, value: Any, _values: object) -> datetime:  # noqa: ANN401
    return parse_moment(value)


def _codes(field: Field, value: Any, _values: object) -> tuple[str, ...]:  # noqa: ANN401
    if isinstance(value, list) and value and all(isinstance(code, str) for code in value):
        return tuple(dict.fromkeys(value))
    raise Wrong(requirement(field))


_READERS: Final[dict[type[inspect.Type], Callable[[Field, Any, Mapping[str, Any]], Any]]] = {
    inspect.StrType: _text,
    inspect.IntType: _integer,
    inspect.BoolType: _flag,
    inspect.LiteralType: _choice,
    inspect.DateTimeType: _moment,
    inspect.VarTupleType: _codes,
}
"""How a value of each type is read: it is given back as the struct has it, or Wrong says why.

A setting of another type fails the test of the reader, for want of an entry here.
"""


def decoder_fault(message: str, struct: object) -> tuple[str, Text]:
    """Word what msgspec's decoder says of a body of type ``struct``: the field, and its fault.

    msgspec names the field, or the unknown or missing one; the words are ours. A body that is no
    object, or a fault that no field is named for, is the field ``body``.
    """
    if found := _PLACE.search(message):
        name = found[1]
        known = fields_of(struct) if _is_struct(struct) else {}
        return (name, requirement(known[name])) if name in known else (name, UNKNOWN)
    if found := _NAMED.search(message):
        return found[2], UNKNOWN if found[1] == "unknown" else MISSING
    return "body", NOT_AN_OBJECT


def _is_struct(type_: object) -> TypeGuard[type[msgspec.Struct]]:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


_PLACE: Final = re.compile(r"\$\.([a-z_]+)")
_NAMED: Final = re.compile(r"(unknown|missing required) field `([^`]{1,64})`")
