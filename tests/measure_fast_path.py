"""Measures the fast path's cost in Python, part by part, without kernel, Redis and network.

``python tests/measure_fast_path.py``. The real fast path, desk, checks and batcher get the
benchmark's requests on transports that lead nowhere; a batch is settled as if the script had
answered. The least of several rounds is reported: it hardly moves where the rates of a shared
machine do, so a change to the fast path can be judged by it. What the rest of a request costs is in
the kernel, the event loop and Redis.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final, cast

import structlog
import uvloop
from rich.console import Console

from loadtest.bench.rig import SIGNING_KEY
from loadtest.members import Mint
from loadtest.tables import grid, wide_console
from sale.api.fast_routes import fast_routes, make_fast_path
from sale.api.member import ORDER_REQUEST, order_answer
from sale.api.request import checked_key, decode_body
from sale.domain.campaign import Campaign, Showing
from sale.http.connection import Connection
from sale.http.fast_routes import FastRoutes
from sale.http.overload import Overload
from sale.http.request import bearer_token
from sale.http.request_head import HeadReader
from sale.http.waiting_line import WaitingLine
from sale.http.wire import rendered
from sale.identity import MemberTokens, SigningKey
from sale.members.orders import TicketCodes, key_hash
from sale.members.purchase import Placed, PurchaseDesk
from sale.members.rate import Rate, RateLimits
from sale.metrics import PurchaseMetrics
from sale.stock.answers import Answer, Purchase
from sale.stock.batch_codec import pack_batch
from sale.stock.batcher import Batcher
from sale.stock.mark import Mark
from sale.stock.scripts import Decision

BATCH: Final = 256
BATCHES: Final = 40
ROUNDS: Final = 12
NAME: Final = "bench"
NOW_MS: Final = 1_764_000_000_000
CAMPAIGN: Final = Campaign(
    id=NAME,
    title="tickets",
    category="culture",
    price_fen=500,
    payment="counter",
    card_limit=3,
    order_max=3,
    unions=("*",),
    owner="district",
    showings=(Showing(id="general", title="tickets", tickets=10_000_000),),
)


class _Nowhere(asyncio.Transport):
    """A transport that forgets what is written."""

    def write(self, data: Any) -> None:
        """Forget it."""

    def is_closing(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing was open."""


class _Taker:
    """The batchers behind a desk: keeps what is queued."""

    halted = ""
    deadline_s = 1e9

    def __init__(self) -> None:
        self.queue: list[Purchase] = []

    def of(self, _: Campaign) -> "_Taker":
        """Give the only one."""
        return self

    def submit(self, purchase: Purchase) -> bool:
        """Queue it."""
        self.queue.append(purchase)
        return True


class Parts:
    """One measurement; µs a purchase by part, the least of the rounds."""

    def __init__(self) -> None:
        self.key = SigningKey(SIGNING_KEY.encode())
        members = range(BATCH * BATCHES)
        requests = Mint(self.key.secret).requests("127.0.0.1:18080", NAME, "general", members)
        self.requests = list(requests)
        self.least: dict[str, float] = {}

    async def run(self) -> dict[str, float]:
        """Measure."""
        for _ in range(ROUNDS):
            await self._round(sold=True)
            await self._round(sold=False)
            self._single_parts()
        return self.least

    async def _round(self, *, sold: bool) -> None:
        taker, limits = _Taker(), _limits()
        catalogue = cast("Any", SimpleNamespace(known={NAME: CAMPAIGN}.get))
        load = Overload(connections_max=BATCH, turn_max_s=0, waiting_max=0, wait_max_s=0)
        desk = PurchaseDesk(
            catalogue, cast("Any", taker), MemberTokens(self.key), _codes(),
            PurchaseMetrics(), cast("Any", None), limits, load,
        )  # fmt: skip
        engine = cast(
            "Any",
            SimpleNamespace(desk=desk, overload=load, limits=limits, public_campaigns=None),
        )
        fast_path = make_fast_path(engine, cast("Any", None), WaitingLine(load))
        connections = [Connection(fast_path) for _ in range(BATCH)]
        for connection in connections:
            connection.connection_made(_Nowhere())
        batcher = _batcher()
        kind = "sold" if sold else "refused by a peek"
        with _no_collector():
            for start in range(0, len(self.requests), BATCH):
                began = time.perf_counter()
                for connection, raw in zip(connections, self.requests[start:], strict=False):
                    connection.data_received(raw)
                queued = time.perf_counter()
                batch, taker.queue = taker.queue, []
                if sold:
                    await self._sell(batcher, batch, start)
                else:
                    batcher._settle(batch, [Answer(Decision.SOLD_OUT)] * BATCH)
                for _ in range(3):  # told, posted, sent
                    await asyncio.sleep(0)
                told = time.perf_counter()
                self._note("read, check, queue (token never seen)", queued - began, BATCH)
                self._note(f"pack, word, answer: {kind}", told - queued, BATCH)
        fast_path.waiting_line.close()
        await fast_path.close()

    async def _sell(self, batcher: Batcher, batch: list[Purchase], start: int) -> None:
        bids = pack_batch(
            (
                [str(p.member_no) for p in batch],
                [p.union for p in batch],
                [p.showing for p in batch],
                [p.quantity for p in batch],
                [p.key_hash for p in batch],
            )
        )
        reply = [0, NOW_MS, start + BATCH, b"0" * 40, 1, 500, start, 1, 0] + [2] * BATCH
        batcher._answer(batch, bids, reply)

    def _single_parts(self) -> None:
        """Steps on the way, each alone."""
        raws, reader = self.requests, HeadReader(_routes(), learned_after=1)
        ends = [raw.find(b"\r\n\r\n") + 4 for raw in raws]
        heads = [reader.read(raw, end) for raw, end in zip(raws, ends, strict=True)]
        plain = [head for head in heads if head is not None]
        tokens = [bearer_token(head.authorization or "") or "" for head in plain]
        keys = [head.key or "" for head in plain]
        bodies = [raw[end:] for raw, end in zip(raws, ends, strict=True)]
        verifier, limits, codes, now = MemberTokens(self.key), _limits(), _codes(), time.time()
        shape = reader.shape
        self._each(" head, by llhttp", lambda: [reader.read(r, e) for r, e in zip(raws, ends)])  # noqa: B905
        self._each(" head, by its shape", lambda: [shape.read(raw) for raw in raws])
        self._each(" body", lambda: [decode_body(body, ORDER_REQUEST) for body in bodies])
        self._each(" key", lambda: [checked_key(key) for key in keys])
        self._each(" key's hash (only for the script)", lambda: [key_hash(key) for key in keys])
        self._each(" token, never seen", lambda: [verifier.verify(token, now) for token in tokens])
        self._each(" token, seen before", lambda: [verifier.verify(token, now) for token in tokens])
        members = [verifier.verify(token, now).no for token in tokens]
        self._each(" rate limits", lambda: [limits.spend(no, NAME, 100.0) for no in members])
        desk = SimpleNamespace(_codes=codes)
        answers = [Answer(Decision.SOLD, n, 2, NOW_MS, NOW_MS, 500) for n in range(len(raws))]
        purchase = cast("Any", SimpleNamespace(showing=0, quantity=1))
        placed: list[Placed] = []
        word = PurchaseDesk.word
        self._each(
            " word an order",
            lambda: placed.extend(
                cast("Placed", word(cast("Any", desk), CAMPAIGN, purchase, answer))
                for answer in answers
            ),
        )
        worded = [order_answer(each) for each in placed]
        self._each(" its JSON", lambda: [order_answer(each) for each in placed])
        self._each(" its bytes on the wire", lambda: [rendered(*each) for each in worded])

    def _each(self, name: str, work: Callable[[], object]) -> None:
        with _no_collector():
            began = time.perf_counter()
            work()
            self._note(name, time.perf_counter() - began, len(self.requests))

    def _note(self, name: str, took_s: float, count: int) -> None:
        each_us = took_s / count * 1e6
        self.least[name] = min(each_us, self.least.get(name, each_us))


def _batcher() -> Batcher:
    batcher = Batcher(
        CAMPAIGN, cast("Any", None), NAME, PurchaseMetrics(), batch_max=BATCH, queue_max=BATCH,
        deadline_s=1e9, behind_max=(1, 1), next_call=lambda: 1,
    )  # fmt: skip
    batcher.mark = Mark("run:repl:1", 1, "0" * 40)
    return batcher


def _routes() -> FastRoutes:
    return fast_routes(cast("Any", SimpleNamespace(desk=None, public_campaigns=None)))


def _limits() -> RateLimits:
    return RateLimits(card_campaign=Rate(5, 10), card=Rate(10, 20), address=Rate(1, 1))


def _codes() -> TicketCodes:
    return TicketCodes(SIGNING_KEY.encode()[:32])


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def print_parts(least: dict[str, float], console: Console) -> None:
    """Print the table."""
    parts = sorted(least.items(), key=lambda item: item[0].startswith(" "))
    rows = [(name, f"{each_us:.2f}") for name, each_us in parts]
    console.print(grid(f"CPU µs a purchase, the least of {ROUNDS} rounds", "|µs", rows))


def main() -> None:
    """Print what each part costs."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print_parts(uvloop.run(Parts().run()), wide_console())


if __name__ == "__main__":
    main()
