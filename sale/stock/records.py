"""A card's value in the hash ``cards``: one record of 31 bytes an order, see ``purchase.lua``."""

from collections.abc import Iterable
from typing import Final

from sale.events import SaleRecord

RECORD_BYTES: Final = 31


def parse_records(value: bytes) -> list[SaleRecord]:
    """Read a card's orders, oldest first. Raises ValueError where the value is not whole."""
    if len(value) % RECORD_BYTES:
        raise ValueError(f"a card's value of {len(value)} bytes is not whole records")
    return [
        SaleRecord(
            seq=int.from_bytes(value[at + 16 : at + 21], "big"),
            at_ms=int.from_bytes(value[at + 21 : at + 27], "big"),
            showing=int.from_bytes(value[at + 27 : at + 29], "big"),
            quantity=int.from_bytes(value[at + 29 : at + 31], "big"),
            key_hash=value[at : at + 16].decode("ascii"),
        )
        for at in range(0, len(value), RECORD_BYTES)
    ]


def pack_records(records: Iterable[SaleRecord]) -> bytes:
    """Write a card's orders as ``purchase.lua`` does. The reverse of ``parse_records``."""
    return b"".join(
        record.key_hash.encode("ascii")
        + record.seq.to_bytes(5, "big")
        + record.at_ms.to_bytes(6, "big")
        + record.showing.to_bytes(2, "big")
        + record.quantity.to_bytes(2, "big")
        for record in records
    )
