"""Overload control: bounds the connections, and refuses requests beyond capacity.

An overloaded event loop does not show it: its queue is in the kernel, where this process cannot
count it. The *turn* can be measured: one poll of the loop delivers everything that has arrived, and
takes longer the more requests there are. The first request of a turn stores the time, and by
``call_soon`` schedules a callback for the turn's end, which runs after all reads of that poll on
asyncio's own loop and on uvloop (``tests/test_waiting_line.py`` tests both). A request that is read
more than ``turn_max_s`` after its turn began is refused or, if it is a purchase, joins the waiting
line (``http/waiting_line.py``). This bounds the time that a request waits in this process before it
is examined: the rest of the turn before its own, ``turn_max_s``, and the longest stay in the
waiting line. A heartbeat that measures the loop's lag was rejected: it notices a rush one interval
late, and then refuses the small turns that follow.

The other reasons concern admitted purchases that wait for their batch: there are too many
("queue"), or a new purchase would wait too long ("late"), given their number and the pace at which
they left the queue lately. Deciding by the time that the first of them has waited was tried and
rejected: by then all purchases behind it, which came in one moment, are late too, and pass their
deadline together while no purchase is admitted.

A refusal costs a large part of what a purchase costs, mostly in the kernel. ``may_refuse`` is false
when refusals become so many that they would cost sales; then purchases stay in the waiting line,
both those of the fast path and those of aiohttp (``api/admit.py``).
"""

import asyncio
import math
import random
import resource
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, NamedTuple

FILES_RESERVE: Final = 256
"""File descriptors kept for the stores, metrics, logs and listeners of a process."""

MEASURE_EVERY_S: Final = 0.01
PACE_LEAST_S: Final = 0.05
PACE_STEP_S: Final = 0.1
PACE_OVER_S: Final = 1.0
ALWAYS_WAIT: Final = 256
"""This many may always wait, about one batch: a short stall of a store is no overload."""

CALM_S: Final = 5.0
RETRY_MIN_S: Final = 1
RETRY_SPREAD_S: Final = 5
RETRY_MAX_S: Final = 20
SPREAD_GROWS_EVERY_S: Final = 2.0
SPREAD_EVERY_S: Final = 0.25
REFUSALS_PER_S: Final = (2_000.0, 20_000.0)
REFUSALS_GROW: Final = 1.1
REFUSALS_SHRINK: Final = 0.8
REFUSALS_AHEAD_S: Final = 0.1
REFUSALS_DUE_MAX_S: Final = 1.0

CONNECTIONS, TURN, QUEUE, LATE = "connections", "turn", "queue", "late"
REASONS: Final = (CONNECTIONS, TURN, QUEUE, LATE)
MUST_WAIT: Final = -1
"""In place of a Retry-After: the purchase is neither admitted nor refused now."""


class Waiting(NamedTuple):
    """Purchases in the queues, since when the first waits (0.0: none, or only because a store
    fails), how many have left the queues so far, and how many wait because a store fails.
    """

    purchases: int
    since: float
    taken: int
    for_store: int = 0


class Overload:
    """Admits or refuses the connections and requests of one process.

    ``waiting`` gives the state of the batchers' queues (``Waiting``). A bound of 0 means no bound,
    except for connections. All times are seconds of the monotonic clock.
    """

    def __init__(
        self,
        *,
        connections_max: int,
        turn_max_s: float,
        waiting_max: int,
        wait_max_s: float,
        waiting: Callable[[], tuple[int, float, int] | tuple[int, float, int, int]] = lambda: (
            0,
            0.0,
            0,
        ),
        chance: random.Random | None = None,
    ) -> None:
        self.connections_max = connections_max
        """The effective bound; see ``files_allow``."""
        self.connections = 0
        self.waiters = 0
        """Purchases in the process's waiting line, which updates this number."""
        self.shed: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        """Refusals so far, by reason."""
        self._turn_max_s = turn_max_s or float("inf")
        self._waiting_max = waiting_max or float("inf")
        self._wait_max_s = wait_max_s or math.inf
        self._waiting = waiting
        self._chance = (chance or random.Random()).random  # noqa: S311 - no secret
        self._loop = asyncio.get_running_loop()
        self._turn_ends = float("inf")
        self._in_turn = False
        self._room = self._waiting_max
        self._shortage = QUEUE
        self._pace = _Pace()
        self._measure_at = 0.0
        self._over_since = 0.0
        self._over_last = float("-inf")
        self._spread_at = 0.0
        self._spread_s = float(RETRY_SPREAD_S)
        self._refusals_due = 0.0
        self.refusals_per_s, _ = REFUSALS_PER_S
        """Refusals a second that cost no sales; see ``adapt_refusals``."""

    def take_connection(self) -> bool:
        """Count a new connection; False if there are too many, and the caller must close it."""
        if self.connections >= self.connections_max:
            self.shed[CONNECTIONS] += 1
            return False
        self.connections += 1
        return True

    def release_connection(self) -> None:
        """Count the end of a connection that ``take_connection`` admitted."""
        self.connections -= 1

    def overloaded(self, now: float, *, called: bool = False) -> str:
        """Give the reason why a purchase is not admitted now, or ''.

        A caller that refuses it passes the reason to ``refuse``. A purchase that is ``called`` from
        the waiting line was read in an earlier turn.
        """
        if not called:
            if not self._in_turn:
                self._begin_turn(now)
            elif now > self._turn_ends:
                return TURN
        if now >= self._measure_at:
            self._measure(now)
        self._room -= 1
        return self._shortage if self._room < 0 else ""

    def turn_is_over(self, now: float) -> str:
        """Do the same for requests that wait in no queue."""
        if not self._in_turn:
            self._begin_turn(now)
        elif now > self._turn_ends:
            return TURN
        return ""

    def refuse(self, reason: str, now: float) -> int:
        """Count a refusal; give its Retry-After in whole seconds, 1 to ``RETRY_MAX_S``."""
        self.shed[reason] += 1
        due = max(self._refusals_due, now) + 1 / self.refusals_per_s
        self._refusals_due = min(due, now + REFUSALS_DUE_MAX_S)  # not all refusals ask may_refuse
        return self.retry_after(now)

    def retry_after(self, now: float) -> int:
        """Give a random Retry-After (s); its range grows while the overload lasts.

        The same value for all clients would bring all of them back at once.
        """
        if now >= self._spread_at:
            self._update_spread(now)
        return RETRY_MIN_S + int(self._chance() * self._spread_s)

    def may_refuse(self, now: float) -> bool:
        """Whether a refusal now costs no sales."""
        return self._refusals_due <= now + REFUSALS_AHEAD_S

    def adapt_refusals(self, *, time_left: bool) -> None:
        """Allow more refusals a second if the process has time left, and fewer if it has none.

        The lowest rate takes about a twentieth of a core.
        """
        least, most = REFUSALS_PER_S
        if time_left:
            self.refusals_per_s = min(self.refusals_per_s * REFUSALS_GROW, most)
        else:
            self.refusals_per_s = max(self.refusals_per_s * REFUSALS_SHRINK, least)

    def has_room(self, now: float) -> bool:
        """Whether a purchase that is read now would find room in the queue."""
        if now >= self._measure_at:
            self._measure(now)
        return self._room >= 1

    def _update_spread(self, now: float) -> None:
        if now - self._over_last > CALM_S:
            self._over_since = now
        self._over_last = now
        self._spread_at = now + SPREAD_EVERY_S
        lasted_s = now - self._over_since
        self._spread_s = min(RETRY_SPREAD_S + lasted_s / SPREAD_GROWS_EVERY_S, RETRY_MAX_S)

    def _begin_turn(self, now: float) -> None:
        self._in_turn = True
        self._turn_ends = now + self._turn_max_s
        self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._in_turn = False

    def _measure(self, now: float) -> None:
        """Measure the queues, at an interval because there may be hundreds of batchers."""
        self._measure_at = now + MEASURE_EVERY_S
        count, since, taken, for_store = Waiting(*self._waiting())
        self._room, self._shortage = self._waiting_max - count, QUEUE
        if not since:
            self._pace.rest(taken)
            return
        room = max(self._pace.per_s(now, taken) * self._wait_max_s, ALWAYS_WAIT) - (
            count - for_store
        )
        if room < self._room:
            self._room, self._shortage = room, LATE


class _Pace:
    """Measures how many purchases a second leave the queue while some wait in it."""

    def __init__(self) -> None:
        self._taken = 0
        self._seen: deque[tuple[float, int]] = deque()

    def rest(self, taken: int) -> None:
        """Forget the pace while none waits, because then demand sets it and not capacity."""
        self._taken = taken
        self._seen.clear()

    def per_s(self, now: float, taken: int) -> float:
        """Give the pace of the last ``PACE_OVER_S``; infinite before ``PACE_LEAST_S``."""
        seen = self._seen
        if taken < self._taken:  # a deleted campaign took its count with it
            self.rest(taken)
        if not seen:
            # Begin at the count from when none waited: what left since then counts.
            seen.append((now, self._taken))
        elif now - seen[-1][0] >= PACE_STEP_S:
            seen.append((now, taken))
            while now - seen[1][0] >= PACE_OVER_S:
                seen.popleft()
        self._taken = taken
        began, before = seen[0]
        return (taken - before) / (now - began) if now - began >= PACE_LEAST_S else math.inf


def files_allow(connections_max: int) -> int:
    """Give ``connections_max``, or fewer if the limit of open files does not allow as many.

    Raises the soft limit of open files as far as needed and the hard limit allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections_max + FILES_RESERVE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if most > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        return max(soft - FILES_RESERVE, 1)
    return connections_max
