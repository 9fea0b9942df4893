"""Run by ``test_campaign.py`` on an engine with one more setting: prints the parts that know it."""

import asyncio
import sys

import msgspec
from redis.asyncio import Redis
from stock_maker import Bid, Stock, key, member

from sale.domain.campaign_file import InvalidCampaign, parse_campaign, request_type
from sale.domain.campaign_view import campaign_view, desk_view
from sale.stock.catalogue import read_campaign

TABLE = {
    "id": "made-up",
    "title": "made up",
    "category": "culture",
    "price_fen": 0,
    "payment": "none",
    "card_limit": 9,
    "showings": [{"id": "general", "title": "general", "tickets": 20}],
}


async def main(redis_url: str) -> dict[str, object]:
    redis, unions = Redis.from_url(redis_url), frozenset({"district"})
    try:
        parse_campaign(TABLE | {"pairs_max": 10}, unions)
    except InvalidCampaign as wrong:
        fault = wrong.problems["pairs_max"]
    made = parse_campaign(TABLE | {"pairs_max": 2}, unions)
    stock = Stock(redis, made.id)
    await stock.create(made)
    await stock.load_roster()
    await stock.step("open")
    bought = await stock.buy(Bid(member(1), key(1), 4), Bid(member(2), key(2), 5))
    now = await read_campaign(redis, made.id)
    books = await stock.check_books()
    await redis.aclose()
    schema = msgspec.json.schema(request_type())["$defs"]["CampaignRequest"]["properties"]
    views = msgspec.to_builtins([campaign_view(now), desk_view(now)])
    return {
        "fault": fault,
        "schema": schema["pairs_max"],
        "views": [view["pairs_max"] for view in views],
        "ledger": books.config["pairs_max"],
        "decisions": [told.decision.name for told in bought],
    }


print(msgspec.json.encode(asyncio.run(main(sys.argv[1]))).decode())
