"""What `sale doctor` tells: what runs, in which version, how durable, how far behind."""

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.config import Durability
from sale.db import ledger, offices
from sale.domain import CampaignState
from sale.stock.catalogue import CampaignNow, Unreadable, campaign_ids, read_campaigns
from sale.stock.connection import server_name
from sale.stock.durability import durability_faults, rewrite_trouble
from sale.stock.troubles import read_troubles
from sale.usecases.disk_watch import free_mb, redis_directory


class CampaignDiagnosis(msgspec.Struct, frozen=True):
    """One campaign: events in Redis and in PostgreSQL, and what is wrong in words, or ''.

    ``rehearsal_of`` is the campaign that it rehearses, '' for a real one.
    """

    id: str
    state: str
    seq: int
    applied: int
    trouble: str
    rehearsal_of: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """Everything at a glance. ``redis_version`` names the product too: "Valkey 9.1.2".

    ``durability`` is the level that was set; ``faults`` say in words what is weaker than it.
    ``redis_disk_free_mb`` is None where Redis' disk is not on this host. ``writer`` and
    ``scheduler`` say in words which works (``host:process``) and which stand by.
    """

    redis_version: str
    postgres_version: str
    deployment: str
    durability: Durability
    faults: list[str]
    redis_disk_free_mb: int | None
    writer: str
    scheduler: str
    cards: int
    campaigns: list[CampaignDiagnosis]


async def diagnose(
    redis: Redis,
    pool: asyncpg.Pool,
    nonce: str,
    *,
    redis_url: str = "",
    durability: Durability = "fsync",
    replicas_min: int = 1,
) -> Diagnosis:
    """Look at both stores. Raises their own errors.

    ``durability`` and ``replicas_min`` are the level that was set, which Redis is measured by;
    without ``redis_url`` nobody looks at its disk.
    """
    server = await redis.info("server")
    async with pool.acquire() as connection:
        version = await connection.fetchval("SHOW server_version")
        writers = await offices.seats(connection, offices.WRITER)
        schedulers = await offices.seats(connection, offices.SCHEDULER)
        cards = await connection.fetchval("SELECT count(*) FROM card")
        fsync = await connection.fetchval("SHOW fsync")
        positions = await ledger.positions(connection)
    faults = await durability_faults(redis, durability, replicas_min)
    if trouble := await rewrite_trouble(redis):
        faults.append(trouble)
    if fsync != "on":
        faults.append("PostgreSQL's fsync is off")
    directory = await redis_directory(redis, redis_url)
    campaigns = []
    told = await read_troubles(redis)
    ids = sorted({*await campaign_ids(redis), *positions})
    unreadable: list[Unreadable] = []
    found = {
        now.campaign.id: now for now in await read_campaigns(redis, ids, unreadable=unreadable)
    }
    damaged = {each.campaign_id: each.why for each in unreadable}
    for campaign_id in ids:
        applied = positions[campaign_id].applied if campaign_id in positions else 0
        troubles = [each[campaign_id] for each in told.values() if campaign_id in each]
        if why := damaged.get(campaign_id):
            campaigns.append(CampaignDiagnosis(campaign_id, "unreadable", 0, applied, why))
            continue
        now = found.get(campaign_id)
        if now is not None and now.state is CampaignState.DELETED and not troubles:
            continue
        campaigns.append(_diagnosis(campaign_id, now, applied, troubles))
    return Diagnosis(
        redis_version=server_name(server),
        postgres_version=str(version),
        deployment=nonce,
        durability=durability,
        faults=faults,
        redis_disk_free_mb=None if directory is None else free_mb(directory),
        writer=_in_office(writers),
        scheduler=_in_office(schedulers),
        cards=cards,
        campaigns=campaigns,
    )


def _diagnosis(
    campaign_id: str, now: CampaignNow | None, applied: int, troubles: list[str]
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


def _in_office(seats: list[offices.Seat]) -> str:
    if not seats:
        return "none is connected"
    active = [seat.who for seat in seats if seat.active]
    waiting = [seat.who for seat in seats if not seat.active]
    words = f"{active[0]} works" if active else "none works"
    return f"{words}, {len(waiting)} on standby ({', '.join(waiting)})" if waiting else words
