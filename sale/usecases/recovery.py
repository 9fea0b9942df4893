"""Recovery: build a campaign's state in Redis again, from PostgreSQL's ledger.

It does nothing where head and ledger fit. Where Redis has lost the campaign, or is behind what
PostgreSQL has applied, the fold of the ledger is written beside the old keys and moved over them
in one step, under the next epoch and with a ``recovered`` event. What the old stream holds beyond
PostgreSQL is for the writer to apply first; a stream that forked from PostgreSQL's ledger is
refused here, because choosing between two histories is not for a command without more evidence.
"""

import msgspec
import asyncpg
from redis.asyncio import Redis

from sale.db import ledger
from sale.domain import Problem, Refused
from sale.stock.catalogue import read_campaign
from sale.stock.scripts import Scripts
from sale.usecases.verification import verify


class Recovery(msgspec.Struct, frozen=True):
    """What was done, or would be: event numbers in Redis and PostgreSQL, and one line."""

    campaign: str
    changed: bool
    redis_seq: int
    applied: int
    says: str


async def recover(  # noqa: PLR0913 - the stores, and who asks
    redis: Redis,
    scripts: Scripts,
    pool: asyncpg.Pool,
    campaign_id: str,
    *,
    actor: str,
    dry_run: bool,
) -> Recovery:
    """Recover one campaign. Raises Refused for an unknown one and for a fork."""
    raise NotImplementedError
