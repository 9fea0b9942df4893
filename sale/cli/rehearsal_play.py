"""How `sale rehearse` plays: the copy, the load generator beside it, the proof, and the removal."""

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from sale.cli.rehearsal_report import Outcome
from sale.cli.runtime import CommandContext
from sale.cli.terminal import note

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loadtest.rehearsal import Record
    from sale.bootstrap import Stores
    from sale.operators.rehearsal import Rehearsals

AFTER_S: Final = 900.0
"""Longest that the generator may take beyond the rush: last answers, books, audit, report."""
ANSWER_S: Final = 5.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a rehearsal."""

    of: str
    cards: int
    rate: float
    seconds: float
    arrivals: str
    target: str
    out: Path | None
    keep: bool
    beside_real_sales: bool
    opens_in_s: float
    processes: int
    fail_if: tuple[str, ...] = ()


async def play(context: CommandContext, plan: Plan, reason: str) -> Outcome:
    """Play the rehearsal; whatever comes, it is closed, and removed unless it is to be kept."""
    from sale.operators.campaigns import Actor

    actor = Actor(context.actor)
    key = context.signing_key()
    with tempfile.TemporaryDirectory(prefix="sale-rehearsal-") as folder:
        tokens = Path(folder) / "tokens.jsonl"
        await asyncio.to_thread(_write_tokens, tokens, key, plan)
        async with opened(context) as (stores, desk), desk.alone():
            before = await desk.real(plan.of)
            original = await desk.original(plan.of)
            made = await desk.begin(
                original, actor, reason, opens_in_s=plan.opens_in_s, lasts_s=plan.seconds
            )
            identifier = made.campaign.id
            out = plan.out or context.settings.data_dir / "rehearsals" / identifier
            try:
                note(f"{identifier} opens in {plan.opens_in_s:.0f} s; Ctrl-C ends and removes it")
                await ask(plan.target, f"/api/v1/campaigns/{identifier}")
                record = await _rush(context, plan, identifier, tokens, out)
                await desk.close(identifier, actor)
                outcome = await _proven(
                    context, stores, desk, identifier, plan, out, record, before
                )
            except BaseException:
                await _tidy(desk, identifier, actor, keep=plan.keep)
                note(f"{identifier} has ended early" + ", and is removed" * (not plan.keep))
                raise
            purged = await _tidy(desk, identifier, actor, keep=plan.keep)
    return msgspec.structs.replace(outcome, purged=purged)


@contextlib.asynccontextmanager
async def opened(context: CommandContext) -> "AsyncIterator[tuple[Stores, Rehearsals]]":
    """Open the stores, and the desk of rehearsals on them."""
    from sale.bootstrap import open_stores
    from sale.operators.rehearsal import Rehearsals

    async with open_stores(context.settings, pool_size=5) as stores:
        yield stores, Rehearsals(stores.redis, stores.scripts, stores.pool)


async def ask(target: str, path: str) -> None:
    """See that this deployment answers there. Raises click.ClickException."""
    import aiohttp

    url = f"{_url(target)}{path}"
    try:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            if answer.status == 200:
                return
            says = f"{url} answers {answer.status}: does another deployment listen there?"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        says = f"{url} does not answer ({str(error) or type(error).__name__}): say --target"
    raise click.ClickException(says)


def _write_tokens(file: Path, key: Any, plan: Plan) -> None:  # noqa: ANN401 - the signing key
    from sale.operators.rehearsal import tokens

    ttl_s = int(plan.opens_in_s + plan.seconds + AFTER_S)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        for row in tokens(key, plan.cards, ttl_s=ttl_s):
            stream.write(msgspec.json.encode(row) + b"\n")


async def _rush(
    context: CommandContext, plan: Plan, identifier: str, tokens: Path, out: Path
) -> "Record":
    """Play the release to its end. Raises click.ClickException."""
    from loadtest.rehearsal import ReleaseError, play_release, release

    run = release(
        context.settings,
        target=plan.target.removeprefix("http://").rstrip("/"),
        campaign=identifier,
        tokens=str(tokens),
        rate=plan.rate,
        seconds=plan.seconds,
        arrivals=plan.arrivals,
        processes=plan.processes,
        name=f"rehearsal of {plan.of}",
        fail_if=plan.fail_if,
    )
    try:
        async with asyncio.timeout(plan.opens_in_s + plan.seconds + AFTER_S):
            return await play_release(run, out, note)
    except TimeoutError:
        why = f"was not done {AFTER_S:.0f} s after the rush"
    except ReleaseError as error:
        why = f"failed: {error}"
    raise click.ClickException(f"the load generator {why}")


async def _proven(
    context: CommandContext,
    stores: "Stores",
    desk: "Rehearsals",
    identifier: str,
    plan: Plan,
    out: Path,
    record: "Record",
    before: Any,  # noqa: ANN401 - Real
) -> Outcome:
    from sale.trust.audit import audit

    settings = context.settings
    reports = [
        await audit(
            stores.redis,
            stores.pool,
            each,
            durability=settings.durability,
            replicas_min=settings.replicas_min,
        )
        for each in (identifier, plan.of)
    ]
    return Outcome.of_run(
        identifier,
        plan.of,
        out,
        record,
        audits=[each for report in reports for each in report.campaigns],
        untouched=await desk.real(plan.of) == before,
    )


async def _tidy(desk: "Rehearsals", identifier: str, actor: Any, *, keep: bool) -> bool:  # noqa: ANN401
    """Close it, and remove it unless it is to be kept; whether it is gone."""
    from sale.operators.rehearsal import REASON_OVER

    again = f"sale rehearse --purge {identifier}"
    try:
        if keep:
            await desk.close(identifier, actor)
            note(f"its data stays until {again}")
            return False
        await desk.purge(identifier, actor, REASON_OVER)
    except Exception as error:
        raise click.ClickException(
            f"{identifier} could not be removed yet ({error}); remove it later: {again}"
        ) from error
    return True


def _url(target: str) -> str:
    return (target if "://" in target else f"http://{target}").rstrip("/")
