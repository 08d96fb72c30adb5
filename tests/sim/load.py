"""What scenarios have in common: workers that announce, lookups that are timed, traffic that is counted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from mesh.limits import ANNOUNCE_INTERVAL
from mesh.records import SignedRecord
from tests.sim.population import Member, Population
from tests.sim.world import World


@dataclass
class Lookups:
    """What happened to some lookups."""

    tried: int = 0
    found: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def success(self) -> float:
        return self.found / self.tried

    def summary(self) -> dict[str, Any]:
        return {
            "lookups": self.tried,
            "success": round(self.success, 4),
            "p50_s": round(median(self.seconds), 3),
            "p99_s": round(sorted(self.seconds)[int(len(self.seconds) * 0.99)], 3),
        }


class Announcer:
    """Announces a member's models as a worker does: every minute with jitter, until it is killed."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.tasks: dict[Member, asyncio.Task[None]] = {}

    def begin(self, member: Member, model: str, *, spread: float = ANNOUNCE_INTERVAL) -> None:
        wait = self.population.rng.uniform(0, spread)
        self.tasks[member] = asyncio.create_task(self._announce(member, model, wait))

    async def _announce(self, member: Member, model: str, wait: float) -> None:
        while True:
            await asyncio.sleep(wait)
            await member.announce(model)
            wait = ANNOUNCE_INTERVAL * self.population.rng.uniform(0.85, 1.15)

    async def end(self, *members: Member) -> None:
        for member in members or list(self.tasks):
            task = self.tasks.pop(member, None)
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()


async def timed_lookup(
    world: World, member: Member, model: str, lookups: Lookups, want: int = 16
) -> list[SignedRecord]:
    """One lookup by a member that does not announce the model itself."""
    start = world.loop.time()
    found = await member.dht.lookup(model, want)
    lookups.tried += 1
    lookups.found += bool(found)
    lookups.seconds.append(world.loop.time() - start)
    return found


class Traffic:
    """Bytes and contacts per node from now on."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.since = population.world.loop.time()
        self.before = {
            m: (m.protocol.transport.sent, m.protocol.transport.received) for m in population.members
        }

    def per_node(self) -> dict[str, Any]:
        members = [m for m in self.population.members if m in self.before]
        seconds = self.population.world.loop.time() - self.since
        ports = [(m.protocol.transport, *self.before[m]) for m in members]
        sent = [(port.sent - before) / seconds for port, before, _ in ports]
        received = [(port.received - before) / seconds for port, _, before in ports]
        return {
            "sent_B_per_s": round(mean(sent)),
            "received_B_per_s": round(mean(received)),
            "sent_B_per_s_max": round(max(sent)),
            "contacts": round(mean(len(m.table) for m in members)),
            "records_held": round(mean(m.protocol.storage.records for m in members), 1),
        }
