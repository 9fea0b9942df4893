"""The identity of this installation: the one row that the first migration makes."""

from typing import Any, NamedTuple


class Deployment(NamedTuple):
    """``nonce`` names the installation; ticket codes are derived from the secret of 32 bytes."""

    nonce: str
    ticket_secret: bytes


async def read(pool: Any) -> Deployment:  # noqa: ANN401 - an asyncpg pool
    """Read the row. Raises asyncpg's errors where the migrations have not run."""
    row = await pool.fetchrow("SELECT nonce, ticket_secret FROM deployment")
    return Deployment(row["nonce"].hex, bytes(row["ticket_secret"]))
