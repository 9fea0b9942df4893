"""A process that has just started gets the load of a rush."""

from redis.asyncio import Redis
from service import Client, Service

from sale.bootstrap import open_engine
from sale.config import Settings
from sale.stock.keys import campaign_keys


def settings(service: Service) -> Settings:
    return Settings(
        redis_url=service.redis_url,
        database_url=service.database_url,
        data_dir=service.data_dir,
    )


async def test_new_process_knows_campaigns_before_a_request(
    service: Service, client: Client
) -> None:
    campaign, draft = await client.campaign(), await client.campaign(draft=True)
    async with open_engine(settings(service)) as engine:
        assert engine.desk.known(campaign) is not None
        assert engine.desk.known(draft) is None


async def test_unreadable_campaign_does_not_stop_a_new_process(
    service: Service, client: Client
) -> None:
    campaign, broken = await client.campaign(), await client.campaign()
    head = campaign_keys(broken).head
    redis = Redis.from_url(service.redis_url)
    config = await redis.hget(head, "config")
    await redis.hset(head, "config", "{")
    try:
        async with open_engine(settings(service)) as engine:
            now = await engine.catalogue.now(campaign)
            assert now is not None
            assert now.visible
    finally:
        await redis.hset(head, "config", config)
        await redis.aclose()
