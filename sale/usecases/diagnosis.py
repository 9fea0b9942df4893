"""What `sale doctor` tells: what runs, in which version, how durable, how far behind."""

import asyncpg
import msgspec
from redis.asyncio import Redis

from sale.db import ledger
from sale.domain import CampaignState
from sale.stock.catalogue import campaign_ids, read_campaign
from sale.stock.connection import durability_faults


class CampaignDiagnosis(msgspec.Struct, frozen=True):
    """One campaign: events in Redis and in PostgreSQL, and what is wrong in words, or ''."""

    id: str
    state: str
    seq: int
    applied: int
    trouble: str


class Diagnosis(msgspec.Struct, frozen=True):
    """Everything at a glance; ``faults`` are settings that let an answered order be lost."""

    redis_version: str
    postgres_version: str
    deployment: str
    faults: list[str]
    writer: str
    cards: int
    campaigns: list[CampaignDiagnosis]


async def diagnose(redis: Redis, pool: asyncpg.Pool, nonce: str) -> Diagnosis:
    """Look at both stores. Raises their own errors."""
    server = await redis.info("server")
    async with pool.acquire() as connection:
        version = await connection.fetchval("SHOW server_version")
        writers = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sale-writer'"
        )
        cards = await connection.fetchval("SELECT count(*) FROM card")
        fsync = await connection.fetchval("SHOW fsync")
        positions = await ledger.positions(connection)
    faults = await durability_faults(redis)
    if fsync != "on":
        faults.append("PostgreSQL's fsync is off")
    campaigns = []
    for campaign_id in sorted({*await campaign_ids(redis), *positions}):
        now = await read_campaign(redis, campaign_id)
        applied = positions[campaign_id].applied if campaign_id in positions else 0
        if now is not None and now.state is CampaignState.DELETED:
            continue
        campaigns.append(
            CampaignDiagnosis(
                campaign_id,
                "missing" if now is None else now.state.value,
                0 if now is None else now.seq,
                applied,
                "not in Redis: recover it" if now is None else now.recovering,
            )
        )
    return Diagnosis(
        redis_version=str(server["redis_version"]),
        postgres_version=str(version),
        deployment=nonce,
        faults=faults,
        writer=f"{writers} connected" if writers else "none is connected",
        cards=cards,
        campaigns=campaigns,
    )
