"""Calls the Lua scripts and parses their replies. Each script is a file of its own in ``lua/``.

``_ledger.lua`` is prepended to every script. It reads the head, checks that this Redis can be
trusted, and appends to the chain, so that all scripts do this in the same way.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from functools import partial
from importlib.resources import files
from typing import Any, Final

import msgspec
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from sale.domain.campaign import STOCK_MAX
from sale.domain.order import OrderPlace
from sale.stock.keys import AWAITED, CampaignKeys, campaign_keys
from sale.stock.mark import NOT_CHECKED, Mark
from sale.stock.script_connection import ScriptConnection, pack


class CallReply(IntEnum):
    """First integer of every reply; ``_ledger.lua`` has the same numbers."""

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
    UNCHECKED = -11
    DUE = -12
    NOT_FOUND = -13


class Decision(IntEnum):
    """Decisions of ``purchase.lua`` on one purchase; its header has the same numbers."""

    SOLD = 1
    REPLAYED = 2
    REPLAYED_CHANGED = 3
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
    BEHIND = -12
    TOO_MANY_ORDERS = -13


class Peek(msgspec.Struct, frozen=True):
    """The state by which a purchase would be decided now.

    ``remaining`` and ``held`` (tickets in holds) by showing number; ``hold_ends_ms`` is when the
    next hold ends (0: there is none), ``due`` whether that has come.
    """

    now_ms: int
    seq: int
    chain: str
    epoch: int
    state: str
    opens_at_ms: int
    roster_rev: int
    config_seq: int
    hold_ends_ms: int
    due: bool
    remaining: tuple[int, ...]
    held: tuple[int, ...]


class Operation(msgspec.Struct, frozen=True):
    """A step's actor and reason; ``op`` and ``content`` identify its repeats (INV-4)."""

    op: str
    content: str
    actor: str
    reason: str | None


class OperationReply(msgspec.Struct, frozen=True):
    """The outcome of an operator's call; if it was done, ``chain`` is the hash after ``seq``."""

    reply: CallReply
    seq: int = 0
    state: str = ""
    chain: str = ""
    tickets: int = 0
    remaining: int = 0


class OrderReply(msgspec.Struct, frozen=True):
    """A script's reply about one order: its code, and what follows as the script's header says."""

    reply: CallReply
    values: tuple[Any, ...]


class Expired(msgspec.Struct, frozen=True):
    """The result of one ``expire.lua``; ``next_ends_ms`` is 0 where there is no other hold.

    ``held`` is how many orders are still held.
    """

    seq: int
    count: int
    next_ends_ms: int
    now_ms: int
    grace_until_ms: int
    held: int


class Repeat(msgspec.Struct, frozen=True):
    """A step that was done before: its event, the state now, and the event that made the campaign.

    A campaign that was made after the step is another one under the same ID.
    """

    seq: int
    state: str
    made: int

    @property
    def gone(self) -> bool:
        """Whether the draft that the step changed was deleted since."""
        return self.state == "deleted" or self.seq < self.made


class Untrusted(Exception):  # noqa: N818 - the name states the condition
    """This Redis, or this campaign in it, cannot be trusted (INV-8)."""

    def __init__(self, reply: CallReply) -> None:
        super().__init__(reply.name.lower())
        self.reply = reply


_ACKNOWLEDGED: Final = frozenset({CallReply.OK, CallReply.REPLAYED})


class NotReplicated(RedisError):  # noqa: N818 - the name states the condition
    """The call was executed, but too few replicas have it, so it may be lost (INV-3)."""


class Scripts:
    """The scripts on one Redis. ``nonce`` identifies the deployment whose data this must be.

    ``replicas``: how many must have a purchase or an operator's step before it is answered, and up
    to how many ms to wait for them; otherwise these calls raise NotReplicated. A repeat with the
    same key gives the same answer, and waits again.
    """

    def __init__(
        self, redis: Redis, nonce: str, *, replicas: tuple[int, int] | None = None
    ) -> None:
        self.redis = redis
        self.nonce = nonce
        self._replicas = replicas
        self._wait: tuple[str | int, ...] = () if replicas is None else ("WAIT", *replicas)
        self._packed_wait = b""
        if replicas is not None:
            self._packed_wait = pack(*self._wait)

    async def purchase(
        self,
        keys: CampaignKeys,
        process: str,
        call: int,
        mark: Mark,
        behind_max: tuple[int, int],
        packed: bytes,
        connection: ScriptConnection | None = None,
    ) -> list[Any]:
        """Run ``purchase.lua`` for what ``pack_batch`` packed; the reply is raw.

        ``behind_max`` is how far PostgreSQL may be behind, in events and in ms. The call goes on
        ``connection`` if one is given and no replica is waited for.
        """
        reply: list[Any] = await _by_hash(
            partial(self._send, connection), PURCHASE, keys, process, call, mark.incarnation,
            mark.seq, self.nonce, *behind_max, packed,
        )  # fmt: skip
        return reply

    async def _send(
        self, script_connection: ScriptConnection | None, *command: str | int | bytes
    ) -> Any:  # noqa: ANN401
        packed = pack(*command)
        if script_connection is not None and self._replicas is None:
            return await script_connection.call(packed)
        pool = self.redis.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            if self._replicas is None:
                await connection.send_packed_command(packed, check_health=False)
                return await connection.read_response()
            await connection.send_packed_command(packed + self._packed_wait, check_health=False)
            reply, acknowledged = await _read(connection), await _read(connection)
            return self._replicated(reply, acknowledged)
        except asyncio.CancelledError:
            # The reply is still to come, and must not be read as that of another call.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    async def peek(
        self,
        keys: CampaignKeys,
        mark: Mark,
        showings: int,
        connection: ScriptConnection | None = None,
    ) -> Peek:
        """Run ``peek.lua``, on ``connection`` if one is given. Raises Untrusted."""
        arguments = (mark.incarnation, mark.seq, self.nonce, *range(showings))
        execute = self._execute if connection is None else partial(_on, connection)
        reply = await _by_hash(execute, PEEK, keys, *arguments)
        if reply[0] != CallReply.OK:
            raise Untrusted(CallReply(reply[0]))
        return Peek(
            now_ms=reply[1],
            seq=reply[2],
            chain=reply[3].decode(),
            epoch=reply[4],
            state=reply[5].decode(),
            opens_at_ms=reply[6],
            roster_rev=reply[7],
            config_seq=reply[8],
            hold_ends_ms=reply[9],
            due=bool(reply[10]),
            remaining=tuple(reply[11 : 11 + showings]),
            held=tuple(reply[11 + showings :]),
        )

    async def create(
        self, campaign_id: str, operation: Operation, campaign: bytes, *, schedule: bool
    ) -> OperationReply:
        """Run ``create.lua`` for what ``head.packed`` packed; as a draft, or scheduled at once."""
        return await self._operate(
            CREATE, campaign_id, *_who(operation), self.nonce, campaign, int(schedule)
        )

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

    async def expire(self, campaign_id: str) -> Expired:
        """Run ``expire.lua`` once: ends up to 256 holds that are due. Raises Untrusted."""
        reply = await self._run(EXPIRE, campaign_keys(campaign_id), self.nonce)
        if reply[0] != CallReply.OK:
            raise Untrusted(CallReply(reply[0]))
        return Expired(*reply[1:])

    async def cancel(
        self,
        place: OrderPlace,
        member_no: int,
        tickets: Sequence[int],
        actor: str,
        reason: str | None,
        *,
        mark: Mark | None,
        limited: bool,
    ) -> OrderReply:
        """Run ``cancel.lua``; no ``tickets``: all that can be given back.

        ``mark``: that of the API process which answers, if it is one. ``limited``: only until the
        campaign's ``cancel_until``.
        """
        return await self._change(
            CANCEL, place.campaign_id, *(mark or NOT_CHECKED)[:2], self.nonce, member_no, place.seq,
            place.low_bits, ",".join(map(str, tickets)), int(limited), _json(actor), _json(reason),
        )  # fmt: skip

    async def pay(self, place: OrderPlace, member_no: int, amount_fen: int) -> OrderReply:
        """Run ``pay.lua`` for money that came in."""
        return await self._change(
            PAY, place.campaign_id, self.nonce, member_no, place.seq, place.low_bits, amount_fen
        )

    async def _change(self, script: "Script", campaign_id: str, *args: Any) -> OrderReply:  # noqa: ANN401
        code, *rest = await self._run(script, campaign_keys(campaign_id), *args)
        return OrderReply(CallReply(code), tuple(rest))

    async def repeated(
        self, campaign_id: str, operation: Operation
    ) -> tuple[CallReply, Repeat | None]:
        """Run ``repeated.lua``; gives the repeat if the reply is REPLAYED."""
        reply = await self._run(
            REPEATED, campaign_keys(campaign_id), operation.op, operation.content, self.nonce
        )
        code = CallReply(reply[0])
        if code is not CallReply.REPLAYED:
            return code, None
        return code, Repeat(reply[1], reply[2].decode(), reply[3])

    async def tick(self, campaign_id: str) -> OperationReply:
        """Run ``tick.lua``; ``tickets`` of the reply counts the events it recorded."""
        return await self._operate(TICK, campaign_id, self.nonce)

    async def verify(
        self, campaign_id: str, seq: int, chain: str, recovering: str = "", *, whole: bool = False
    ) -> OperationReply:
        """Run ``verify.lua``: mark as verified, or as recovering and why.

        ``whole``: stock and members were compared too, so the mark of a recovery is removed too.
        """
        return await self._operate(
            VERIFY, campaign_id, seq, chain, self.nonce, recovering, int(whole)
        )

    async def set_applied(
        self, campaign_id: str, applied: int, behind_since_ms: int | None
    ) -> OperationReply:
        """Run ``applied.lua``: PostgreSQL's last event, and since when it lacks the next."""
        since = "" if behind_since_ms is None else behind_since_ms
        return await self._operate(APPLIED, campaign_id, applied, since)

    async def sync_revoked(
        self,
        campaign_id: str,
        from_rev: int,
        to_rev: int,
        changes: list[tuple[int, bool]],
        *,
        load: str = "",
        begins: bool = False,
    ) -> OperationReply:
        """Run ``sync_revoked.lua``; ``changes`` are members and whether each is active now.

        ``load`` names a first load, which ``begins`` with an empty set.
        """
        flat = [value for no, active in changes for value in ("-" if active else "+", no)]
        return await self._operate(
            SYNC_REVOKED, campaign_id, from_rev, to_rev, load, int(begins), *flat
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
        execute = self._execute_awaited if self._wait and script.awaited else self._execute
        return await _by_hash(execute, script, keys, *args)

    async def _execute(self, *command: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        return await self.redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def _execute_awaited(self, *command: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.execute_command(*command)
            # WAIT covers this connection's writes, and the repeat of a step writes nothing.
            pipe.set(AWAITED, 1)
            pipe.execute_command(*self._wait)
            reply, _, acknowledged = await pipe.execute(raise_on_error=False)
        return self._replicated(reply, acknowledged)

    def _replicated(self, reply: Any, acknowledged: Any) -> Any:  # noqa: ANN401 - Redis' replies
        """Give the reply if enough replicas have it. Raises it if it is an error."""
        if isinstance(reply, Exception):
            raise reply
        if reply[0] not in _ACKNOWLEDGED:
            return reply  # a refusal has changed nothing, so no replica needs it
        wanted, timeout_ms = self._replicas or (0, 0)
        if isinstance(acknowledged, Exception):
            raise NotReplicated(f"WAIT: {acknowledged}")
        if acknowledged < wanted:
            raise NotReplicated(f"{acknowledged} of {wanted} replicas had it after {timeout_ms} ms")
        return reply


async def _by_hash(
    execute: Callable[..., Awaitable[Any]],
    script: "Script",
    keys: CampaignKeys,
    *args: Any,  # noqa: ANN401 - as redis-py has it
) -> Any:  # noqa: ANN401
    try:
        return await execute("EVALSHA", script.sha, len(keys), *keys, *args)
    except NoScriptError:
        # A Redis that restarted has lost its scripts. NOSCRIPT means: not executed.
        return await execute("EVAL", script.source, len(keys), *keys, *args)


async def _on(connection: ScriptConnection, *command: str | int) -> Any:  # noqa: ANN401
    return await connection.call(pack(*command))


async def _read(connection: AbstractConnection) -> Any:  # noqa: ANN401 - Redis' reply
    """Read one reply and return an error reply too, so that the next reply is read as well."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


class Script(msgspec.Struct, frozen=True):
    """A script's source and the SHA-1 by which Redis knows it.

    ``awaited``: its effect is acknowledged, so the call waits for replicas if the level demands it.
    """

    source: str
    sha: str
    awaited: bool


def _load(name: str, *, awaited: bool = False, orders: bool = False) -> Script:
    """Load a script behind what it shares with others; ``orders``: with the layout of orders."""
    folder = files(__package__) / "lua"
    parts = ["_ledger", *(["_orders"] if orders else []), name]
    source = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in parts)
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return Script(source, sha, awaited)


def _who(operation: Operation) -> tuple[str, str, str, str]:
    return (
        operation.op,
        operation.content,
        _json(operation.actor),
        _json(operation.reason),
    )


def _json(value: str | None) -> str:
    return msgspec.json.encode(value).decode()


PURCHASE: Final = _load("purchase", awaited=True, orders=True)
PEEK: Final = _load("peek", orders=True)
EXPIRE: Final = _load("expire", orders=True)
CANCEL: Final = _load("cancel", awaited=True, orders=True)
PAY: Final = _load("pay", awaited=True, orders=True)
CREATE: Final = _load("create", awaited=True)
TRANSITION: Final = _load("transition", awaited=True)
ADD_STOCK: Final = _load("add_stock", awaited=True)
REPEATED: Final = _load("repeated", awaited=True)
TICK: Final = _load("tick")
VERIFY: Final = _load("verify")
APPLIED: Final = _load("applied")
SYNC_REVOKED: Final = _load("sync_revoked")
RECOVER: Final = _load("recover")
