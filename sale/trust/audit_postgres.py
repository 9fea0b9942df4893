"""The audit within PostgreSQL: compares campaign, orders and counters with the ledger there.

It reads them in the snapshot in which the audit folds the ledger.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from sale.db import queries
from sale.db.pool import Connection
from sale.domain.campaign import Campaign
from sale.domain.clock import nearest, to_ms
from sale.identity import TOKEN_TTL_S
from sale.ledger.fold import CampaignState
from sale.ledger.kinds import CLOCK, KINDS, MEMBER
from sale.trust.comparison import Findings
from sale.trust.history import QUERY_TIMEOUT_S

ROWS: Final = 2_000


def compare_campaign(position: Mapping[str, Any], books: CampaignState, findings: Findings) -> None:
    """Compare PostgreSQL's campaign with its own ledger."""
    opens_at, closes_at = position["opens_at"], position["closes_at"]
    for invariant, name, held, expected in (
        ("INV-7", "state", position["state"], books.state),
        ("INV-7", "opening", opens_at and to_ms(opens_at), _storable(books.opens_at_ms)),
        ("INV-7", "closing", closes_at and to_ms(closes_at), _storable(books.closes_at_ms)),
        ("INV-2", "card limit", position["card_limit"], books.config.get("card_limit")),
        ("INV-5", "price", position["price_fen"], books.config.get("price_fen")),
        ("INV-5", "epoch", position["epoch"], books.epoch),
    ):
        if held != expected:
            findings.add(invariant, f"PostgreSQL: {name} {held}, the ledger says {expected}")


async def compare_showings(
    connection: Connection, campaign_id: str, books: CampaignState, findings: Findings
) -> None:
    """Compare each showing's stock and counter with the ledger and the orders."""
    for row in await connection.fetch(_SQL["showings"], campaign_id, timeout=QUERY_TIMEOUT_S):
        name, number = f"showing {row['showing_id']}", row["showing_no"]
        stock = books.tickets.get(number, 0)
        if row["really"] > row["stock"]:
            findings.add("INV-1", f"{name}: {row['really']} sold of {row['stock']}")
        if row["stock"] != stock:
            findings.add("INV-1", f"{name}: PostgreSQL has {row['stock']}, the ledger says {stock}")
        if row["live"] != row["really"]:
            findings.add(
                "INV-6",
                f"{name}: counted {row['live']} live, orders add up to {row['really']}",
            )
        sold = stock - books.remaining.get(number, 0)
        if row["really"] != sold:
            findings.add("INV-6", f"{name}: orders add up to {row['really']}, the ledger to {sold}")


async def compare_orders(connection: Connection, campaign: Campaign, findings: Findings) -> None:
    """Compare orders, counters and audit log with the ledger, all in one snapshot."""
    campaign_id = campaign.id

    async def each(invariant: str, query: str, says: str, *args: object) -> None:
        rows = await connection.fetch(_SQL[query], campaign_id, *args, timeout=QUERY_TIMEOUT_S)
        for row in rows:
            findings.add(invariant, says.format(**row))

    limit = campaign.card_limit
    miscounted = await connection.fetch(
        _SQL["members_miscounted"], campaign_id, limit, timeout=QUERY_TIMEOUT_S
    )
    for row in miscounted:
        findings.add(
            "INV-2" if row["really"] > limit else "INV-6",
            f"member {row['member_no']}: orders add up to {row['really']}, "
            f"counted {row['live']}, limit {limit}",
        )
    await each("INV-3", "sales_without_order", "event {seq}: sold, and no order like it")
    await each("INV-3", "orders_without_sale", "order {seq}: no sale in the ledger")
    await each("INV-5", "conflicts", "event {seq}: refused by PostgreSQL: {why}")
    await each("INV-3", "untold", "event {seq}: {why}")
    await each(
        "INV-11", "money_not_presented", "payment {payment_no}: taken, and not in the ledger"
    )
    await each(
        "INV-11",
        "money_unaccounted",
        "payment {payment_no}: {paid_fen} fen came in, {counted} are tickets or go back",
    )
    await each("INV-11", "paid_without_money", "order {seq}: paid, and no money came in for it")
    await each("INV-9", "sold_to_revoked", "event {seq}: sold to a member who was not active")
    await each(
        "INV-10",
        "steps_unaccounted",
        "event {seq} ({kind}): not in the audit log, or no why",
        [name for name, kind in KINDS.items() if kind.audited],
        [CLOCK, MEMBER],
        [name for name, kind in KINDS.items() if kind.needs_reason],
    )
    if "*" not in campaign.unions:
        await each(
            "INV-9",
            "sold_to_others",
            "event {seq}: sold to a member of a union that may not buy",
            list(campaign.unions),
            timedelta(seconds=TOKEN_TTL_S),
        )


async def compare_changes(
    connection: Connection, campaign_id: str, books: CampaignState, findings: Findings
) -> None:
    """Compare the orders that have changed since they were made, and their tickets."""
    expected = {
        (member_no, order.seq): order
        for member_no, orders in books.members.items()
        for order in orders
        if order.changed
    }
    async for row in connection.cursor(_SQL["changed_orders"], campaign_id, prefetch=ROWS):
        order = expected.pop((row["member_no"], row["seq"]), None)
        if order is None or tuple(row)[2:] != (
            order.state, order.live, order.changed, order.paid, order.returned, order.given_back,
        ):  # fmt: skip
            findings.add("INV-6", f"order {row['seq']}: PostgreSQL has another state of it")
    for _, seq in expected:
        findings.add("INV-6", f"order {seq}: PostgreSQL lacks a change of it")


def _storable(moment_ms: int | None) -> int | None:
    """Give the moment as PostgreSQL stores it."""
    return None if moment_ms is None else nearest(moment_ms)


_SQL: Final = queries.load("audit")
