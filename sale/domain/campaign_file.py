"""Reads campaigns from files and from the API's bodies, and names every fault in one go.

``fields.py`` reads each field by its type; rules over several fields are in ``_broken_rules``.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from sale.domain.campaign import HOLD_S, Campaign
from sale.domain.fields import NOT_AN_OBJECT, Reader, fields_of
from sale.domain.text import Text
from sale.files import brief, parse_toml

FAULTS_SHOWN_MAX: Final = 20


class InvalidCampaign(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A campaign file or body is wrong; ``problems`` maps each field to what is wrong with it.

    ``text`` says it in both languages.
    """

    def __init__(self, faults: dict[str, Text]) -> None:
        shown = [what.of_field(field) for field, what in faults.items()][:FAULTS_SHOWN_MAX]
        if more := len(faults) - len(shown):
            shown.append(Text(f"另有 {more} 处", f"and {more} more"))
        self.text = Text("；".join(each.zh for each in shown), "; ".join(each.en for each in shown))
        self.problems = {field: what.en for field, what in faults.items()}
        super().__init__(self.text.en)


def parse_campaign_toml(text: str, unions: frozenset[str]) -> Campaign:
    """Read a campaign file. Raises InvalidCampaign naming every wrong field in one go."""
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise InvalidCampaign({"file": Text(str(error), str(error))}) from None
    return parse_campaign(table, unions)


def parse_campaign(table: object, unions: frozenset[str]) -> Campaign:
    """Check a campaign given as a table (TOML, or JSON with RFC 3339 strings for times).

    ``unions`` are the known union codes. Raises InvalidCampaign naming every wrong field at once.
    """
    if not isinstance(table, dict):
        raise InvalidCampaign({"campaign": NOT_AN_OBJECT})
    reader = Reader()
    values = reader.read(Campaign, table)
    for field, what in _broken_rules(values, unions):
        reader.faults.setdefault(field, what)
    if reader.faults:
        raise InvalidCampaign(reader.faults)
    if values["payment"] == "online" and values["hold_s"] is None:
        values["hold_s"] = HOLD_S
    return msgspec.convert(values, Campaign)


def request_type() -> type[msgspec.Struct]:
    """Give the type that describes a campaign as a body: ``Campaign`` as files may have it."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(Campaign):
        about = fields_of(Campaign)[field.name]
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


def _broken_payment(values: Mapping[str, Any]) -> Iterator[tuple[str, Text]]:
    payment = values.get("payment")
    if payment == "online" and values.get("price_fen") == 0:
        yield "payment", Text("为 online 时 price_fen 必须大于 0", "online needs price_fen above 0")
    if payment not in {None, "online"} and values.get("hold_s") is not None:
        yield "hold_s", Text("只在 payment 为 online 时有效", 'needs payment = "online"')
    if payment == "none" and values.get("price_fen", 0) > 0:
        yield "payment", Text("为 none 时 price_fen 必须是 0", "none needs price_fen = 0")


def _broken_rules(values: Mapping[str, Any], unions: frozenset[str]) -> Iterator[tuple[str, Text]]:
    """Give each rule over several fields that is broken: a field, and what is wrong with it.

    A field that is wrong by itself is missing from ``values``.
    """
    yield from _broken_payment(values)
    opens_at, closes_at = values.get("opens_at"), values.get("closes_at")
    if opens_at and closes_at and closes_at <= opens_at:
        yield "closes_at", Text("必须晚于 opens_at", "must be after opens_at")
    codes = values.get("unions", ())
    if "*" not in codes or len(codes) > 1:
        unknown = sorted({*codes} - unions)
        if unknown:
            codes = brief(", ".join(unknown))[1:-1]
            yield "unions", Text(f"没有这些工会：{codes}", f"unknown union: {codes}")
    owner = values.get("owner")
    if owner is not None and owner not in unions:
        yield "owner", Text(f"没有工会 {owner!r}", f"{owner!r} is not a known union")
    seen: set[str] = set()
    for number, showing in enumerate(values.get("showings", ())):
        showing_id = showing.get("id", "")
        if showing_id in seen:
            twice = Text(f"{showing_id!r} 出现了两次", f"{showing_id!r} is there twice")
            yield f"showings[{number}].id", twice
        limit, most = showing.get("showing_limit"), values.get("card_limit")
        if limit is not None and most is not None and limit > most:
            yield (
                f"showings[{number}].showing_limit",
                Text(f"不能大于 card_limit（{most}）", f"must be at most card_limit ({most})"),
            )
        seen.add(showing_id)
