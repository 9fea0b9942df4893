"""Calls the Lua scripts and puts their replies into words. One script a file, see ``lua/``.

Every script is put behind ``_ledger.lua``, which reads the head, checks that this Redis may be
believed and appends to the chain: a difference between two scripts in this would be a hole in the
ledger.
"""

import asyncio
import hashlib
from enum import IntEnum
from importlib.resources import files
from typing import Any, Final

import hiredis
import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from sale.domain import STOCK_MAX
from sale.stock.keys import CampaignKeys, campaign_keys


class CallReply(IntEnum):
    """First integer of every reply; the same numbers stand in ``_ledger.lua``."""

    OK = 0
    MISSING = -1
    UNVERIFIED = -2
    STALE = -3
    BROKEN = -4
    LATE = -5
    EXISTS = -6
    WRONG_STATE = -7
    MISMATCH = -8
    REPLAYED = -9
    INVALID = -10


class Decision(IntEnum):
    """What ``purchase.lua`` says of one purchase; the same numbers stand in its header."""

    SOLD = 1
    REPLAYED = 2
    CARD_REVOKED = -1
    NOT_ELIGIBLE = -2
    KEY_MISMATCH = -3
    NOT_OPEN = -4
    PAUSED = -5
    CLOSED = -6
    RECOVERING = -7
    DRAFT = -8
    LIMIT_EXCEEDED = -9
    SOLD_OUT = -10
    BAD_QUANTITY = -11


class Peek(msgspec.Struct, frozen=True):
    """What a campaign would answer now; ``remaining`` by showing number."""

    now_ms: int
    seq: int
    epoch: int
    state: str
    opens_at_ms: int
    roster_rev: int
    remaining: tuple[int, ...]


class Operation(msgspec.Struct, frozen=True):
    """Who does what and why; ``op`` and ``content`` make a repeat recognisable (INV-4)."""

    op: str
    content: str
    actor: str
    reason: str | None


class OperationReply(msgspec.Struct, frozen=True):
    """How an operator's call went."""

    reply: CallReply
    seq: int = 0
    state: str = ""
    tickets: int = 0
    remaining: int = 0


class Untrusted(Exception):  # noqa: N818 - the state is, not the caller
    """This Redis, or this campaign in it, may not be believed (INV-8)."""

    def __init__(self, reply: CallReply) -> None:
        super().__init__(reply.name.lower())
        self.reply = reply


class Scripts:
    """The scripts on one Redis. ``nonce`` names the deployment whose data this must be."""

    def __init__(self, redis: Redis, nonce: str) -> None:
        self.redis = redis
        self.nonce = nonce

    async def purchase(
        self,
        keys: CampaignKeys,
        process: str,
        call: int,
        mark: tuple[int, int],
        arguments: list[str | int],
    ) -> list[int]:
        """Run ``purchase.lua``: ``arguments`` hold five values a purchase; the reply is raw.

        Packed by hiredis and sent on a connection of redis-py's pool: ``execute_command`` encodes
        argument by argument in Python, and was 5 % of the samples of a profile.
        """
        head = (7, *keys, process, call, *mark, self.nonce)
        try:
            reply: list[int] = await self._send("EVALSHA", PURCHASE.sha, *head, *arguments)
        except NoScriptError:
            reply = await self._send("EVAL", PURCHASE.source, *head, *arguments)
        return reply

    async def _send(self, *command: str | int) -> Any:  # noqa: ANN401 - Redis' reply
        pool = self.redis.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            packed = hiredis.pack_command(command)  # type: ignore[arg-type]
            await connection.send_packed_command(packed, check_health=False)
            return await connection.read_response()
        except asyncio.CancelledError:
            # The reply is still to come; nobody else may be given it.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    async def peek(self, keys: CampaignKeys, mark: tuple[int, int], showings: int) -> Peek:
        """Run ``peek.lua``. Raises Untrusted."""
        reply = await self._run(PEEK, keys, *mark, self.nonce, *range(showings))
        if reply[0] != CallReply.OK:
            raise Untrusted(CallReply(reply[0]))
        return Peek(
            now_ms=reply[1],
            seq=reply[2],
            epoch=reply[3],
            state=reply[4].decode(),
            opens_at_ms=reply[5],
            roster_rev=reply[6],
            remaining=tuple(reply[7:]),
        )

    async def create(
        self, campaign_id: str, operation: Operation, config: bytes, head: list[str | int]
    ) -> OperationReply:
        """Run ``create.lua``; ``head`` is what stands in its header after ``config``."""
        return await self._operate(CREATE, campaign_id, *_who(operation), self.nonce, config, *head)

    async def transition(
        self, campaign_id: str, action: str, operation: Operation, opens_at_ms: int | None = None
    ) -> OperationReply:
        """Run ``transition.lua``."""
        moment = "" if opens_at_ms is None else opens_at_ms
        return await self._operate(
            TRANSITION, campaign_id, action, *_who(operation), self.nonce, moment
        )

    async def add_stock(
        self, campaign_id: str, operation: Operation, showing: int, add: int
    ) -> OperationReply:
        """Run ``add_stock.lua``."""
        return await self._operate(
            ADD_STOCK, campaign_id, *_who(operation), self.nonce, showing, add, STOCK_MAX
        )

    async def tick(self, campaign_id: str) -> OperationReply:
        """Run ``tick.lua``; ``tickets`` of the reply counts the events it recorded."""
        return await self._operate(TICK, campaign_id, self.nonce)

    async def verify(
        self, campaign_id: str, seq: int, chain: str, recovering: str = "", *, whole: bool = False
    ) -> OperationReply:
        """Run ``verify.lua``: mark as verified, or as recovering and why.

        ``whole``: stock and cards were compared too, so that another's mark is lifted as well.
        """
        return await self._operate(
            VERIFY, campaign_id, seq, chain, self.nonce, recovering, int(whole)
        )

    async def sync_cards(
        self,
        campaign_id: str,
        from_rev: int,
        to_rev: int,
        changes: list[tuple[str, bool]],
        *,
        load: str = "",
        begins: bool = False,
    ) -> OperationReply:
        """Run ``sync_cards.lua``; ``changes`` are cards and whether each is active now.

        ``load`` names a first load, which ``begins`` with an empty set.
        """
        flat = [value for card, active in changes for value in ("-" if active else "+", card)]
        return await self._operate(
            SYNC_CARDS, campaign_id, from_rev, to_rev, load, int(begins), *flat
        )

    async def _operate(
        self,
        script: "Script",
        campaign_id: str,
        *args: Any,  # noqa: ANN401 - as redis-py has it
    ) -> OperationReply:
        reply = await self._run(script, campaign_keys(campaign_id), *args)
        values: list[Any] = [
            value.decode() if isinstance(value, bytes) else value for value in reply
        ]
        return OperationReply(CallReply(values[0]), *values[1:])

    async def _run(self, script: "Script", keys: CampaignKeys, *args: Any) -> Any:  # noqa: ANN401
        try:
            return await self._execute("EVALSHA", script.sha, 7, *keys, *args)
        except NoScriptError:
            # A Redis that restarted has lost its scripts. NOSCRIPT means: not executed.
            return await self._execute("EVAL", script.source, 7, *keys, *args)

    async def _execute(self, *command: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        return await self.redis.execute_command(*command)  # type: ignore[no-untyped-call]


class Script(msgspec.Struct, frozen=True):
    """A script's source and the SHA-1 by which Redis knows it."""

    source: str
    sha: str


def _load(name: str) -> Script:
    folder = files(__package__) / "lua"
    shared = (folder / "_ledger.lua").read_text("utf-8")
    source = f"{shared}\n{(folder / f'{name}.lua').read_text('utf-8')}"
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _who(operation: Operation) -> tuple[str, str, str, str]:
    return (
        operation.op,
        operation.content,
        msgspec.json.encode(operation.actor).decode(),
        msgspec.json.encode(operation.reason).decode(),
    )


PURCHASE: Final = _load("purchase")
PEEK: Final = _load("peek")
CREATE: Final = _load("create")
TRANSITION: Final = _load("transition")
ADD_STOCK: Final = _load("add_stock")
TICK: Final = _load("tick")
VERIFY: Final = _load("verify")
SYNC_CARDS: Final = _load("sync_cards")
RECOVER: Final = _load("recover")
