"""The table of routes: how a path is found, who may call what, and which statuses are answered."""

import asyncio
from typing import Any

import pytest
from multidict import CIMultiDict
from route_calls import DOCUMENT, STATE_BEFORE, all_of, body_of, name_of, prepared, step_of
from service import ADMIN, CAMPAIGNS, ORDERS, Card, Client, Seen, Service, end_holds, new_key
from waiting import until_equal

from sale.api.dispatch import MEMBER, OPERATOR
from sale.api.payments import NOTIFY
from sale.api.routes import ROUTES
from sale.http.routes import Key, Load, Route, RouteTable
from sale.operators.accounts import ROLES
from sale.operators.steps import STEPS
from sale.stock.rebuild import freeze

OWN, OTHER, DISTRICT = "dongsi", "longtan", "district"
NOBODY = {"anonymous", "stranger", "expired"}
CODES = {401: "unauthenticated", 403: "forbidden"}
NOT_PROVOKED = {"429", "503"}
"""A limit or a store at its end would be the whole service's; test_rate_limits, test_waiting_line
and the fault tests bring them about."""

DESCRIBED = [route for route in ROUTES if route.summary]


async def nothing(_: object) -> None:
    return None


def route(method: str, path: str) -> Route:
    return Route(method=method, path=path, handler=nothing)


@pytest.mark.parametrize(
    ("method", "path", "found", "parameters"),
    [
        ("GET", "/", "/", {}),
        ("GET", "/a", "/a", {}),
        ("HEAD", "/a", "/a", {}),
        ("GET", "/a/", "/a/", {}),
        ("GET", "/a/b", "/a/{id}", {"id": "b"}),
        ("GET", "/a/b/c", "/a/{id}/c", {"id": "b"}),
        ("GET", "/a/new", "/a/new", {}),
        ("GET", "/a//c", None, {}),
        ("GET", "/a/b/", None, {}),
        ("GET", "/a/b/d", None, {}),
        ("GET", "//a", None, {}),
        ("GET", "", None, {}),
        ("POST", "/a", None, {}),
    ],
)
def test_path_is_found_by_its_segments(
    method: str, path: str, found: str | None, parameters: dict[str, str]
) -> None:
    paths = ("/", "/a", "/a/", "/a/new", "/a/{id}", "/a/{id}/c")
    told = RouteTable(route("GET", each) for each in paths).find(method, path)
    assert (None if told.route is None else told.route.path) == found
    if found is not None:
        assert told.parameters == parameters


def test_methods_of_path_are_told() -> None:
    table = RouteTable([route("GET", "/a/{id}"), route("DELETE", "/a/{id}"), route("POST", "/b")])
    assert table.find("PUT", "/a/x").methods == {"GET", "HEAD", "DELETE"}
    assert table.find("GET", "/b").methods == {"POST"}
    assert table.find("GET", "/a").methods == set()
    assert table.find("GET", "/c").methods == set()


@pytest.mark.parametrize(
    "paths", [("/a", "/a"), ("/a/{id}", "/a/{id}"), ("/a/{id}", "/a/{name}/b")]
)
def test_routes_that_cannot_be_told_apart_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"/a|same segment"):
        RouteTable(route("GET", path) for path in paths)


def test_each_route_says_who_may_call_it() -> None:
    for each in ROUTES:
        admin = each.path.startswith("/api/v1/admin")
        assert (each.access.scheme == OPERATOR) is admin, each.path
        assert bool(each.access.roles) is admin, each.path
        assert each.access.roles <= set(ROLES), each.path
        changes = admin and each.method != "GET"
        assert each.access.owner is changes, each.path
        assert not changes or each.access.roles <= {"admin", "operator"}, each.path
        assert (each.key is Key.OPTIONAL) is changes, each.path
        if each.load is not Load.ADMITTED:
            assert each.path in {"/healthz", "/readyz", f"{CAMPAIGNS}/{{id}}/orders"}


def allowed(each: Route, role: str, union: str) -> int:
    """Give the status that the table promises; 0 for that of a request that is served."""
    access = each.access
    if access.scheme == MEMBER:
        return 0 if role == "member" else 401
    if access.scheme == OPERATOR:
        if role in NOBODY:
            return 401
        if role not in access.roles:
            return 403
        return 403 if access.owner and union == OTHER else 0
    return 0


@pytest.fixture(scope="module")
def tokens(service: Service) -> dict[tuple[str, str], str]:
    """A token of each role and union; members' are those of a card each."""
    made = {
        (role, union): service.operator(role, union)[1]
        for role in ROLES
        for union in (OWN, OTHER, DISTRICT)
    }
    made |= {("anonymous", DISTRICT): "", ("stranger", DISTRICT): "sale_op_x"}
    made["expired", DISTRICT] = service.token(7, now_s=1_000_000)
    for union in (OWN, OTHER, DISTRICT):
        made["member", union] = service.token(service.card().member, union)
    return made


async def ask(client: Client, each: Route, token: str, url: str, body: Any, **headers: str) -> Seen:
    if each.key is not Key.NONE:
        headers.setdefault("Idempotency-Key", new_key())
    sent = {} if body is None else {"json": body}
    return await client.ask(each.method, url, token or None, headers=headers, **sent)


@pytest.mark.parametrize("each", ROUTES, ids=name_of)
async def test_each_role_and_union_may_do_what_the_table_says(
    client: Client, tokens: dict[tuple[str, str], str], each: Route
) -> None:
    buyer = tokens["member", OWN]
    url, body = await all_of(client, each, buyer, owner=OWN)
    for (role, union), token in tokens.items():
        expected = allowed(each, role, union)
        if role in each.access.roles and each.method != "GET":
            url, body = await all_of(client, each, buyer, owner=OWN)  # the one before has changed
            if union == OTHER and STATE_BEFORE.get(step_of(each)) == "draft":
                expected = 404  # another union's draft
        if "{order_no}" in each.path and not expected:
            others = token != buyer if role == "member" else union == OTHER
            expected = 404 if others else 0  # nobody else's order exists
        if each.path == NOTIFY:
            expected = 403  # no token counts: a notice is signed
        seen = await ask(client, each, token, url, body)
        assert seen.status == (expected or each.status), (role, union, seen)
        if expected in CODES:
            assert seen.code == CODES[expected]


@pytest.mark.parametrize("state", ["draft", "sells"])
@pytest.mark.parametrize(
    "each", [one for one in ROUTES if one.access.scheme == OPERATOR and "{id}" in one.path],
    ids=name_of,
)  # fmt: skip
async def test_draft_of_other_union_is_hidden_from_every_role(
    client: Client, tokens: dict[tuple[str, str], str], each: Route, state: str
) -> None:
    campaign = await prepared(client, "open" if state == "draft" else "", owner=OWN)
    for role in sorted(each.access.roles):
        url = each.path.replace("{id}", campaign)
        seen = await ask(client, each, tokens[role, OTHER], url, body_of(each))
        visible = 403 if each.access.owner else 200
        assert seen.status == (404 if state == "draft" else visible), role


class Provoked:
    """Sends what brings about each status that an operation describes."""

    def __init__(self, service: Service, client: Client, each: Route) -> None:
        self.service = service
        self.client = client
        self.each = each
        self.card: Card = service.card()
        self.token = ""
        if each.access.scheme:
            self.token = self.card.token if each.access.scheme == MEMBER else service.admin_token

    async def send(self, url: str, body: Any = None, **how: Any) -> Seen:
        return await ask(self.client, self.each, how.pop("token", self.token), url, body, **how)

    async def statuses(self) -> set[int]:
        url, body = await self.good()
        seen = [await self.send(url, body)]
        seen += [await self.twice(url, body), await self.send(url, body, token="wrong")]
        seen += [await self.as_nobody_may(url, body)]
        seen += [await self.send(self.unknown(), body)]
        if self.each.cached_s is not None:
            seen.append(await self.send(url, **{"If-None-Match": seen[0].headers["ETag"]}))
        if self.each.status in {200, 201, 204} and self.each.method != "GET":
            seen += await self.in_wrong_state(body)
        if body is not None:
            seen += await self.as_wrong_body(url, body)
        if self.each.key is not Key.NONE:
            seen += await self.under_one_key()
        return {each.status for each in seen}

    async def good(self) -> tuple[str, Any]:
        return await all_of(self.client, self.each, self.card.token)

    def unknown(self) -> str:
        path = self.each.path.replace("{id}", "nothing-there")
        return path.replace("{order_no}", "nothing.1.000000")

    async def twice(self, url: str, body: Any) -> Seen:
        """A header that may come once comes twice."""
        headers = CIMultiDict({"Referer": "a"})
        headers.add("Referer", "b")
        return await self.raw(url, body, headers)

    async def raw(self, url: str, body: Any, headers: "CIMultiDict[str]") -> Seen:
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        sent = {} if body is None else {"json": body}
        address = self.service.url + url
        async with self.client._session.request(
            self.each.method, address, headers=headers, **sent
        ) as answer:
            seen = Seen(answer.status, answer.headers, await answer.read())
        self.client._described.check(self.each.method, url, seen)
        return seen

    async def as_nobody_may(self, url: str, body: Any) -> Seen:
        """An operator's call by a member, and a purchase by a card of another union."""
        if self.each.load is Load.HANDLER:
            campaign = await prepared(self.client, "", unions=[OWN])
            card = await asyncio.to_thread(self.card_of_other_union)
            return await self.send(f"{CAMPAIGNS}/{campaign}/orders", body, token=card.token)
        return await self.send(url, body, token=self.card.token)

    def card_of_other_union(self) -> Card:
        return next(card for card in iter(self.service.card, None) if card.union != OWN)

    async def in_wrong_state(self, body: Any) -> list[Seen]:
        """Deleting and opening what sells, all else on a draft; an ID that is taken."""
        if self.each.path == ADMIN:
            taken = {**body, "id": await prepared(self.client, "")}
            return [await self.send(ADMIN, taken)]
        if "{order_no}" in self.each.path:
            return [await self.send(await self.expired_order(), body)]
        seen = []
        for step in ("open", "resume", "reopen", ""):
            campaign = await prepared(self.client, step)
            seen.append(await self.send(self.each.path.replace("{id}", campaign), body))
        closed = await prepared(self.client, "reopen")
        if self.each.load is Load.HANDLER:
            seen.append(await self.client.buy(closed, self.token))
        if step_of(self.each) == "stock":  # any other state takes more tickets
            async with self.service.redis() as redis:
                await freeze(redis, closed, "a test")
            seen.append(await self.send(self.each.path.replace("{id}", closed), body))
        return seen

    async def expired_order(self) -> str:
        campaign = await self.client.campaign(payment="online")
        held = await self.client.buy(campaign, self.card.token)
        await end_holds(self.service, campaign)
        order_no = held.json()["order_no"]

        async def state() -> object:
            return (await self.client.get(f"{ORDERS}/{order_no}", self.card.token)).json()["state"]

        await until_equal(state, "expired")
        return self.each.path.replace("{order_no}", order_no)

    async def as_wrong_body(self, url: str, body: Any) -> list[Seen]:
        seen = [await self.send(url, {**body, "pad": "x" * 17_000})]
        plain = CIMultiDict({"Content-Type": "text/plain", "Idempotency-Key": new_key()})
        seen.append(await self.raw(url, body, plain))
        return seen

    async def under_one_key(self) -> list[Seen]:
        key = new_key()
        first, body = await all_of(self.client, self.each)
        other, also = await all_of(self.client, self.each)
        if self.each.path == ADMIN:
            also = {**body, "title": "另一个"}
        elif self.each.load is Load.HANDLER:
            other, also = first, {**body, "quantity": 2}
        elif self.each.method == "POST":
            other, also = first, {**also, "reason": "another"}
        else:
            return [await self.send(first), await self.after_another_step(key, first)]
        told: dict[str, Any] = {"Idempotency-Key": key}
        return [await self.send(first, body, **told), await self.send(other, also, **told)]

    async def after_another_step(self, key: str, _: str) -> Seen:
        """The key of another step on the same campaign."""
        campaign = await prepared(self.client, "open")
        used = {"Idempotency-Key": key}
        opened = await self.client.ask(
            "POST", f"{ADMIN}/{campaign}/schedule", self.token, json={}, headers=used
        )
        assert opened.status == 200
        return await self.send(f"{ADMIN}/{campaign}", **used)


@pytest.mark.parametrize("each", DESCRIBED, ids=name_of)
async def test_each_described_status_is_answered(
    service: Service, client: Client, each: Route
) -> None:
    described = set(DOCUMENT["paths"][each.path][each.method.lower()]["responses"])
    if each.load is Load.EXEMPT:
        assert (await client.get(each.path)).status == 200
        assert described - {"503"} == {"200"}
        return
    seen = await Provoked(service, client, each).statuses()
    assert described - NOT_PROVOKED <= {str(status) for status in seen}


def test_each_step_is_a_route() -> None:
    assert {step_of(each) for each in ROUTES} == {"", *STEPS}
