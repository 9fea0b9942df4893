"""Who is let in: connections are counted, and requests beyond capacity are turned away.

An overloaded event loop does not look overloaded: its queue stands in the kernel, where nobody
counts it. What can be seen is the *turn*: one poll of the loop hands out everything that has
arrived, and that takes as long as the crowd is large. The first request of a turn notes the time
and asks by ``call_soon`` to be told of the turn's end, which comes after all reads of that poll, on
asyncio's own loop and on uvloop alike (``tests/test_waiting_line.py`` tries both). A request that
is read more than ``turn_max_s`` after its turn began is refused or, if it is a purchase, joins the
waiting line (``http/waiting_line.py``). So the time that a request waits in this process before the
process looks at it is bounded: the rest of the turn before its own, ``turn_max_s``, and the longest
stay in the waiting line. A heartbeat that measures the loop's lag was rejected: it notices a crowd
one interval late, and refuses the small turns that follow.

The other reasons look at the purchases that were let in and wait for their batch: there are too
many of them ("queue"), or who comes now would wait too long ("late"): behind so many, at the pace
at which they have left the queue of late. What the first of them has waited was tried instead and
rejected: that is known only when it is too late for everybody behind, who came in a moment and then
waited past their deadline together, while nobody at all was let in.

A refusal costs a good part of what a purchase costs, most of it in the kernel. ``may_refuse`` tells
when they become so many that they would cost sales; then the crowd is let stand, that of the fast
lane and that of aiohttp alike (``api/admit.py``).
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

LOOK_AGAIN_S: Final = 0.01
PACE_LEAST_S: Final = 0.05
PACE_STEP_S: Final = 0.1
PACE_OVER_S: Final = 1.0
WELCOME: Final = 256
"""So many may always wait, about a batch: a store that stalls for a moment is no overload."""

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
"""In place of a Retry-After: neither let in nor refused now."""


class Waiting(NamedTuple):
    """How many purchases wait, and since when the first does (0.0: nobody, or only for a store that
    ails), how many have left the queues so far, and how many of those that wait do so for a store.
    """

    purchases: int
    since: float
    taken: int
    ailing: int = 0


class Overload:
    """Lets connections and requests of one process in, or says why not.

    ``waiting`` gives what waits in the batchers (``Waiting``). A bound of 0 is no bound, except
    that of connections. All times are seconds of the monotonic clock.
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
        """The bound that holds; see ``files_allow``."""
        self.connections = 0
        self.waiters = 0
        """Purchases that stand in the one crowd of this process, which keeps it."""
        self.shed: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        """Refused so far, by reason."""
        self._turn_max_s = turn_max_s or float("inf")
        self._waiting_max = waiting_max or float("inf")
        self._wait_max_s = wait_max_s or math.inf
        self._waiting = waiting
        self._chance = (chance or random.Random()).random  # noqa: S311 - spreads, hides nothing
        self._loop = asyncio.get_running_loop()
        self._turn_ends = float("inf")
        self._in_turn = False
        self._room = self._waiting_max
        self._lacking = QUEUE
        self._pace = _Pace()
        self._look_at = 0.0
        self._over_since = 0.0
        self._over_last = float("-inf")
        self._spread_at = 0.0
        self._spread_s = float(RETRY_SPREAD_S)
        self._refusals_due = 0.0
        self.refusals_per_s, _ = REFUSALS_PER_S
        """How many may be refused without a second thought; see ``breathes``."""

    def take_connection(self) -> bool:
        """Count a connection in; False where there are too many and it must be closed."""
        if self.connections >= self.connections_max:
            self.shed[CONNECTIONS] += 1
            return False
        self.connections += 1
        return True

    def release_connection(self) -> None:
        """Count a connection out that was let in."""
        self.connections -= 1

    def overloaded(self, now: float, *, called: bool = False) -> str:
        """Why a purchase that is read now may not go on, or ''.

        Who refuses it calls ``refuse`` with that. Who is ``called`` from the crowd came earlier.
        """
        if not called:
            if not self._in_turn:
                self._begin_turn(now)
            elif now > self._turn_ends:
                return TURN
        if now >= self._look_at:
            self._look(now)
        self._room -= 1
        return self._lacking if self._room < 0 else ""

    def turn_is_over(self, now: float) -> str:
        """Like ``overloaded``, for requests that wait in no queue."""
        if not self._in_turn:
            self._begin_turn(now)
        elif now > self._turn_ends:
            return TURN
        return ""

    def refuse(self, reason: str, now: float) -> int:
        """Count a refusal; give its Retry-After in whole seconds, 1 to ``RETRY_MAX_S``."""
        self.shed[reason] += 1
        due = max(self._refusals_due, now) + 1 / self.refusals_per_s
        self._refusals_due = min(due, now + REFUSALS_DUE_MAX_S)  # some are refused without a choice
        return self.retry_after(now)

    def retry_after(self, now: float) -> int:
        """Give a Retry-After by chance: the longer the overload lasts, the wider they are spread.

        One second for all would bring everybody back at once.
        """
        if now >= self._spread_at:
            self._widen(now)
        return RETRY_MIN_S + int(self._chance() * self._spread_s)

    def may_refuse(self, now: float) -> bool:
        """Whether refusals are few enough just now not to cost sales."""
        return self._refusals_due <= now + REFUSALS_AHEAD_S

    def breathes(self, *, easily: bool) -> None:
        """Allow more refusals while the process has time left, and fewer where it has not.

        The least of them take about a twentieth of a core.
        """
        least, most = REFUSALS_PER_S
        if easily:
            self.refusals_per_s = min(self.refusals_per_s * REFUSALS_GROW, most)
        else:
            self.refusals_per_s = max(self.refusals_per_s * REFUSALS_SHRINK, least)

    def has_room(self, now: float) -> bool:
        """Whether a purchase that is read now would find room in the queue."""
        if now >= self._look_at:
            self._look(now)
        return self._room >= 1

    def _widen(self, now: float) -> None:
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

    def _look(self, now: float) -> None:
        """See what waits: now and then, because there may be hundreds of batchers."""
        self._look_at = now + LOOK_AGAIN_S
        count, since, taken, ailing = Waiting(*self._waiting())
        self._room, self._lacking = self._waiting_max - count, QUEUE
        if not since:
            self._pace.rest(taken)
            return
        room = max(self._pace.per_s(now, taken) * self._wait_max_s, WELCOME) - (count - ailing)
        if room < self._room:
            self._room, self._lacking = room, LATE


class _Pace:
    """How many purchases a second leave the queue while somebody waits in it."""

    def __init__(self) -> None:
        self._taken = 0
        self._seen: deque[tuple[float, int]] = deque()

    def rest(self, taken: int) -> None:
        """Note that nobody waits: how few come then says nothing of how many could be served."""
        self._taken = taken
        self._seen.clear()

    def per_s(self, now: float, taken: int) -> float:
        """Give the pace of the last ``PACE_OVER_S``; infinite while too little was seen."""
        seen = self._seen
        if taken < self._taken:  # a campaign has gone, and its count with it
            self.rest(taken)
        if not seen:
            # What has left since nobody waited counts: it was quick.
            seen.append((now, self._taken))
        elif now - seen[-1][0] >= PACE_STEP_S:
            seen.append((now, taken))
            while now - seen[1][0] >= PACE_OVER_S:
                seen.popleft()
        self._taken = taken
        began, before = seen[0]
        return (taken - before) / (now - began) if now - began >= PACE_LEAST_S else math.inf


def files_allow(connections_max: int) -> int:
    """How many connections this process may have: ``connections_max``, or what its files allow.

    Raises the soft limit of open files towards the hard one where more are wanted.
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
