"""A campaign's settings are declared once; reader, schema, views and scripts follow."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from stock_maker import campaign, open_stock

from sale.domain.campaign import Campaign, Terms
from sale.domain.campaign_file import InvalidCampaign, parse_campaign, request_type
from sale.domain.campaign_view import CampaignView, DeskView
from sale.stock import head

ROOT = Path(__file__).resolve().parents[1]
UNIONS = frozenset({"district", "dongsi"})


def table(**changes: Any) -> dict[str, Any]:
    whole = {
        "id": "films",
        "title": "五元看大片",
        "category": "culture",
        "price_fen": 500,
        "payment": "counter",
        "card_limit": 3,
        "showings": [{"id": "general", "title": "通用券", "tickets": 20}],
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def faults(**changes: Any) -> dict[str, str]:
    with pytest.raises(InvalidCampaign) as wrong:
        parse_campaign(table(**changes), UNIONS)
    return wrong.value.problems


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("id", "Films", "must be 1 to 48 of a-z, 0-9 and -"),
        ("id", "films\n", "must be 1 to 48 of a-z, 0-9 and -"),
        ("id", None, "is missing"),
        ("title", 3, "must be a text of 1 to 200 characters"),
        ("category", "food", "must be one of culture, education, health, living, sport"),
        ("price_fen", -1, "must be a whole number from 0 to 10000000"),
        ("price_fen", True, "must be a whole number from 0 to 10000000"),
        ("payment", "gold", "must be one of counter, none, online"),
        ("hold_s", 300, 'needs payment = "online"'),
        ("hold_s", 119, "must be a whole number from 120 to 1800"),
        ("cancel_until", "soon", "must be a date and time with an offset"),
        ("payment", "none", "none needs price_fen = 0"),
        ("card_limit", 0, "must be a whole number from 1 to 1000"),
        ("order_max", 4, "must be a whole number from 1 to 3"),
        ("opens_at", "2015-05-01", "must be a date and time with an offset"),
        ("unions", [], 'must be ["*"] or a list of union codes'),
        ("unions", ["*", "dongsi"], "unknown union: *"),
        ("unions", ["atlantis"], "unknown union: atlantis"),
        ("owner", "atlantis", "'atlantis' is not a known union"),
        ("draft", 1, "must be true or false"),
        ("showings", [], "must be a list of 1 to 500 showings"),
        ("rehearsal_of", "x", "is not a known field"),
        ("colour", "red", "is not a known field"),
    ],
)
def test_wrong_field_is_named_and_worded(field: str, value: object, says: str) -> None:
    told = faults(**{field: value})
    assert set(told) == {field}
    assert told[field].startswith(says)


def test_online_campaign_holds_five_minutes_unless_it_says_otherwise() -> None:
    assert parse_campaign(table(payment="online"), UNIONS).hold_s == 300
    assert parse_campaign(table(payment="online", hold_s=120), UNIONS).hold_s == 120
    assert faults(payment="online", price_fen=0) == {"payment": "online needs price_fen above 0"}
    showings = [{"id": "a", "title": "a", "tickets": 1, "showing_limit": 4}]
    assert set(faults(showings=showings)) == {"showings[0].showing_limit"}


def test_faults_of_all_fields_and_showings_are_told_in_one_go() -> None:
    told = faults(
        id="X",
        card_limit=0,
        order_max=2.5,
        opens_at="2020-01-02T00:00:00Z",
        closes_at="2020-01-01T00:00:00Z",
        showings=[{"id": "a", "title": "a", "tickets": -1}, {"id": "a", "title": "b"}, 3],
    )
    assert set(told) == {
        *("id", "card_limit", "order_max", "closes_at"),
        *("showings[0].tickets", "showings[1].id", "showings[1].tickets", "showings[2]"),
    }


def test_setting_left_out_takes_the_setting_that_bounds_it() -> None:
    assert parse_campaign(table(), UNIONS).order_max == 3
    assert parse_campaign(table(order_max=2), UNIONS).order_max == 2


def test_body_schema_has_the_fields_and_bounds_of_the_file() -> None:
    whole = msgspec.json.schema(request_type())
    schema = whole["$defs"]["CampaignRequest"]
    assert set(schema["properties"]) == set(Campaign.__struct_fields__) - {"rehearsal_of"}
    assert set(schema["required"]) == set(table())
    assert schema["properties"]["order_max"]["maximum"] == 1_000
    assert schema["additionalProperties"] is False


def test_each_view_shows_every_setting() -> None:
    for view in (CampaignView, DeskView):
        assert set(Terms.__struct_fields__) <= set(view.__struct_fields__)


async def test_head_holds_the_rules_by_their_names(redis: Redis) -> None:
    # given / when
    stock = await open_stock(redis, 5, order_max=2, unions=("dongsi", "district"))
    # then
    part = await head.RULES.read(redis, stock.id)
    assert head.unpacked_rules(part.rules) == {
        "price_fen": 500, "card_limit": 3, "order_max": 2, "unions": ",dongsi,district,",
        "payment": "counter",
    }  # fmt: skip
    made = campaign(5, order_max=2, unions=("dongsi", "district"))
    assert head.unpacked_rules(part.rules) == head.rules_of(made)


def test_only_one_module_spells_fields_of_a_head() -> None:
    """A field of a head is a string in ``stock/head.py`` and an attribute everywhere else."""
    call = re.compile(r"\b(?:hget|hmget|hset|hdel|read_heads|look)\(([^()]|\([^()]*\))*\)")
    names = "|".join(set(head.Head.__struct_fields__) - {"state"})
    spelled = {
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in (ROOT / "sale").rglob("*.py")
        if path.name != "head.py"
        for found in call.finditer(path.read_text("utf-8"))
        if re.search(rf"[\"'](?:{names})[\"']", found[0])
    }
    assert spelled == set()


def test_made_up_setting_is_one_line_of_struct_and_script(redis_url: str, tmp_path: Path) -> None:
    # given: the engine with a setting more, declared in one line and used in one
    shutil.copytree(ROOT / "sale", tmp_path / "sale")
    insert(
        tmp_path / "sale/domain/campaign.py",
        before="    owner: str = DISTRICT",
        line="    pairs_max: Annotated[int, Meta(ge=1, le=9), RULE] = 1\n",
    )
    insert(
        tmp_path / "sale/stock/lua/purchase.lua",
        before="      elseif live + quantity > limit then",
        line="      elseif quantity > 2 * rules.pairs_max then code = -11\n",
    )
    # when
    seen = subprocess.run(
        [sys.executable, Path(__file__).with_name("made_up_setting.py"), redis_url],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # then: the reader, the schema, both views, the ledger and the script have it
    assert seen.stderr == ""
    assert msgspec.json.decode(seen.stdout) == {
        "fault": "must be a whole number from 1 to 9",
        "schema": {"type": "integer", "minimum": 1, "maximum": 9, "default": 1},
        "views": [2, 2],
        "ledger": 2,
        "decisions": ["SOLD", "BAD_QUANTITY"],
    }


def insert(file: Path, *, before: str, line: str) -> None:
    text = file.read_text("utf-8")
    assert text.count(before) == 1
    file.write_text(text.replace(before, line + before), "utf-8")
