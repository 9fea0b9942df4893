"""The benchmark's figures: what one run measured."""

import statistics
from typing import Final

import msgspec

CLEAN: Final = "clean"
BUSY: Final = 0.9


class Case(msgspec.Struct, frozen=True):
    """One kind of request. ``*_us``: CPU microseconds a request; ``*_busy``: share of a core;
    ``ratio``: rate as a share of the constant peer's just before and after; ``cpu_ratio``: the same
    by CPU time, which what others run hardly touches.
    """

    name: str
    rate: float
    latency_ms: tuple[float, float, float]
    api_us: float
    redis_us: float
    server_busy: float
    client_busy: float
    books_busy: float
    ratio: float = 1.0
    cpu_ratio: float = 1.0
    requests: int = 0

    @property
    def server_us(self) -> float:
        """CPU microseconds a request, API and Redis."""
        return self.api_us + self.redis_us

    def beside(self, *constants: "Case") -> "Case":
        """Give this case with its shares of the constant peer, as measured close to it."""
        rate = statistics.fmean(each.rate for each in constants)
        server_us = statistics.fmean(each.server_us for each in constants)
        return msgspec.structs.replace(
            self, ratio=self.rate / rate, cpu_ratio=server_us / self.server_us
        )


class Growth(msgspec.Struct, frozen=True):
    """What a purchase costs when so many were sold in the campaign before it."""

    sold: int
    rate: float
    api_us: float
    redis_us: float


class Result(msgspec.Struct, frozen=True):
    """Everything that one run measured."""

    client: str
    connections: int
    cases: list[Case]
    growth: list[Growth]
    redis_bytes_an_order: float
    stream_entries_left: int
    writer_rows_a_second: float
    audit: str

    @property
    def disturbed(self) -> bool:
        """Whether something else used the server's core, so that the rates mean little."""
        return min(case.server_busy for case in self.cases) < BUSY
