"""Rehearsals: apart from everything real while they last, and gone afterwards but for the log."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import click
import msgspec
import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from service import ADMIN, CAMPAIGNS, ROOT, Client, Service
from shop import ME, Shop, open_shop
from stock_maker import BEHIND_MAX, CAMPAIGN, Bid, campaign, key, member
from waiting import until

from loadtest import record as records
from loadtest.rehearsal import release
from loadtest.rush import arrivals
from loadtest.thresholds import judge, read_rules
from sale.bootstrap import open_stores
from sale.cli import rehearse
from sale.cli.rehearsal_report import Outcome, show
from sale.config import Settings
from sale.db import claims, rehearsals
from sale.domain.campaign import Campaign
from sale.domain.campaign_file import InvalidCampaign, parse_campaign
from sale.domain.member import is_made_up, may_meet
from sale.domain.order import LOW_BITS, OrderPlace
from sale.domain.problem import Problem, Refused
from sale.domain.unions import REHEARSAL_UNION, default_unions_path, load_unions
from sale.identity import MemberTokens, SigningKey
from sale.ledger.chain import Event
from sale.ledger.kinds import SOLD
from sale.lifetime import cancel_and_wait
from sale.metrics import PurchaseMetrics
from sale.operators.diagnosis import diagnose
from sale.operators.rehearsal import ID_MAX, Rehearsals, made_up_members, rehearsal_id, tokens
from sale.stock.answers import Answer, AwaitedPurchase
from sale.stock.batchers import Batchers
from sale.stock.catalogue import Catalogue, campaign_ids, read_campaign
from sale.stock.keys import campaign_keys
from sale.stock.removal import NotRemoved, remove_rehearsal
from sale.stock.scripts import CallReply, Decision
from sale.trust.auto_recovery import AutoRecovery
from sale.trust.recover import recover
from sale.trust.verify import verify_all
from sale.trust.witness import Witness

KEY = SigningKey(b"k" * 32)
TABLES = ("event", "orders", "member_use", "showing", "ticket", "conflict", "handed_in")
CARDS = [member.no for member in made_up_members(8)]


class Play:
    """A shop with an API process, and its one real campaign: cards 1 and 2 have bought."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.desk = Rehearsals(shop.redis, shop.scripts, shop.pool)
        self.batchers = Batchers(
            shop.scripts, "p1", PurchaseMetrics(), batch_max=256, queue_max=4_096, deadline_s=5.0,
            behind_max=BEHIND_MAX,
        )  # fmt: skip
        self.witness = Witness(shop.redis, shop.pool, self.batchers)

    async def begin(self, **how: float) -> Campaign:
        """Begin a rehearsal of the real campaign that is open at once."""
        original = await self.desk.original(CAMPAIGN)
        times = {"opens_in_s": 0.0, "lasts_s": 10.0, **how}
        return (await self.desk.begin(original, ME, "three days before", **times)).campaign

    async def buy(
        self, made: Campaign, cards: list[str], union: str = REHEARSAL_UNION, quantity: int = 1
    ) -> list[Answer]:
        loop = asyncio.get_running_loop()
        bids = [AwaitedPurchase(no, union, 0, quantity, key(7), loop) for no in cards]
        for bid in bids:
            assert self.batchers.of(made).submit(bid)
        async with asyncio.timeout(10):
            return [await bid.answer for bid in bids]

    async def purge(self, campaign_id: str) -> rehearsals.Removed:
        return await self.desk.purge(campaign_id, ME, "over")

    async def rows(self, campaign_id: str) -> dict[str, int]:
        """Rows of a campaign in each table that may hold some."""
        found = {}
        for table in TABLES:
            query = f"SELECT count(*) FROM {table} WHERE campaign_id = $1"
            found[table] = await self.shop.pool.fetchval(query, campaign_id)
        return {table: count for table, count in found.items() if count}

    async def has(self, campaign_id: str, **rows: int) -> bool:
        """Tell whether PostgreSQL has these rows by now."""
        found = await self.rows(campaign_id)
        return all(found.get(table) == count for table, count in rows.items())

    async def clean(self) -> bool:
        return (await self.shop.audit()).clean


@pytest.fixture
async def play(redis: Redis, redis_url: str, database_url: str) -> AsyncIterator[Play]:
    async with open_shop(redis_url, database_url) as shop:
        await shop.start_writer()
        await shop.add_cards(1, 2)
        await shop.create(campaign(10, 5))
        await shop.step("open")
        await shop.step("stock", showing="s1", add=4)
        await shop.buy(1, 2)
        await shop.applied()
        play = Play(shop)
        beating = asyncio.create_task(play.witness.run())
        yield play
        await cancel_and_wait([beating])
        await play.batchers.close()
        await shop.redis.flushall()


async def test_rehearsal_copies_showings_and_limits(
    play: Play,
) -> None:
    before = await play.desk.real(CAMPAIGN)
    made = await play.begin()
    real = campaign(10, 5)
    assert made.rehearsal_of == CAMPAIGN
    assert made.unions == (REHEARSAL_UNION,)
    assert [showing.tickets for showing in made.showings] == [10, 9]
    for field in ("category", "price_fen", "payment", "card_limit", "order_max", "owner"):
        assert getattr(made, field) == getattr(real, field), field
    assert made.closes_at is not None  # also where nobody closes it
    assert await play.desk.real(CAMPAIGN) == before
    assert await play.clean()


async def test_rehearsal_of_an_online_campaign_holds_nothing(play: Play) -> None:
    real = campaign(10, campaign_id="paid-online", payment="online")
    await play.shop.create(real)
    original = await play.desk.original(real.id)
    begun = await play.desk.begin(original, ME, "before it", opens_in_s=0.0, lasts_s=10.0)
    made = begun.campaign
    assert (made.payment, made.hold_s) == ("counter", None)
    (told,) = await play.buy(made, CARDS[:1])
    assert (told.decision, told.pay_before_ms) == (Decision.SOLD, 0)
    assert not await play.shop.redis.exists(campaign_keys(made.id).holds)
    assert await play.clean()


async def test_given_back_tickets_of_a_rehearsal_are_purged(play: Play) -> None:
    made = await play.begin()
    (sold,) = await play.buy(made, CARDS[:1], quantity=2)
    place = OrderPlace(made.id, sold.value, sold.sold_at_ms & LOW_BITS)
    told = await play.shop.scripts.cancel(
        place, CARDS[0], (1,), "cli:me", "wanted", mark=None, limited=False
    )
    assert told.reply is CallReply.OK
    await until(lambda: play.has(made.id, ticket=1))
    await play.purge(made.id)
    assert await play.rows(made.id) == {}
    assert await play.clean()


async def test_rehearsal_is_listed_only_on_request(play: Play) -> None:
    made = await play.begin()
    catalogue = Catalogue(play.shop.redis)
    assert [now.campaign.id for now in await catalogue.all() if now.listed] == [CAMPAIGN]
    assert await catalogue.for_sale(made.id) == made


async def test_cards_of_the_other_side_are_refused(
    play: Play,
) -> None:
    made, real = await play.begin(), campaign(10, 5)
    # By the script: the token's union is not the rehearsal's.
    (told,) = await play.buy(made, [member(1)], "district")
    assert told.decision is Decision.NOT_ELIGIBLE
    # By the desk: the real campaign is for everybody.
    assert not may_meet(real, CARDS[0])
    assert not may_meet(made, member(1))
    assert may_meet(real, member(1))
    assert may_meet(made, CARDS[0])
    (told,) = await play.buy(made, CARDS[:1])
    assert told.decision is Decision.SOLD


async def test_audit_finds_a_made_up_card_that_bought_for_real(
    play: Play,
) -> None:
    await play.shop.stock.buy(Bid(CARDS[0], key(3)))  # past the desk
    (found,) = (await play.shop.audit()).campaigns
    assert {finding.invariant for finding in found.findings} == {"INV-9"}


def test_made_up_members_have_numbers_and_tokens_of_their_own() -> None:
    rows = list(tokens(KEY, 3, ttl_s=60))
    verifier = MemberTokens(KEY)
    for row in rows:
        member = verifier.verify(row["token"], time.time())
        assert (str(member.no), member.union) == (row["card_no"], REHEARSAL_UNION)
        assert is_made_up(member.no)
    assert len({row["card_no"] for row in rows}) == 3
    with pytest.raises(Refused):
        verifier.verify(rows[0]["token"], time.time() + 61)


def test_file_that_claims_to_be_a_rehearsal_is_refused(
    tmp_path: Path,
) -> None:
    unions = load_unions(default_unions_path())
    with pytest.raises(InvalidCampaign) as wrong:
        parse_campaign({"rehearsal_of": "x", "unions": [REHEARSAL_UNION]}, frozenset(unions))
    assert {"rehearsal_of", "unions"} <= set(wrong.value.problems)
    file = tmp_path / "unions.toml"
    rows = "".join(f'[[unions]]\ncode = "{code}"\nname = "x"\n' for code in (*unions, "rehearsal"))
    file.write_text(rows, "utf-8")
    with pytest.raises(ValueError, match="kept for rehearsals"):
        load_unions(file)


@pytest.mark.parametrize("of", ["a", "five-yuan-films", "x" * 48, f"{'x' * 21}-{'y' * 26}"])
def test_rehearsal_has_a_new_valid_id(of: str) -> None:
    names = {rehearsal_id(of) for _ in range(20)}
    assert len(names) == 20
    for name in names:
        assert len(name) <= ID_MAX
        assert name.startswith("rehearsal-")
        assert not name.endswith("-")


async def test_purge_removes_rows_and_keys_and_keeps_the_log(
    play: Play,
) -> None:
    shop, made = play.shop, await play.begin()
    told = await play.buy(made, CARDS)
    assert {answer.decision for answer in told} == {Decision.SOLD}
    before = await play.desk.real(CAMPAIGN)
    assert await play.clean()
    removed = await play.purge(made.id)
    assert removed == rehearsals.Removed(8, 8)
    assert await play.rows(made.id) == {}
    assert [each async for each in shop.redis.scan_iter(match=f"*{made.id}*")] == []
    assert await campaign_ids(shop.redis) == [CAMPAIGN]
    assert await play.desk.real(CAMPAIGN) == before
    actions = await shop.pool.fetch(
        "SELECT action, actor, reason FROM audit_log WHERE campaign_id = $1 ORDER BY id", made.id
    )
    assert [row["action"].partition(".")[2] for row in actions] == [
        "created", "scheduled", "closed", "purged",
    ]  # fmt: skip
    assert (actions[0]["actor"], actions[0]["reason"]) == ("cli:me", "three days before")
    assert await play.desk.left_over() == []
    report = await shop.audit()
    assert (report.clean, [each.id for each in report.campaigns]) == (True, [CAMPAIGN])


async def test_engine_does_not_miss_a_purged_rehearsal(play: Play) -> None:
    shop, made = play.shop, await play.begin()
    await play.buy(made, CARDS)
    await play.purge(made.id)
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []

    async def forgotten() -> bool:
        return not any(each.campaign_id == made.id for each in play.batchers.all())

    await until(forgotten)
    found = await diagnose(shop.redis, shop.pool)
    assert [(each.id, each.trouble) for each in found.campaigns] == [(CAMPAIGN, "")]
    with pytest.raises(Refused) as wrong:
        await recover(shop.redis, shop.scripts, shop.pool, made.id, actor="cli:me", dry_run=False)
    assert wrong.value.problem is Problem.NOT_FOUND
    with pytest.raises(Refused):
        await play.purge(made.id)
    # A process that was stopped, and comes back with what it has told, is owed nothing.
    late = Event(5, 1_700_000_000_000, 1, SOLD, CARDS[0], 0, 1, key(7), 500)
    async with shop.pool.acquire() as connection:
        await claims.hand_in(connection, made.id, "p2", [late])
    assert await play.rows(made.id) == {}
    # A writer that wakes up with its first events in hand finds another position.
    assert await shop.pool.fetchval("SELECT applied FROM campaign WHERE campaign_id = $1", made.id)


async def test_scheduler_tells_no_stock_of_a_purged_rehearsal(play: Play) -> None:
    made = await play.begin()

    async def told(registry: CollectorRegistry, *, there: bool) -> bool:
        samples = {"campaign": made.id, "showing": "s1"}
        return (registry.get_sample_value("sale_stock_remaining", samples) is not None) is there

    async with play.shop.scheduling() as registry:
        await until(lambda: told(registry, there=True))
        await play.purge(made.id)
        await until(lambda: told(registry, there=False))


async def test_purged_rehearsal_in_older_files_is_removed_again(
    play: Play,
) -> None:
    shop, made = play.shop, await play.begin()
    await play.buy(made, CARDS)
    keys = [name for name in campaign_keys(made.id) if await shop.redis.exists(name)]
    kept = {name: await shop.redis.dump(name) for name in keys}
    await play.purge(made.id)
    for name, value in kept.items():
        await shop.redis.restore(name, 0, value)
    await shop.redis.sadd("sale:campaigns", made.id)
    await shop.redis.hset(campaign_keys(made.id).head, mapping={"run_id": "x", "seq": 3})
    unfit = await verify_all(shop.redis, shop.scripts, shop.pool)
    assert unfit == [made.id]
    auto_recovery = AutoRecovery(shop.redis, shop.scripts, shop.pool, allowed=True)
    await auto_recovery.recover_unfit(unfit)
    assert await read_campaign(shop.redis, made.id) is None
    assert await verify_all(shop.redis, shop.scripts, shop.pool) == []
    assert await play.clean()


async def test_purge_that_died_goes_on_when_repeated(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await play.begin()
    await play.buy(made, CARDS)

    async def die(*_: object) -> bool:
        raise ConnectionError("died")

    with monkeypatch.context() as patched:
        patched.setattr("sale.operators.rehearsal.remove_rehearsal", die)
        with pytest.raises(ConnectionError):
            await play.purge(made.id)
    assert (await play.rows(made.id))["event"] > 8
    assert await play.clean()
    assert await verify_all(play.shop.redis, play.shop.scripts, play.shop.pool) == []
    (left,) = await play.desk.left_over()
    assert (left.id, left.struck_off) == (made.id, True)
    await play.purge(made.id)
    assert await play.rows(made.id) == {}
    assert await play.desk.left_over() == []


async def test_audits_beside_a_purge_are_clean(
    play: Play,
) -> None:
    made = await play.begin()
    await play.buy(made, CARDS)
    purging = asyncio.create_task(play.purge(made.id))
    audits = 0
    while not purging.done():
        assert await play.clean()
        audits += 1
    await purging
    assert audits


async def test_rehearsal_that_redis_lost_can_be_purged(play: Play) -> None:
    made = await play.begin()
    await play.buy(made, CARDS)
    await until(lambda: play.has(made.id, orders=8))
    await remove_rehearsal(play.shop.redis, made.id)
    assert await verify_all(play.shop.redis, play.shop.scripts, play.shop.pool) == [made.id]
    await play.purge(made.id)
    assert await play.rows(made.id) == {}
    assert await play.clean()


async def test_sql_keeps_the_rows_of_a_real_campaign(play: Play) -> None:
    before = await play.rows(CAMPAIGN)
    async with play.shop.pool.acquire() as connection:
        for table in TABLES[:4]:
            with pytest.raises(asyncpg.IntegrityConstraintViolationError):
                await connection.execute(f"DELETE FROM {table} WHERE campaign_id = $1", CAMPAIGN)
        applied = await connection.fetchval("SELECT applied FROM campaign")
        struck = await rehearsals.strike_off(connection, CAMPAIGN, applied, actor="x", reason="x")
        assert struck is None
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await rehearsals.remove_rows(connection, CAMPAIGN)
    assert await play.rows(CAMPAIGN) == before


async def test_sql_refuses_to_make_a_real_campaign_a_rehearsal(
    play: Play,
) -> None:
    for statement in (
        'UPDATE campaign SET config = config || \'{"rehearsal_of": "x"}\'',
        "UPDATE campaign SET config = '{}'",
        "UPDATE campaign SET purged_at = now()",
        "UPDATE campaign SET purged_at = now(), state = 'deleted'",
        "UPDATE campaign SET rehearsal_of = 'x'",
        "TRUNCATE orders",
        "TRUNCATE event",
        "TRUNCATE conflict",
        f"INSERT INTO member VALUES ({CARDS[0]}, 'x', 'dongsi', '', NULL, 'active')",
    ):
        with pytest.raises(asyncpg.PostgresError):
            await play.shop.pool.execute(statement)
    assert await play.clean()


async def test_sql_keeps_the_rows_of_an_unpurged_rehearsal(
    play: Play,
) -> None:
    made = await play.begin()
    await play.buy(made, CARDS)
    await until(lambda: play.has(made.id, orders=8))
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await play.shop.pool.execute("DELETE FROM orders WHERE campaign_id = $1", made.id)
    assert (await play.rows(made.id))["orders"] == 8


async def test_purge_of_a_real_campaign_is_refused(
    play: Play,
) -> None:
    with pytest.raises(Refused, match="no rehearsal"):
        await play.purge(CAMPAIGN)
    with pytest.raises(NotRemoved):
        await remove_rehearsal(play.shop.redis, CAMPAIGN)
    with pytest.raises(Refused) as wrong:
        await play.purge("never-was")
    assert wrong.value.problem is Problem.NOT_FOUND
    assert (await read_campaign(play.shop.redis, CAMPAIGN)) is not None


async def test_real_sales_are_named_before_a_rehearsal(play: Play) -> None:
    soon = int((time.time() + 600) * 1_000)
    later = int((time.time() + 7_200) * 1_000)
    await play.shop.create(campaign(1, campaign_id="soon", opens_at_ms=soon))
    await play.shop.create(campaign(1, campaign_id="later", opens_at_ms=later))
    await play.begin()
    found = await play.desk.real_sales(60.0)
    assert sorted(each.split()[0] for each in found) == [CAMPAIGN, "soon"]
    assert f"{CAMPAIGN} is open" in found


async def test_second_rehearsal_at_the_same_time_is_refused(play: Play) -> None:
    async with play.desk.alone():
        with pytest.raises(Refused, match="somebody else"):
            async with play.desk.alone():
                pass
    async with play.desk.alone():
        pass


async def test_rehearsal_of_a_rehearsal_is_refused(play: Play) -> None:
    made = await play.begin()
    with pytest.raises(Refused, match="rehearsal itself"):
        await play.desk.original(made.id)


async def test_api_shows_a_rehearsal_to_its_cards_only(service: Service, client: Client) -> None:
    real = await client.campaign(5)
    async with open_stores(Settings(data_dir=service.data_dir), pool_size=3) as stores:
        desk = Rehearsals(stores.redis, stores.scripts, stores.pool)
        original = await desk.original(real)
        made = await desk.begin(original, ME, "a test", opens_in_s=0.0, lasts_s=1.0)
        name = made.campaign.id
        synthetic = next(tokens(service.key, 1, ttl_s=60))["token"]
        sold = await client.buy(name, synthetic)
        assert sold.status == 201, sold
        for campaign_id, token in ((real, synthetic), (name, service.card().token)):
            refused = await client.buy(campaign_id, token)
            assert (refused.status, refused.code) == (403, "not-eligible")
            told = await client.get(f"{CAMPAIGNS}/{campaign_id}/allowance", token)
            assert told.json()["reason"] == "not-eligible"
        assert (await client.get(f"{CAMPAIGNS}/{name}")).status == 200
        assert name not in (await client.get(f"{CAMPAIGNS}?limit=200")).body.decode()
        for query, listed in (("", False), ("&rehearsals=true", True)):
            answer = await client.get(f"{ADMIN}?limit=200{query}", service.admin_token)
            assert (name in answer.body.decode()) is listed
        for words, listed in (((), False), (("--all",), True)):
            ran = await service.asale("campaign", "list", "--json", *words)
            assert (name in [each["id"] for each in ran.json()]) is listed
        assert name in (await service.asale("doctor")).out
        purged = await service.asale("rehearse", "--purge", name, "--json")
        assert purged.json() == [{"purged": name, "orders": 1, "tickets": 1}]
        # Nothing tells of it any more but the audit log; who asks is told that there is none.
        await client.get(CAMPAIGNS)
        await until(lambda: _says(client, name, synthetic, 404))
        assert name not in (await service.asale("doctor")).out
        log = await client.get(f"/api/v1/admin/audit-log?campaign={name}", service.admin_token)
        assert log.json()["items"][0]["action"] == "rehearsal.purged"


async def _says(client: Client, campaign_id: str, token: str, status: int) -> bool:
    await client.get(CAMPAIGNS)
    return (await client.buy(campaign_id, token)).status == status


async def test_wrong_words_are_told_in_one_line(service: Service, client: Client) -> None:
    real = await client.campaign(5)
    cards = ("--cards", 5)
    for words, status, says in (
        ((), 2, "CAMPAIGN"),
        ((real,), 2, "--cards"),
        ((real, *cards, "--beside-real-sales"), 2, "--yes"),
        ((real, *cards, "--beside-real-sales", "--reason", "r"), 2, "--yes"),
        ((real, *cards, "--reason", "r", "--yes"), 1, "--beside-real-sales"),
        ((real, *cards, "--arrivals", "noon"), 2, "--arrivals"),
        ((real, *cards, "--fail-if", "p98>1ms"), 2, "no figure 'p98'"),
        (("no-such", *cards, "--reason", "r", "--yes"), 1, "no campaign"),
        ((real, "--purge"), 1, "no rehearsal"),
        (("no-such", "--purge"), 1, "no rehearsal"),
        ((real, *cards, "--beside-real-sales", "--yes", "--reason", "r", "--target", "[::1]:9"),
         1, "does not answer"),
    ):  # fmt: skip
        ran = await service.asale("rehearse", *words)
        assert ran.status == status, ran
        assert says in ran.err.splitlines()[-1], ran
        assert "Traceback" not in ran.err


def test_generator_knows_the_arrivals_of_a_rehearsal(
    tmp_path: Path,
) -> None:
    assert list(rehearse.ARRIVALS) == sorted(arrivals.KINDS, reverse=True)
    settings = Settings(data_dir=tmp_path, durability="relaxed")
    made = release(settings, target="h:1", campaign="copy", rate=5, arrivals="constant")
    assert (made.arrivals, made.at_opening, made.alone, made.quantity) == (
        "constant",
        True,
        True,
        0,
    )
    told = made.books.settings()
    assert told is not None
    assert (told["SALE_DATA_DIR"], told["SALE_DURABILITY"]) == (str(tmp_path), "relaxed")


@pytest.mark.parametrize("says_yes", [True, False])
def test_rehearsal_wants_a_reason_and_a_yes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, says_yes: bool
) -> None:
    said = iter(["  ", " because "])

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.prompt", lambda *_, **__: next(said))
    monkeypatch.setattr("click.confirm", lambda *_, **__: says_yes)
    if says_yes:
        assert rehearse._confirmed(" ", yes=False) == "because"
        return
    with pytest.raises(click.Abort):
        rehearse._confirmed(None, yes=False)
    assert capsys.readouterr().err == "nothing was made\n"


def test_limited_rehearsal_shows_no_rate_of_the_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = Outcome(rehearsal="r", of="films", clean=True, offered=5, offered_rate=5.0)
    show(msgspec.structs.replace(outcome, bottleneck="late"))
    assert "5/s offered, – answered" in capsys.readouterr().out


def test_missed_threshold_is_read_from_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = records.Record(name="r", campaign="c", started_at="2026-01-01T00:00:00Z",
                            duration_s=1.0, not_played="100 of 100 could not buy",
                            proof=records.Proof(clean=True))  # fmt: skip
    record.thresholds = judge(read_rules(["p99>1ms", "sold<0"]), record)
    made = Outcome.of_run("r", "films", tmp_path, record, audits=[], untouched=True)
    assert made.findings == []
    assert made.failed == [
        "the rush did not happen: 100 of 100 could not buy",
        "threshold missed: p99>1ms: it was not measured",
    ]
    show(made)
    assert "threshold missed: p99>1ms" in capsys.readouterr().out


@pytest.mark.load
async def test_rehearsed_release_is_proven_and_gone(
    service: Service, client: Client, tmp_path: Path
) -> None:
    real = await client.campaign(20)
    out = tmp_path / "report"
    ran = await asyncio.to_thread(
        subprocess.run,
        [
            *(sys.executable, "-m", "sale", "--data-dir", str(service.data_dir), "rehearse", real),
            *("--cards", "40", "--rate", "40", "--opens-in", "6", "--reason", "a test", "--yes"),
            *("--beside-real-sales", "--out", str(out), "--json", "--fail-if", "sold>99"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    told = json.loads(ran.stdout)
    assert told["clean"], (told, ran.stderr)
    assert ran.returncode == (1 if told["bottleneck"] else 0)
    assert (told["real_untouched"], told["purged"], told["audit_clean"]) == (True, True, True)
    assert told["tickets"] == 20  # more was asked for than there was
    assert told["outcomes"]["sold-out"] > 0
    assert told["bottleneck"] or "only its lateness was judged" in told["notes"][-1]
    record = records.read(out / "run.json")
    assert record.plan["arrivals"] == "release"
    assert [(each.rule, each.missed) for each in record.thresholds] == [("sold>99", False)]
    assert told["report"] == str(out / "report.html")
    assert (await client.remaining(real)) == [20]
    assert (await client.get(f"{CAMPAIGNS}/{told['rehearsal']}")).status == 404
