"""Runs a schedule: members, operators and faults, each at its moment."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.members import Ask, Member
from loadtest.wire import ProtocolError, Response
from soak.members import UNCERTAIN, Stall, buy, outcome, post
from soak.schedule import Act, Fault, Offer, Schedule
from soak.timeline import Timeline
from soak.trouble import Trouble

PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.4, 0.8)
STEP_TRIES = 6
PLAY_EXTRA_S = 25.0
SETTLE_S = 20.0


@dataclass
class ActTold:
    """An operator's step and its attempts: (sent, received, status) of each."""

    act: Act
    reason: str
    campaign: str
    tries: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def done_at(self) -> float | None:
        """When it was first acknowledged; None: never."""
        return min((end for _, end, status in self.tries if 200 <= status < 300), default=None)

    @property
    def uncertain(self) -> bool:
        """Whether it may have been done without an acknowledgement."""
        return self.done_at is None and any(
            status in UNCERTAIN or status >= 500 for _, _, status in self.tries
        )


class Player:
    """One seed on a rig. ``problems`` holds those that the judges do not check."""

    def __init__(
        self,
        rig: Any,
        schedule: Schedule,
        timeline: Timeline,
        trouble: Trouble,
        stalls: Sequence[Stall],
        members: Sequence[Member],
        operator_token: str,
        after_faults: Callable[[], Awaitable[None]],
    ) -> None:
        self.rig = rig
        self.schedule = schedule
        self.timeline = timeline
        self.trouble = trouble
        self.stalls = stalls
        self.members = members
        self.operator_token = operator_token
        self.after_faults = after_faults
        self.acts: list[ActTold] = []
        self.problems: list[str] = []
        self._unsettled: list[tuple[Stall, Member, Ask]] = []

    async def play(self) -> None:
        """Run it to its end, with a time limit; then end all faults."""
        self.timeline.start()
        work = [
            *(self._at(offer.at_s, self._offer(offer)) for offer in self.schedule.offers),
            *(self._at(act.at_s, self._act(act)) for act in self.schedule.acts),
        ]
        # Members do not wait for a fault to end, nor faults for members.
        doing = asyncio.gather(*work)
        faults = asyncio.gather(
            *(self._at(fault.at_s, self._fault(fault)) for fault in self.schedule.faults)
        )
        try:
            async with asyncio.timeout(self.schedule.seconds + PLAY_EXTRA_S):
                await faults
                await self._at(self.schedule.seconds, self._end_faults())
                await doing
        except TimeoutError:
            self._problem("members or operators are still waiting: the run was ended")
            for group in (doing, faults):
                group.cancel()
            await asyncio.gather(doing, faults, return_exceptions=True)
            await self._end_faults()

    async def _end_faults(self) -> None:
        await self.trouble.heal()
        await self.after_faults()

    async def settle(self) -> None:
        """Retry each unknown outcome with the same key; each must become known."""
        since = time.perf_counter()
        pending = list(self._unsettled)
        for stall in self.stalls:
            member = self.members[-1 - self.stalls.index(stall)]
            key = f"probe-{self.schedule.seed}"
            pending.append((stall, member, Ask(member.member_no, key, stall.showings[0], 1)))
        while pending and time.perf_counter() - since < SETTLE_S:
            told = await asyncio.gather(*(self._buy(*each) for each in pending[:64]))
            pending = [
                *(
                    each
                    for each, answer in zip(pending, told, strict=False)
                    if answer.status in UNCERTAIN
                ),
                *pending[64:],
            ]
            if pending:
                await asyncio.sleep(PAUSES_S[0])
        self.timeline.note(
            f"settled after {time.perf_counter() - since:.2f} s, {len(pending)} not told"
        )
        for stall in {stall.campaign for stall, _, _ in pending}:
            self._problem(f"not selling: {stall} is not healed after {SETTLE_S:.0f} s")

    async def _at(self, at_s: float, work: Awaitable[None]) -> None:
        await asyncio.sleep(max(0.0, at_s - self.timeline.now_s))
        try:
            await work
        except Exception as error:  # noqa: BLE001 - a fault of the soak must not hide the engine's
            self._problem(f"the soak itself: {type(error).__name__}: {error}")

    async def _fault(self, fault: Fault) -> None:
        await self.trouble.do(fault)

    async def _offer(self, offer: Offer) -> None:
        stall, member = self.stalls[offer.sale], self.members[offer.member]
        asked = Ask(member.member_no, offer.key, stall.showings[offer.showing], offer.quantity)
        answer = Response(0, b"", b"")
        for attempt in range(offer.tries):
            if attempt:
                await asyncio.sleep(PAUSES_S[min(attempt - 1, len(PAUSES_S) - 1)])
            at_once = 2 if offer.twice and not attempt else 1
            told = await asyncio.gather(*(self._buy(stall, member, asked) for _ in range(at_once)))
            answer = next((each for each in told if each.status not in UNCERTAIN), told[0])
            if answer.status not in UNCERTAIN:
                break
        if answer.status in UNCERTAIN and offer.settles:
            self._unsettled.append((stall, member, asked))
        if answer.status == 201:
            for later_s, quantity in offer.again:
                await asyncio.sleep(later_s)
                again = Ask(asked.member_no, asked.key, asked.showing, quantity)
                await self._buy(stall, member, again)

    async def _buy(self, stall: Stall, member: Member, asked: Ask) -> Response:
        try:
            answer = await buy(self.rig.address, stall, member, asked)
        except ProtocolError as error:
            self._problem(f"protocol: {error}")
            answer = Response(0, b"", b"", str(error))
        self.timeline.answered(self.stalls.index(stall), outcome(answer))
        return answer

    async def _act(self, act: Act) -> None:
        stall = self.stalls[act.sale]
        number = self.schedule.acts.index(act)
        told = ActTold(act, f"soak {self.schedule.seed} step {number}", stall.campaign)
        self.acts.append(told)
        self.timeline.note(f"{act} begins")
        if act.key:
            for _ in range(act.times):
                await self._step(act, stall, told)
        else:
            await self._command(act, stall, told)
        statuses = [status for _, _, status in told.tries]
        self.timeline.note(f"{act} ended: {statuses}")

    async def _step(self, act: Act, stall: Stall, told: ActTold) -> None:
        """Send it with its key until the outcome is known."""
        body: dict[str, object] = {"reason": told.reason}
        if act.what == "stock":
            body |= {"showing": stall.showings[act.showing], "add": act.add}
        path = f"/api/v1/admin/campaigns/{stall.campaign}/{act.what}"
        for pause_s in PAUSES_S[:STEP_TRIES]:
            sent_at = time.perf_counter()
            answer = await post(self.rig.address, path, self.operator_token, body, act.key)
            told.tries.append((sent_at, time.perf_counter(), answer.status))
            if answer.status not in UNCERTAIN:
                return
            await asyncio.sleep(pause_s)

    async def _command(self, act: Act, stall: Stall, told: ActTold) -> None:
        """Do it by the command line: done (200) or unknown (0)."""
        words: tuple[str, ...]
        if act.what in {"revoke", "restore"}:
            words = ("cards", act.what, self.rig.card_numbers[self.members[act.member].member_no])
        elif act.what == "stock":
            showing = stall.showings[act.showing]
            words = ("campaign", "add-stock", stall.campaign, showing, str(act.add))
        else:
            words = ("campaign", act.what, stall.campaign)
        sent_at = time.perf_counter()
        ran = await self.rig.sale(*words, "--reason", told.reason)
        told.tries.append((sent_at, time.perf_counter(), 0 if ran.status else 200))
        if "Traceback" in ran.err:
            self._problem(f"command line: {' '.join(words[:2])}: {ran.err[-1_500:]}")

    def _problem(self, what: str) -> None:
        self.problems.append(what)
        self.timeline.note(f"PROBLEM {what}"[:500])
