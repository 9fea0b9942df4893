"""Card numbers are in the roster's table alone: a rush is played, then all else is searched."""

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from redis.asyncio import Redis
from service import ORDERS, Client, Service, new_key
from waiting import until

BUYERS = 150
TICKETS = 200
RUNS = re.compile(rb"[0-9]{12,}")
PLANTED = "880011223344556"


def leaking(places: Mapping[str, bytes], numbers: set[bytes]) -> set[str]:
    """Places in which one of the numbers is, also as a part of a longer run of digits."""
    sizes = {len(number) for number in numbers}
    return {
        place
        for place, content in places.items()
        if any(
            run[at : at + size] in numbers
            for run in set(RUNS.findall(content))
            for size in sizes
            for at in range(len(run) - size + 1)
        )
    }


async def values_of(redis: Redis, key: bytes) -> object:
    match await redis.type(key):
        case b"hash":
            return await redis.hgetall(key)
        case b"set":
            return await redis.smembers(key)
        case b"zset":
            return await redis.zrange(key, 0, -1, withscores=True)
        case b"stream":
            return await redis.xrange(key)
        case b"string":
            return await redis.get(key)
        case kind:
            raise AssertionError(f"{key!r}: a {kind!r} is not searched")


async def tables(service: Service) -> dict[str, bytes]:
    """Every row of every table but ``card``, as text."""
    async with service.database() as connection:
        rows = await connection.fetch(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname <> 'card'"
            " AND relnamespace = 'public'::regnamespace"
        )
        names = [row["relname"] for row in rows]
        assert {"event", "orders", "member", "audit_log", "conflict", "handed_in"} <= set(names)
        return {
            f"table {name}": "\n".join(
                row[0] for row in await connection.fetch(f'SELECT t::text FROM "{name}" t')
            ).encode()
            for name in names
        }


def files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file())


def command_lines(*processes: int) -> bytes:
    """Command lines and environments of processes and all that they started."""
    found = b""
    for pid in processes:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    found += Path(f"/proc/{process.pid}/{name}").read_bytes()
    return found


async def all_places(service: Service, redis: Redis, *processes: int) -> dict[str, bytes]:
    append_only = list(files(service.data_dir / "redis"))
    assert any(path.name.endswith(".aof") and path.stat().st_size for path in append_only)
    logs = [service.log_file, *files(service.data_dir / "logs")]
    found = {f"file {path.name}": path.read_bytes() for path in (*append_only, *logs)}
    async for key in redis.scan_iter(count=1_000):
        found[f"key {key.decode()}"] = key + repr(await values_of(redis, key)).encode()
    found["metrics"] = (await service.metrics()).encode()
    found["process list"] = command_lines(service.process.pid, *processes)
    return found | await tables(service)


async def rush(service: Service, client: Client, spread: Client) -> str:
    """Sold, replayed, limited, sold out, revoked, replaced, read, paused."""
    campaign = await client.campaign(TICKETS, card_limit=2)
    buyers = service.cards(BUYERS)
    keys = [new_key() for _ in buyers]
    for quantity in (1, 1, 2):
        seen = await asyncio.gather(
            *(
                spread.buy(campaign, each.token, quantity, key=key)
                for each, key in zip(buyers, keys, strict=True)
            )
        )
        keys = [new_key() if quantity == 1 else key for key in keys]
        assert {one.status for one in seen} <= {201, 409, 422}
    await service.asale("cards", "revoke", buyers[0].no, "--reason", "lost", "--as", "ann")
    replaced = await service.asale(
        "cards", "replace", buyers[1].no, PLANTED.replace("88", "77", 1), "--reason", "lost"
    )
    assert replaced.status == 0, replaced
    await asyncio.sleep(1)
    for each in buyers[:3]:
        await spread.buy(campaign, each.token)
        await spread.get(ORDERS, each.token)
    await client.step(campaign, "pause")
    await until(lambda: client.all_applied(campaign))
    return campaign


async def test_played_rush_leaves_no_card_number_outside_the_roster(
    service: Service, client: Client, spread: Client
) -> None:
    await rush(service, client, spread)
    async with service.database() as connection:
        rows = await connection.fetch("SELECT card_no FROM card")
    numbers = {row["card_no"].encode() for row in rows}
    assert len(numbers) > BUYERS

    async with service.redis() as redis:
        places = await all_places(service, redis)

    assert len(places) > 25
    assert leaking(places, numbers) == set()


@contextlib.contextmanager
def waiting_process(*arguments: str) -> Iterator[int]:
    """A process with these arguments that does nothing; its number."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        yield process.pid


async def test_search_finds_a_number_wherever_it_is_planted(
    service: Service, client: Client
) -> None:
    """The search itself: a number that no other test may know is put into each kind of place."""
    campaign, number = await client.campaign(), {PLANTED.encode()}
    log = service.data_dir / "logs" / "planted.log"
    log.write_text(f"bought by 1{PLANTED}\n")
    async with service.database() as connection, service.redis() as redis:
        with waiting_process(PLANTED) as process:
            try:
                await connection.execute("CREATE TABLE planted AS SELECT $1::text AS what", PLANTED)
                await redis.hset("sale:planted", f"card-{PLANTED}", 1)
                places = await all_places(service, redis, process)
            finally:
                await redis.delete("sale:planted")
                await connection.execute("DROP TABLE IF EXISTS planted")
                log.unlink()
    places["metrics"] += f'sale_purchases_total{{card="{PLANTED}"}} 1'.encode()

    found = leaking(places, number)

    assert {"table planted", "key sale:planted", "file planted.log", "process list"} <= found
    assert "metrics" in found
    assert any(place.endswith(".aof") for place in found)
    assert f"key sale:{{{campaign}}}:head" not in found
