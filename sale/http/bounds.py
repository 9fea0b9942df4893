"""Bounds of a connection: bytes and seconds. Both paths keep them."""

from typing import Final

BODY_MAX: Final = 16 * 1024
BODY_WITHIN_S: Final = 10.0
HEAD_WITHIN_S: Final = 10.0
HELD_MAX: Final = 64 * 1024
"""Bytes that wait on a connection behind a request that is under way."""

UNENDED_MAX: Final = 128 * 1024
"""Bytes of a head that does not end. aiohttp bounds its lines (8,190 bytes), not their number; what
it takes of a head in one read, it takes in many."""

HELD_FREELY: Final = 8 * 1024
"""More than a purchase of ours has: a token, a key and a short body are under 1 KiB."""

HELD_BY_ALL_MAX: Final = 64 * 1024 * 1024
"""Bytes that wait on all connections of a process, beyond which no connection is read on that holds
more than ``HELD_FREELY``. A thousand that hold their most are this many, and 50,000 that hold a
purchase or two are fewer; 50,000 that hold their most would be 3 GB. The last read of each comes on
top: up to 256 KiB, from a client that sends more than it waits for answers to."""

KEEPALIVE_S: Final = 75.0
UNREAD_WITHIN_S: Final = 30.0
"""How long a client may leave unread what has been written to it."""

ENDED_WITHIN_S: Final = 75.0
"""How long a client that sends no more may wait for its answers, and take to read them."""
