"""Models with very many workers, and very many models."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace
from statistics import mean, median
from typing import Any

from mesh.dht.announcing import Announcing
from mesh.dht.limits import CATALOGUE_FRESH
from mesh.dht.shards import Depth
from mesh.dht.store import RecordStore
from mesh.identity import Identity, dht_id
from mesh.limits import ANNOUNCE_INTERVAL
from tests.sim.load import Announcer, Lookups, timed_lookup
from tests.sim.population import Member, Population
from tests.sim.world import World


async def popular(world: World, nodes: int, *, workers: int, samples: int, settle: float) -> dict[str, Any]:
    """One model with more workers than a key holds, and a minute of samples of one by clients.

    All start within the first third of `settle` seconds. Where there are more `workers` than `nodes`,
    a node announces for several identities.
    """
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    hands = [Hand(population.members[number % nodes], population) for number in range(workers)]
    running = [asyncio.create_task(hand.announce_for_ever("hot", settle / 3)) for hand in hands]
    await asyncio.sleep(settle)
    stores = StoreRate(population)
    lookups = Lookups()
    met: Counter[bytes] = Counter()

    async def sample(wait: float) -> None:
        await asyncio.sleep(wait)
        found = await timed_lookup(world, population.rng.choice(population.members), "hot", lookups, 1)
        if found:
            met[population.rng.choice(found).record.node_id] += 1

    await asyncio.gather(*(sample(ANNOUNCE_INTERVAL * number / samples) for number in range(samples)))
    rates = stores.per_key()
    fullest = fullest_key(population)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    depths = Counter(hand.depth.depth for hand in hands)
    settling = sorted(hand.depth.since - hand.began for hand in hands)
    await population.stop()
    return {
        "nodes": nodes,
        "workers": workers,
        **lookups.summary(),
        "depths": dict(sorted(depths.items())),
        "at_depth_after_s_p50": round(median(settling), 1),
        "at_depth_after_s_p99": round(settling[int(len(settling) * 0.99)], 1),
        "fullest_key": fullest,
        "stores_per_s_and_key_max": round(max(rates), 2),
        "workers_met": len(met),
        "uniform_p": round(uniform_p([hand.identity.id for hand in hands], met), 4),
    }


async def catalogue(world: World, nodes: int, *, settle: float, readers: int) -> dict[str, Any]:
    """Each node serves a model of its own; what others read in the catalogue after `settle` seconds, and
    when a tenth of them have left.
    """
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    announcer = Announcer(population)
    for number, member in enumerate(population.members):
        announcer.begin(member, f"model-{number}")
    await asyncio.sleep(settle)
    await announcer.end()
    listed, seconds = [], []
    datagrams = world.datagrams
    for member in population.rng.sample(population.members, readers):
        began = world.loop.time()
        listed.append(len(await member.dht.models()))
        seconds.append(world.loop.time() - began)
    requests = (world.datagrams - datagrams) / 2 / readers
    leaving = range(0, nodes, 10)
    for number in leaving:
        member = population.members[number]
        await member.dht.withdraw(member.record(f"model-{number}"))
    await asyncio.sleep(CATALOGUE_FRESH)
    left = await population.members[1].dht.models()
    result = {
        "models": nodes,
        "listed_mean": round(mean(listed), 1),
        "listed_least": min(listed),
        "read_p50_s": round(median(seconds), 2),
        "read_requests": round(requests),
        "left": len(leaving),
        "left_but_listed": sum(f"model-{number}" in left for number in leaving),
        "fullest_key": fullest_key(population),
    }
    await population.stop()
    return result


def fullest_key(population: Population) -> int:
    """The most live records that anybody holds under one key."""
    now = population.world.wall()
    storages: list[RecordStore] = [member.protocol.storage for member in population.members]
    return max(storage.count(key, now) for storage in storages for key in storage._keys)


class Hand:
    """One worker of a node that announces for several."""

    def __init__(self, member: Member, population: Population) -> None:
        parts = member.dht._parts
        environment = parts.protocol.environment
        self.identity = Identity(population.rng.randbytes(32))
        self.announcing = Announcing(
            parts.protocol, parts.lookups, self.identity, population.network, environment
        )
        self.began = 0.0
        self._member = member
        self._rng = population.rng

    @property
    def depth(self) -> Depth:
        """Where it announces."""
        [announced] = self.announcing._own.values()
        return announced.depth

    async def announce(self, model: str) -> None:
        await self.announcing.announce(replace(self._member.record(model), node_id=self.identity.id))

    async def announce_for_ever(self, model: str, spread: float) -> None:
        wait = self._rng.uniform(0, spread)
        self.began = self._member.world.loop.time() + wait
        while True:
            await asyncio.sleep(wait)
            await self.announce(model)
            wait = ANNOUNCE_INTERVAL * self._rng.uniform(0.85, 1.15)


class StoreRate:
    """Counts the stores that each holder gets for each key."""

    def __init__(self, population: Population) -> None:
        self._world = population.world
        self._since = self._world.loop.time()
        self._counts: Counter[tuple[int, bytes]] = Counter()
        for number, member in enumerate(population.members):
            self._watch(number, member)

    def _watch(self, number: int, member: Member) -> None:
        storage = member.protocol.storage
        put = storage.put

        def counted(key: bytes, blob: bytes, source: str | None, now: float) -> Any:
            if source is not None:
                self._counts[number, key] += 1
            return put(key, blob, source, now)

        storage.put = counted

    def per_key(self) -> list[float]:
        seconds = self._world.loop.time() - self._since
        return [count / seconds for count in self._counts.values()]


def uniform_p(workers: list[bytes], met: Counter[bytes]) -> float:
    """The p-value of a chi-square test that every worker is met with the same chance.

    Workers are grouped by the first bits of their DHT id, as shards are, so that each group is
    expected often enough. Wilson and Hilferty's approximation of the distribution.
    """
    samples = met.total()
    bits = max(2, min(8, int(math.log2(samples / 10))))
    group = {worker: dht_id(worker)[0] >> (8 - bits) for worker in workers}
    sizes = Counter(group.values())
    seen = Counter(group[worker] for worker in met.elements())
    expected = {g: samples * size / len(workers) for g, size in sizes.items()}
    chi = sum((seen[g] - e) ** 2 / e for g, e in expected.items())
    freedom = len(expected) - 1
    spread = 2 / (9 * freedom)
    z = ((chi / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))
