"""Operators' work on campaigns. Each step is one script, one event, one audit-log row.

The steps are entries of ``steps.py``. The script decides whether a step is allowed in the
campaign's state; this module checks the account, and words a refusal. The writer turns the event
into the row of the audit log (INV-10), so that an action cannot be missing there.
"""

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.db import read
from sale.db.errors import POSTGRES_ERRORS
from sale.domain.campaign import Campaign, State
from sale.domain.campaign_view import CampaignNow
from sale.domain.problem import Problem, Refused
from sale.domain.unions import DISTRICT
from sale.operators.steps import PAUSE, RUNNERS, Step, StepCall, StepRequest, checked_reason
from sale.stock.catalogue import latest_first, read_campaign, read_campaigns
from sale.stock.head import packed
from sale.stock.keys import CAMPAIGNS
from sale.stock.scripts import CallReply, Operation, OperationReply, Repeat, Scripts
from sale.trust.history import wait_applied
from sale.trust.revocation import sync_campaign

APPLIED_WAIT_S: Final = 1.0
APPLIED_PAUSE_S: Final = 0.02
_SELLS_NOTHING: Final = frozenset({"paused", "closed", "scheduled", "draft", "deleted"})


class Actor(msgspec.Struct, frozen=True):
    """The acting account: its name in the audit log, its role, and its union.

    None and the district act for every union. An account of another one, whatever its role, acts
    for that union alone; what it may see is ``may_see``, for each reader (audit log: the same rule
    in SQL, ``audit_log_of_union`` and the view ``audit_log_owned``).
    """

    name: str
    role: str = "admin"
    union: str | None = None

    @property
    def sees_all(self) -> bool:
        """Whether this actor acts for every union."""
        return self.union in {None, DISTRICT}

    def acts_for(self, owner: str) -> bool:
        """Whether campaigns of that union are this actor's own."""
        return self.sees_all or self.union == owner

    def may_see(self, now: CampaignNow) -> bool:
        """Whether this campaign exists for this actor: its own, and those of the members' list."""
        if now.state is State.DELETED:
            return False
        return now.listed or self.acts_for(now.campaign.owner)


class CampaignDesk:
    """The operators' steps. Each takes a key; the same key again does nothing twice (INV-4)."""

    def __init__(
        self,
        redis: Redis,
        scripts: Scripts,
        pool: asyncpg.Pool,
        on_step: Callable[[str, int, str], None] | None = None,
    ) -> None:
        """``on_step(campaign_id, seq, chain)`` is called after each step: the ledger's end then."""
        self._on_step = on_step
        self._redis = redis
        self._scripts = scripts
        self._pool = pool

    async def create(
        self, campaign: Campaign, actor: Actor, reason: str | None, key: str | None
    ) -> CampaignNow:
        """Make a campaign: scheduled where it has an opening moment, else a draft."""
        check_may(actor, RUNNERS, campaign.owner)
        reason = None if reason is None else checked_reason(reason)
        config = msgspec.json.encode(campaign)
        operation = _operation(actor, reason, key, "create", config.decode())
        before = await read_campaign(self._redis, campaign.id)
        again = await self._find_repeat(campaign.id, operation, key)
        if again is not None:
            return await self._repeated(campaign.id, actor, again)
        await self._check_free(campaign.id, before, actor)
        scheduled = campaign.opens_at is not None and not campaign.draft
        # Registered first: an ID without a head is passed over, a head without its ID is not seen.
        await self._redis.sadd(CAMPAIGNS, campaign.id)
        reply = await self._scripts.create(
            campaign.id,
            operation,
            packed(campaign, config, campaign.opens_at_ms, campaign.closes_at_ms),
            schedule=scheduled,
        )
        if reply.reply is CallReply.EXISTS:
            raise _taken(campaign.id, await read_campaign(self._redis, campaign.id), actor)
        _check_reply(reply, "create")
        # It is made. If PostgreSQL is away, the scheduler loads the revoked members later.
        with contextlib.suppress(*POSTGRES_ERRORS):
            await sync_campaign(self._redis, self._scripts, self._pool, campaign.id)
        return await self._confirmed(campaign.id, actor, reply.seq)

    async def show(self, campaign_id: str, actor: Actor) -> CampaignNow:
        """Give a campaign as it is now, drafts too. Raises Refused."""
        return seen(campaign_id, await read_campaign(self._redis, campaign_id), actor)

    async def all(self, actor: Actor, *, rehearsals: bool) -> list[CampaignNow]:
        """Give every campaign that exists for this actor, latest opening first."""
        return [
            now
            for now in latest_first(await read_campaigns(self._redis))
            if actor.may_see(now) and (rehearsals or not now.campaign.rehearsal_of)
        ]

    async def live(self, campaign_id: str, actor: Actor) -> tuple[CampaignNow, int]:
        """Give a campaign as it is now, and how many of its events PostgreSQL has.

        Raises Refused.
        """
        now = await self.show(campaign_id, actor)
        async with self._pool.acquire() as connection:
            applied, _ = await read.position(connection, campaign_id)
        return now, applied

    async def take(
        self, step: Step, campaign_id: str, request: StepRequest, actor: Actor, key: str | None
    ) -> CampaignNow | None:
        """Take a step; give the campaign as it is then, None where the step removes it.

        Raises Refused.
        """
        reason = None if request.reason is None else checked_reason(request.reason)
        operation = _operation(actor, reason, key, step.name, f"{campaign_id}|{request.content()}")
        before = await read_campaign(self._redis, campaign_id)
        again = await self._find_repeat(campaign_id, operation, key)
        if again is not None:
            return None if step.removes else await self._repeated(campaign_id, actor, again)
        now = seen(campaign_id, before, actor)
        check_may(actor, step.roles, now.campaign.owner)
        reply = await step.script(StepCall(step, self._scripts, now, operation, request))
        if reply.reply is CallReply.INVALID:
            field, why = step.invalid
            raise Refused(Problem.INVALID_REQUEST, f"{field}: {why}", field=field)
        _check_reply(reply, step.name, step.instead)
        if step.removes:
            await self._applied(campaign_id, reply.seq)
            return None
        self._taken(campaign_id, reply)
        return await self._confirmed(campaign_id, actor, reply.seq)

    def _taken(self, campaign_id: str, reply: OperationReply) -> None:
        if self._on_step is not None and reply.reply is CallReply.OK:
            self._on_step(campaign_id, reply.seq, reply.chain)

    async def pause_for(self, campaign_id: str, reason: str) -> None:
        """Pause a campaign on the engine's own behalf (a conflict in the ledger, INV-8).

        A campaign that sells nothing needs no pause. Raises Refused for all others that cannot be
        paused now: a recovery may put a campaign back into its state before, in which it sells.
        """
        operation = _operation(Actor("engine"), reason, None, "pause", campaign_id)
        reply = await self._scripts.transition(campaign_id, "pause", operation)
        if reply.reply is CallReply.WRONG_STATE and reply.state in _SELLS_NOTHING:
            return
        _check_reply(reply, PAUSE.name, PAUSE.instead)

    async def _check_free(self, campaign_id: str, before: CampaignNow | None, actor: Actor) -> None:
        """Refuse an ID that is in use, or that PostgreSQL knows and this Redis has lost (INV-8)."""
        if before is not None:
            gone = before.state is State.DELETED
            if not gone or (before.recovering and not actor.acts_for(before.campaign.owner)):
                raise _taken(campaign_id, before, actor)
            return
        async with self._pool.acquire() as connection:
            applied, _ = await read.position(connection, campaign_id)
        if applied and await read_campaign(self._redis, campaign_id) is None:
            if not actor.sees_all:
                raise _taken(campaign_id, None, actor)
            raise Refused(
                Problem.UNAVAILABLE,
                f"{campaign_id!r} is in PostgreSQL but not in Redis: recover it first",
            )

    async def _find_repeat(
        self, campaign_id: str, operation: Operation, key: str | None
    ) -> Repeat | None:
        """Give the step that was taken before under this key, or None. Raises Refused.

        This comes after the campaign was read and before its state decides anything, so that a
        repeat gets the first answer, however the campaign has changed since.
        """
        if key is None:
            return None
        reply, repeat = await self._scripts.repeated(campaign_id, operation)
        if repeat is None and reply not in {CallReply.OK, CallReply.MISSING}:
            _check_reply(OperationReply(reply), "repeat")
        return repeat

    async def _repeated(self, campaign_id: str, actor: Actor, again: Repeat) -> CampaignNow:
        """Give the campaign of a step that was taken before, as it is now. Raises Refused.

        A deleted draft is shown as it was at its end: its ID may belong to another campaign now.
        """
        if not again.gone:
            return await self._confirmed(campaign_id, actor, again.seq)
        await self._applied(campaign_id, again.seq)
        async with self._pool.acquire() as connection:
            draft = await read.gone_draft(connection, campaign_id, again.seq)
        if draft is None:
            raise Refused(Problem.UNAVAILABLE, "PostgreSQL has not seen its end yet; try again")
        return _gone(draft)

    async def _confirmed(self, campaign_id: str, actor: Actor, seq: int) -> CampaignNow:
        """Give the campaign as it is after a step. Raises Refused if Redis has lost the step since.

        The answer must not confirm a step that a restored Redis no longer has (INV-8).
        """
        await self._applied(campaign_id, seq)
        now = await self.show(campaign_id, actor)
        if now.seq < seq:
            raise Refused(
                Problem.UNAVAILABLE,
                f"Redis has lost event {seq} since; try again once {campaign_id!r} is recovered",
            )
        return now

    async def _applied(self, campaign_id: str, seq: int) -> None:
        await wait_a_moment(self._pool, campaign_id, seq)


async def wait_a_moment(pool: asyncpg.Pool, campaign_id: str, seq: int) -> None:
    """Wait for the writer, so that what was done can be read in the audit log."""

    async def applied_now() -> int:
        async with pool.acquire(timeout=APPLIED_WAIT_S) as connection:
            return (await read.position(connection, campaign_id)).seq

    with contextlib.suppress(*POSTGRES_ERRORS):
        await wait_applied(
            applied_now,
            seq,
            patience_s=APPLIED_WAIT_S,
            within_s=APPLIED_WAIT_S,
            pause_s=APPLIED_PAUSE_S,
        )


def _operation(
    actor: Actor, reason: str | None, key: str | None, action: str, what: str
) -> Operation:
    """Name an operation by who and which key, so that a repeat of it is recognised."""
    named = f"{actor.name}|{key or secrets.token_hex(16)}"
    content = f"{action}|{what}|{reason}"
    return Operation(
        op=hashlib.blake2b(named.encode(), digest_size=12).hexdigest(),
        content=hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
        actor=actor.name,
        reason=reason,
    )


def seen(campaign_id: str, now: CampaignNow | None, actor: Actor) -> CampaignNow:
    """Give a campaign that this actor may see. Raises Refused, the same for missing and hidden."""
    if now is None or not actor.may_see(now):
        raise Refused(Problem.NOT_FOUND, f"no campaign {campaign_id!r}")
    return now


def _taken(campaign_id: str, now: CampaignNow | None, actor: Actor) -> Refused:
    """Say that an ID is not free; if its campaign is hidden from the actor, without the reason."""
    if now is not None and actor.may_see(now):
        return Refused(Problem.WRONG_STATE, f"there is a campaign {campaign_id!r} already")
    return Refused(
        Problem.FORBIDDEN,
        f"id: this account may not use {campaign_id!r}; choose another",
        field="id",
    )


def _gone(draft: read.GoneDraft) -> CampaignNow:
    """Give a draft as it was when it was deleted."""
    campaign = msgspec.convert(draft.config, Campaign)
    return CampaignNow(
        campaign=campaign,
        config_seq=0,
        state=State.DELETED,
        recorded=State.DELETED,
        opens_at_ms=campaign.opens_at_ms,
        closes_at_ms=campaign.closes_at_ms,
        recovering="",
        seq=draft.seq,
        chain="",
        epoch=draft.epoch,
        roster_rev=-1,
        tickets=tuple(draft.tickets),
        held=(0,) * len(draft.tickets),
        remaining=tuple(draft.tickets),
        as_of_ms=draft.at_ms,
    )


def check_may(actor: Actor, roles: frozenset[str], owner: str) -> None:
    """Raise Refused unless this actor has one of the roles and acts for the owner."""
    if actor.role not in roles:
        raise Refused(Problem.FORBIDDEN, f"the role {actor.role!r} may not change campaigns")
    if not actor.acts_for(owner):
        raise Refused(
            Problem.FORBIDDEN,
            f"an account of {actor.union!r} may not change campaigns of {owner!r}",
        )


def _check_reply(
    reply: OperationReply, action: str, instead: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise Refused unless the step was done, now or before."""
    match reply.reply:
        case CallReply.OK | CallReply.REPLAYED:
            return
        case CallReply.MISMATCH:
            raise Refused(Problem.IDEMPOTENCY_MISMATCH, "this key was used for another step before")
        case CallReply.WRONG_STATE:
            hint = instead.get(reply.state)
            raise Refused(
                Problem.WRONG_STATE,
                f"cannot {action} a campaign that is {reply.state}" + (f": {hint}" if hint else ""),
                state=reply.state,
            )
        case CallReply.MISSING:
            raise Refused(Problem.NOT_FOUND, "no such campaign")
        case _:
            raise Refused(
                Problem.UNAVAILABLE,
                f"the state in Redis is not trusted ({reply.reply.name.lower()}); try again",
            )
