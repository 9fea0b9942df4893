"""The schedule of a seed: campaigns, purchases, operators' steps and faults, fixed in advance.

The same seed, length and mode give the same schedule, so a failure is named by these three. Only
the order in which processes get the processor differs from run to run.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OFFERS_A_SECOND = 110
OFFERS_MAX = 4_000
MEMBERS_A_SEED = 240
FAULTS_FROM, FAULTS_TO = 0.08, 0.8
"""Share of the run in which faults begin; the rest is for retries."""

EVERYTHING_SHARE = 0.1

SERVES = ("serve-1", "serve-2")
WRITERS = ("writer-1", "writer-2")
SCHEDULERS = ("scheduler-1", "scheduler-2")
STORES = ("redis", "postgres")
NAMES = (*STORES, *SERVES, *WRITERS, *SCHEDULERS)
LINKS = (
    ("serve-1", "redis"),
    ("serve-2", "redis"),
    ("serve-1", "postgres"),
    ("writer-1", "redis"),
    ("writer-1", "postgres"),
    ("scheduler-1", "redis"),
    ("scheduler-1", "postgres"),
)
DIRECTIONS = ("up", "down")


@dataclass(frozen=True)
class Sale:
    """A campaign of a seed. Moments in seconds from the start; None: none."""

    tickets: tuple[int, ...]
    card_limit: int
    order_max: int
    opens_s: float
    closes_s: float | None

    def __str__(self) -> str:
        window = f"{self.opens_s:+.2f} s to " + (
            "no end" if self.closes_s is None else f"{self.closes_s:+.2f} s"
        )
        stock = "+".join(map(str, self.tickets))
        return f"{stock} tickets, {self.card_limit} a card, {self.order_max} an order, {window}"


@dataclass(frozen=True)
class Offer:
    """A purchase with its key: tried up to ``tries`` times until the outcome is known.

    ``again`` asks once more after a 201: (seconds later, quantity); the same quantity is a replay,
    another one a mismatch. ``twice`` sends the first try over two connections at once. ``settles``
    has the key asked again, when all faults are over, until it knows.
    """

    at_s: float
    sale: int
    member: int
    showing: int
    quantity: int
    key: str
    tries: int
    twice: bool
    settles: bool
    again: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Act:
    """An operator's step, sent ``times`` times with ``key``; '' means once by the command line."""

    at_s: float
    what: str
    sale: int
    key: str
    times: int
    showing: int = 0
    add: int = 0
    member: int = 0

    def __str__(self) -> str:
        to = f"{self.sale}" if self.what not in {"revoke", "restore"} else f"member {self.member}"
        more = f" showing {self.showing} +{self.add}" if self.what == "stock" else ""
        how = f"{self.times} × key {self.key}" if self.key else "command line"
        return f"operator: {self.what} {to}{more} ({how})"


@dataclass(frozen=True)
class Fault:
    """A fault: an action of the rig and its target."""

    at_s: float
    what: str
    target: tuple[str, ...]
    amount: float = 0

    def __str__(self) -> str:
        amount = f" {self.amount:g}" if self.amount else ""
        return f"fault: {self.what} {' – '.join(self.target)}{amount}"


@dataclass(frozen=True)
class Schedule:
    """The whole schedule; members come for ``seconds``."""

    seed: int
    seconds: float
    lossy: bool
    sales: tuple[Sale, ...]
    offers: tuple[Offer, ...]
    acts: tuple[Act, ...]
    faults: tuple[Fault, ...]

    @property
    def witnessed(self) -> bool:
        """Whether no API process is killed, so that all can report their acknowledged orders."""
        return not any(
            fault.what == "kill" and set(SERVES) & set(fault.target) for fault in self.faults
        )

    def lines(self) -> Iterator[str]:
        """Print campaigns, then operators' steps and faults in order."""
        for number, sale in enumerate(self.sales):
            yield f"campaign {number}: {sale}"
        yield f"{len(self.offers)} purchases of {MEMBERS_A_SEED} cards over {self.seconds:g} s"
        for step in sorted([*self.acts, *self.faults], key=lambda step: step.at_s):
            yield f"{step.at_s:6.2f} s  {step}"


def plan(seed: int, seconds: float, *, lossy: bool = False) -> Schedule:
    """Compute a seed's schedule."""
    rng = random.Random(f"{seed} {seconds:g} {lossy}")
    sales = tuple(_sale(rng, seconds, lossy=lossy) for _ in range(rng.choice((1, 2, 2, 3))))
    offers = _offers(rng, seconds, sales)
    acts = _acts(rng, seconds, sales)
    faults = _Faults(rng, seconds).all(lossy=lossy)
    return Schedule(seed, seconds, lossy, sales, offers, acts, faults)


def _sale(rng: random.Random, seconds: float, *, lossy: bool) -> Sale:
    limit = rng.randint(1, 5)
    closes = not lossy and rng.random() < 0.3
    return Sale(
        tickets=tuple(rng.randint(3, 25 + int(25 * seconds)) for _ in range(rng.randint(1, 3))),
        card_limit=limit,
        order_max=rng.randint(1, limit),
        opens_s=-1.0 if rng.random() < 0.5 else rng.uniform(0, seconds * 0.3),
        closes_s=rng.uniform(0.5, 1.1) * seconds if closes else None,
    )


def _offers(rng: random.Random, seconds: float, sales: Sequence[Sale]) -> tuple[Offer, ...]:
    offers = []
    for number in range(min(int(seconds * OFFERS_A_SECOND), OFFERS_MAX)):
        sale = rng.randrange(len(sales))
        most = sales[sale].order_max
        quantity = rng.randint(1, most)
        again = [(rng.random() * seconds * 0.4, quantity)] if rng.random() < 0.2 else []
        if most > 1 and rng.random() < 0.06:
            again.append((rng.random() * seconds * 0.4, quantity % most + 1))
        offers.append(
            Offer(
                at_s=rng.random() * seconds,
                sale=sale,
                member=rng.randrange(MEMBERS_A_SEED),
                showing=rng.randrange(len(sales[sale].tickets)),
                quantity=quantity,
                key=f"k{number}-{rng.getrandbits(32):08x}",
                tries=rng.choice((1, 3, 8)),
                twice=rng.random() < 0.06,
                settles=rng.random() < 0.7,
                again=tuple(again),
            )
        )
    return tuple(sorted(offers, key=lambda offer: offer.at_s))


def _acts(rng: random.Random, seconds: float, sales: Sequence[Sale]) -> tuple[Act, ...]:
    acts: list[Act] = []

    def act(at_s: float, what: str, sale: int, **more: int) -> None:
        key = f"op{len(acts)}-{rng.getrandbits(32):08x}"
        # The command line is a process of its own, a second of a core: not too many of them.
        by_hand = what in {"revoke", "restore"} or (seconds >= 5 and rng.random() < 0.15)
        acts.append(Act(at_s, what, sale, "" if by_hand else key, rng.choice((1, 1, 2, 3)), **more))

    for _ in range(rng.randint(0, 2 + int(seconds / 2))):
        sale, at_s = rng.randrange(len(sales)), rng.random() * seconds * 0.85
        later_s = at_s + rng.random() * seconds * 0.3
        match rng.choice(("pause", "pause", "close", "stock", "stock", "stock")):
            case "pause":
                act(at_s, "pause", sale)
                act(later_s, "resume", sale)
            case "close":
                act(at_s, "close", sale)
                act(later_s, "reopen", sale)
            case _:
                showing = rng.randrange(len(sales[sale].tickets))
                act(at_s, "stock", sale, showing=showing, add=rng.randint(1, 20))
    if rng.random() < min(0.25 + seconds / 20, 0.9):
        member, at_s = rng.randrange(MEMBERS_A_SEED), rng.random() * seconds * 0.5
        act(at_s, "revoke", 0, member=member)
        if rng.random() < 0.5:
            act(at_s + rng.uniform(0.2, 0.5) * seconds, "restore", 0, member=member)
    return tuple(sorted(acts, key=lambda step: step.at_s))


class _Faults:
    """Draws random faults, each with the action that ends it."""

    def __init__(self, rng: random.Random, seconds: float) -> None:
        self._rng = rng
        self._seconds = seconds
        self._list: list[Fault] = []

    def all(self, *, lossy: bool) -> tuple[Fault, ...]:
        """Give one to four faults (more for long runs), in the order of their moments."""
        rng = self._rng
        kinds = (
            (self._kill, 6),
            (self._freeze, 4),
            (self._link, 6),
            (self._rolling, 1),
        )
        draws, weights = zip(*kinds, strict=True)
        for _ in range(rng.randint(1, 3 + int(self._seconds / 4))):
            rng.choices(draws, weights)[0]()
        if rng.random() < EVERYTHING_SHARE:
            self._everything()
        if lossy:
            rng.choice((self._torn, self._old_redis, self._empty_redis, self._old_postgres))()
        return tuple(sorted(self._list, key=lambda fault: fault.at_s))

    def _add(self, at_s: float, what: str, *target: str, amount: float = 0) -> None:
        self._list.append(Fault(at_s, what, target, amount))

    def _moment(self) -> float:
        return self._rng.uniform(FAULTS_FROM, FAULTS_TO) * self._seconds

    def _duration(self) -> float:
        return self._rng.uniform(0.02, self._rng.choice((0.1, 0.5, 1.2, 0.3 * self._seconds)))

    def _kill(self) -> None:
        at_s = self._moment()
        name = self._rng.choice((*NAMES, "redis", "serve-1", "serve-2", "writer-1"))
        self._add(at_s, "kill", name)
        self._add(at_s + self._duration(), "start", name)

    def _freeze(self) -> None:
        at_s, name = self._moment(), self._rng.choice(NAMES)
        self._add(at_s, "stop", name)
        self._add(at_s + self._duration(), "cont", name)

    def _link(self) -> None:
        rng, at_s, link = self._rng, self._moment(), self._rng.choice(LINKS)
        match rng.choice(("cut", "cut", "delay", "halve", "hold", "swallow")):
            case "cut":
                self._add(at_s, "cut", *link)
            case "delay":
                self._add(at_s, "delay", *link, amount=rng.choice((0.02, 0.2, 0.8)))
            case "halve":
                self._add(at_s, "halve", *link, rng.choice(DIRECTIONS), amount=rng.randint(1, 3000))
            case what:
                self._add(at_s, what, *link, rng.choice(DIRECTIONS))
        self._add(at_s + self._duration(), "heal", *link)

    def _rolling(self) -> None:
        at_s = self._moment()
        for number, name in enumerate(SERVES):
            self._add(at_s + number * 0.2 * self._seconds, "restart", name)

    def _everything(self) -> None:
        at_s = self._moment()
        self._add(at_s, "kill", *NAMES)
        self._add(at_s + 0.05, "start", *NAMES)

    def _torn(self) -> None:
        at_s = self._moment()
        self._behind(at_s)
        self._add(at_s, "torn redis", amount=self._rng.randint(1, 20_000))

    def _old_redis(self) -> None:
        at_s = self._moment()
        copied_s = self._behind(at_s)
        self._add(copied_s, "copy redis")
        self._add(at_s, "old redis")

    def _empty_redis(self) -> None:
        at_s = self._moment()
        self._behind(at_s)
        self._add(at_s, "empty redis")

    def _old_postgres(self) -> None:
        at_s = self._moment()
        self._add(at_s * self._rng.random(), "copy postgres")
        self._add(at_s, "old postgres")

    def _behind(self, at_s: float) -> float:
        """Mostly, let nobody write the ledger before a loss; sometimes, let nobody know of it.

        Gives a moment since when Redis alone has known of all that was sold.
        """
        since_s = self._rng.uniform(0.02, 0.95) * at_s
        if self._rng.random() < 0.8:
            self._add(since_s, "kill", *WRITERS)
            if self._rng.random() < 0.4:
                self._add(at_s - 0.01, "kill", *SERVES)
            self._add(at_s + self._duration(), "start", *SERVES, *WRITERS)
        return since_s
