"""What this process knows of the campaigns: read from Redis, kept for a moment, never guessed.

A campaign's configuration cannot change once it has left the draft, so it is kept for good; state
and stock are kept for at most ``FRESH_S``, and everybody who asks meanwhile shares one read. A
draft is never kept: it may be deleted and made anew with other showings.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sale.domain.campaign import CAMPAIGN_ID, Campaign, State
from sale.domain.clock import in_bounds, rfc3339
from sale.domain.problem import DAMAGED, Problem, Refused
from sale.stock import survey
from sale.stock.atomic import read_at_once
from sale.stock.keys import CAMPAIGNS, campaign_keys

FRESH_S: Final = 0.8
"""Below the second that the contract allows, so that the answer is still fresh on arrival."""
REFRESH_S: Final = FRESH_S / 2
"""Past this age, what is asked for from memory is read again meanwhile."""
ABSENT_S: Final = 0.1
"""For what members may not know of yet: it may be opened by hand any moment."""
UNKNOWN_MAX: Final = 1_000
CONFIGS_KEPT: Final = 1_024
_INTEGER_MAX: Final = 2**63


class Unreadable(Refused, ValueError):  # noqa: N818 - the campaign is
    """What Redis holds of one campaign is not what the engine writes there."""

    def __init__(self, campaign_id: str, error: object) -> None:
        why = f"what Redis holds of it cannot be read ({error}): recover it"[:300]
        super().__init__(Problem.UNAVAILABLE, f"{campaign_id}: {why}")
        self.campaign_id = campaign_id
        self.why = why


class CampaignNow(msgspec.Struct, frozen=True):
    """A campaign at a moment. ``tickets`` and ``remaining`` by showing number.

    ``state`` counts what the clock has changed; ``recorded`` is what the ledger says so far.
    """

    campaign: Campaign
    state: State
    recorded: State
    opens_at_ms: int | None
    closes_at_ms: int | None
    recovering: str
    seq: int
    chain: str
    epoch: int
    roster_rev: int
    tickets: tuple[int, ...]
    remaining: tuple[int, ...]
    as_of_ms: int

    @property
    def visible(self) -> bool:
        """Whether members may know of it."""
        return self.state not in {State.DRAFT, State.DELETED}

    @property
    def window_fault(self) -> str:
        """What is wrong with the opening that it waits for; '' where nothing is."""
        waits = self.state in {State.DRAFT, State.SCHEDULED}
        if not waits or self.opens_at_ms is None or in_bounds(self.opens_at_ms):
            return ""
        return f"its opening ({rfc3339(self.opens_at_ms)}) is out of bounds: schedule it again"

    @property
    def listed(self) -> bool:
        """Whether members are told of it unasked."""
        return self.visible and not self.campaign.rehearsal_of


class Catalogue:
    """The campaigns in one Redis, as this process last read them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._known: dict[str, Campaign] = {}
        self._now: dict[str, tuple[float, CampaignNow | None]] = {}
        self._all: tuple[float, list[CampaignNow]] | None = None
        self._reading: dict[str, asyncio.Task[CampaignNow | None]] = {}
        self._reading_all: asyncio.Task[list[CampaignNow]] | None = None
        self._clock: tuple[float, int] | None = None
        self._reading_clock: asyncio.Task[tuple[float, int]] | None = None

    def known(self, campaign_id: str) -> Campaign | None:
        """Give the configuration of a campaign that was for sale once; no I/O."""
        return self._known.get(campaign_id)

    async def for_sale(self, campaign_id: str) -> Campaign | None:
        """Give the configuration of a campaign that members may know of."""
        now = await self.now(campaign_id)
        return now.campaign if now is not None and now.visible else None

    async def now(self, campaign_id: str) -> CampaignNow | None:
        """Give a campaign as it was at most ``FRESH_S`` ago; None where there is none."""
        kept = self._now.get(campaign_id)
        if kept is not None:
            sure = kept[1] is not None and kept[1].visible
            if time.monotonic() - kept[0] < (FRESH_S if sure else ABSENT_S):
                return kept[1]
        return await asyncio.shield(self._read_soon(campaign_id))

    def fresh(self, campaign_id: str) -> CampaignNow | None:
        """Give a campaign that members may know of as it was at most ``FRESH_S`` ago; no I/O.

        None where memory has no such one. A campaign that is asked for all the time is read again
        before it is too old, so that a crowd never waits for Redis.
        """
        kept = self._now.get(campaign_id)
        if kept is None:
            return None
        read_at, now = kept
        age_s = time.monotonic() - read_at
        if now is None or age_s >= FRESH_S or not now.visible:
            return None
        if age_s >= REFRESH_S:
            self._read_soon(campaign_id)
        return now

    def _read_soon(self, campaign_id: str) -> "asyncio.Task[CampaignNow | None]":
        """Begin to read a campaign, unless that is under way."""
        task = self._reading.get(campaign_id)
        if task is None:
            task = asyncio.create_task(self.read(campaign_id))
            self._reading[campaign_id] = task
            task.add_done_callback(lambda done: self._has_read(campaign_id, done))
        return task

    def _has_read(self, campaign_id: str, task: "asyncio.Task[CampaignNow | None]") -> None:
        self._reading.pop(campaign_id, None)
        if not task.cancelled():
            task.exception()  # it concerns those who await the task; there may be none

    async def close(self) -> None:
        """End what is being read."""
        tasks = list(self._reading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def all(self) -> list[CampaignNow]:
        """Give every campaign, as at most ``FRESH_S`` ago, latest opening first."""
        if self._all is not None and time.monotonic() - self._all[0] < FRESH_S:
            return self._all[1]
        if self._reading_all is None or self._reading_all.done():
            self._reading_all = asyncio.create_task(self.read_all())
        return await asyncio.shield(self._reading_all)

    async def clock_ms(self) -> int:
        """Give milliseconds of the clock that decides openings, asked once in ``FRESH_S``."""
        clock = self._clock
        if clock is None or time.monotonic() - clock[0] >= FRESH_S:
            if self._reading_clock is None or self._reading_clock.done():
                self._reading_clock = asyncio.create_task(self._read_clock())
            clock = await asyncio.shield(self._reading_clock)
        return clock[1] + int((time.monotonic() - clock[0]) * 1_000)

    async def read(self, campaign_id: str) -> CampaignNow | None:
        """Read a campaign at once."""
        asked_at = time.monotonic()
        found = await read_campaign(self._redis, campaign_id)
        if found is None and len(self._now) >= UNKNOWN_MAX:
            self._now.clear()
        self._keep(campaign_id, found, asked_at)
        return found

    async def read_all(self) -> list[CampaignNow]:
        """Read every campaign at once."""
        asked_at = time.monotonic()
        found = await read_campaigns(self._redis)
        for now in found:
            self._keep(now.campaign.id, now, asked_at)
        there = {now.campaign.id for now in found}
        for campaign_id in [each for each in self._known if each not in there]:
            self._forget_rehearsal(campaign_id)
        found = latest_first(found)
        self._all = (asked_at, found)
        return found

    async def those_for_sale(self, campaign_ids_: Sequence[str]) -> dict[str, Campaign]:
        """Give the configurations of those that members may know of; reads what it does not know.

        At most two round trips, however many they are. That there was none a
        moment ago does not count: a campaign may be younger than that.
        """
        unknown = [each for each in campaign_ids_ if each not in self._known]
        if unknown:
            asked_at = time.monotonic()
            for now in await read_campaigns(self._redis, unknown):
                self._keep(now.campaign.id, now, asked_at)
        return {each: self._known[each] for each in campaign_ids_ if each in self._known}

    async def _read_clock(self) -> tuple[float, int]:
        now_ms = await redis_now_ms(self._redis)
        self._clock = (time.monotonic(), now_ms)
        return self._clock

    def _keep(self, campaign_id: str, found: CampaignNow | None, asked_at: float) -> None:
        self._now[campaign_id] = (asked_at, found)
        if found is not None and found.visible:
            self._known.setdefault(campaign_id, found.campaign)
        elif found is None:
            self._forget_rehearsal(campaign_id)

    def _forget_rehearsal(self, campaign_id: str) -> None:
        """Only rehearsals go away; any other that is not there has been lost, and comes back."""
        known = self._known.get(campaign_id)
        if known is not None and known.rehearsal_of:
            del self._known[campaign_id]


def latest_first(campaigns: Iterable[CampaignNow]) -> list[CampaignNow]:
    """Sort campaigns for a list: latest opening first."""
    return sorted(campaigns, key=lambda now: (-(now.opens_at_ms or 0), now.campaign.id))


async def campaign_ids(redis: Redis) -> list[str]:
    """Give the IDs of all campaigns that have, or had, a head; sorted."""
    return ids_of(await redis.smembers(CAMPAIGNS))  # type: ignore[arg-type]


def ids_of(members: Iterable[bytes]) -> list[str]:
    """Give the campaign IDs among the members of the set, sorted; nothing else is one."""
    texts = (member.decode(errors="replace") for member in members)
    return sorted(text for text in texts if CAMPAIGN_ID.fullmatch(text))


async def read_campaign(redis: Redis, campaign_id: str) -> CampaignNow | None:
    """Read a campaign's head and stock in one atomic step; None where there is none.

    Raises Unreadable, and redis-py's errors.
    """
    head = campaign_keys(campaign_id).head
    try:
        told = await read_at_once(redis, head, lambda pipe: _ask(pipe, campaign_id))
        return _parse(campaign_id, *told)
    except DAMAGED as error:
        raise Unreadable(campaign_id, error) from None
    except ResponseError as error:
        if survey.is_wrong_type(error):
            raise Unreadable(campaign_id, "a key of another type") from None
        raise


async def read_campaigns(
    redis: Redis,
    only: Sequence[str] | None = None,
    *,
    unreadable: list[Unreadable] | None = None,
) -> list[CampaignNow]:
    """Read all campaigns, or ``only`` these, at once; each may be read between two of its events.

    One whose values are damaged is left out, so that the others are seen; it is added to
    ``unreadable``.
    """
    ids = await campaign_ids(redis) if only is None else only
    keys = [campaign_keys(campaign_id) for campaign_id in ids]
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        survey.ask(pipe, [each.head for each in keys], _HEAD_FIELDS)
        survey.ask(pipe, [each.stock for each in keys])
        clock, *replies = await pipe.execute()
    half = len(replies) // 2
    heads = survey.told(replies[:half], len(keys))
    stocks = survey.told(replies[half:], len(keys))
    read = []
    for campaign_id, head, stock in zip(ids, heads, stocks, strict=True):
        errors = [reply for reply in (head, stock) if isinstance(reply, Exception)]
        try:
            if errors:
                raise Unreadable(campaign_id, errors[0])
            now = _parse(campaign_id, clock, head, dict(zip(stock[::2], stock[1::2], strict=True)))
        except DAMAGED as error:
            if unreadable is not None:
                why = error if isinstance(error, Unreadable) else Unreadable(campaign_id, error)
                unreadable.append(why)
            continue
        if now is not None:
            read.append(now)
    return read


def _ask(pipe: Any, campaign_id: str) -> None:  # noqa: ANN401 - redis-py's pipeline
    keys = campaign_keys(campaign_id)
    pipe.time()
    pipe.hmget(keys.head, _HEAD_FIELDS)
    pipe.hgetall(keys.stock)


def _parse(
    campaign_id: str,
    clock: tuple[int, int],
    head: list[bytes | None],
    stock: dict[bytes, bytes],
) -> CampaignNow | None:
    config, state, opens_at, closes_at, recovering, seq, chain, epoch, roster_rev, last_ms = head
    if config is None or state is None or seq is None or chain is None or epoch is None:
        return None
    campaign = _campaign(config)
    if campaign.id != campaign_id:
        raise ValueError(f"its configuration is that of {campaign.id}")
    now_ms = max(clock[0] * 1000 + clock[1] // 1000, _integer(last_ms or b"0"))
    opens_at_ms, closes_at_ms = _moment(opens_at), _moment(closes_at)
    showings = range(len(campaign.showings))
    return CampaignNow(
        campaign=campaign,
        state=_state_at(now_ms, state.decode(), opens_at_ms, closes_at_ms, recovering),
        recorded=State(state.decode()),
        opens_at_ms=opens_at_ms,
        closes_at_ms=closes_at_ms,
        recovering=(recovering or b"").decode(),
        seq=_integer(seq),
        chain=chain.decode(),
        epoch=_integer(epoch),
        roster_rev=-1 if roster_rev is None else _integer(roster_rev),
        tickets=tuple(_integer(stock.get(b"t%d" % number, b"0")) for number in showings),
        remaining=tuple(_integer(stock.get(b"r%d" % number, b"0")) for number in showings),
        as_of_ms=now_ms,
    )


async def redis_now_ms(redis: Redis) -> int:
    """Milliseconds of the clock that decides openings."""
    seconds, micros = await redis.time()
    return seconds * 1000 + micros // 1000


def _state_at(
    now_ms: int,
    state: str,
    opens_at_ms: int | None,
    closes_at_ms: int | None,
    recovering: bytes | None,
) -> State:
    """Give the state as the next script will find it: what the clock has changed counts."""
    if state in {"draft", "deleted"}:
        return State(state)
    if recovering:
        return State.RECOVERING
    if state == "scheduled" and opens_at_ms is not None and now_ms >= opens_at_ms:
        state = "open"
    if (
        state in {"scheduled", "open", "paused"}
        and closes_at_ms is not None
        and now_ms >= closes_at_ms
    ):
        state = "closed"
    return State(state)


def _moment(value: bytes | None) -> int | None:
    return int(value) if value else None


def _integer(value: bytes) -> int:
    """Read a number that can be told as JSON. Raises ValueError."""
    number = int(value)
    if not -_INTEGER_MAX <= number < _INTEGER_MAX:
        raise ValueError(f"{number} is beyond any number of the engine")
    return number


_HEAD_FIELDS: Final = [
    "config", "state", "opens_at", "closes_at", "recovering", "seq", "chain", "epoch",
    "roster_rev", "clock",
]  # fmt: skip
_campaign: Final = lru_cache(maxsize=CONFIGS_KEPT)(msgspec.json.Decoder(Campaign).decode)
"""All campaigns are read some times a second, and what they are made of does not change."""
