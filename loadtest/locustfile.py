"""A release with Locust: members, refreshers, bots and an operator.

Start ``sale up`` with a roster, then for instance:

    locust -f loadtest/locustfile.py --headless --processes 2 --host http://127.0.0.1:8080 \
        --data-dir .sale --scenario five-yuan-films --out run

Without ``--headless`` the same has its page at http://127.0.0.1:8089, and ``/proof`` there shows
what the books said last. A scenario makes a campaign of its own for each run; with ``--campaign``
one that there is is played. With an engine elsewhere, give ``--database-url``, ``--tokens`` and
``--operator-token-file`` instead of ``--data-dir``.

When the users have stopped, every answer is compared with PostgreSQL. Exit status 0: all stands;
1: something does not; 2: the test was not begun; 3: the books could not be read. A user who waits
for an answer asks for nothing else (a closed loop), so this shows how members fare and that nothing
is sold wrongly; what the engine carries is measured by ``python -m loadtest rush``.
"""

from typing import Any, Final

from locust import LoadTestShape, events, runners
from locust.env import Environment

from loadtest.crowd.operator import OperatorUser
from loadtest.crowd.options import add_options
from loadtest.crowd.run import RUN
from loadtest.crowd.users import BotUser, MemberUser, RefresherUser

# Beats of a second. A busy host kept workers silent for longer than Locust's 3, and the test ended
# with nothing asked; one that has really gone is found at the end by its missing account.
runners.HEARTBEAT_LIVENESS = 30


class ReleaseShape(LoadTestShape):
    """Quiet, crowd gathering, the second of opening, long tail; or so many users for so long."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Users at this moment and how many come or go a second; None ends the test."""
        return RUN.tick()


def _prepare(environment: Environment, **_: object) -> None:
    RUN.prepare(environment)
    if not RUN.leads:
        return
    mix = RUN.mix()
    for user, weight in (
        (MemberUser, mix.members),
        (RefresherUser, mix.refreshers),
        (BotUser, mix.bots),
    ):
        user.weight = weight
    OperatorUser.weight = 0
    OperatorUser.fixed_count = int(RUN.deeds().any)


_EVENTS: Final[Any] = events
_EVENTS.init_command_line_parser.add_listener(add_options)
_EVENTS.init.add_listener(_prepare)
_EVENTS.test_start.add_listener(lambda **_: RUN.begin())
_EVENTS.test_stop.add_listener(lambda **_: RUN.finish())
_EVENTS.quitting.add_listener(lambda **_: RUN.quit())
