"""The state machine's independent model of a campaign, in plain dicts.

Nothing of the engine is imported here, and nothing is copied from it: the rules are the contract's.
The clock stands still until a test moves it. ``log`` is the ledger that must result.
"""

from typing import Any, NamedTuple

STEPS = {
    "schedule": ({"draft", "scheduled"}, "scheduled", "scheduled"),
    "open": ({"draft", "scheduled"}, "open", "opened"),
    "pause": ({"open"}, "paused", "paused"),
    "resume": ({"paused"}, "open", "resumed"),
    "close": ({"scheduled", "open", "paused"}, "closed", "closed"),
    "reopen": ({"closed"}, "open", "reopened"),
    "delete": ({"draft"}, "deleted", "deleted"),
}
SHUT = {
    "scheduled": "not_open",
    "paused": "paused",
    "closed": "closed",
    "draft": "draft",
    "deleted": "draft",
}


class Asked(NamedTuple):
    member: int
    union: str
    showing: int
    quantity: int
    key: str


class Model:
    """One campaign. Answers are (what, value, tickets the member may still buy)."""

    def __init__(self, clock: int) -> None:
        self.clock = clock
        self.log: list[tuple[Any, ...]] = []
        self.state = "deleted"
        self.opens_at: int | None = None
        self.closes_at: int | None = None
        self.limit = 0
        self.unions: set[str] = set()
        self.tickets: list[int] = []
        self.orders: dict[tuple[str, str], dict[str, int]] = {}
        self.revoked: set[str] = set()
        self.operations: dict[str, tuple[str, int]] = {}

    @property
    def seq(self) -> int:
        return len(self.log)

    def create(
        self,
        op: str,
        tickets: list[int],
        limit: int,
        unions: set[str],
        opens_at: int | None,
        closes_at: int | None,
        scheduled: bool,
    ) -> None:
        self.log.append(("created", tuple(tickets)))
        self.state, self.tickets, self.limit, self.unions = "draft", list(tickets), limit, unions
        self.opens_at, self.closes_at = opens_at, closes_at
        if scheduled:
            self.state = "scheduled"
            self.log.append(("scheduled",))
        self.operations[op] = ("create", self.seq)

    # The clock

    def crossings(self) -> list[str]:
        """The openings and closings that the clock has reached and no event records yet."""
        events, state = [], self.state
        if state == "scheduled" and self.opens_at is not None and self.clock >= self.opens_at:
            events.append("opened")
            state = "open"
        ends = self.closes_at is not None and self.clock >= self.closes_at
        if ends and state in {"scheduled", "open", "paused"}:
            events.append("closed")
        return events

    def state_now(self) -> str:
        events = self.crossings()
        return {"opened": "open", "closed": "closed"}[events[-1]] if events else self.state

    def record_crossings(self) -> None:
        state = self.state_now()
        self.log += [(event,) for event in self.crossings()]
        self.state = state

    # Members

    def held(self, member: int) -> int:
        return sum(order["quantity"] for (who, _), order in self.orders.items() if who == member)

    def left(self, showing: int) -> int:
        sold = (o["quantity"] for o in self.orders.values() if o["showing"] == showing)
        return self.tickets[showing] - sum(sold)

    def decide(self, asked: Asked) -> tuple[str, int, int]:
        """The answer to a purchase now; ``("sold", number, …)`` for a sale."""
        order = self.orders.get((asked.member, asked.key))
        may = self.limit - self.held(asked.member)
        state = self.state_now()
        if asked.member in self.revoked:
            return "card_revoked", 0, 0
        if "*" not in self.unions and asked.union not in self.unions:
            return "not_eligible", 0, 0
        if order is not None:
            if (order["showing"], order["quantity"]) == (asked.showing, asked.quantity):
                return "replayed", order["seq"], may
            return "key_mismatch", 0, 0
        if state != "open":
            return SHUT[state], (self.opens_at or 0) if state == "scheduled" else 0, 0
        if asked.quantity > may:
            return "limit_exceeded", may, 0
        if asked.quantity > self.left(asked.showing):
            return "sold_out", self.left(asked.showing), 0
        return "sold", self.seq + len(self.crossings()) + 1, may - asked.quantity

    def buy(self, asked: Asked) -> tuple[str, int, int]:
        answer = self.decide(asked)
        if answer[0] == "sold":
            self.record_crossings()
            self.log.append(("sold", asked.member, asked.showing, asked.quantity, asked.key))
            self.orders[asked.member, asked.key] = {
                "seq": self.seq,
                "showing": asked.showing,
                "quantity": asked.quantity,
            }
        return answer

    # Operators

    def done_before(self, op: str, content: str) -> str | None:
        if op not in self.operations:
            return None
        return "replayed" if self.operations[op][0] == content else "mismatch"

    def step(self, action: str, op: str, content: str, opens_at: int | None) -> str:
        before = self.done_before(op, content)
        if before:
            return before
        states, after, event = STEPS[action]
        if self.state_now() not in states:
            return "wrong_state"
        if action == "schedule":
            opens = self.opens_at if opens_at is None else opens_at
            if opens is None or (self.closes_at is not None and self.closes_at <= opens):
                return "invalid"
        self.record_crossings()
        if action == "schedule":
            self.opens_at = opens
        if action == "open" or (
            action == "reopen" and (self.opens_at is None or self.opens_at > self.clock)
        ):
            self.opens_at = self.clock
        if after == "open" and self.closes_at is not None and self.closes_at <= self.clock:
            self.closes_at = None
        self.state = after
        self.log.append((event,))
        self.operations[op] = (content, self.seq)
        return "ok"

    def add_stock(self, op: str, content: str, showing: int, add: int) -> str:
        before = self.done_before(op, content)
        if before:
            return before
        if self.state == "deleted":
            return "wrong_state"
        self.record_crossings()
        self.log.append(("stock_added", showing, add))
        self.tickets[showing] += add
        self.operations[op] = (content, self.seq)
        return "ok"

    # The ledger as far as a number

    def showings_at(self, seq: int) -> list[tuple[int, int]]:
        """Stock and live tickets of each showing after event ``seq``."""
        stock: list[int] = []
        live: list[int] = []
        for event in self.log[:seq]:
            if event[0] == "created":
                stock, live = list(event[1]), [0] * len(event[1])
            elif event[0] == "stock_added":
                stock[event[1]] += event[2]
            elif event[0] == "sold":
                live[event[2]] += event[3]
        return list(zip(stock, live, strict=True))
