"""Users of a release: members with a phone, people who only reload, and scripts."""

import random
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec
from locust import FastHttpUser, task
from locust.exception import StopUser
from locust.user.task import LOCUST_STATE_STOPPING

from loadtest.books.answers import Answer, read_answer
from loadtest.crowd.run import RUN
from loadtest.members import Ask
from loadtest.wire import TOO_MANY, asks_again

LOOKS_MAX: Final = 20
CLOCK_LOOKS: Final = 2
TRIES_MAX: Final = 12
BACKOFF_S: Final = 0.3
RETRY_AFTER_MAX_S: Final = 30.0
OPENING_MAX_S: Final = 600.0
REACTION_S: Final = 0.4
"""Mean of how long a thumb takes once the clock shows the opening."""

LATE_SHARE: Final = 0.1
EARLY_SHARE: Final = 0.04
BAD_TOKEN_SHARE: Final = 0.1
NOSE_SHARE: Final = 0.1
GATEWAY: Final = frozenset({502, 504})
"""A balancer's own answers: the engine is not to be blamed for them, and the outcome is open."""

AGAIN_CODES: Final = frozenset({"not-open", "paused"})

ORDERS_SEEN: Final[deque[tuple[str, str]]] = deque(maxlen=200)
"""Member and order number of orders of this process, to try whether others may see them."""


@dataclass(frozen=True, slots=True)
class Told:
    """An HTTP answer; ``body`` is an empty object where it is not JSON."""

    status: int
    headers: Any
    body: Any


class SaleUser(FastHttpUser):
    """Shared by all users: requests that are judged, and pauses in which a user may be stopped."""

    abstract = True
    connection_timeout = 10.0
    network_timeout = 10.0
    pause_s = 0.0
    purchase_name = "purchase"
    token = ""

    def wait_time(self) -> float:
        """How long ``pause`` was asked to wait, once."""
        pause_s, self.pause_s = self.pause_s, 0.0
        return pause_s

    def stop(self, force: bool = False) -> bool:  # noqa: FBT001, FBT002 - Locust's own
        """Stop; asked again, as Locust does where the end meets a leaving crowd, do nothing."""
        return False if self._state == LOCUST_STATE_STOPPING and not force else super().stop(force)

    def pause(self, seconds: float) -> None:
        """Do nothing for a while; a user that is to stop does so here, never in a request."""
        self.pause_s = seconds
        self.wait()  # type: ignore[no-untyped-call]

    def call(self, method: str, path: str, name: str = "", **more: Any) -> Told:  # noqa: ANN401
        """One request. Only what an engine may never answer is reported as a finding."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        headers |= more.pop("headers", {})
        response = self.client.request(method, path, name=name or path, headers=headers, **more)
        status = response.status_code
        if status >= 500 and status != 503 and status not in GATEWAY:
            RUN.booth.find("server-error", f"{method} {name or path}: {response.status_code}")
        return Told(response.status_code, response.headers or {}, _json(response.content))

    def ask(self, wish: Ask, token: str) -> tuple[Answer, Any]:
        """Ask for tickets; the answer is taken down, whatever becomes of it."""
        sent_at, answer = time.time(), None
        headers: Any = {}
        content: dict[str, Any] = {"quantity": wish.quantity, "showing": wish.showing}
        try:
            with self.client.post(
                f"/api/v1/campaigns/{RUN.booth.setting.campaign}/orders",
                json=content,
                headers={"Authorization": f"Bearer {token}", "Idempotency-Key": wish.key},
                catch_response=True,
                name=self.purchase_name,
            ) as response:
                headers = response.headers or {}
                answer = read_answer(
                    wish,
                    response.status_code,
                    response.content or b"",
                    replayed=headers.get("Idempotency-Replayed") == "true",
                    sent_at=sent_at,
                    received_at=time.time(),
                )
                # A refusal is a right answer; only what leaves the outcome open is a failure.
                if answer.sold or answer.refused or response.status_code == TOO_MANY:
                    response.success()
        finally:
            # Also where the user is killed in the midst of it: then nobody knows the outcome.
            answer = answer or read_answer(wish, 0, b"", sent_at=sent_at, received_at=time.time())
            RUN.booth.record(answer)
        return answer, headers

    def wish(self, member_no: str) -> Ask:
        """Make up what to ask for, under a new key."""
        setting = RUN.booth.setting
        showing, quantity = random.choice(setting.showings), random.randint(1, setting.order_max)
        return Ask(member_no, f"{random.getrandbits(80):020x}", showing, quantity)


class CardHolder(SaleUser):
    """A user with a card of its own; without one it does not play, and the run fails."""

    abstract = True

    def on_start(self) -> None:
        """Take a card. Raises StopUser where there is none."""
        card = RUN.booth.card()
        if card is None:
            raise StopUser
        self.card = card
        self.token = card.token


class MemberUser(CardHolder):
    """One member of the union on a phone."""

    served = False

    @task
    def visit(self) -> None:
        """Look, wait for the opening, grab, look at the order; then stay on the page."""
        if self.served:
            self.pause(random.uniform(3, 8))
            self._look()
            return
        campaign = self._look()
        if campaign is None:
            return
        self.served = True
        self._wait_for_opening(campaign)
        answer = self._grab(self.wish(self.card.member_no))
        if answer is not None and answer.sold:
            self._check_order(answer)

    def _look(self) -> dict[str, Any] | None:
        """Look at the list, the campaign and what is left; None where it does not show."""
        path = f"/api/v1/campaigns/{RUN.booth.setting.campaign}"
        for _ in range(LOOKS_MAX):
            self.call("GET", "/api/v1/campaigns")
            told = self.call("GET", path, "/api/v1/campaigns/[id]")
            if told.status == 200:
                self.call("GET", f"{path}/availability", "/api/v1/campaigns/[id]/availability")
                return dict(told.body)
            self.pause(again_after_s(told.headers, 1))
        RUN.booth.find("not-shown", f"campaign {RUN.booth.setting.campaign} could not be read")
        raise StopUser

    def _wait_for_opening(self, campaign: dict[str, Any]) -> None:
        """Wait by the server's clock, not by the phone's. A few press too early, some come late."""
        left_s = self._left_s(campaign) if campaign["state"] == "scheduled" else 0.0
        if left_s > 1.0 and random.random() < EARLY_SHARE:
            self.ask(self.wish(self.card.member_no), self.token)
        moment = time.monotonic() + left_s
        late_s = random.expovariate(1 / REACTION_S)
        if random.random() < LATE_SHARE:
            late_s = random.uniform(0, RUN.booth.setting.tail_s * 0.8)
        self.pause(min(max(moment - time.monotonic(), 0.0) + late_s, OPENING_MAX_S))

    def _left_s(self, campaign: dict[str, Any]) -> float:
        """Seconds to the opening: of ``CLOCK_LOOKS`` at the clock, by the one that was quickest."""
        opens_at = datetime.fromisoformat(campaign["opens_at"])
        looks: list[tuple[float, float]] = []
        for number in range(LOOKS_MAX):
            began = time.monotonic()
            told = self.call("GET", "/api/v1/time")
            trip_s = time.monotonic() - began
            if told.status == 200:
                # The clock was read half a round trip before the answer came.
                left = opens_at - datetime.fromisoformat(told.body["now"])
                looks.append((trip_s, began + trip_s / 2 + left.total_seconds()))
            else:
                self.pause(again_after_s(told.headers, number))
            if len(looks) == CLOCK_LOOKS:
                break
        return max(min(looks)[1] - time.monotonic(), 0.0) if looks else 0.0

    def _grab(self, wish: Ask) -> Answer | None:
        """Ask until the outcome is known, always under the same key."""
        for number in range(TRIES_MAX):
            answer, headers = self.ask(wish, self.token)
            if not asks_again(answer.status) and answer.code not in AGAIN_CODES:
                return answer
            self.pause(again_after_s(headers, number))
        return None

    def _check_order(self, answer: Answer) -> None:
        """See that the order stands as it was told, is ours, and that another's is not shown."""
        told = self.call("GET", f"/api/v1/orders/{answer.order_no}", "/api/v1/orders/[order]")
        who = f"order {answer.order_no} of member {self.card.member_no}"
        if told.status == 200:
            codes = tuple(ticket["code"] for ticket in told.body.get("tickets", ()))
            shown = (told.body.get("order_no"), told.body.get("quantity"), codes)
            if shown != (answer.order_no, answer.told_quantity, answer.tickets):
                RUN.booth.find("order-differs", f"{who}: is shown otherwise than it was told")
        elif not asks_again(told.status):
            RUN.booth.find("order-not-shown", f"{who}: {told.status} right after the 201")
        others = [order_no for no, order_no in ORDERS_SEEN if no != self.card.member_no]
        if others and random.random() < NOSE_SHARE:
            self._try_anothers(random.choice(others))
        ORDERS_SEEN.append((self.card.member_no, answer.order_no))

    def _try_anothers(self, order_no: str) -> None:
        with self.client.get(
            f"/api/v1/orders/{order_no}",
            headers={"Authorization": f"Bearer {self.token}"},
            name="/api/v1/orders/[another's]",
            catch_response=True,
        ) as response:
            if response.status_code == 200:
                what = f"order {order_no} was shown to member {self.card.member_no}"
                RUN.booth.find("anothers-order", what)
            elif response.status_code in (403, 404):
                response.success()


class RefresherUser(SaleUser):
    """Somebody who reloads the page and what is left, and buys nothing."""

    etag = ""

    @task
    def reload(self) -> None:
        """The page, the campaign where it has changed, what is left."""
        path = f"/api/v1/campaigns/{RUN.booth.setting.campaign}"
        self.call("GET", "/")
        seen = {"If-None-Match": self.etag} if self.etag else {}
        told = self.call("GET", path, "/api/v1/campaigns/[id]", headers=seen)
        self.etag = told.headers.get("ETag") or self.etag
        self.call("GET", f"{path}/availability", "/api/v1/campaigns/[id]/availability")
        self.pause(random.uniform(0.5, 2.0))


class BotUser(CardHolder):
    """A script: always a new key, no pause, no regard for Retry-After, at times a forged token."""

    purchase_name = "purchase, bots"

    @task
    def hammer(self) -> None:
        """Ask, and ask again."""
        forged = random.random() < BAD_TOKEN_SHARE
        token = _forged(self.card.token) if forged else self.card.token
        answer, _ = self.ask(self.wish(self.card.member_no), token)
        if forged and answer.sold:
            what = f"member {self.card.member_no} bought with a forged token"
            RUN.booth.find("forged-token", what)
        if answer.status == 0:
            self.pause(BACKOFF_S)  # nobody is there: even a script would only spin


def again_after_s(headers: Any, number: int) -> float:  # noqa: ANN401 - its own kind of mapping
    """How long to wait before the next try: what the server says, else longer each time; spread."""
    said = headers.get("Retry-After") or ""
    wait_s = float(said) if said.isdigit() else BACKOFF_S * 2 ** min(number, 5)
    return min(wait_s, RETRY_AFTER_MAX_S) * random.uniform(1.0, 1.25)


def _forged(token: str) -> str:
    """The same token with another signature."""
    head, _, signature = token.rpartition(".")
    return f"{head}.{signature[::-1]}"


def _json(content: bytes | None) -> Any:  # noqa: ANN401
    try:
        return msgspec.json.decode(content or b"{}")
    except msgspec.DecodeError:
        return {}
