"""Announce and lookup times over real UDP on the loopback: ``python benchmarks/dht.py [NODES]``.

All nodes share one process, so every figure holds the work of both sides. Prints one JSON object a line.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from statistics import median
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))

from mesh.dht import Dht
from mesh.identity import Identity
from mesh.network import Network
from mesh.records import WorkerRecord

T = TypeVar("T")

NETWORK = Network("benchmark")
ROUNDS = 100


def make_record(identity: Identity, model: str) -> WorkerRecord:
    """A worker's record, as of now."""
    now = time.time()
    return WorkerRecord(
        node_id=identity.id,
        seq=int(now * 1000),
        expires=int(now + 180),
        addresses=("127.0.0.1:9470",),
        model=model,
        digest=bytes(16),
        health=90,
        slots=4,
        context=4096,
        generation_speed=30.0,
        prompt_speed=300.0,
        flags=frozenset(),
        software="qmesh benchmark",
    )


def report(what: str, times: list[float], **more: object) -> None:
    """Print the percentiles of some times, given in seconds."""
    ordered = sorted(times)
    figures = {
        "p50_ms": round(1000 * median(ordered), 1),
        "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 1),
    }
    print(json.dumps({"what": what, **figures, **more}), flush=True)


async def timed(times: list[float], work: Awaitable[T]) -> T:
    """Await some work, note how long it took, and let the loop breathe."""
    began = time.perf_counter()
    result = await work
    times.append(time.perf_counter() - began)
    await asyncio.sleep(0.005)
    return result


async def run(count: int) -> None:
    """Measure a mesh of `count` nodes."""
    rng = random.Random(1)
    nodes = [(Dht(identity, NETWORK), identity) for identity in (Identity() for _ in range(count))]
    for dht, _ in nodes:
        await dht.start("127.0.0.1", 0)
        dht.join([nodes[0][0].address])
    began = time.perf_counter()
    while any(len(dht.peers) < min(30, count - 1) for dht, _ in nodes):  # noqa: ASYNC110  # tables have no event
        await asyncio.sleep(0.05)
    report("all nodes have met", [time.perf_counter() - began], nodes=count)
    await asyncio.sleep(3)

    announces: list[float] = []
    replicas = [
        await timed(announces, nodes[i % count][0].announce(make_record(nodes[i % count][1], f"m{i}")))
        for i in range(ROUNDS)
    ]
    report("first announce of a model", announces, replicas_p50=median(replicas))
    announces.clear()
    replicas = [
        await timed(announces, nodes[i % count][0].announce(make_record(nodes[i % count][1], f"m{i}")))
        for i in range(ROUNDS)
    ]
    report("announce", announces, replicas_p50=median(replicas))

    lookups: list[float] = []
    for i in range(ROUNDS):
        found = await timed(lookups, rng.choice(nodes)[0].lookup(f"m{i}", 1000))
        assert len(found) == 1
    report("full lookup", lookups)
    for dht, identity in nodes[:20]:
        await dht.announce(make_record(identity, "popular"))
    lookups.clear()
    for _ in range(ROUNDS):
        await timed(lookups, rng.choice(nodes[20:] or nodes)[0].lookup("popular", 8))
    report("lookup of 8 out of 20 workers", lookups)

    began = time.perf_counter()
    await nodes[0][0].announce(make_record(nodes[0][1], "new"))
    seen = await asyncio.gather(*(dht.lookup("new") for dht, _ in nodes))
    assert all(seen)
    report("a new worker is seen by all", [time.perf_counter() - began], nodes=count)

    dead, alive = nodes[: count * 3 // 10], nodes[count * 3 // 10 :]
    for dht, _ in dead:
        await dht.stop()
    first: list[float] = []
    later: list[float] = []
    for dht, _ in alive:
        model = f"m{rng.randrange(len(dead), count)}"
        assert await timed(first, dht.lookup(model, 1000))
    for dht, _ in alive * 2:
        model = f"m{rng.randrange(len(dead), count)}"
        assert await timed(later, dht.lookup(model, 1000))
    report("full lookup, 30 % dead, first of each node", first)
    report("full lookup, 30 % dead, later", later)
    for dht, _ in alive:
        await dht.stop()


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
