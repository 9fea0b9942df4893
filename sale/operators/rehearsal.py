"""Rehearsals: a copy of a campaign is sold to made-up cards on the deployment itself, then removed.

The copy is a campaign like any other: it uses the same scripts, API processes, Redis, writer and
audit, because these are rehearsed. Three marks keep it apart: its configuration names the campaign
that it rehearses, which no campaign file can do; its only union is in no roster; and the numbers of
its buyers are of a range that no roster accepts (``domain.may_meet``). It closes by itself soon
after its rush, even if the process that began it has died.

Afterwards it is struck off in PostgreSQL, which then no longer counts it as missing, taken out of
Redis, and its rows are removed (``db/rehearsals.py``). The audit log keeps who did it, when and
why, and the chain hash of the removed ledger. Rejected: a second Redis or schema for rehearsals,
which would rehearse other servers than those of the release.
"""

import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Final

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.db import read, rehearsals
from sale.db.errors import POSTGRES_ERRORS
from sale.db.pool import Connection
from sale.db.rehearsals import LeftOver, Removed
from sale.domain.campaign import Campaign, State
from sale.domain.campaign_view import CampaignNow
from sale.domain.clock import LOCAL_ZONE, from_ms, rfc3339
from sale.domain.member import MADE_UP_FROM
from sale.domain.problem import Problem, Refused
from sale.domain.text import TITLE_MAX
from sale.domain.unions import REHEARSAL_UNION
from sale.identity import Member, SigningKey, issue_member_token
from sale.operators.campaigns import Actor, CampaignDesk
from sale.operators.steps import CLOSE, StepRequest
from sale.stock.catalogue import read_campaign, read_campaigns, redis_now_ms
from sale.stock.head import TRUST
from sale.stock.process_reports import collect_reports
from sale.stock.removal import NotRemoved, remove_rehearsal
from sale.stock.scripts import Scripts
from sale.trust.history import wait_applied
from sale.trust.recover import LOCK_PATIENCE_S, alone

QUIET_MS: Final = 30 * 60_000
"""No rehearsal if a real campaign opens within this time after it, unless the operator insists."""
CLOSES_AFTER_S: Final = 300.0
"""A rehearsal closes by itself this long after its rush."""
TITLE_PREFIX: Final = "演练 rehearsal: "
ID_MAX: Final = 48
CARDS_MAX: Final = 1_000_000
APPLIED_WAIT_S: Final = 30.0
"""Longest time that the writer may make no progress."""
REASON_OVER: Final = "the rehearsal is over"
_SELLS: Final = {
    State.OPEN: "is open",
    State.PAUSED: "is paused, and may go on any moment",
    State.RECOVERING: "is being recovered",
}


class Real(msgspec.Struct, frozen=True):
    """The rehearsed campaign's event number and chain hash, which show that it was not touched."""

    id: str
    seq: int
    chain: str


class Rehearsals:
    """Begins, closes and purges rehearsals."""

    def __init__(self, redis: Redis, scripts: Scripts, pool: asyncpg.Pool) -> None:
        self._redis = redis
        self._pool = pool
        self._desk = CampaignDesk(redis, scripts, pool)

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the right to play or remove rehearsals here. Raises Refused."""
        async with self._pool.acquire() as connection:
            if not await rehearsals.hold_play(connection):
                raise Refused(
                    Problem.WRONG_STATE,
                    "somebody else is playing or removing a rehearsal: wait for its end",
                )
            try:
                yield
            finally:
                # The end of a lost connection gave the right back.
                with contextlib.suppress(*POSTGRES_ERRORS):
                    await rehearsals.leave_play(connection)

    async def original(self, campaign_id: str) -> CampaignNow:
        """Give the campaign to be rehearsed. Raises Refused where it cannot be."""
        now = await self._desk.show(campaign_id, Actor("engine"))
        if now.campaign.rehearsal_of:
            raise Refused(Problem.WRONG_STATE, f"{campaign_id!r} is a rehearsal itself")
        return now

    async def real_sales(self, for_s: float) -> list[str]:
        """Say in words which real campaigns sell now, or open within QUIET_MS of ``for_s``."""
        until_ms = await redis_now_ms(self._redis) + int(for_s * 1_000) + QUIET_MS
        found = []
        for now in await read_campaigns(self._redis):
            if now.campaign.rehearsal_of:
                continue
            if now.state in _SELLS:
                found.append(f"{now.campaign.id} {_SELLS[now.state]}")
            elif now.state is State.SCHEDULED and (now.opens_at_ms or 0) <= until_ms:
                found.append(f"{now.campaign.id} opens at {rfc3339(now.opens_at_ms or 0)}")
        return found

    async def begin(
        self, original: CampaignNow, actor: Actor, reason: str, *, opens_in_s: float, lasts_s: float
    ) -> CampaignNow:
        """Make the copy, to open by itself in ``opens_in_s``. Raises Refused."""
        opens_at_ms = await redis_now_ms(self._redis) + int(opens_in_s * 1_000)
        copy = copy_of(original, opens_at_ms, opens_at_ms + int((lasts_s + CLOSES_AFTER_S) * 1_000))
        return await self._desk.create(copy, actor, reason, None)

    async def close(self, campaign_id: str, actor: Actor) -> None:
        """Close a rehearsal, where it is not closed yet. Raises Refused."""
        now = await read_campaign(self._redis, campaign_id)
        if now is not None and now.state in {
            State.SCHEDULED, State.OPEN, State.PAUSED,
        }:  # fmt: skip
            await self._desk.take(CLOSE, campaign_id, StepRequest(reason=REASON_OVER), actor, None)

    async def real(self, campaign_id: str) -> Real:
        """Give the event number and chain hash of a real campaign. Raises Refused."""
        now = await self._desk.show(campaign_id, Actor("engine"))
        return Real(campaign_id, now.seq, now.chain)

    async def left_over(self) -> list[LeftOver]:
        """Rehearsals that have anything left, in either store."""
        async with self._pool.acquire() as connection:
            found = {each.id: each for each in await rehearsals.left_over(connection)}
            real = await rehearsals.real(connection)
        for now in await read_campaigns(self._redis):
            campaign = now.campaign
            # For a campaign that PostgreSQL knows as a real one, Redis is not believed.
            if campaign.rehearsal_of and campaign.id not in found and campaign.id not in real:
                found[campaign.id] = LeftOver(
                    campaign.id, campaign.rehearsal_of, now.state.value, 0, struck_off=False
                )
        return sorted(found.values(), key=lambda each: each.id)

    async def purge(self, campaign_id: str, actor: Actor, reason: str) -> Removed:
        """Close a rehearsal and remove all of it but its rows in the audit log.

        May be repeated after it died. Raises Refused for all other campaigns.
        """
        left = {each.id: each for each in await self.left_over()}.get(campaign_id)
        if left is None:
            now = await read_campaign(self._redis, campaign_id)
            if now is not None:
                raise Refused(
                    Problem.WRONG_STATE,
                    f"{campaign_id!r} is no rehearsal: nothing of it is removed",
                )
            raise Refused(Problem.NOT_FOUND, f"no rehearsal {campaign_id!r} is left")
        if not left.struck_off:
            await self.close(campaign_id, actor)
            await self._let_go(campaign_id)
        async with alone(self._pool, campaign_id, LOCK_PATIENCE_S) as connection:
            removed = Removed(0, 0)
            if not await rehearsals.is_purged(connection, campaign_id):
                removed = await self._strike_off(connection, campaign_id, actor, reason)
            try:
                await remove_rehearsal(self._redis, campaign_id)
            except NotRemoved as error:
                raise Refused(Problem.UNAVAILABLE, str(error)) from None
            await rehearsals.remove_rows(connection, campaign_id)
        return removed

    async def _strike_off(
        self, connection: Connection, campaign_id: str, actor: Actor, reason: str
    ) -> Removed:
        applied, _ = await read.position(connection, campaign_id)
        removed = await rehearsals.strike_off(
            connection, campaign_id, applied, actor=actor.name, reason=reason
        )
        if removed is None:
            raise Refused(
                Problem.UNAVAILABLE, f"{campaign_id}: it has changed meanwhile; try again"
            )
        return removed

    async def _let_go(self, campaign_id: str) -> None:
        """Wait until PostgreSQL has all of it and no API process keeps orders of it.

        Does not wait for a campaign that is lost or recovering. Raises Refused.
        """
        head = await TRUST.read(self._redis, campaign_id)
        if head.seq is None or head.recovering:
            return
        seq = head.seq

        async def applied_now() -> int:
            now = await TRUST.read(self._redis, campaign_id)
            return seq if now.seq is None or now.recovering else now.applied

        applied = await wait_applied(applied_now, seq, patience_s=APPLIED_WAIT_S)
        if applied < seq:
            raise Refused(
                Problem.UNAVAILABLE,
                f"{campaign_id}: PostgreSQL has {applied} of {seq} events: is the writer "
                "running? Its data stays until that is so",
            )
        await collect_reports(self._redis)


def copy_of(original: CampaignNow, opens_at_ms: int, closes_at_ms: int) -> Campaign:
    """Give the rehearsal of a campaign: the same showings, stock, limits and price.

    Its stock is all tickets of the original, with those that were added since. One that is paid
    online is rehearsed as if paid at the counter: it holds nothing and never reaches a provider.
    """
    campaign = original.campaign
    payment = "counter" if campaign.payment == "online" else campaign.payment
    return msgspec.structs.replace(
        campaign,
        id=rehearsal_id(campaign.id),
        title=f"{TITLE_PREFIX}{campaign.title}"[:TITLE_MAX],
        unions=(REHEARSAL_UNION,),
        opens_at=from_ms(opens_at_ms),
        closes_at=from_ms(closes_at_ms),
        draft=False,
        payment=payment,
        hold_s=None,
        rehearsal_of=campaign.id,
        showings=tuple(
            msgspec.structs.replace(showing, tickets=tickets)
            for showing, tickets in zip(campaign.showings, original.tickets, strict=True)
        ),
    )


def rehearsal_id(campaign_id: str) -> str:
    """Give a new ID, ``rehearsal-<date>-<six hex digits>-<campaign>``, cut where it is too long."""
    today = datetime.now(LOCAL_ZONE).strftime("%Y%m%d")
    name = f"rehearsal-{today}-{secrets.token_hex(3)}-{campaign_id}"
    return re.sub(r"-+$", "", name[:ID_MAX])


def made_up_members(count: int) -> Iterator[Member]:
    """Give ``count`` members who are in no roster, the same ones each time."""
    return (Member(MADE_UP_FROM + number, REHEARSAL_UNION) for number in range(count))


def tokens(key: SigningKey, count: int, *, ttl_s: int) -> Iterator[dict[str, str]]:
    """Make tokens of made-up members: ``card_no``, ``token``, ``union``, as ``sale tokens`` does.

    They have no card; ``card_no`` is their number.
    """
    now_s = int(time.time())
    for member in made_up_members(count):
        token = issue_member_token(key, member, now_s=now_s, ttl_s=ttl_s)
        yield {"card_no": str(member.no), "token": token, "union": member.union}
