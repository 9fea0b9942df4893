"""Opens and closes what a process needs; the one place where parts are put together."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
import msgspec
import structlog
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from sale.background import keep_running
from sale.config import Settings, SettingsError
from sale.db import deployment
from sale.db.errors import POSTGRES_ERRORS
from sale.db.pool import close_pool, open_pool
from sale.domain.unions import default_unions_path, load_unions
from sale.host import embedded
from sale.http.client_address import ClientAddresses
from sale.http.overload import Overload, files_allow
from sale.identity import MemberTokens, SigningKey, load_or_create_signing_key
from sale.members.campaigns import PublicCampaigns
from sale.members.cancel import CancelDesk
from sale.members.orders import OwnOrders, TicketCodes
from sale.members.pay import PayDesk
from sale.members.provider import Providers
from sale.members.purchase import PurchaseDesk
from sale.members.rate import Rate, RateLimits
from sale.members.test_provider import TestProvider
from sale.metrics import LoadMetrics, PurchaseMetrics, StoreMetrics, new_registry
from sale.operators.campaigns import CampaignDesk
from sale.operators.orders import OrderDesk
from sale.stock.batchers import Batchers
from sale.stock.catalogue import Catalogue
from sale.stock.connection import open_redis, product_of, too_old
from sale.stock.errors import REDIS_ERRORS
from sale.stock.scripts import Scripts
from sale.trust.disk_watch import DiskWatch
from sale.trust.durability_watch import DurabilityWatch
from sale.trust.generations import Generations
from sale.trust.readiness import Readiness
from sale.trust.store_watch import StoreWatch
from sale.trust.witness import Witness

START_PATIENCE_S: Final = 30.0
START_PAUSE_S: Final = 0.2
END_TRIES: Final = 10
END_AGAIN_S: Final = 0.2
LOOK_AROUND_S: Final = 2.0
STORE_ERRORS: Final = tuple(dict.fromkeys((*REDIS_ERRORS, *POSTGRES_ERRORS)))
"""Errors of a call to either store that is away, slow, or refuses it."""

log = structlog.get_logger()


class Stores(msgspec.Struct, frozen=True):
    """Redis and PostgreSQL of a deployment, and what both know of it."""

    settings: Settings
    redis: Redis
    pool: asyncpg.Pool
    scripts: Scripts
    unions: dict[str, str]
    nonce: str
    ticket_secret: bytes


class Engine(msgspec.Struct, frozen=True):
    """Everything an API process serves from."""

    stores: Stores
    key: SigningKey
    tokens: MemberTokens
    catalogue: Catalogue
    batchers: Batchers
    desk: PurchaseDesk
    orders: OwnOrders
    cancellations: CancelDesk
    order_desk: OrderDesk
    payments: PayDesk
    test_provider: TestProvider | None
    public_campaigns: PublicCampaigns
    campaigns: CampaignDesk
    metrics: PurchaseMetrics
    registry: CollectorRegistry
    overload: Overload
    limits: RateLimits
    addresses: ClientAddresses
    readiness: Readiness


def store_urls(settings: Settings) -> tuple[str, str]:
    """Give the URLs of Redis and PostgreSQL: the settings', else the embedded ones that run.

    Raises SettingsError where neither is there.
    """
    redis_url, database_url = settings.redis_url, settings.database_url
    if redis_url is None or database_url is None:
        found = embedded.find(settings.data_dir)
        if found is not None:
            redis_url = redis_url or found.redis_url
            database_url = database_url or found.database_url
    if redis_url is None or database_url is None:
        raise SettingsError(
            f"no engine is running on {settings.data_dir}: start `sale up` there, "
            "or set SALE_REDIS_URL and SALE_DATABASE_URL"
        )
    return redis_url, database_url


@asynccontextmanager
async def open_stores(
    settings: Settings, *, patience_s: float = 0.0, pool_size: int = 8
) -> AsyncIterator[Stores]:
    """Open Redis and PostgreSQL, waiting for them up to ``patience_s``.

    Raises SettingsError, or the stores' own errors once the patience is spent.
    """
    redis_url, database_url = store_urls(settings)
    unions = load_unions(default_unions_path())
    async with contextlib.AsyncExitStack() as stack:
        redis = open_redis(redis_url)
        stack.push_async_callback(redis.aclose)
        pool = await _patiently(lambda: open_pool(database_url, max_size=pool_size), patience_s)
        stack.push_async_callback(close_pool, pool)
        about = await _patiently(lambda: redis.info("server"), patience_s)
        if old := too_old(product_of(about)):
            raise SettingsError(old)
        nonce, ticket_secret = await _patiently(lambda: deployment.read(pool), patience_s)
        yield Stores(
            settings=settings,
            redis=redis,
            pool=pool,
            scripts=Scripts(redis, nonce, replicas=settings.replicas_awaited),
            unions=unions,
            nonce=nonce,
            ticket_secret=ticket_secret,
        )


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """Open everything an API process needs; on the way out, answer what waits first."""
    async with open_stores(settings, patience_s=START_PATIENCE_S) as stores:
        key = load_or_create_signing_key(settings)
        metrics = PurchaseMetrics()
        registry = new_registry("serve")
        registry.register(metrics)
        generations = Generations(stores.redis, stores.pool)
        await _patiently(generations.load, START_PATIENCE_S)
        tokens = MemberTokens(key, generations.raised)
        codes = TicketCodes(stores.ticket_secret)
        catalogue = Catalogue(stores.redis)
        orders = OwnOrders(catalogue, stores.redis, stores.pool, codes)
        test_provider = test_provider_of(stores)
        await _look_around(catalogue)
        batchers = Batchers(
            stores.scripts,
            f"{int(time.time() * 1000):x}-{secrets.token_hex(6)}",
            metrics,
            batch_max=settings.batch_max,
            queue_max=settings.queue_max,
            deadline_s=settings.purchase_deadline_ms / 1000,
            behind_max=(settings.ledger_behind_max_events, settings.ledger_behind_max_s * 1000),
            configured=catalogue.configured,
        )
        disk = DiskWatch(
            stores.redis,
            store_urls(settings)[0],
            batchers,
            free_min_mb=settings.disk_free_min_mb,
        )
        durability = DurabilityWatch(stores.redis, batchers, settings)
        batchers.check_redis = durability.look
        await _patiently(durability.look, START_PATIENCE_S)
        overload = Overload(
            connections_max=files_allow(settings.connections_max),
            turn_max_s=settings.turn_max_ms / 1000,
            waiting_max=settings.waiting_max,
            wait_max_s=settings.wait_max_ms / 1000,
            waiting=batchers.waiting,
        )
        limits = _rate_limits(settings)
        registry.register(
            LoadMetrics(
                lambda: overload.connections,
                lambda: {each.campaign_id: each.waiting for each in batchers.all()},
                overload.shed,
                limits.limited,
                lambda: overload.waiters,
            )
        )
        witness = Witness(stores.redis, stores.pool, batchers)
        answering = StoreWatch(stores.redis, stores.pool, StoreMetrics(registry))
        watches = (disk.run, durability.run, witness.run, answering.run, generations.run)
        watching = [asyncio.create_task(keep_running(watch)) for watch in watches]
        try:
            yield Engine(
                stores=stores,
                key=key,
                tokens=tokens,
                catalogue=catalogue,
                batchers=batchers,
                desk=PurchaseDesk(
                    catalogue, batchers, tokens, codes, metrics, stores.pool, limits, overload
                ),
                public_campaigns=PublicCampaigns(catalogue, stores.redis),
                orders=orders,
                cancellations=CancelDesk(stores.scripts, catalogue, batchers, orders),
                payments=PayDesk(orders, stores.scripts, stores.pool, providers_of(test_provider)),
                test_provider=test_provider,
                order_desk=OrderDesk(
                    stores.redis, stores.scripts, stores.pool, catalogue, batchers.of
                ),
                campaigns=CampaignDesk(
                    stores.redis, stores.scripts, stores.pool, on_step=batchers.on_step
                ),
                metrics=metrics,
                registry=registry,
                overload=overload,
                limits=limits,
                addresses=ClientAddresses(settings.trusted_proxies),
                readiness=Readiness(stores),
            )
        finally:
            await batchers.close()
            await catalogue.close()
            await _ended(watching)
            await witness.sign_off()


def test_provider_of(stores: Stores) -> TestProvider | None:
    """Give the test provider, where the settings have it on."""
    if not stores.settings.test_provider:
        return None
    return TestProvider(stores.pool, stores.ticket_secret)


def providers_of(test_provider: TestProvider | None) -> Providers:
    """Give the payment providers of this deployment, by name."""
    return {} if test_provider is None else {test_provider.name: test_provider}


async def _look_around(catalogue: Catalogue) -> None:
    """Know the campaigns before anybody asks.

    Until a campaign is known its purchases go by aiohttp. A rush that met a new process had its
    first second there, at three times the cost, while the first look at the campaign waited behind
    it for its turns of the loop.
    """
    with contextlib.suppress(*REDIS_ERRORS, msgspec.MsgspecError):
        async with asyncio.timeout(LOOK_AROUND_S):
            await catalogue.read_all()


def _rate_limits(settings: Settings) -> RateLimits:
    return RateLimits(
        card_campaign=Rate(settings.card_campaign_per_s, settings.card_campaign_burst),
        card=Rate(settings.card_per_s, settings.card_burst),
        address=Rate(settings.address_per_s, settings.address_burst),
    )


async def _ended(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks until they have ended, bounded: redis-py may swallow a cancellation."""
    for _ in range(END_TRIES):
        for task in tasks:
            task.cancel()
        _, going_on = await asyncio.wait(tasks, timeout=END_AGAIN_S)
        if not going_on:
            return


async def _patiently(attempt, patience_s: float):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Await ``attempt()`` until it works or the patience is spent."""
    deadline = time.monotonic() + patience_s
    logged = False
    while True:
        try:
            return await attempt()
        except STORE_ERRORS as error:
            if time.monotonic() >= deadline:
                raise
            if not logged:
                log.info("store.awaited", error=type(error).__name__)
                logged = True
        await asyncio.sleep(START_PAUSE_S)
