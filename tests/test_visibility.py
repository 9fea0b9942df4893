"""Every reader shows an account its campaigns by one rule; a hidden one is answered as unknown."""

import asyncio
from typing import Any

import pytest
from service import ADMIN, Client, Seen, Service, campaign_table, in_s

from sale.bootstrap import open_stores
from sale.config import Settings
from sale.operators.campaigns import Actor
from sale.operators.rehearsal import Rehearsals

AUDIT_LOG = "/api/v1/admin/audit-log"
OWNER = "dongsi"
STATES = ("draft", "scheduled", "open", "deleted")
RUNNERS = ("admin", "operator")
SECRET = "未公布的名字"
Campaigns = dict[str, str]


async def make(client: Client, state: str, owner: str = OWNER) -> str:
    """A campaign of that union, with a step of somebody's in its log."""
    opens_at = {"scheduled": in_s(3_600), "open": in_s(-60)}.get(state)
    campaign = await client.campaign(owner=owner, opens_at=opens_at, title=SECRET)
    assert (await client.step(campaign, "stock", showing="general", add=1)).status == 200
    if state == "deleted":
        token = client.service.admin_token
        assert (await client.ask("DELETE", f"{ADMIN}/{campaign}", token)).status == 204
    return campaign


@pytest.fixture
async def campaigns(client: Client) -> Campaigns:
    return {state: await make(client, state) for state in STATES}


async def alike(client: Client, method: str, path: str, campaign: str, **how: Any) -> Seen:
    """Send a request whose answer must equal that of a campaign that does not exist."""
    invented = client.service.new_id()
    seen = await client.ask(method, path.format(campaign), **how)
    other = await client.ask(method, path.format(invented), **how)
    same = (other.status, other.body.replace(invented.encode(), campaign.encode()))
    assert (seen.status, seen.body) == same, (method, path)
    return seen


async def log_of(client: Client, token: str, campaign: str | None = None) -> list[dict[str, Any]]:
    query = "?limit=200" if campaign is None else f"?campaign={campaign}"
    seen = await client.get(AUDIT_LOG + query, token)
    assert seen.status == 200
    return list(seen.json()["items"])


@pytest.mark.parametrize("union", [OWNER, "longtan", "district"])
@pytest.mark.parametrize("role", [*RUNNERS, "clerk", "auditor"])
async def test_account_sees_and_runs_by_one_rule(
    service: Service, client: Client, campaigns: Campaigns, role: str, union: str
) -> None:
    _, token = await asyncio.to_thread(service.operator, role, union)
    own = union in {OWNER, "district"}
    listed = {
        each["id"] for each in (await client.get(f"{ADMIN}?limit=200", token)).json()["items"]
    }
    for state, campaign in campaigns.items():
        seen = state in {"scheduled", "open"} or (own and state == "draft")
        assert (campaign in listed) is seen, state
        for path in (f"{ADMIN}/{{}}", f"{ADMIN}/{{}}/live"):
            if seen:
                assert (await client.get(path.format(campaign), token)).status == 200, state
            else:
                assert (await alike(client, "GET", path, campaign, token=token)).status == 404
        told = {"showing": "general", "add": 1, "reason": "short"}
        step: dict[str, Any] = {"token": token, "json": told}
        if seen:
            allowed = 200 if own and role in RUNNERS else 403
            done = await client.ask("POST", f"{ADMIN}/{campaign}/stock", **step)
            assert done.status == allowed, state
        else:
            taken = await alike(client, "POST", f"{ADMIN}/{{}}/stock", campaign, **step)
            deleted = await alike(client, "DELETE", f"{ADMIN}/{{}}", campaign, token=token)
            hidden = 404 if role in RUNNERS else 403  # the role is checked first
            assert (taken.status, deleted.status) == (hidden, hidden)
        if role == "clerk":
            assert (await client.get(f"{AUDIT_LOG}?campaign={campaign}", token)).status == 403
        else:
            rows = await log_of(client, token, campaign)
            assert bool(rows) is (seen or own), state


@pytest.mark.parametrize("role", ["admin", "operator", "auditor"])
async def test_unions_audit_log_tells_nothing_of_others(
    service: Service, client: Client, campaigns: Campaigns, role: str
) -> None:
    own = await make(client, "draft", "longtan")
    card = service.card()
    revoked = await service.asale("cards", "revoke", card.no, "--reason", "lost")
    assert revoked.status == 0
    _, token = await asyncio.to_thread(service.operator, role, "longtan")
    rows = await log_of(client, token)
    assert rows[0]["campaign"] == own
    told = {row["campaign"] for row in rows}
    assert None not in told
    assert told & set(campaigns.values()) == {campaigns["scheduled"], campaigns["open"]}
    everything = await log_of(client, service.admin_token)
    assert {None, *campaigns.values()} <= {row["campaign"] for row in everything}


async def test_audit_log_pages_by_what_is_seen(
    service: Service, client: Client, campaigns: Campaigns
) -> None:
    own = await make(client, "draft", "longtan")
    _, token = await asyncio.to_thread(service.operator, "auditor", "longtan")
    cursor, rows = "", []
    for _ in range(200):
        page = (await client.get(f"{AUDIT_LOG}?limit=2{cursor}", token)).json()
        rows += page["items"]
        if page["next"] is None or own in {row["campaign"] for row in page["items"][1:]}:
            break
        assert len(page["items"]) == 2
        cursor = f"&cursor={page['next']}"
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows}, reverse=True)
    assert {campaigns["draft"], campaigns["deleted"]}.isdisjoint(row["campaign"] for row in rows)


@pytest.mark.parametrize("role", RUNNERS)
async def test_create_over_hidden_id_does_not_say_why(
    service: Service, client: Client, campaigns: Campaigns, role: str
) -> None:
    _, token = await asyncio.to_thread(service.operator, role, "longtan")
    for state in ("draft", "scheduled", "open"):
        table = campaign_table(campaigns[state], owner="longtan", opens_at=None)
        seen = await client.ask("POST", ADMIN, token, json=table)
        if state == "draft":
            assert (seen.status, seen.code, seen.json()["field"]) == (403, "forbidden", "id")
            words = seen.body.decode()
            assert not any(word in words for word in (SECRET, OWNER, "draft", "already", "exist"))
        else:
            assert (seen.status, seen.code) == (409, "wrong-state")
    elsewhere = campaign_table(service.new_id(), owner=OWNER)
    assert (await client.ask("POST", ADMIN, token, json=elsewhere)).status == 403


async def test_reused_id_tells_each_union_its_own_life(
    service: Service, client: Client, campaigns: Campaigns
) -> None:
    campaign = campaigns["deleted"]
    table = campaign_table(campaign, owner="longtan", opens_at=None, title="龙潭的")
    _, new = await asyncio.to_thread(service.operator, "operator", "longtan")
    _, old = await asyncio.to_thread(service.operator, "auditor", OWNER)
    assert (await client.ask("POST", ADMIN, new, json=table)).status == 201
    assert [row["action"] for row in await log_of(client, new, campaign)] == ["campaign.created"]
    before = await log_of(client, old, campaign)
    assert [row["action"].partition(".")[2] for row in before] == [
        *("deleted", "stock_added", "created")
    ]
    assert (await client.get(f"{ADMIN}/{campaign}", old)).status == 404
    opened = await client.ask("POST", f"{ADMIN}/{campaign}/open", new, json={})
    assert opened.status == 200
    assert len(await log_of(client, old, campaign)) == 5
    assert len(await log_of(client, new, campaign)) == 2


async def test_rehearsal_of_other_union_is_hidden(service: Service, client: Client) -> None:
    draft = await make(client, "draft")
    actor = Actor("cli:test")
    async with open_stores(Settings(data_dir=service.data_dir)) as stores:
        rehearsals = Rehearsals(stores.redis, stores.scripts, stores.pool)
        original = await rehearsals.original(draft)
        begun = await rehearsals.begin(original, actor, "try", opens_in_s=3_600, lasts_s=9)
        copy = begun.campaign.id
        for union in (OWNER, "longtan"):
            _, token = await asyncio.to_thread(service.operator, "auditor", union)
            pages = await client.pages(f"{ADMIN}?limit=200&rehearsals=true", token)
            listed = {each["id"] for page in pages for each in page}
            assert (copy in listed) is (union == OWNER)
            seen = await client.get(f"{ADMIN}/{copy}", token)
            assert seen.status == (200 if union == OWNER else 404)
            assert bool(await log_of(client, token, copy)) is (union == OWNER)
        await rehearsals.purge(copy, actor, "over")


@pytest.mark.parametrize("value", ["AAA", "", "TRUE", "1", "true "])
async def test_rehearsals_flag_is_true_or_false(client: Client, value: str) -> None:
    seen = await client.get(f"{ADMIN}?rehearsals={value}", client.service.admin_token)
    assert (seen.status, seen.json()["field"]) == (400, "rehearsals")
