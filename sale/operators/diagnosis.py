"""The diagnosis of `sale doctor`: processes, versions, durability, ledger lag."""

from collections.abc import Iterator
from typing import Final

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.config import Durability
from sale.db import deployment, locks, payments, read
from sale.db.errors import NO_SCHEMA, POSTGRES_ERRORS
from sale.domain.campaign import State
from sale.domain.campaign_view import CampaignNow
from sale.ledger.chain import Position
from sale.stock.catalogue import Unreadable, campaign_ids, read_campaigns
from sale.stock.connection import product_of
from sale.stock.durability import durability_faults, rewrite_trouble
from sale.stock.errors import REDIS_ERRORS
from sale.stock.process_reports import RECENT_MS, read_identity, read_reports
from sale.stock.troubles import read_troubles
from sale.trust.disk_watch import free_mb, redis_directory


class CampaignDiagnosis(msgspec.Struct, frozen=True):
    """One campaign: events in Redis and in PostgreSQL, and what is wrong in words, or ''.

    Events are None where their store does not answer. ``rehearsal_of`` is the campaign that it
    rehearses, '' for a real one.
    """

    id: str
    state: str
    seq: int | None
    applied: int | None
    trouble: str
    rehearsal_of: str = ""

    @property
    def lag(self) -> int | None:
        """How many events PostgreSQL does not have yet."""
        return None if self.seq is None or self.applied is None else self.seq - self.applied


class Diagnosis(msgspec.Struct, frozen=True):
    """The state of the deployment. ``redis_version`` names the product too: "Valkey 9.1.2".

    A field whose store does not answer is '' or None.

    ``cards`` counts the cards in use, one a member. ``durability`` is the level that was set;
    ``faults`` say in words what is weaker than it. ``redis_disk_free_mb`` is None where Redis' disk
    is not on this host. ``api``, ``writer``, ``scheduler`` and ``keeper`` say in words which
    process works (``host:process``) and which stand by. ``missing`` says in words which store does
    not answer and which part does not run, ``money`` which money only people can help.
    """

    redis_version: str
    postgres_version: str
    deployment: str
    durability: Durability
    faults: list[str]
    redis_disk_free_mb: int | None
    api: str
    writer: str
    scheduler: str
    keeper: str
    cards: int | None
    campaigns: list[CampaignDiagnosis]
    missing: list[str]
    money: list[str]

    @property
    def wrong(self) -> list[str]:
        """What is wrong, in words; the space on Redis' disk and the campaigns apart."""
        return [*self.missing, *self.faults, *self.money]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, the space on Redis' disk apart."""
        return not (self.wrong or any(each.trouble for each in self.campaigns))


class _FromRedis(msgspec.Struct, frozen=True):
    """The part that Redis gives. ``damaged`` maps campaigns that cannot be read to the reason."""

    version: str = ""
    faults: list[str] = []
    disk_free_mb: int | None = None
    api: int | None = None
    campaigns: dict[str, CampaignNow] = {}
    damaged: dict[str, str] = {}
    troubles: dict[str, dict[str, str]] = {}


class _FromPostgres(msgspec.Struct, frozen=True):
    """The part that PostgreSQL gives; the members of each lock are None if it is away."""

    version: str = ""
    deployment: str = ""
    faults: list[str] = []
    writers: list[locks.LockMember] | None = None
    schedulers: list[locks.LockMember] | None = None
    keepers: list[locks.LockMember] | None = None
    money: list[str] = []
    cards: int | None = None
    positions: dict[str, Position] = {}


async def diagnose(
    redis: Redis,
    pool: asyncpg.Pool | None,
    *,
    redis_url: str = "",
    postgres_away: str = "",
    durability: Durability = "fsync",
    replicas_min: int = 1,
) -> Diagnosis:
    """Examine both stores; if one does not answer, report that, and examine the other.

    ``pool`` is None where PostgreSQL is away, as ``postgres_away`` says. ``durability`` and
    ``replicas_min`` are the level that was set, which Redis is measured by; without ``redis_url``
    the disk is not examined.
    """
    missing: list[str] = []
    from_redis, from_postgres = _FromRedis(), _FromPostgres()
    if pool is None:
        missing.append(postgres_away)
    else:
        try:
            from_postgres = await _read_postgres(pool)
        except POSTGRES_ERRORS as error:
            missing.append(_why_not(error))
    try:
        from_redis = await _read_redis(
            redis, redis_url, durability, replicas_min, {*from_postgres.positions}
        )
    except REDIS_ERRORS as error:
        missing.append(f"Redis does not answer: {_first_line(error)}")
    if from_redis.api == 0:
        missing.append("no API process runs: nothing is sold (sale serve)")
    for members, part, so in (
        (from_postgres.writers, "writer", "the ledger piles up in Redis"),
        (from_postgres.schedulers, "scheduler", "nothing opens, closes or is audited by itself"),
        (from_postgres.keepers, "keeper", "money is neither presented nor refunded"),
    ):
        if members is not None and not any(member.active for member in members):
            missing.append(f"no {part} works: {so} (sale {part})")
    return Diagnosis(
        redis_version=from_redis.version,
        postgres_version=from_postgres.version,
        deployment=from_postgres.deployment,
        durability=durability,
        faults=from_redis.faults + from_postgres.faults,
        redis_disk_free_mb=from_redis.disk_free_mb,
        api=_UNKNOWN
        if from_redis.api is None
        else f"{from_redis.api or 'none'} reported within 5 s",
        writer=_holds_lock(from_postgres.writers),
        scheduler=_holds_lock(from_postgres.schedulers),
        keeper=_holds_lock(from_postgres.keepers),
        cards=from_postgres.cards,
        campaigns=list(_campaigns(from_redis, from_postgres)),
        missing=missing,
        money=from_postgres.money,
    )


async def _read_redis(
    redis: Redis, redis_url: str, durability: Durability, replicas_min: int, known: set[str]
) -> _FromRedis:
    server = await redis.info("server")
    faults = await durability_faults(redis, durability, replicas_min)
    if trouble := await rewrite_trouble(redis):
        faults.append(trouble)
    directory = await redis_directory(redis, redis_url)
    since_ms = (await read_identity(redis)).now_ms - RECENT_MS
    reports = (await read_reports(redis)).values()
    unreadable: list[Unreadable] = []
    ids = sorted({*await campaign_ids(redis), *known})
    found = await read_campaigns(redis, ids, unreadable=unreadable)
    return _FromRedis(
        version=str(product_of(server)),
        faults=faults,
        disk_free_mb=None if directory is None else free_mb(directory),
        api=sum(report.at_ms >= since_ms for report in reports),
        campaigns={now.campaign.id: now for now in found},
        damaged={each.campaign_id: each.why for each in unreadable},
        troubles=await read_troubles(redis),
    )


async def _read_postgres(pool: asyncpg.Pool) -> _FromPostgres:
    async with pool.acquire() as connection:
        fsync = await connection.fetchval("SHOW fsync")
        return _FromPostgres(
            version=str(await connection.fetchval("SHOW server_version")),
            deployment=(await deployment.read(connection)).nonce,
            faults=[] if fsync == "on" else ["PostgreSQL's fsync is off"],
            writers=await locks.members(connection, locks.WRITER),
            schedulers=await locks.members(connection, locks.SCHEDULER),
            keepers=await locks.members(connection, locks.KEEPER),
            money=[
                f"{found.rows} {found.what}, {found.amount_fen} fen: sale report money"
                for found in await payments.stuck_sums(connection)
            ],
            cards=await connection.fetchval("SELECT count(*) FROM card WHERE replaced_at IS NULL"),
            positions=await read.positions(connection),
        )


def _campaigns(from_redis: _FromRedis, from_postgres: _FromPostgres) -> Iterator[CampaignDiagnosis]:
    for campaign_id in sorted(
        {*from_redis.campaigns, *from_redis.damaged, *from_postgres.positions}
    ):
        now = from_redis.campaigns.get(campaign_id)
        position = from_postgres.positions.get(campaign_id)
        applied = None if not from_postgres.version else 0 if position is None else position.seq
        troubles = [
            each[campaign_id] for each in from_redis.troubles.values() if campaign_id in each
        ]
        if not from_redis.version:
            yield CampaignDiagnosis(campaign_id, _UNKNOWN, None, applied, "")
        elif why := from_redis.damaged.get(campaign_id):
            yield CampaignDiagnosis(campaign_id, "unreadable", 0, applied, why)
        elif now is None or now.state is not State.DELETED or troubles:
            yield _diagnosis(campaign_id, now, applied, troubles)


def _diagnosis(
    campaign_id: str, now: CampaignNow | None, applied: int | None, troubles: list[str]
) -> CampaignDiagnosis:
    if now is None:
        troubles = ["not in Redis: recover it", *troubles]
        return CampaignDiagnosis(campaign_id, "missing", 0, applied, "; ".join(troubles))
    known = [now.recovering, now.window_fault, *troubles]
    return CampaignDiagnosis(
        campaign_id,
        now.state.value,
        now.seq,
        applied,
        "; ".join(dict.fromkeys(each for each in known if each)),
        now.campaign.rehearsal_of,
    )


def _why_not(error: Exception) -> str:
    if isinstance(error, asyncpg.UndefinedTableError):
        return NO_SCHEMA
    return f"PostgreSQL does not answer: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _holds_lock(members: list[locks.LockMember] | None) -> str:
    if members is None:
        return _UNKNOWN
    if not members:
        return "none is connected"
    active = [member.who for member in members if member.active]
    waiting = [member.who for member in members if not member.active]
    words = f"{active[0]} works" if active else "none works"
    return f"{words}, {len(waiting)} on standby ({', '.join(waiting)})" if waiting else words


_UNKNOWN: Final = "unknown"
