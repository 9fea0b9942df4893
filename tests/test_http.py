"""Probe."""
import asyncio
from service import Client, Service, new_key
import time

async def test_probe(service: Service, client: Client, crowd: Client) -> None:
    cid = await client.campaign()
    card = service.card()
    seen = await client.buy(cid, card.token, 2)
    print(seen)
    print(await client.buy(cid, card.token, 2))
    t=time.time()
    answers = await asyncio.gather(*(crowd.buy(cid, c.token) for c in service.cards(200)))
    print(time.time()-t, sum(a.status==201 for a in answers), sum(a.code=="sold-out" for a in answers))
    print(await client.get("/api/v1/campaigns/"+cid))
    print(await service.asale("doctor"))
