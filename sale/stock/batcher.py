"""Group commit: purchases that arrive during a script call go together into the next call.

Each process has one batcher per campaign. A purchase waits in a bounded queue. A single task takes
up to ``batch_max`` purchases, runs ``purchase.lua`` once, and answers each. Only one call is under
way at a time, so that after a lost connection at most one batch has an unknown outcome. Two calls
at a time were tried: they sold no more (0.9 to 1.5 of the benchmark's constant, against 0.96 to 1.5
with one) and were no faster at half of the capacity (p99 8.6 to 16.8 ms against 7.2 to 13.7). The
process writes the answers of a batch while the next call is under way.

If the connection is lost during a call, its outcome is unknown. The batcher repeats the call with
the same keys and a higher call number until the deadline. INV-4 makes the repeat harmless, and the
script refuses the first attempt if it arrives late. A purchase whose outcome stays unknown is
answered "unavailable", never "sold out" (INV-8).

If the last answers were mostly refusals for state or stock, the next call is one ``peek``, by which
the batcher refuses every purchase that it can. A purchase goes to the script if its member may
already have an order, or if there may be a ticket for it.

Rejected: one EVALSHA per request (6,200 a second against 23,000 in the design's prototype);
pipelining single EVALSHAs (one fsync each under ``appendfsync always``).
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any, Final

import structlog
from redis.exceptions import ResponseError

from sale.domain.campaign import Campaign
from sale.domain.order import OrderState
from sale.ledger.chain import CorruptLedger, Event
from sale.ledger.kinds import HELD, SOLD
from sale.lifetime import cancel_and_wait
from sale.metrics import PurchaseMetrics
from sale.stock.answers import (
    OUTCOMES,
    UNKNOWN,
    Answer,
    Purchase,
    read_answer,
    refusal_by_state,
    sale_event,
)
from sale.stock.batch_codec import pack_batch
from sale.stock.buyer_filter import BuyerFilter
from sale.stock.errors import REDIS_ERRORS
from sale.stock.head import TRUST
from sale.stock.keys import campaign_keys
from sale.stock.mark import NOT_CHECKED, Found, Mark, look_up
from sale.stock.script_connection import ScriptConnection
from sale.stock.scripts import CallReply, Decision, Peek, Scripts, Untrusted
from sale.stock.unapplied import Batch, Unapplied

RETRY_PAUSES_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
UNTRUSTED_PATIENCE_S: Final = 2.0
GATHER_AT_LEAST: Final = 16
GATHER_S: Final = 0.005
"""Longest time to gather, because a turn of the loop may be long for other reasons."""

PEEKED_MAX: Final = 4_096
CALLS_PER_DEADLINE: Final = 3

log = structlog.get_logger()


_BY_PEEK: Final = frozenset(
    {Decision.SOLD_OUT, Decision.NOT_OPEN, Decision.PAUSED, Decision.CLOSED, Decision.CARD_REVOKED}
)
_PASSING: Final = frozenset(
    {CallReply.OK, CallReply.LATE, CallReply.UNVERIFIED, CallReply.UNCHECKED}
)
"""Replies that may change within UNTRUSTED_PATIENCE_S, so that the call is repeated."""
_RESULTS_AT: Final = 9
"""Index of the first result in a reply of ``purchase.lua``."""


def unknown(_campaign_id: str, _config_seq: int) -> None:
    """Know no other configuration than the first."""


class Batcher:
    """Collects the purchases of one campaign in this process. See the module's docstring."""

    def __init__(
        self,
        campaign: Campaign,
        scripts: Scripts,
        process: str,
        metrics: PurchaseMetrics,
        *,
        batch_max: int,
        queue_max: int,
        deadline_s: float,
        behind_max: tuple[int, int],
        next_call: Callable[[], int],
        connection: ScriptConnection | None = None,
        check_redis: Callable[[], Awaitable[str]] | None = None,
        configured: Callable[[str, int], Campaign | None] = unknown,
    ) -> None:
        self._campaign = campaign
        self._configured = configured
        self._check_redis = check_redis
        self._keys = campaign_keys(campaign.id)
        self._scripts = scripts
        self._process = process
        self._metrics = metrics
        self._batch_max = batch_max
        self._queue_max = queue_max
        self._deadline_s = deadline_s
        # Shorter than the deadline, so that a call to a stalled Redis can be repeated in time.
        self._call_timeout_s = deadline_s / CALLS_PER_DEADLINE
        self._behind_max = behind_max
        self._next_call = next_call
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Purchase] = deque()
        self._task: asyncio.Task[None] | None = None
        self._buyer_filter: BuyerFilter | None = None
        self._all_refused = False
        self._warned = ""
        self._store_failing = self._store_rejects = False
        self._peeked = False
        """Whether a peek came before this batch and refused the purchases that it could."""
        self._asking: list[Purchase] = []
        self._settled = 0
        self.mark = NOT_CHECKED
        """A ledger that does not pass through it lacks events that this process saw (INV-8)."""
        self.unapplied = Unapplied()
        """Sales that this process acknowledged and PostgreSQL may not have yet (INV-3)."""

    @property
    def campaign_id(self) -> str:
        """ID of its campaign."""
        return self._campaign.id

    @property
    def rehearsal(self) -> bool:
        """Whether its campaign is a rehearsal, which may be purged."""
        return bool(self._campaign.rehearsal_of)

    def submit(self, purchase: Purchase) -> bool:
        """Queue a purchase, which will be settled once. False if the queue is full."""
        if len(self._queue) >= self._queue_max:
            return False
        self._queue.append(purchase)
        if self._task is None:
            self._task = self._loop.create_task(self._drain())
        return True

    @property
    def waiting(self) -> int:
        """Purchases in the queue."""
        return len(self._queue)

    @property
    def taken(self) -> int:
        """Purchases that have left the queue so far, with any outcome."""
        return self._settled + len(self._asking)

    @property
    def waiting_since(self) -> float:
        """Since when the first of them waits; 0.0 if none waits, or if Redis fails.

        If Redis fails, waiting purchases are no sign of overload; they are answered "unavailable".
        """
        return 0.0 if self._store_failing or not self._queue else self._queue[0].asked_at

    async def close(self) -> None:
        """Answer the queued purchases, at most until the deadline, then stop."""
        if (task := self._task) is not None:
            await asyncio.wait([task], timeout=self._deadline_s)
            await cancel_and_wait([task])
        if self._buyer_filter is not None:
            await self._buyer_filter.close()
        self._give_up(self._asking + self._take(len(self._queue)))

    async def _drain(self) -> None:
        answering = False  # after a batch, do not gather: its answers are written during the next
        try:
            while self._queue:
                if not answering:
                    await self._gather()
                answering = False
                if self._all_refused:
                    batch = await self._refuse_by_peek()
                else:
                    batch, self._peeked = self._take(self._batch_max), False
                # A client past its deadline has gone, so its purchase must not reach the script.
                self._asking = self._drop_overdue(batch)
                if self._asking:
                    await self._decide(self._asking)
                    self._asking = []
                    answering = True
        except Exception:
            # A bug of ours must leave no purchase waiting; "unknown" is a correct answer.
            log.exception("batcher.failed", campaign=self._campaign.id)
            asking, self._asking = self._asking, []
            self._give_up(asking + self._take(len(self._queue)))
        finally:
            self._task = None

    async def _gather(self) -> None:
        """Wait for a full batch while each turn of the loop brings GATHER_AT_LEAST purchases.

        A call costs the same for any batch size (mainly its fsync), and in a rush more requests
        wait in the kernel than have been read. A turn that brings fewer purchases ends the wait,
        because more may not come. When any number of purchases prolonged it, the median latency at
        half of the capacity was five times as high.
        """
        queue, before = self._queue, 0
        until = time.monotonic() + GATHER_S
        while before + GATHER_AT_LEAST <= len(queue) < self._batch_max and time.monotonic() < until:
            before = len(queue)
            await asyncio.sleep(0)

    def _take(self, most: int) -> list[Purchase]:
        queue = self._queue
        if len(queue) <= most:
            taken = list(queue)
            queue.clear()
            return taken
        return [queue.popleft() for _ in range(most)]

    async def _decide(self, batch: list[Purchase]) -> None:
        """Run the script for a batch until each purchase is answered or past its deadline."""
        attempt = 0
        first_asked_at = time.monotonic()
        while batch:
            packed = pack_batch(
                (
                    [str(p.member_no) for p in batch],
                    [p.union for p in batch],
                    [p.showing for p in batch],
                    [p.quantity for p in batch],
                    [p.key_hash for p in batch],
                )
            )
            mark = self.mark
            try:
                async with asyncio.timeout(self._call_timeout_s):
                    reply = await self._scripts.purchase(
                        self._keys, self._process, self._next_call(), mark, self._behind_max,
                        packed, self._connection,
                    )  # fmt: skip
            except ResponseError as error:
                # Refused before its first write: out of memory, or a read-only replica.
                self._warn_store("purchase.rejected", str(error)[:200])
                self._store_rejects = True
                self._all_refused = True  # a peek only reads, so it can still refuse purchases
                break
            except REDIS_ERRORS as error:
                self._warn_store("purchase.unknown", type(error).__name__)
            else:
                # A reply of an earlier incarnation is not valid in this one: ask again.
                if reply[0] == CallReply.OK and mark.incarnation == self.mark.incarnation:
                    self._warned = ""
                    self._store_failing = self._store_rejects = False
                    self._answer(batch, packed, reply)
                    return
                if (
                    reply[0] == CallReply.UNCHECKED
                    and await self.check_acknowledged()
                    and attempt == 0
                ):
                    attempt = 1
                    batch = self._asking = self._drop_overdue(batch)
                    continue
                if reply[0] == CallReply.DUE:
                    await self._expire()
                    batch = self._asking = self._drop_overdue(batch)
                    continue
                self._warn_store("purchase.untrusted", CallReply(reply[0]).name.lower())
                if reply[0] not in _PASSING:
                    break
                if time.monotonic() - first_asked_at > UNTRUSTED_PATIENCE_S:
                    break
            await asyncio.sleep(RETRY_PAUSES_S[min(attempt, len(RETRY_PAUSES_S) - 1)])
            attempt += 1
            batch = self._asking = self._drop_overdue(batch)
        self._give_up(batch)

    async def _expire(self) -> None:
        """End holds that are due, so that nobody is refused for their tickets.

        If none ended, because another process was faster or the script fails, wait for a moment:
        the call is repeated until the deadline.
        """
        try:
            async with asyncio.timeout(self._call_timeout_s):
                if (await self._scripts.expire(self._campaign.id)).count:
                    return
        except (Untrusted, *REDIS_ERRORS) as error:
            self._warn_store("purchase.holds_not_ended", f"{type(error).__name__}: {error}"[:200])
        await asyncio.sleep(RETRY_PAUSES_S[0])

    async def check_acknowledged(self) -> bool:
        """Check that this Redis holds everything that this process acknowledged, and mark it so.

        False if something is missing or Redis cannot be read. Then this process sells nothing until
        the campaign is recovered and its unapplied sales are handed in (``trust/witness.py``).
        """
        mark = self.mark
        try:
            async with asyncio.timeout(self._call_timeout_s):
                if self._check_redis is not None and (why := await self._check_redis()):
                    self._warn_store("purchase.not_durable", why)
                    return False
                head = await TRUST.read(self._scripts.redis, self._campaign.id)
                if head.seq is None or not (head.run_id and head.replid and head.epoch):
                    return False
                found = await self.look_up()
        except (*REDIS_ERRORS, ValueError) as error:
            self._warn_store("purchase.unknown", type(error).__name__)
            return False
        if found is not Found.HELD:
            self._warn_store("campaign.lacks_orders", f"epoch {head.epoch}, event {head.seq}")
            return False
        if self.mark != mark:
            return False  # a reply of the earlier incarnation came meanwhile and was not checked
        self.mark = Mark(head.incarnation, head.seq, head.chain)
        return True

    async def look_up(self) -> Found:
        """Look for the mark in this Redis, whether or not it was verified. Raises its errors."""
        return await look_up(self._scripts.redis, self._keys, self.mark)

    def advance(self, seq: int, chain: str) -> None:
        """Take over what a reply of the same incarnation says of the end of the ledger."""
        if seq > self.mark.seq:
            self.mark = Mark(self.mark.incarnation, seq, chain)

    def begin_anew(self) -> None:
        """Drop the mark and the unapplied sales, all of which were handed in."""
        self.mark = NOT_CHECKED
        self.unapplied.clear()

    def take_config(self, config_seq: int) -> None:
        """Use the campaign's configuration of this number, if the catalogue knows it."""
        self._campaign = self._configured(self._campaign.id, config_seq) or self._campaign

    def _warn_store(self, action: str, why: str) -> None:
        self._store_failing = True
        self._warn(action, why)

    def _warn(self, action: str, why: str) -> None:
        """Log a problem once, not once per batch."""
        if self._warned != action + why:
            log.warning(action, campaign=self._campaign.id, why=why)
        self._warned = action + why

    def _give_up(self, purchases: list[Purchase]) -> None:
        self._settle(purchases, [UNKNOWN] * len(purchases))

    def _answer(self, batch: list[Purchase], packed: bytes, reply: list[Any]) -> None:
        """Store the sales, then settle all purchases. For the reply see ``purchase.lua``."""
        now_ms, seq, chain, epoch, price_fen, number, config_seq, pay_before = reply[1:_RESULTS_AT]
        self.take_config(config_seq)
        self.advance(seq, chain.decode())
        self._metrics.batch_size.observe(len(batch))
        if len(reply) == _RESULTS_AT + len(batch):
            # The usual case of a rush: each purchase was sold, so the results need no inspection.
            self._all_refused &= self._peeked
            self.unapplied.add_batch(
                Batch(epoch, price_fen, number + 1, now_ms, pay_before, len(batch), packed)
            )
            answers = [
                Answer(Decision.SOLD, event, left, now_ms, now_ms, price_fen, pay_before)
                for event, left in enumerate(islice(reply, _RESULTS_AT, None), number + 1)
            ]
        else:
            answers = self._answers_of(batch, reply)
            if not self._peeked:  # otherwise ``_refuse_by_peek`` decides
                by_peek = sum([answer.decision in _BY_PEEK for answer in answers])
                self._all_refused = 2 * by_peek > len(answers)
        if len(answers) != len(batch):
            raise ValueError(f"{len(answers)} answers to {len(batch)} purchases")
        # Settle in the loop's next turn: by then the next call is sent, and Redis works (and waits
        # for its disk) while this process writes answers.
        self._settled += len(batch)
        self._loop.call_soon(self._settle_each, batch, answers)

    def _answers_of(self, batch: list[Purchase], reply: list[Any]) -> list[Answer]:
        """Read a reply with refusals or replays, and store the sales."""
        now_ms, _, _, epoch, price_fen, number, _, pay_before = reply[1:_RESULTS_AT]
        kind, held_until = (HELD, pay_before) if pay_before else (SOLD, None)
        shared: dict[int, Answer] = {}
        answers: list[Answer] = []
        sales: list[Event] = []
        for p, result in zip(batch, islice(reply, _RESULTS_AT, None), strict=False):
            if result >= 0:
                number += 1
                answer = Answer(
                    Decision.SOLD, number, result, now_ms, now_ms, price_fen, pay_before
                )
                sales.append(sale_event(p, number, now_ms, epoch, kind, price_fen, held_until))
            elif result in shared:
                answer = shared[result]
            else:
                answer = shared[result] = read_answer(
                    reply[-result : 4 - result], now_ms, price_fen
                )
                sales += self._replayed(p, answer, epoch)
            answers.append(answer)
        self.unapplied.add(sales)
        return answers

    def _replayed(self, p: Purchase, answer: Answer, epoch: int) -> list[Event]:
        """Give the sale that a replay acknowledges, if it is to be kept.

        The event of an order that has changed since is not known any more, but for a hold's.
        """
        seq, record = answer.value, answer.record
        if answer.decision is Decision.REPLAYED:
            kind, held_until = SOLD, None
        elif record is not None and record.state is OrderState.HELD:
            kind, held_until = HELD, answer.pay_before_ms
        else:
            return []
        if seq <= self.unapplied.applied or not self.unapplied.first_replay(seq, p.key_hash):
            return []
        return [sale_event(p, seq, answer.sold_at_ms, epoch, kind, answer.price_fen, held_until)]

    def _settle(self, purchases: list[Purchase], answers: list[Answer]) -> None:
        self._settled += len(purchases)
        self._settle_each(purchases, answers)

    def _settle_each(self, purchases: list[Purchase], answers: list[Answer]) -> None:
        try:
            self._settle_and_count(purchases, answers)
        except Exception:
            # A bug of ours must leave no purchase waiting. A settled one ignores a second answer.
            log.exception("batcher.failed", campaign=self._campaign.id)
            for purchase in purchases:
                purchase.settle(UNKNOWN)

    def _settle_and_count(self, purchases: list[Purchase], answers: list[Answer]) -> None:
        now = time.monotonic()
        for decision, count in Counter([answer.decision for answer in answers]).items():
            self._metrics.outcomes[self._campaign.id, OUTCOMES[decision]] += count
        self._metrics.seconds.observe_all([now - purchase.asked_at for purchase in purchases])
        for purchase, answer in zip(purchases, answers, strict=True):
            purchase.settle(answer)

    def _drop_overdue(self, batch: list[Purchase]) -> list[Purchase]:
        overdue_before = time.monotonic() - self._deadline_s
        # Check all, not only the first: a purchase from the waiting line is older than others.
        if batch and min([p.asked_at for p in batch]) >= overdue_before:
            return batch
        self._give_up([p for p in batch if p.asked_at < overdue_before])
        return [p for p in batch if p.asked_at >= overdue_before]

    async def _peek(self) -> tuple[Peek, BuyerFilter] | None:
        """Read the campaign's state and stock; None if no purchase can be refused by them."""
        try:
            async with asyncio.timeout(self._call_timeout_s):
                peek = await self._scripts.peek(
                    self._keys, self.mark, len(self._campaign.showings), self._connection
                )
                buyer_filter = self._buyer_filter
                if buyer_filter is None:
                    buyer_filter = BuyerFilter(
                        self._scripts.redis, self._campaign.id, made_up=self.rehearsal
                    )
                    self._buyer_filter = buyer_filter
                return (peek, buyer_filter) if await buyer_filter.come_up_to(peek) else None
        except (Untrusted, *REDIS_ERRORS):
            return None
        except CorruptLedger as error:
            self._warn("buyer_filter.not_loaded", str(error))
            self._buyer_filter = None
            return None

    async def _refuse_by_peek(self) -> list[Purchase]:
        """Refuse purchases by one peek; return those that the script must decide."""
        # A peek is not valid for purchases that came after it was sent: tickets may have come back.
        asked = min(len(self._queue), PEEKED_MAX)
        self._peeked = False
        seen = await self._peek()
        if seen is None:
            return self._take(self._batch_max)
        peek, buyer_filter = seen
        self.take_config(peek.config_seq)
        self.advance(peek.seq, peek.chain)
        self._peeked = True
        if not self._store_rejects:  # otherwise Redis answers reads and still refuses writes
            self._warned, self._store_failing = "", False
        refusal, left = refusal_by_state(peek), peek.remaining
        if peek.due and refusal is None:
            return self._take(self._batch_max)  # holds end first, by the script's DUE
        by_showing = [
            Answer(Decision.SOLD_OUT, n, 0, 0, peek.now_ms, 0, peek.hold_ends_ms, held)
            for n, held in zip(left, peek.held, strict=True)
        ]
        if refusal is not None:
            by_showing, left = [refusal] * len(left), (0,) * len(left)
        shown, unions = len(left), None if "*" in self._campaign.unions else self._campaign.unions
        bits, first = buyer_filter.bits, buyer_filter.first
        bound = len(bits) << 3
        undecided: list[Purchase] = []
        refused: list[Purchase] = []
        answers: list[Answer] = []
        self._asking = taken = self._take(asked)  # so that they are answered after an exception
        for number, purchase in enumerate(taken, start=1):
            place = purchase.member_no - first
            if (
                (-1 < place < bound and bits[place >> 3] >> (place & 7) & 1)
                or purchase.showing >= shown  # one that came with a newer configuration
                or purchase.quantity <= left[purchase.showing]
                or (unions is not None and purchase.union not in unions)
            ):
                undecided.append(purchase)
                if len(undecided) == self._batch_max:
                    self._queue.extendleft(reversed(taken[number:]))
                    break
            else:
                refused.append(purchase)
                answers.append(by_showing[purchase.showing])
        self._asking = undecided
        self._settle(refused, answers)
        if len(undecided) > self._batch_max // 2:
            self._all_refused = False
        return undecided
