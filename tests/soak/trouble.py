"""Applies the faults of a schedule to a rig, and ends all of them afterwards."""

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

from soak.schedule import LINKS, NAMES, STORES, Fault
from soak.timeline import Timeline

FAULT_S = 40.0
HEAL_S = 60.0
HEAL_TRIES = 2


class Trouble:
    """The faults of one seed. ``problems`` lists faults that could not be applied."""

    def __init__(self, rig: Any, timeline: Timeline, folder: Path) -> None:
        self.rig = rig
        self.timeline = timeline
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.problems: list[str] = []
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._whole = asyncio.Lock()

    async def do(self, fault: Fault) -> None:
        """Apply one fault."""
        self.timeline.note(str(fault))
        try:
            async with asyncio.timeout(FAULT_S):
                await self._do(fault)
        except Exception as error:  # noqa: BLE001 - whatever it was, the seed is judged
            self._problem(f"{fault}: {type(error).__name__}: {error}")

    async def _do(self, fault: Fault) -> None:
        match fault.what:
            case "kill":
                for name in fault.target:
                    self._kill(name)
            case "start":
                await self._start_all(fault.target)
            case "restart":
                await self._replace(fault.target[0])
            case "stop" | "cont":
                if self.rig.alive(fault.target[0]):
                    getattr(self.rig, fault.what)(fault.target[0])
            case "cut" | "heal" | "delay" | "halve" | "hold" | "swallow":
                self._disturb(fault)
            case _:
                async with self._whole:
                    await self._lose(fault)

    def _disturb(self, fault: Fault) -> None:
        """Apply a fault to a link."""
        proxy = self.rig.link(*fault.target[:2])
        match fault.what:
            case "delay":
                proxy.delay(fault.amount)
            case "halve":
                proxy.halve(int(fault.amount), fault.target[2])
            case "hold" | "swallow":
                getattr(proxy, fault.what)(fault.target[2])
            case _:
                getattr(proxy, fault.what)()

    async def _replace(self, name: str) -> None:
        """Stop a process with SIGTERM, and start it again."""
        async with self._locks[name]:
            if self.rig.alive(name):
                took_s = await self.rig.term(name)
                self.timeline.note(f"{name} ended after {took_s:.2f} s")
            await self._start_if_dead(name)

    async def _lose(self, fault: Fault) -> None:
        """Lose files, which no durability level promises to survive."""
        redis_copy, postgres_copy = self.folder / "redis", self.folder / "postgres"
        match fault.what:
            case "copy redis":
                await self.rig.copy_redis(redis_copy)
            case "copy postgres":
                async with self._locks["postgres"]:
                    await self.rig.copy_postgres(postgres_copy)
            case "torn redis":
                await self._with_redis_dead(lambda: self.rig.tear_redis(int(fault.amount)))
            case "old redis" if redis_copy.exists():
                await self._with_redis_dead(lambda: self.rig.restore_redis(redis_copy))
            case "empty redis":
                await self._with_redis_dead(lambda: self.rig.restore_redis(None))
            case "old postgres" if postgres_copy.exists():
                async with self._locks["postgres"]:
                    await self.rig.restore_postgres(postgres_copy)

    async def _with_redis_dead(self, work: Any) -> None:
        async with self._locks["redis"]:
            self._kill("redis")
            await work()
            await self._start_if_dead("redis")

    async def heal(self) -> None:
        """End every fault: heal links, continue and start all processes."""
        for link in LINKS:
            self.rig.link(*link).heal()
        for name in NAMES:
            if self.rig.alive(name):
                self.rig.cont(name)
        try:
            async with asyncio.timeout(HEAL_S):
                for _ in range(HEAL_TRIES):
                    await self._start_all(NAMES)
        except TimeoutError:
            self.timeline.note("healing takes too long")
        for name in NAMES:
            if not self.rig.alive(name):
                self._problem(f"{name} does not start: {self.rig.log(name)[-500:]}")
        self.timeline.note("all faults are over")

    async def _start_all(self, names: Any) -> None:
        """Start dead processes, the stores first."""
        for group in (
            [name for name in names if name in STORES],
            [name for name in names if name not in STORES],
        ):
            await asyncio.gather(*(self._start(name) for name in group))

    async def _start(self, name: str) -> None:
        async with self._locks[name]:
            await self._start_if_dead(name)

    async def _start_if_dead(self, name: str) -> None:
        if self.rig.alive(name):
            return
        try:
            await self.rig.start(name)
        except Exception as error:  # noqa: BLE001 - a store may be down, a kill may meet it
            self.timeline.note(f"{name} did not start: {type(error).__name__}: {error}"[:300])
        else:
            self.timeline.note(f"{name} is up")

    def _kill(self, name: str) -> None:
        if self.rig.alive(name):
            self.rig.kill(name)

    def _problem(self, what: str) -> None:
        self.problems.append(what)
        self.timeline.note(f"PROBLEM {what}"[:500])
