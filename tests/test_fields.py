"""A wrong field of a body is named and worded in both languages, in the engine's own words."""

from typing import Any

import msgspec
import pytest

from sale.api.problems import problem_answer
from sale.api.request import decode_body
from sale.api.schemas import OrderRequest
from sale.domain.problem import Refused
from sale.operators.steps import STEPS, ScheduleRequest, StockRequest

STOCK = {"reason": "x", "showing": "general", "add": 1}


@pytest.mark.parametrize(
    ("form", "body", "zh", "en"),
    [
        (
            OrderRequest, {"quantity": "2"},
            "quantity：必须是 1 到 1000 的整数", "quantity: must be a whole number from 1 to 1000",
        ),
        (
            OrderRequest, {"quantity": 0},
            "quantity：必须是 1 到 1000 的整数", "quantity: must be a whole number from 1 to 1000",
        ),
        (
            OrderRequest, {"quantity": 1, "showing": 1},
            "showing：必须是文字", "showing: must be a text",
        ),
        (OrderRequest, {}, "quantity：没有填写", "quantity: is missing"),
        (OrderRequest, {"quantity": 1, "x": 1}, "x：没有这个字段", "x: is not a known field"),
        (OrderRequest, [], "body：必须是一个对象", "body: must be an object"),
        (
            StockRequest, STOCK | {"add": True},
            "add：必须是 1 到 10000000 的整数", "add: must be a whole number from 1 to 10000000",
        ),
        (
            StockRequest, STOCK | {"reason": ""},
            "reason：必须是 1 到 500 个字符的文字", "reason: must be a text of 1 to 500 characters",
        ),
        (
            StockRequest, STOCK | {"showing": "General"},
            "showing：必须是 1 到 48 个小写字母、数字或 -",
            "showing: must be 1 to 48 of a-z, 0-9 and -",
        ),
        (
            ScheduleRequest, {"at": 3},
            "at：必须是带时区的日期和时间（RFC 3339），例如 2015-05-01T09:00:00+08:00",
            "at: must be a date and time with an offset (RFC 3339), as 2015-05-01T09:00:00+08:00",
        ),
    ],
)  # fmt: skip
def test_wrong_body_is_worded_in_both_languages(
    form: type[msgspec.Struct], body: object, zh: str, en: str
) -> None:
    told = refused(form, body)
    assert told["detail"].endswith(f"（{zh}）")
    assert told["detail_en"] == en
    assert told["field"] == en.partition(":")[0]


def test_no_step_quotes_the_decoder() -> None:
    for step in STEPS.values():
        for field in msgspec.structs.fields(step.request):
            for value in ({}, [], 1.5, "", 10**9):
                body = STOCK | {field.name: value}
                body = {name: body[name] for name in body if name in step.request.__struct_fields__}
                try:
                    told = refused(step.request, body)
                except ValueError:
                    continue  # it is a value of this field
                assert "`" not in told["detail"] + told["detail_en"]
                assert "Expected" not in told["detail"] + told["detail_en"]


def refused(form: type[msgspec.Struct], body: object) -> dict[str, Any]:
    """Give the problem document for a body. Raises ValueError where the body is right."""
    try:
        decode_body(msgspec.json.encode(body), msgspec.json.Decoder(form))
    except Refused as wrong:
        document: dict[str, Any] = msgspec.json.decode(problem_answer(wrong)[1])
        return document
    raise ValueError(f"{body} is right")
