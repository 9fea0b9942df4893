"""Operators' steps over HTTP: states, reasons, repeats, and the audit log."""

import asyncio
from datetime import datetime
from typing import Any

import pytest
from service import (
    ADMIN,
    CAMPAIGNS,
    PAST,
    Client,
    Seen,
    Service,
    campaign_table,
    in_s,
    new_key,
    showings,
)
from waiting import until

AUDIT_LOG = "/api/v1/admin/audit-log"
STEPS = ("schedule", "open", "pause", "resume", "close", "reopen")


async def create(client: Client, token: str, table: Any, **headers: str) -> Seen:
    return await client.ask("POST", ADMIN, token, json=table, headers=headers)


async def take_step(client: Client, token: str | None, campaign: str, step: str) -> Seen:
    return await client.ask("POST", f"{ADMIN}/{campaign}/{step}", token, json={"reason": "because"})


async def told(client: Client, campaign: str) -> list[dict[str, Any]]:
    """The audit log of a campaign, oldest first."""
    seen = await client.get(f"{AUDIT_LOG}?campaign={campaign}", client.service.admin_token)
    assert seen.status == 200
    return list(seen.json()["items"][::-1])


async def test_state_and_audit_log_follow_each_step(service: Service, client: Client) -> None:
    name, token = await asyncio.to_thread(service.operator, "admin")
    table = campaign_table(service.new_id(), opens_at=None)
    made = await create(client, token, table)
    assert (made.status, made.json()["state"]) == (201, "draft")
    assert made.headers["Location"] == f"{ADMIN}/{table['id']}"
    moment = in_s(3_600)

    async def step(action: str, state: str, **fields: Any) -> None:
        seen = await client.ask(
            "POST",
            f"{ADMIN}/{table['id']}/{action}",
            token,
            json={"reason": f"why {action}", **fields},
        )
        assert (seen.status, seen.json()["state"]) == (200, state), seen

    await step("schedule", "scheduled", at=moment)
    seen = await client.get(f"{CAMPAIGNS}/{table['id']}")
    assert (
        abs(
            datetime.fromisoformat(seen.json()["opens_at"]) - datetime.fromisoformat(moment)
        ).total_seconds()
        < 0.002
    )
    await step("open", "open")
    await step("pause", "paused")
    await step("resume", "open")
    await step("stock", "open", showing="general", add=5)
    await step("close", "closed")
    await step("reopen", "open")

    entries = await told(client, table["id"])
    assert [entry["action"].rpartition(".")[2] for entry in entries] == [
        *("created", "scheduled", "opened", "paused", "resumed", "stock_added", "closed"),
        "reopened",
    ]
    assert {entry["actor"] for entry in entries} == {f"operator:{name}"}
    assert {entry["target"] for entry in entries} == {table["id"]}
    added = next(entry for entry in entries if entry["action"].endswith("stock_added"))
    assert added["data"]["seq"] >= 1
    assert 5 in added["data"].values()
    assert [entry["reason"] for entry in entries] == [
        None,
        *(f"why {action}" for action in ("schedule", "open", "pause", "resume", "stock")),
        *("why close", "why reopen"),
    ]
    assert sorted(entry["at"] for entry in entries) == [entry["at"] for entry in entries]
    assert {entry["campaign"] for entry in entries} == {table["id"]}
    opened = (await client.get(f"{ADMIN}/{table['id']}", token)).json()
    assert datetime.fromisoformat(opened["opens_at"]) <= datetime.now().astimezone()


@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        ("draft", {"schedule", "open"}),
        ("scheduled", {"schedule", "open", "close"}),
        ("open", {"pause", "close"}),
        ("paused", {"resume", "close"}),
        ("closed", {"reopen"}),
    ],
)
async def test_every_other_step_of_a_state_is_refused_in_words(
    client: Client, state: str, allowed: set[str]
) -> None:
    for step in STEPS:
        campaign = await client.campaign(
            opens_at=None if state == "draft" else in_s(99) if state == "scheduled" else PAST
        )
        if state in {"paused", "closed"}:
            await client.step(campaign, "pause" if state == "paused" else "close")
        seen = await client.step(campaign, step, **({"at": in_s(9)} if step == "schedule" else {}))
        if step in allowed:
            assert seen.status == 200, (step, seen)
            continue
        assert (seen.status, seen.code) == (409, "wrong-state"), (step, seen)
        assert step in seen.json()["detail"]
        assert state in seen.json()["detail"]
        after = await client.get(f"{ADMIN}/{campaign}", client.service.admin_token)
        assert after.json()["state"] == state


async def test_new_token_or_disabled_account_ends_the_old_token(
    service: Service, client: Client
) -> None:
    name, old = await asyncio.to_thread(service.operator, "auditor")
    new = (await service.asale("operator", "token", name, "--json")).json()["token"]
    assert (await client.get(ADMIN, old)).status == 401
    assert (await client.get(ADMIN, new)).status == 200
    assert (await service.asale("operator", "disable", name)).status == 0
    assert (await client.get(ADMIN, new)).status == 401


@pytest.mark.parametrize("step", ["pause", "reopen", "stock"])
async def test_step_without_its_required_reason_is_400(client: Client, step: str) -> None:
    campaign = await client.campaign()
    if step == "reopen":
        await client.step(campaign, "close")
    path = f"{ADMIN}/{campaign}/{step}"
    fields: dict[str, Any] = {"showing": "general", "add": 1} if step == "stock" else {}
    for reason in ({}, {"reason": None}, {"reason": ""}, {"reason": "   "}, {"reason": "x" * 501},
                   {"reason": 1}, {"reason": "\u200b"}, {"reason": "a\u202eb"},
                   {"reason": "a\nb"}):  # fmt: skip
        seen = await client.ask("POST", path, client.service.admin_token, json=fields | reason)
        assert (seen.status, seen.code) == (400, "invalid-request"), reason
        assert "reason" in seen.json()["detail"], reason
    assert (await client.ask("POST", path, client.service.admin_token)).status in {400, 415}
    assert (await client.step(campaign, step, "x" * 500, **fields)).status == 200


async def test_stock_for_an_unknown_showing_names_those_there_are(client: Client) -> None:
    several = [{"id": f"s{number}", "title": "一场", "tickets": 1} for number in range(12)]
    campaign = await client.campaign(showings=several)
    fields = {"showing": "nowhere", "add": 1, "reason": "x"}
    seen = await client.ask(
        "POST", f"{ADMIN}/{campaign}/stock", client.service.admin_token, json=fields
    )
    assert (seen.status, seen.json()["field"]) == (400, "showing")
    told = (
        "showing: there is no 'nowhere'; there is s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 and 2 more"
    )
    assert seen.json()["detail_en"] == told
    assert "s9 等 12 场" in seen.json()["detail"]


async def test_stock_repeated_under_its_key_is_added_once(
    service: Service, client: Client, spread: Client
) -> None:
    campaign, key = await client.campaign(showings=showings(10, 10)), new_key()
    wish = {"showing": "b", "add": 7, "reason": "short of demand"}

    async def add(with_key: str | None, **changes: Any) -> Seen:
        return await spread.ask(
            "POST",
            f"{ADMIN}/{campaign}/stock",
            service.admin_token,
            json=wish | changes,
            headers={} if with_key is None else {"Idempotency-Key": with_key},
        )

    seen = await asyncio.gather(*(add(key) for _ in range(10)))
    assert {one.status for one in seen} == {200}
    assert await client.remaining(campaign) == [10, 17]
    for change in ({"add": 8}, {"showing": "a"}, {"reason": "other"}):
        other = await add(key, **change)
        assert (other.status, other.code) == (422, "idempotency-mismatch"), change
    await add(None)
    await add(None)
    assert await client.remaining(campaign) == [10, 31]
    assert (await add("not a key")).code == "invalid-request"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"add": 0}, "add"),
        ({"add": -1}, "add"),
        ({"add": 10_000_001}, "add"),
        ({"add": 10_000_000}, "add"),
        ({"add": 10**30}, "add"),
        ({"add": 1.5}, "add"),
        ({"add": True}, "add"),
        ({"add": "1"}, "add"),
        ({"add": None}, "add"),
        ({"showing": "z"}, "showing"),
        ({"showing": None}, "showing"),
        ({"showing": "A!"}, "showing"),
        ({"remove": 1}, "remove"),
    ],
)
async def test_bad_stock_addition_is_400_and_changes_nothing(
    client: Client, fields: dict[str, Any], field: str
) -> None:
    campaign = await client.campaign(tickets=5)
    wish: dict[str, Any] = {"showing": "general", "add": 1} | fields
    seen = await client.step(campaign, "stock", **wish)
    assert (seen.status, seen.json().get("field")) == (400, field)
    assert await client.remaining(campaign) == [5]


async def test_step_repeated_under_its_key_is_taken_once(service: Service, client: Client) -> None:
    campaign, key = await client.campaign(), {"Idempotency-Key": new_key()}
    path, told_why = f"{ADMIN}/{campaign}/pause", {"json": {"reason": "lunch"}}
    for _ in range(2):
        seen = await client.ask("POST", path, service.admin_token, headers=key, **told_why)
        assert seen.status == 200
    assert len([entry for entry in await told(client, campaign) if entry["reason"] == "lunch"]) == 1

    await client.step(campaign, "resume")
    late = await client.ask("POST", path, service.admin_token, headers=key, **told_why)
    assert (late.status, late.json()["state"]) == (200, "open")


async def test_every_wrong_field_of_a_campaign_body_is_named(
    service: Service, client: Client
) -> None:
    table = campaign_table(
        "Not An Id",
        title="",
        category="food",
        price_fen=-1,
        payment="cash",
        card_limit=0,
        order_max=2.5,
        opens_at="tomorrow",
        closes_at="2020-01-01T00:00:00",
        unions=["atlantis"],
        owner="nobody",
        draft="no",
        showings=[{"id": "a", "title": "a", "tickets": -1}, {"id": "a", "title": "b"}, 3],
        colour="red",
    )

    seen = await create(client, service.admin_token, table)

    assert (seen.status, seen.code) == (400, "invalid-request")
    assert set(seen.json()["fields"]) == {
        *("id", "title", "category", "price_fen", "payment", "card_limit", "order_max"),
        *("opens_at", "closes_at", "unions", "owner", "draft", "colour"),
        *("showings[0].tickets", "showings[1].id", "showings[1].tickets", "showings[2]"),
    }
    for field in seen.json()["fields"]:
        assert field in seen.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b'"x"', b"\xff"])
async def test_campaign_body_that_is_no_object_is_400(
    service: Service, client: Client, body: bytes
) -> None:
    seen = await client.ask(
        "POST",
        ADMIN,
        service.admin_token,
        data=body,
        headers={"Content-Type": "application/json"},
    )
    assert (seen.status, seen.code) == (400, "invalid-request")


async def test_taken_id_is_409_and_the_same_key_is_a_repeat(
    service: Service, client: Client
) -> None:
    table, key = campaign_table(service.new_id()), new_key()
    first = await create(client, service.admin_token, table, **{"Idempotency-Key": key})
    again = await create(client, service.admin_token, table, **{"Idempotency-Key": key})
    other = await create(client, service.admin_token, table)
    assert (first.status, again.status) == (201, 201)
    assert again.json()["id"] == table["id"]
    assert (other.status, other.code) == (409, "wrong-state")
    assert table["id"] in other.json()["detail"]


async def test_only_drafts_can_be_deleted_and_made_anew(service: Service, client: Client) -> None:
    draft = await client.campaign(draft=True)
    assert (await client.ask("DELETE", f"{ADMIN}/{draft}", service.admin_token)).status == 204
    for path in ("", "/live"):
        assert (await client.get(f"{ADMIN}/{draft}{path}", service.admin_token)).status == 404
    assert (await client.ask("DELETE", f"{ADMIN}/{draft}", service.admin_token)).status == 404
    assert (await take_step(client, service.admin_token, draft, "open")).status == 404

    anew = await create(client, service.admin_token, campaign_table(draft, tickets=1))
    assert anew.status == 201
    assert (await client.buy(draft, service.card().token)).status == 201

    seen = await client.ask("DELETE", f"{ADMIN}/{draft}", service.admin_token)
    assert (seen.status, seen.code) == (409, "wrong-state")


async def test_live_view_has_stock_and_ledger_position(service: Service, client: Client) -> None:
    campaign = await client.campaign(tickets=10)
    for card in service.cards(4):
        await client.buy(campaign, card.token, 2)

    live = (await client.get(f"{ADMIN}/{campaign}/live", service.admin_token)).json()

    assert (live["id"], live["state"]) == (campaign, "open")
    assert live["showings"] == [{"id": "general", "tickets": 10, "remaining": 2}]
    assert live["ledger_seq"] >= 5
    await until(lambda: client.all_applied(campaign), within_s=5)


async def test_audit_log_distinguishes_actors_of_one_name(service: Service, client: Client) -> None:
    name = "clock"
    await service.asale("operator", "add", name, "--role", "admin")
    token = (await service.asale("operator", "token", name, "--json")).json()["token"]
    campaign = await client.campaign()
    assert (await take_step(client, token, campaign, "pause")).status == 200
    await until(lambda: client.all_applied(campaign), within_s=5)
    paused = [entry for entry in await told(client, campaign) if "paused" in entry["action"]]
    assert [entry["actor"] for entry in paused] == ["operator:clock"]


async def test_audit_log_pages_have_each_entry_once_newest_first(
    service: Service, client: Client
) -> None:
    campaign = await client.campaign()
    for _ in range(3):
        await client.step(campaign, "pause")
        await client.step(campaign, "resume")
    path = f"{AUDIT_LOG}?campaign={campaign}"
    everything = (await client.get(path, service.admin_token)).json()["items"]
    pages = await client.pages(f"{path}&limit=3", service.admin_token)
    assert all(len(page) <= 3 for page in pages)
    found = [entry for page in pages for entry in page]
    assert found == everything
    assert len(found) >= 7
    moments = [entry["at"] for entry in found]
    assert moments == sorted(moments, reverse=True)
    for query, field in (
        ("cursor=!", "cursor"),
        ("campaign=%00", "campaign"),
        ("limit=0", "limit"),
    ):
        bad = await client.get(f"{AUDIT_LOG}?{query}", service.admin_token)
        assert (bad.status, bad.json()["field"]) == (400, field)
    other = await client.get(f"{AUDIT_LOG}?campaign=nothing", service.admin_token)
    assert other.json() == {"items": [], "next": None}


async def test_audit_log_of_a_revocation_has_actor_and_masked_card(
    service: Service, client: Client
) -> None:
    card = service.card()
    await service.asale("cards", "revoke", card.no, "--reason", "lost it", "--as", "hotline-7")
    seen = await client.get(AUDIT_LOG, service.admin_token)
    entry = next(each for each in seen.json()["items"] if each["actor"] == "hotline-7")
    assert entry["reason"] == "lost it"
    assert "revoke" in entry["action"]
    assert entry["target"] == f"member {card.member}, card {'*' * 12}{card.no[-4:]}"
    assert entry["data"] == {"from": "active", "to": "cancelled"}
    assert card.no not in seen.body.decode()


@pytest.mark.parametrize("reason", ["a\x00b", "a\x1b[2Jb", "a\u0001"])
async def test_reason_postgresql_cannot_store_stays_out_of_ledger(
    client: Client, reason: str
) -> None:
    campaign = await client.campaign(5)
    for step in ("pause", "close"):
        assert (await client.step(campaign, step, reason=reason)).status == 400
    assert (await client.step(campaign, "pause", reason="全角　空格")).status == 200
    await until(lambda: client.all_applied(campaign))
