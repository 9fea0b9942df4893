"""The campaigns as this process knows them: read from Redis, kept briefly, never guessed.

A configuration is kept until the head is seen to carry another number (``config_seq``): each read
and each reply of a script tells it. State and stock are kept for at most ``FRESH_S``, and all
callers in that time share one read. A draft is never kept: it may be deleted and made anew with
other showings.
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
from sale.domain.campaign_view import CampaignNow
from sale.domain.problem import DAMAGED, Problem, Refused
from sale.lifetime import cancel_and_wait
from sale.stock import survey
from sale.stock.atomic import read_at_once
from sale.stock.head import SNAPSHOT, Head, integer
from sale.stock.keys import CAMPAIGNS, campaign_keys

FRESH_S: Final = 0.8
"""Below the second that the contract allows, so that the answer is still fresh on arrival."""
REFRESH_S: Final = FRESH_S / 2
"""Past this age, what is asked for from memory is read again meanwhile."""
ABSENT_S: Final = 0.1
"""For what members may not know of yet: it may be opened by hand any moment."""
UNKNOWN_MAX: Final = 1_000
CONFIGS_KEPT: Final = 1_024


class Unreadable(Refused, ValueError):  # noqa: N818 - the campaign is
    """What Redis holds of one campaign is not what the engine writes there."""

    def __init__(self, campaign_id: str, error: object) -> None:
        why = f"what Redis holds of it cannot be read ({error}): recover it"[:300]
        super().__init__(Problem.UNAVAILABLE, f"{campaign_id}: {why}")
        self.campaign_id = campaign_id
        self.why = why


class Catalogue:
    """The campaigns in one Redis, as this process last read them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._known: dict[str, CampaignNow] = {}
        """Those for sale, as they were when their configuration was read."""
        self._moved_at: dict[str, float] = {}
        """When the configuration that was known was seen to be an old one."""
        self._now: dict[str, tuple[float, CampaignNow]] = {}
        self._absent: dict[str, float] = {}
        """When each ID that has no campaign was asked for, the oldest first."""
        self._all: tuple[float, list[CampaignNow]] | None = None
        self._reading: dict[str, asyncio.Task[CampaignNow | None]] = {}
        self._reads: set[asyncio.Task[CampaignNow | None]] = set()
        """All that are under way, also those whose answer is an old configuration's."""
        self._reading_all: asyncio.Task[list[CampaignNow]] | None = None
        self._clock: tuple[float, int] | None = None
        self._reading_clock: asyncio.Task[tuple[float, int]] | None = None

    def known(self, campaign_id: str) -> Campaign | None:
        """Give the configuration of a campaign that was for sale once; no I/O."""
        known = self._known.get(campaign_id)
        return None if known is None else known.campaign

    def configured(self, campaign_id: str, config_seq: int) -> Campaign | None:
        """Give the configuration of that number, which a script has just replied with.

        None where it is not known: another one is forgotten, so that the next request reads it.
        """
        known = self._known.get(campaign_id)
        if known is None or known.config_seq == config_seq:
            return None if known is None else known.campaign
        self._moved_at[campaign_id] = time.monotonic()
        for kept in (self._known, self._now, self._reading):
            kept.pop(campaign_id, None)
        return None

    def was_for_sale(self, campaign_id: str) -> bool:
        """Whether a campaign was for sale when it was read last, also if that is in doubt."""
        _, now = self._now.get(campaign_id, (0.0, None))
        return campaign_id in self._known or (now is not None and now.visible)

    def doubt(self, campaign_id: str) -> None:
        """Read a configuration again that a request was refused by, unless it is fresh.

        Such a refusal asks no store, so no reply would tell that the configuration has moved. The
        old one serves until the read ends: otherwise any wrong request would take the campaign off
        the fast path.
        """
        read_at, _ = self._now.get(campaign_id, (0.0, None))
        if campaign_id in self._known and time.monotonic() - read_at >= FRESH_S:
            self._read_soon(campaign_id)

    async def for_sale(self, campaign_id: str) -> Campaign | None:
        """Give the configuration of a campaign that members may know of."""
        now = await self.now(campaign_id)
        return now.campaign if now is not None and now.visible else None

    async def now(self, campaign_id: str) -> CampaignNow | None:
        """Give a campaign as it was at most ``FRESH_S`` ago; None where there is none."""
        now = time.monotonic()
        if now - self._absent.get(campaign_id, -ABSENT_S) < ABSENT_S:
            return None
        kept = self._now.get(campaign_id)
        if kept is not None and now - kept[0] < (FRESH_S if kept[1].visible else ABSENT_S):
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
        if age_s >= FRESH_S or not now.visible:
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
            self._reads.add(task)
            task.add_done_callback(lambda done: self._has_read(campaign_id, done))
        return task

    def _has_read(self, campaign_id: str, task: "asyncio.Task[CampaignNow | None]") -> None:
        self._reads.discard(task)
        if self._reading.get(campaign_id) is task:
            del self._reading[campaign_id]
        if not task.cancelled():
            task.exception()  # it concerns those who await the task; there may be none

    async def close(self) -> None:
        """End what is being read."""
        await cancel_and_wait(tuple(self._reads))

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
        if found is None:
            self._lacks(campaign_id, asked_at)
        else:
            self._keep(found, asked_at)
        return found

    async def read_all(self) -> list[CampaignNow]:
        """Read every campaign at once."""
        asked_at = time.monotonic()
        found = await read_campaigns(self._redis)
        for now in found:
            self._keep(now, asked_at)
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
                self._keep(now, asked_at)
        return {each: self._known[each].campaign for each in campaign_ids_ if each in self._known}

    async def _read_clock(self) -> tuple[float, int]:
        now_ms = await redis_now_ms(self._redis)
        self._clock = (time.monotonic(), now_ms)
        return self._clock

    def _keep(self, found: CampaignNow, asked_at: float) -> None:
        """Keep what was read, unless it was asked for before its configuration moved."""
        campaign_id = found.campaign.id
        if asked_at < self._moved_at.get(campaign_id, 0.0):
            return
        self._absent.pop(campaign_id, None)
        self._now[campaign_id] = (asked_at, found)
        if not found.visible:
            self._known.pop(campaign_id, None)
            return
        known = self._known.get(campaign_id)
        if known is None or known.config_seq != found.config_seq:
            self._known[campaign_id] = found

    def _lacks(self, campaign_id: str, asked_at: float) -> None:
        """Note that Redis has no such campaign."""
        self._now.pop(campaign_id, None)
        self._absent.pop(campaign_id, None)
        if len(self._absent) >= UNKNOWN_MAX:
            del self._absent[next(iter(self._absent))]
        self._absent[campaign_id] = asked_at
        self._forget_rehearsal(campaign_id)

    def _forget_rehearsal(self, campaign_id: str) -> None:
        """Only rehearsals go away; any other that is not there has been lost, and comes back."""
        known = self._known.get(campaign_id)
        if known is not None and known.campaign.rehearsal_of:
            del self._known[campaign_id]
            self._now.pop(campaign_id, None)


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
        survey.add_reads(pipe, [each.head for each in keys], SNAPSHOT.fields)
        survey.add_reads(pipe, [each.stock for each in keys])
        clock, *replies = await pipe.execute()
    half = len(replies) // 2
    heads = survey.replies_by_key(replies[:half], len(keys))
    stocks = survey.replies_by_key(replies[half:], len(keys))
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
    pipe.hmget(keys.head, SNAPSHOT.fields)
    pipe.hgetall(keys.stock)


def _parse(
    campaign_id: str,
    clock: tuple[int, int],
    values: list[bytes | None],
    stock: dict[bytes, bytes],
) -> CampaignNow | None:
    head = SNAPSHOT.parse(values)
    if head.seq is None or not (head.config and head.state and head.chain and head.epoch):
        return None
    campaign = _campaign(head.config)
    if campaign.id != campaign_id:
        raise ValueError(f"its configuration is that of {campaign.id}")
    now_ms = max(clock[0] * 1000 + clock[1] // 1000, head.clock)
    showings = range(len(campaign.showings))
    return CampaignNow(
        campaign=campaign,
        config_seq=head.config_seq,
        state=_state_at(now_ms, head),
        recorded=State(head.state),
        opens_at_ms=head.opens_at,
        closes_at_ms=head.closes_at,
        recovering=head.recovering,
        seq=head.seq,
        chain=head.chain,
        epoch=head.epoch,
        roster_rev=-1 if head.roster_rev is None else head.roster_rev,
        tickets=tuple(integer(stock.get(b"t%d" % number, b"0")) for number in showings),
        remaining=tuple(integer(stock.get(b"r%d" % number, b"0")) for number in showings),
        held=tuple(integer(stock.get(b"h%d" % number, b"0")) for number in showings),
        as_of_ms=now_ms,
    )


async def redis_now_ms(redis: Redis) -> int:
    """Milliseconds of the clock that decides openings."""
    seconds, micros = await redis.time()
    return seconds * 1000 + micros // 1000


def _state_at(now_ms: int, head: Head) -> State:
    """Give the state as the next script will find it: what the clock has changed counts."""
    state = State(head.state)
    if state in {State.DRAFT, State.DELETED}:
        return state
    if head.recovering:
        return State.RECOVERING
    if state is State.SCHEDULED and head.opens_at is not None and now_ms >= head.opens_at:
        state = State.OPEN
    ends = state in {State.SCHEDULED, State.OPEN, State.PAUSED}
    if ends and head.closes_at is not None and now_ms >= head.closes_at:
        return State.CLOSED
    return state


_campaign: Final = lru_cache(maxsize=CONFIGS_KEPT)(msgspec.json.Decoder(Campaign).decode)
"""All campaigns are read some times a second, and what they are made of does not change."""
