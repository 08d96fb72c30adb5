"""What a mesh must survive, at any size: each scenario returns what it measured."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Awaitable, Callable
from statistics import mean, median
from typing import Any

from mesh.dht.crawl import Crawl
from mesh.identity import dht_id
from mesh.limits import ANNOUNCE_INTERVAL
from tests.sim.load import Announcer, Lookups, Traffic, timed_lookup
from tests.sim.population import OPEN, Member, Population
from tests.sim.world import World


async def churn(
    world: World, nodes: int, *, minutes: float, life: float = 1800.0, announcing: float = 1.0
) -> dict[str, Any]:
    """Nodes live for `life` seconds on average and are replaced; a share of them announces a model.

    There is one model for every ten nodes that announce. Traffic is measured for a minute without lookups.
    """
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    announcer = Announcer(population)
    workers = population.members[: round(nodes * announcing)]
    serves = {member: f"model-{number // 10}" for number, member in enumerate(workers)}
    for member, model in serves.items():
        announcer.begin(member, model)
    await asyncio.sleep(1.5 * ANNOUNCE_INTERVAL)
    traffic = Traffic(population)
    per_node: dict[str, Any] = {}
    lookups = Lookups()
    quiet = world.loop.time() + 60
    end = quiet + 60 * minutes
    next_death = world.loop.time()
    while world.loop.time() < end:
        while next_death < world.loop.time():
            next_death += population.rng.expovariate(nodes / life)
            victim = population.rng.choice(population.members)
            await announcer.end(victim)
            await population.kill(victim)
            [born] = await population.grow(1)
            model = serves.pop(victim, "")
            if model:
                serves[born] = model
                announcer.begin(born, model, spread=1.0)
        if world.loop.time() < quiet:
            await asyncio.sleep(1)
            continue
        per_node = per_node or traffic.per_node()
        models = list(serves.values())
        pairs = [(population.rng.choice(population.members), population.rng.choice(models)) for _ in range(5)]
        await asyncio.gather(
            *(
                timed_lookup(world, asker, model, lookups)
                for asker, model in pairs
                if serves.get(asker) != model
            )
        )
        await asyncio.sleep(0.1)
    await announcer.end()
    await population.stop()
    return {"nodes": nodes, "announcing": announcing, **lookups.summary(), **per_node}


async def routing(world: World, nodes: int, *, lookups: int = 200) -> dict[str, Any]:
    """Hops and requests of a walk to the nearest nodes, and whether it finds them."""
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    ids = [dht_id(m.identity.id) for m in population.members]
    hops, requests, exact, seconds = [], [], [], []

    async def walk() -> None:
        target = population.rng.randbytes(20)
        member = population.rng.choice(population.members)
        start = [(c.id, c.address) for c in member.table.closest(target)]
        crawl = Crawl(member.protocol, target, start)
        began = world.loop.time()
        answers = await crawl.run()
        seconds.append(world.loop.time() - began)
        number = int.from_bytes(target)
        own = dht_id(member.identity.id)
        nearest = heapq.nsmallest(20, (i for i in ids if i != own), key=lambda i: int.from_bytes(i) ^ number)
        exact.append(len(set(nearest) & {a.contact_id for a in answers}) / len(nearest))
        hops.append(crawl.hops)
        requests.append(crawl.requests)

    for _ in range(lookups // 20):
        await asyncio.gather(*(walk() for _ in range(20)))
    await population.stop()
    return {
        "nodes": nodes,
        "hops": round(mean(hops), 1),
        "requests": round(mean(requests), 1),
        "nearest_20_found": round(mean(exact), 4),
        "p50_s": round(median(seconds), 3),
        "p50_round_trips": round(median(seconds) / (sum(world.latency)), 1),
    }


async def halves(world: World, nodes: int, *, patience: float = 120.0) -> dict[str, Any]:
    """Two meshes grow apart; one node of one is told of one node of the other."""
    population = Population(world)
    first = await population.grow(1) + await population.grow(nodes // 2 - 1)
    left = list(population.members)
    population.members = []
    second = await population.grow(1) + await population.grow(nodes // 2 - 1)
    right = list(population.members)
    population.members = left + right
    await asyncio.sleep(30)
    assert not any(m.address in {o.address for o in right} for f in first for m in f.table)
    second[0].dht.join([first[-1].address])
    met = world.loop.time()
    announcer = Announcer(population)
    announcer.begin(first[0], "left")
    announcer.begin(second[1], "right")
    merged = await until(
        world,
        patience,
        lambda: all_find(population, first[1:], "right", 10),
        lambda: all_find(population, second[2:], "left", 10),
    )
    await announcer.end()
    await population.stop()
    return {"nodes": nodes, "merged_after_s": round(merged - met, 1)}


async def all_find(population: Population, members: list[Member], model: str, sample: int) -> bool:
    """Whether a sample of the members finds a model."""
    chosen = population.rng.sample(members, min(sample, len(members)))
    return all(await asyncio.gather(*(member.dht.lookup(model, 1) for member in chosen)))


async def until(world: World, patience: float, *conditions: Callable[[], Awaitable[bool]]) -> float:
    """The virtual time at which all conditions hold. Raises TimeoutError after `patience` seconds."""
    async with asyncio.timeout(patience):
        for condition in conditions:
            while not await condition():  # noqa: ASYNC110  # virtual time, and no event to wait for
                await asyncio.sleep(1.0)
    return world.loop.time()


async def bootstrap_lost(world: World, nodes: int, *, patience: float = 60.0) -> dict[str, Any]:
    """All bootstrap nodes die and come back with nothing but their addresses and keys."""
    population = Population(world)
    seeds = await population.grow(3, seeds=2)
    addresses = [member.address for member in seeds]
    for _ in range(nodes - 3):
        member = population.new_member()
        await member.start(addresses)
        population.members.append(member)
    await asyncio.sleep(60)
    for member in seeds:
        await population.kill(member)
    await asyncio.sleep(30)
    lookups = Lookups()
    worker = population.members[0]
    await worker.announce("kept")
    await timed_lookup(world, population.members[-1], "kept", lookups)
    assert lookups.found, "the mesh does not depend on its bootstrap nodes"
    back = []
    for address in addresses:
        member = Member(world, OPEN, random.Random(population.rng.random()), host=address[0])
        await member.start()
        back.append(member)
        population.members.append(member)
    began = world.loop.time()
    healed = await until(world, patience, lambda: all_find(population, back, "kept", 3))
    newcomer = population.new_member()
    await newcomer.start(addresses)
    population.members.append(newcomer)
    await until(world, patience, lambda: all_find(population, [newcomer], "kept", 1))
    await population.stop()
    return {"nodes": nodes, "healed_after_s": round(healed - began, 1)}


async def partition(world: World, nodes: int, *, minutes: float = 10.0) -> dict[str, Any]:
    """The network is cut in two for longer than a record's life, then heals."""
    population = Population(world)
    await population.grow(1)
    await population.grow(nodes - 1)
    await asyncio.sleep(60)
    sides = {member.address[0]: number % 2 for number, member in enumerate(population.members)}
    left = [m for m in population.members if sides[m.address[0]] == 0]
    right = [m for m in population.members if sides[m.address[0]] == 1]
    announcer = Announcer(population)
    announcer.begin(left[0], "left")
    announcer.begin(right[0], "right")
    world.reaches = lambda a, b: sides[a] == sides[b]
    await asyncio.sleep(60 * minutes)
    assert await all_find(population, left, "left", 5)
    assert not await left[1].dht.lookup("right")
    world.reaches = None
    began = world.loop.time()
    healed = await until(
        world,
        120,
        lambda: all_find(population, left, "right", 10),
        lambda: all_find(population, right, "left", 10),
    )
    await announcer.end()
    await population.stop()
    return {"nodes": nodes, "healed_after_s": round(healed - began, 1)}
