"""Every time that is given to the engine is read by one strict reader, with one pair of bounds."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from service import ADMIN, PAST, Client, Service, campaign_table, in_s
from test_cli import CAMPAIGN

from sale.domain.campaign_file import InvalidCampaign, parse_campaign_toml
from sale.domain.clock import MOMENT_MAX, MOMENT_MIN, nearest, parse_moment, rfc3339, to_ms

OTHER_FORMS = (
    "2030-01-01X09:00:00Z",
    "2030-01-01 09:00:00Z",
    "2030-W01-2T09:00:00Z",
    "2030-001T09:00:00Z",
    "20300101T090000Z",
    "2030-01-01T09:00Z",
    "2030-01-01T09Z",
    "2030-01-01",
    "2030-01-01T09:00:00",
    "2030-01-01T09:00:00+08",
    "2030-01-01T09:00:00+0800",
    "2030-01-01T09:00:00+08:00:30",
    "2030-01-01T09:00:00+24:00",
    "2030-01-01T09:00:00+08:60",
    "2030-01-01T09:00:00,5Z",
    "2030-01-01T09:00:00.Z",
    "2030-01-01T09:00:00.1234567890Z",
    "2030-01-01T24:00:00Z",
    "2030-01-01T23:59:60Z",
    "2030-02-30T09:00:00Z",
    "2030-01-01T09:00:00Z\n",
    " 2030-01-01T09:00:00Z",
    "2030-01-01T09:00:00\u221208:00",
    "\uff12030-01-01T09:00:00Z",
    "0000-01-01T00:00:00Z",
    "tomorrow",
    "",
)
OUT_OF_BOUNDS = (
    "9999-12-31T23:59:59Z",
    "9999-12-31T23:59:59-23:59",
    "0001-01-01T00:00:00+08:00",
    "1999-12-31T23:59:59.999Z",
    "2000-01-01T00:00:00+08:00",
    "2100-01-01T00:00:00.001Z",
    "2100-01-01T00:00:00-00:01",
)


@pytest.mark.parametrize("text", OTHER_FORMS)
def test_other_forms_than_rfc_3339_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="RFC 3339"):
        parse_moment(text)


@pytest.mark.parametrize("text", OUT_OF_BOUNDS)
def test_moments_out_of_bounds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="2000-01-01 to 2100-01-01"):
        parse_moment(text)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2030-01-01T09:00:00Z", datetime(2030, 1, 1, 9, tzinfo=UTC)),
        ("2030-01-01t09:00:00z", datetime(2030, 1, 1, 9, tzinfo=UTC)),
        ("2030-01-01T09:00:00-00:00", datetime(2030, 1, 1, 9, tzinfo=UTC)),
        ("2030-01-01T09:00:00.5+08:00", datetime(2030, 1, 1, 1, 0, 0, 500_000, tzinfo=UTC)),
        ("2030-01-01T09:00:00.123999999Z", datetime(2030, 1, 1, 9, 0, 0, 123_000, tzinfo=UTC)),
        ("2030-01-01T09:00:00+23:59", datetime(2029, 12, 31, 9, 1, tzinfo=UTC)),
        ("2000-01-01T00:00:00Z", MOMENT_MIN),
        ("2100-01-01T00:00:00Z", MOMENT_MAX),
        ("2024-02-29T12:00:00Z", datetime(2024, 2, 29, 12, tzinfo=UTC)),
    ],
)
def test_rfc_3339_is_read_to_the_millisecond(text: str, moment: datetime) -> None:
    assert parse_moment(text) == moment


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        True,
        datetime(2030, 1, 1, 9),  # noqa: DTZ001 - TOML's local date-time
        datetime(2030, 1, 1, tzinfo=UTC).date(),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=8))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-8))),
    ],
)
def test_values_that_are_no_moment_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_moment(value)


@pytest.mark.parametrize("ms", [10**18, -(10**18), 10**400, -5, 0, 253_402_300_799_000])
def test_every_number_has_a_wording(ms: int) -> None:
    kept = to_ms(datetime.fromisoformat(rfc3339(ms)))
    assert kept == nearest(ms)
    assert (kept == ms) is (abs(ms) < 10**12)


def campaign_file(more: str = "") -> str:
    return CAMPAIGN.format(id="a", more=more)


@pytest.mark.parametrize(
    "moment",
    [
        "2030-01-01T09:00:00",
        "2030-01-01",
        "09:00:00",
        "9999-12-31T23:59:59Z",
        "0001-01-01T00:00:00+08:00",
        '"2030-W01-2T09:00:00Z"',
        "1893459600",
    ],
)
def test_file_with_a_bad_moment_names_the_field(moment: str) -> None:
    unions = frozenset({"district"})
    for text, field in (
        (campaign_file(f"opens_at = {moment}"), "opens_at"),
        (campaign_file(f"closes_at = {moment}"), "closes_at"),
        (campaign_file() + f"starts_at = {moment}", "showings[0].starts_at"),
    ):
        with pytest.raises(InvalidCampaign) as wrong:
            parse_campaign_toml(text, unions)
        assert list(wrong.value.problems) == [field]


def test_file_takes_a_toml_moment_and_a_text() -> None:
    for moment in ("2030-01-01 09:00:00.123456+08:00", '"2030-01-01T09:00:00.123456+08:00"'):
        read = parse_campaign_toml(campaign_file(f"opens_at = {moment}"), frozenset({"district"}))
        assert read.opens_at == datetime(2030, 1, 1, 1, 0, 0, 123_000, tzinfo=UTC)


async def test_bad_moment_is_refused_on_every_way_in(
    service: Service, client: Client, tmp_path: Path
) -> None:
    draft = await client.campaign(opens_at=None)
    before = await _seq(client, draft)

    async def created(**changes: Any) -> str:
        table = campaign_table(service.new_id(), **changes)
        seen = await client.ask("POST", ADMIN, service.admin_token, json=table)
        assert seen.status == 400, seen
        return str(seen.json()["field"])

    for at in ("9999-12-31T23:59:59Z", "2030-01-01X09:00:00Z", "2030-01-01T09:00:00+08:00:30"):
        showing = {"id": "s", "title": "t", "tickets": 1, "starts_at": at}
        assert await created(opens_at=at) == "opens_at"
        assert await created(closes_at=at) == "closes_at"
        assert await created(showings=[showing]) == "showings[0].starts_at"
        seen = await client.step(draft, "schedule", at=at)
        assert (seen.status, seen.json()["field"]) == (400, "at")
        ran = await service.asale("campaign", "schedule", draft, "--at", at)
        assert (ran.status != 0, ran.err.count("\n"), "at: " in ran.err) == (True, 1, True)
    assert await _seq(client, draft) == before
    assert (await client.get("/api/v1/campaigns")).status == 200


async def test_schedule_says_that_an_opening_is_past(service: Service, client: Client) -> None:
    # Given
    drafts = [await client.campaign(opens_at=None) for _ in range(2)]
    # When
    past = await service.asale("campaign", "schedule", drafts[0], "--at", PAST)
    future = await service.asale("campaign", "schedule", drafts[1], "--at", in_s(60))
    # Then
    assert (past.status, "sells already" in past.err) == (0, True)
    assert (future.status, future.err) == (0, "")


async def test_schedule_stays_before_the_closing(service: Service, client: Client) -> None:
    closes = in_s(600)
    draft = await client.campaign(opens_at=None, closes_at=closes)
    assert (await client.step(draft, "schedule")).json()["field"] == "at"
    for at in (closes, in_s(601)):
        assert (await client.step(draft, "schedule", at=at)).json()["field"] == "at"
    assert (await client.step(draft, "schedule", at=in_s(300))).status == 200
    late = await service.asale("campaign", "schedule", draft, "--at", in_s(601))
    assert (late.status, "before closes_at" in late.err) == (1, True)


async def _seq(client: Client, campaign: str) -> int:
    live = await client.get(f"{ADMIN}/{campaign}/live", client.service.admin_token)
    return int(live.json()["ledger_seq"])
