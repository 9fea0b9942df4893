"""Tokens of a replaced or revoked card end within a second, in every process, on both paths."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from service import ORDERS, Client, Service, new_key
from shop import Shop
from stock_maker import member

from sale.stock.keys import GENERATIONS
from sale.trust.generations import Generations, copy_generations
from sale.trust.revocation import sync_all

LEARNS_WITHIN_S = 1.0


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    await shop.add_cards(1, 2, 3)
    return shop


async def raise_generation(shop: Shop, n: int) -> None:
    await shop.pool.execute(
        "UPDATE member SET generation = generation + 1 WHERE member_no = $1", member(n)
    )


async def copied(shop: Shop) -> None:
    await sync_all(shop.redis, shop.scripts, shop.pool)


async def test_process_starts_with_all_rises_and_follows_new_ones(shop: Shop) -> None:
    await raise_generation(shop, 1)
    generations = Generations(shop.redis, shop.pool)
    await generations.load()  # Redis has no set yet
    assert generations.raised == {member(1): 1}
    await shop.redis.zadd(GENERATIONS, {"0:0": 0})  # or one that is behind
    await generations.look()
    assert generations.raised == {member(1): 1}

    await raise_generation(shop, 2)
    await raise_generation(shop, 1)
    await copied(shop)
    await generations.look()

    assert generations.raised == {member(1): 2, member(2): 1}


async def test_set_lost_by_redis_is_rebuilt_and_nothing_forgotten(shop: Shop) -> None:
    await raise_generation(shop, 1)
    await copied(shop)
    generations = Generations(shop.redis, shop.pool)
    await generations.look()
    await shop.redis.delete(GENERATIONS)
    await generations.look()
    assert generations.raised == {member(1): 1}

    await raise_generation(shop, 2)
    await copied(shop)
    await generations.look()

    assert generations.raised == {member(1): 1, member(2): 1}
    assert await shop.redis.keys(f"{GENERATIONS}*") == [GENERATIONS.encode()]
    assert await shop.redis.ttl(GENERATIONS) == -1


async def test_roster_restored_from_an_older_copy_is_followed(shop: Shop) -> None:
    for n in (1, 2):
        await raise_generation(shop, n)
    await copied(shop)
    generations = Generations(shop.redis, shop.pool)
    await generations.look()

    await shop.damage(
        "UPDATE member SET generation = 0 WHERE member_no > 0", "DELETE FROM member_change"
    )
    await raise_generation(shop, 3)  # takes revision 1 anew
    await copied(shop)
    await generations.look()

    assert generations.raised == {member(3): 1}


async def test_many_copiers_and_one_reader_miss_no_rise(shop: Shop) -> None:
    generations = Generations(shop.redis, shop.pool)

    async def copy() -> None:
        for _ in range(10):
            async with shop.pool.acquire() as connection:
                await copy_generations(shop.redis, connection)
            await generations.look()

    async def rise() -> None:
        for _ in range(10):
            for n in (1, 2, 3):
                await raise_generation(shop, n)

    await asyncio.gather(rise(), copy(), copy())
    await copied(shop)
    await generations.look()
    assert generations.raised == {member(n): 10 for n in (1, 2, 3)}
    # A rise that was read late must not undo a later one.
    anew = Generations(shop.redis, shop.pool)
    await anew.load()
    assert anew.raised == generations.raised


@pytest.fixture
def spare_numbers() -> Iterator[str]:
    """Card numbers that no test's roster has."""
    return (f"77010000{int(time.time() * 1000) % 10**6:06d}{n:02d}" for n in range(100))


async def test_replaced_card_keeps_its_orders_and_its_tokens_end(
    service: Service, client: Client, spread: Client, spare_numbers: Iterator[str]
) -> None:
    campaign, held, key = await client.campaign(card_limit=2), service.card(), new_key()
    bought = await client.buy(campaign, held.token, key=key)
    assert bought.status == 201

    done = await service.asale(
        "cards", "replace", held.no, next(spare_numbers), "--reason", "lost", "--json"
    )
    assert (done.status, done.json()["member"], done.json()["generation"]) == (0, held.member, 1)
    await asyncio.sleep(LEARNS_WITHIN_S)

    # Many connections, so that each API process is asked, on the fast path and beside it.
    seen = await asyncio.gather(*(spread.buy(campaign, held.token) for _ in range(20)))
    seen += await asyncio.gather(*(spread.get(ORDERS, held.token) for _ in range(20)))
    assert {(one.status, one.code) for one in seen} == {(401, "unauthenticated")}

    fresh = service.token(held.member, held.union, generation=1)
    orders = (await client.get(ORDERS, fresh)).json()["items"]
    assert [each["order_no"] for each in orders] == [bought.json()["order_no"]]
    again = await client.buy(campaign, fresh, key=key)
    assert (again.status, again.json()) == (201, bought.json())
    assert again.headers["Idempotency-Replayed"] == "true"
    assert (await client.buy(campaign, fresh, quantity=2)).code == "limit-exceeded"


async def test_suspended_process_learns_once_it_runs_again(
    service: Service, client: Client, spread: Client, spare_numbers: Iterator[str]
) -> None:
    campaign, held = await client.campaign(), service.card()
    serves = [name for name in service.told()["processes"] if name.startswith("serve")]
    with service.stopped(serves[0]):  # it reads nothing meanwhile
        done = await service.asale(
            "cards", "replace", held.no, next(spare_numbers), "--reason", "lost"
        )
        assert done.status == 0, done
        await asyncio.sleep(LEARNS_WITHIN_S)
    await asyncio.sleep(LEARNS_WITHIN_S)
    seen = await asyncio.gather(*(spread.buy(campaign, held.token) for _ in range(20)))
    assert {one.code for one in seen} == {"unauthenticated"}


async def test_card_replaced_without_redis_ends_tokens_once_it_is_back(
    service: Service, client: Client, spread: Client, spare_numbers: Iterator[str]
) -> None:
    campaign, held = await client.campaign(), service.card()
    with service.stopped("redis"):
        done = await service.asale(
            "cards", "replace", held.no, next(spare_numbers), "--reason", "lost"
        )
        assert done.status == 0, done
        assert "the card is replaced; running campaigns follow" in done.err

    await asyncio.sleep(LEARNS_WITHIN_S)
    seen = await asyncio.gather(*(spread.buy(campaign, held.token) for _ in range(20)))

    assert {one.code for one in seen} <= {"unauthenticated", "overloaded"}
    assert "unauthenticated" in {one.code for one in seen}
