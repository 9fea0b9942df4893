"""How many users there are at each second of a release: quiet, gathering, opening, long tail.

The crowd stands before the doors when they open: the gathering's ramp is done at ``SETTLED`` of its
time, and the opening adds the rest within a second. It is a closed loop: a user who waits for an
answer asks for nothing else meanwhile. What members do at the opening is theirs (locustfile).
"""

from typing import Final

import msgspec

from loadtest.scenarios import Phases

SETTLED: Final = 0.7
LEAVING: Final = 0.5
"""Users who leave have left after this part of the tail."""


class Plan(msgspec.Struct, frozen=True):
    """The users of a run. Without phases: up to ``users`` at ``rate`` a second, for ``run_s``.

    ``run_s`` 0 means until it is stopped; with phases it only cuts them short.
    """

    users: int
    rate: float = 100.0
    run_s: float = 0.0
    phases: Phases | None = None

    @property
    def duration_s(self) -> float:
        """When it ends, 0 for never."""
        whole = self.phases.duration_s if self.phases else 0.0
        return min(whole, self.run_s) if whole and self.run_s else whole or self.run_s


def target(plan: Plan, at_s: float) -> tuple[int, float] | None:
    """Users at ``at_s`` seconds, and how many come or go a second; None at the end."""
    if plan.duration_s and at_s >= plan.duration_s:
        return None
    phases = plan.phases
    if phases is None:
        return plan.users, max(plan.rate, 1.0)
    quiet = _part(plan.users, phases.quiet_share)
    gathered = _part(plan.users, phases.gathered_share)
    if at_s < phases.quiet_s:
        return quiet, _rate(quiet, 1.0)
    if at_s < phases.opens_after_s:
        return gathered, _rate(gathered - quiet, phases.gathering_s * SETTLED)
    if at_s < phases.opens_after_s + phases.opening_s:
        return plan.users, _rate(plan.users - gathered, 1.0)
    tail = _part(plan.users, phases.tail_share)
    return tail, _rate(plan.users - tail, phases.tail_s * LEAVING)


def _part(users: int, share: float) -> int:
    return min(max(round(users * share), 1), users)


def _rate(change: int, within_s: float) -> float:
    return max(abs(change) / max(within_s, 1.0), 1.0)
